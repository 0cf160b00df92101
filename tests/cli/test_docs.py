"""The README, the guide and the configs say what is true; test_docs_run.py runs their code."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import yaml
from common import each
from cyclopts import CycloptsError
from documents import KINDS, PAGES, REASONS, Block, arguments, blocks, why_not_run, words, wrong_program

from imagic_lora.cli.app import app
from imagic_lora.core.settings.recipes import recipe_of
from imagic_lora.core.settings.resolve import resolve
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


BLOCKS = [block for page in PAGES for block in blocks(page)]


@each("block", BLOCKS)
def test_a_block_of_code_says_what_it_is(block: Block) -> None:
    """Its kind is known, so that something checks it: Python compiles and is run by test_docs_run.py, and shown text holds no command."""
    assert block.kind in KINDS, f"{block}: {block.kind or 'no kind'}"
    if block.kind == "python":
        compile(block.code, str(block), "exec")
    elif block.kind == "yaml":
        assert isinstance(yaml.safe_load(block.code), dict)
    elif block.kind in ("text", "csv"):
        assert not [line for line in block.code.splitlines() if line.split()[:1] in (["imagic-lora"], ["$"], ["make"], ["python"])], block
    else:
        assert block.commands, block


@each("block, command", [(block, command) for block in BLOCKS for command in block.commands])
def test_a_command_of_the_documents_is_one(block: Block, command: str) -> None:
    """The command line reads every word of it; other programs are known, and so are targets of make and extras of pip."""
    tokens = arguments(command)
    if tokens is None:
        assert wrong_program(command) is None, f"{block}: {command}"
        return
    app.parse_args(tokens, exit_on_error=False, print_error=False)
    assert [name for name in words(command) if name.startswith("configs/") and not (ROOT / name).is_file()] == []
    assert why_not_run(tokens) in (None, *REASONS)


def test_every_reason_for_not_running_a_command_has_one() -> None:
    """Otherwise it is out of date. Most kinds of commands are run."""
    commands = [tokens for block in BLOCKS for command in block.commands if (tokens := arguments(command))]
    assert {why_not_run(tokens) for tokens in commands} == {None, *REASONS}
    run = {tokens[0] for tokens in commands if why_not_run(tokens) is None}
    assert run >= {"edit", "sweep", "export", "plan", "list", "fit", "methods", "reproduce"}


@each("command", ["imagic-lora edit rex --etas 0.5", "imagic-lora fit", "imagic-lora export rex --format pickle", "imagic-lora jump"])
def test_a_wrong_command_would_be_found(command: str) -> None:
    """A flag, an argument, a choice, a command."""
    with pytest.raises(CycloptsError):
        app.parse_args(arguments(command), exit_on_error=False, print_error=False)


def test_a_wrong_program_would_be_found() -> None:
    """A target that the Makefile lacks, an extra that the package lacks, a program that is not known."""
    wrong = ["make dmeo", "pip install 'imagic-lora[wbe]'", "curl example.org"]
    assert [wrong_program(command) is None for command in [*wrong, "make demo", "hf download x"]] == [False, False, False, True, True]
