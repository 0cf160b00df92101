"""``edit --twin``: the distilled twin of a base samples with the adapter of the base."""

from __future__ import annotations

import json
from pathlib import Path
from re import search
from typing import Any

import pytest
from common import Run, array
from PIL import Image
from tiny import save_tiny_klein

import imagic_lora.cli.app as cli
from imagic_lora.photos.reading import read_metadata

FIT = ("--resolution", "32", "--embed.steps", "2", "--tune.steps", "2", "--edit.steps", "2", "--rank", "2", "--preset", "cpu")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, its twin, a list that names both, and a store with the adapter rex of the base and other of a base without a twin."""
    root = tmp_path_factory.mktemp("twins")
    places = {"base": save_tiny_klein(root / "base"), "twin": save_tiny_klein(root / "twin", seed=1, distilled=True)}
    listed = {"slow": {"source": str(places["base"]), "twin": "fast", "licence": "for tests"}, "fast": {"source": str(places["twin"])}}
    places |= {"list": root / "bases.yaml", "store": root / "store"}
    places["list"].write_text(json.dumps(listed))
    Image.radial_gradient("L").resize((40, 32)).convert("RGB").save(root / "dog.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IMAGIC_LORA_BASES", str(places["list"]))
        fit = ("fit", str(root / "dog.png"), "a dog", *FIT, "--store", str(places["store"]))
        assert cli.main([*fit, "--base", "slow", "--name", "rex"]) == 0
    return places


@pytest.fixture(autouse=True)
def listed(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGIC_LORA_BASES", str(places["list"]))


def edited(run: Run, places: dict[str, Path], *flags: Any) -> tuple[Image.Image, dict[str, Any]]:
    """The image of an edit and its metadata."""
    code, out, err = run("edit", "rex", "--eta", 0.6, "--store", places["store"], "--overwrite", "--preset", "cpu", "--json", *flags)
    assert code == 0, err
    file = Path(json.loads(out)["pictures"][0]["file"])
    with Image.open(file) as image:
        return image.convert("RGB"), read_metadata(file)


def test_the_twin_samples_with_its_own_steps(run: Run, places: dict[str, Path]) -> None:
    """Four of them, without guidance; the metadata say so, and the image can be made again."""
    slow, metadata = edited(run, places)
    assert (metadata["base"], metadata["edit"]["steps"], "forced" in metadata) == ("slow", 2, False)
    fast, metadata = edited(run, places, "--twin")
    sampled = metadata["edit"]
    assert (metadata["base"], metadata["forced"], sampled["steps"], sampled["guidance_scale"]) == ("fast", "slow", 4, 0)
    assert (array(slow) != array(fast)).any()
    file = next(Path("outputs/rex").glob("eta*.png"))
    code, _, err = run("reproduce", file, "--store", places["store"], "--preset", "cpu", "--out", "again")
    assert code == 0, err
    (again,) = Path("again").glob("*.png")
    with Image.open(again) as image:
        assert (array(image.convert("RGB")) == array(fast)).all()
    assert edited(run, places, "--twin", "--steps", 3)[1]["edit"]["steps"] == 3


def test_the_page_of_an_adapter_names_the_licence_of_its_base(run: Run, places: dict[str, Path]) -> None:
    """And so does the list of bases."""
    assert '    "for tests"' in (places["store"] / "rex/README.md").read_text()
    code, out, _ = run("bases", "--json")
    assert (code, json.loads(out)["bases"]["klein-base-9b"]["licence"]) == (0, "FLUX Non-Commercial License v2.1")


@pytest.mark.parametrize(
    ("flags", "message"),
    [(("--base", "fast"), "--twin together with --base"), (("--guidance-scale", 4), "guidance scale 4 on fast.*without guidance")],
)
def test_what_a_twin_cannot_do_is_refused(run: Run, places: dict[str, Path], flags: tuple[Any, ...], message: str) -> None:
    """Nothing is written."""
    code, _, err = run("edit", "rex", "--twin", "--store", places["store"], "--preset", "cpu", *flags)
    assert code == 2
    assert search(message, err), err
    assert not list(Path().rglob("*.png"))


def test_a_base_without_a_twin_has_none(run: Run, places: dict[str, Path]) -> None:
    """The message names those that have one; and a distilled base is not fitted."""
    places["list"].write_text(json.dumps({"slow": {"source": str(places["base"])}}))
    code, _, err = run("edit", "rex", "--twin", "--store", places["store"], "--preset", "cpu")
    assert code == 2
    assert "no twin of its base slow is known expected: an adapter of one of klein-base-4b, klein-base-9b" in err
    for command in (("fit", "dog.png", "a dog"), ("plan",)):
        code, _, err = run(*command, "--base", places["twin"], "--preset", "cpu")
        assert code == 2
        assert "distilled to 4 steps" in err
