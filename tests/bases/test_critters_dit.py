"""``critters-dit``: a name whose weights may be missing, with the other parts of ``critters``; on a small copy with random weights."""

from __future__ import annotations

import json
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import Run, array, each
from critters_report import gains, samples
from PIL import Image

from imagic_lora.adapters.store import Store
from imagic_lora.bases.base import Base
from imagic_lora.bases.loading.configs import recipe_for
from imagic_lora.bases.loading.known import CRITTERS, CRITTERS_DIT, SHIPPED
from imagic_lora.bases.loading.registry import architecture_of, load_base
from imagic_lora.core.conditioning import Conditioning
from imagic_lora.core.device_config import MemoryConfig
from imagic_lora.core.errors import Stopped
from imagic_lora.core.runtime import resolve_runtime
from imagic_lora.core.settings.recipes import RECIPES
from imagic_lora.critters import longest_caption, render, scene_at
from imagic_lora.critters.judge import Judge
from imagic_lora.critters.scene import IDENTITY, displaced
from imagic_lora.photos.canvas import to_pixels
from imagic_lora.training.fit import fit as fit_of
from imagic_lora.training.fit import result

NAME = "critters-dit"
SHORT = ("--embed.steps", 2, "--tune.steps", 3, "--edit.steps", 2, "--convergence-every", "0")
SCENES = [scene_at("heldout", 30_000 + k) for k in range(3)]


def on_cpu(name: str) -> Base:
    return load_base(name, resolve_runtime(MemoryConfig(device="cpu")))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    render(SCENES[0]).save(path)
    return path


@each(
    "command",
    [
        ["fit", "photo.png", "a dog jumping", "--base", NAME],
        ["plan", "--base", NAME],
        ["bench", "critters", "--base", NAME],
        ["compare", "photo.png", "a dog jumping", "--base", NAME, "--methods", "sdedit"],
    ],
)
def test_missing_weights_are_named(run: Run, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    """By every command, before anything is written; the list says so too."""
    render(SCENES[0]).save("photo.png")
    gone = SHIPPED[NAME].model_copy(update={"source": str(tmp_path / "nowhere")})
    monkeypatch.setitem(SHIPPED, NAME, gone)
    code, _, err = run(*command)
    assert code == 2
    assert f"base critters-dit, whose weights this copy of imagic-lora lacks: no folder {gone.source}" in err.replace("\n", " ")
    assert "make critters-dit" in err
    _, out, _ = run("bases")
    assert "not in" in out


def test_its_other_parts_are_those_of_critters(tiny_dit: Path) -> None:
    """Prompts and pictures are encoded to the bit as by critters; its fingerprint is its own, by name and by folder."""
    base, other = on_cpu(NAME), on_cpu("critters")
    assert torch.equal(base.encode_prompt("a dog jumping").tokens, other.encode_prompt("a dog jumping").tokens)
    picture = to_pixels(render(SCENES[0]))
    assert torch.equal(base.encode_image(picture), other.encode_image(picture))
    assert on_cpu(str(tiny_dit)).fingerprint == base.fingerprint
    assert base.fingerprint != other.fingerprint
    assert (base.resolution, base.prediction_type) == (64, "flow")
    assert recipe_for(architecture_of(NAME), NAME) == RECIPES[NAME]


def test_the_wheel_has_its_files() -> None:
    """All that the training writes: the patterns of the package's data match them."""
    patterns = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "imagic_lora"
    ]
    root = CRITTERS.parents[1]
    for name in ("model_index.json", "scheduler/scheduler_config.json", "transformer/diffusion_pytorch_model.safetensors"):
        file = str((CRITTERS_DIT / name).relative_to(root))
        assert any(fnmatch(file, pattern) or fnmatch(file, pattern.replace("**/*", "*")) for pattern in patterns), file


