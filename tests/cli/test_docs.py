"""The README and the configs say what is true."""

from __future__ import annotations

import ast
from pathlib import Path

from common import each

from imagic_lora.core.settings import recipe_of, resolve
from imagic_lora.core.yaml_files import read_yaml

ROOT = Path(__file__).parents[2]


CONFIGS = sorted([*(ROOT / "configs").glob("*.yaml"), *(ROOT / "imagic_lora" / "bench").glob("*.yaml")])
ROOMS = sorted(path for path in (ROOT / "imagic_lora").iterdir() if (path / "__init__.py").is_file())


@each("room", ROOMS)
def test_the_map_names_every_room_and_a_room_its_files(room: Path) -> None:
    """One line each: a newcomer finds any file in two hops."""
    lines = (ROOT / "README.md").read_text().split("## Map")[1].splitlines()
    assert sum(line.split()[:1] == [f"{room.name}/"] for line in lines) == 1
    for folder in [room, *(path.parent for path in room.glob("*/__init__.py"))]:
        about = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
        assert [file.name for file in folder.glob("*.py") if file.name != "__init__.py" and f"``{file.name}``" not in about] == []


@each("path", [*sorted((ROOT / "configs").glob("*.yaml")), *sorted((ROOT / "imagic_lora" / "bench").glob("*.yaml"))])
def test_a_config_is_valid_and_headed_by_its_command(path: Path) -> None:
    """Every setting is known, the file names the command that uses it, and its own name is its base, the card and its mode."""
    settings = read_yaml(path)
    config = resolve({}, settings, recipe_of(settings["base"]))
    assert config.base in ("sd15", "sd21", "sdxl", "sd35-medium", "klein-base-4b", "klein-base-9b", "critters")
    assert f"--config {path.relative_to(ROOT)}" in path.read_text()
    if not path.stem.startswith("reference-"):
        card = path.stem.removeprefix(f"{config.base}-").removesuffix(f"{config.tune.mode}").strip("-")
        assert path.stem == "-".join(part for part in (config.base, card, config.tune.mode) if part)
        # a card can take the preset of a smaller one
        assert card in ("", "8gb", "12gb", "16gb", "24gb")
        assert config.preset == "auto" if not card else int(config.preset[:-2]) <= int(card[:-2])


@each("name", ["docs/demo.png", "docs/critters-samples.png", "docs/critterbench.png", "docs/internals/embedded-base.md", "docs/log.md"])
def test_what_the_documents_show_is_there(name: str) -> None:
    """Pictures and pages that the documents link."""
    assert (ROOT / name).stat().st_size > 0