@each("mode", ["lora", "full"])
def test_from_the_fit_to_the_export(tiny_dit: Path, photo: Path, run: Run, mode: str) -> None:
    """A fit by the recipe that was stopped and resumed has the weights of one that was not; its edits depend on eta; it is exported."""
    names = f"{mode}-whole", f"{mode}-halves"
    fit = ("fit", photo, "a dog jumping", "--base", NAME, "--mode", mode, *SHORT, "--preset", "cpu", "--name")
    assert run(*fit, names[0])[0] == 0
    whole = Store(Path("adapters")).read(names[0])
    assert (whole.record.base.name, whole.record.config.embed.space) == (NAME, RECIPES[NAME]["lora"]["embed"]["space"])
    counted = iter(range(9))
    with pytest.raises(Stopped):
        result(fit_of(photo, "a dog jumping", whole.record.config, Store(Path("adapters")), names[1], stop=lambda: next(counted) == 3))
    code, _, err = run(*fit, names[1], "--resume")
    assert (code, "tune 1/3" in err, "tune 2/3" in err) == (0, False, True), err
    for name in ("embeddings.safetensors", *(file for part in whole.record.parts for file in part.files)):
        assert (whole.folder / name).read_bytes() == (Path("adapters") / names[1] / name).read_bytes(), name
    code, out, err = run("edit", names[0], "--eta", "0.4,1", "--json")
    assert code == 0, err
    first, second = (array(Image.open(one["file"])) for one in json.loads(out)["pictures"])
    assert np.abs(first - second).max() > 1
    assert run("export", names[0], "--format", "diffusers", "--out", mode)[0] == 0
    assert {path.suffix for path in Path(mode).rglob("*") if path.is_file()} >= {".safetensors", ".md"}


@pytest.mark.slow
def test_a_sweep_and_a_plan(tiny_dit: Path, photo: Path, run: Run) -> None:
    """Scores of each image on the base without its adapter; a rehearsal of the fit."""
    assert run("fit", photo, "a dog jumping", "--base", NAME, *SHORT, "--preset", "cpu", "--name", "rex")[0] == 0
    code, out, err = run("sweep", "rex", "--eta", "0.5,1", "--json")
    assert (code, json.loads(out)["suggested"] in (0.5, 1)) == (0, True), err
    code, out, err = run("plan", "--base", NAME, "--json")
    assert (code, set(json.loads(out)["stages"])) == (0, {"encode", "embed", "tune", "sample", "decode"}), err


# scripts/critters_report.py


def test_samples_of_a_flow_are_images(tiny_dit: Path) -> None:
    """By diffusers alone, one for each caption, with guidance."""
    images = samples(tiny_dit, CRITTERS, SCENES, 3.0)
    assert [image.size for image in images] == [(64, 64)] * 3
    assert (array(images[0]) != array(images[1])).any()
    assert Judge.load().read_scenes(torch.cat([to_pixels(image) for image in images]))


def test_a_flow_that_knows_the_words_responds_in_full(tiny_dit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A velocity towards the picture of the caption has a gain of 1 at every level; one that ignores the words has none."""
    base, scenes = on_cpu(NAME), SCENES[:1]
    known: dict[str, Any] = {}
    encode = base.encode_prompt

    def remembered(text: str) -> Conditioning:
        one = encode(text)
        known[text] = one
        return one

    pictures = {
        longest_caption(scene): base.encode_image(to_pixels(render(scene)))
        for scene in (*scenes, *(displaced(one, name) for one in scenes for name in ("facing", *IDENTITY)))
    }

    def predict(x_t: torch.Tensor, sigmas: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        own = [next(text for text, one in known.items() if torch.equal(one.tokens[0], tokens)) for tokens in conditioning.tokens]
        return (x_t - torch.cat([pictures[text] for text in own])) / sigmas.view(-1, 1, 1, 1)

    monkeypatch.setattr(base, "encode_prompt", remembered)
    monkeypatch.setattr(base, "predict", predict)
    found = gains(base, scenes, (900, 400))
    for name in ("tint", "facing"):
        assert found[name] == pytest.approx([1, 1], abs=1e-3)
    monkeypatch.setattr(base, "predict", lambda x_t, *_: x_t)
    assert gains(base, scenes, (900,))["tint"] == [0]
