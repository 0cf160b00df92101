"""An image made again, adapters renamed and imported, several prompts from a file."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from common import Run, array, each
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file
from tiny import save_tiny

import imagic_lora.cli.app as cli
import imagic_lora.cli.console as console
import imagic_lora.cli.editing as editing
from imagic_lora.adapters.manifest import manifest_bytes, read_manifest
from imagic_lora.adapters.record import Record
from imagic_lora.adapters.store import Store
from imagic_lora.cli.options import prompt_folders
from imagic_lora.core.config import EditConfig
from imagic_lora.photos.png import write_png
from imagic_lora.photos.reading import read_metadata
from imagic_lora.sampling.metadata import ImageMetadata, a1111_parameters
from imagic_lora.sampling.outputs import image_name

FIT = ("--embed.steps", "2", "--tune.steps", "2", "--edit.steps", "2", "--rank", "2", "--convergence-every", "0")
EDIT = ("--steps", 2, "--eta", "0.2:0.8:0.2", "--seed", "0:2", "--batch-size", 3)


@pytest.fixture(autouse=True)
def wide(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages hold whole paths in one line."""
    monkeypatch.setattr(console.err, "width", 400)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("cli") / "base")


@pytest.fixture(scope="module")
def fitted_store(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A store with the adapter rex."""
    folder, photo = tmp_path_factory.mktemp("store"), tmp_path_factory.mktemp("photo") / "dog.png"
    Image.radial_gradient("L").resize((40, 32)).convert("RGB").save(photo)
    assert cli.main(["fit", str(photo), "a dog", "--base", str(base), *FIT, "--store", str(folder), "--name", "rex"]) == 0
    return folder


@pytest.fixture
def store(fitted_store: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(fitted_store, tmp_path / "store")


def altered(path: Path, to: Path, **changes: Any) -> Path:
    """A copy of an image whose metadata have other values; None removes one."""
    image = Image.open(path)
    values = {name: value for name, value in (json.loads(image.text["imagic-lora"]) | changes).items() if value is not None}
    write_png(image, to, values)
    return to


def test_an_image_is_made_again(run: Run, store: Path, tmp_path: Path) -> None:
    """Pixel by pixel, whatever its place in its batch, its prompt and its start; by an adapter that was renamed since, too."""
    other = ("--prompt", "a cat", "--start", "inverted", "--ddim-eta", 1, "--negative-prompt", "a dog", "--out", "other")
    assert run("edit", "rex", "--store", store, *EDIT)[0] == run("edit", "rex", "--store", store, *EDIT, *other)[0] == 0
    image = Path("outputs/rex/eta0.6-seed1.png")
    assert len(read_metadata(image)["batch"]) == 3
    assert run("rename", "rex", "max", "--store", store)[0] == 0
    for path in (image, Path("outputs/rex/eta0.8-seed1.png"), Path("other/eta0.4-seed0.png")):
        code, out, err = run("reproduce", path, "--store", store, "--overwrite", "--json")
        assert (code, json.loads(out)["identical"], "Identical" in err) == (0, True, True), err
        made = Path("outputs/reproduced") / path.name
        assert np.array_equal(array(Image.open(made)), array(Image.open(path)))
        assert read_metadata(made)["pixels_sha256"] == read_metadata(path)["pixels_sha256"]
    code, _, err = run("reproduce", image, "--store", store, "--out", image.parent)
    assert (code, "is the folder of the image itself" in err) == (2, True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*shows no change")
def test_an_image_that_was_pasted_is_made_again(run: Run, store: Path, tmp_path: Path) -> None:
    """With the image at eta 0 that it was compared with, from another batch or its own; with its mask, and with no other."""
    keep = ("--out", "auto", "--keep", "auto", "--save-mask", "--guidance-scale", 30, "--prompt", "a cat")
    assert run("edit", "rex", "--store", store, *EDIT[:2], "--eta", "0.2,2", *EDIT[4:], *keep)[0] == 0
    assert Image.open("auto/eta2-seed1.mask.png").getbbox()
    for name, own in (("eta2-seed1", False), ("eta0.2-seed0", True)):
        values = read_metadata(Path(f"auto/{name}.png"))
        assert (values["batch"] == values["reference_batch"]) == own
        code, out, err = run("reproduce", f"auto/{name}.png", "--store", store, "--json")
        assert (code, json.loads(out)["identical"]) == (0, True), err
        again = read_metadata(Path(f"outputs/reproduced/{name}.png"))
        assert (again["pixels_sha256"], again["keep"]) == (values["pixels_sha256"], "auto")
    assert "pixels_sha256 is missing" in run("reproduce", "auto/eta2-seed1.mask.png", "--store", store)[2]
    lie = altered(Path("auto/eta2-seed1.png"), tmp_path / "lie.png", reference_batch=None)
    code, _, err = run("reproduce", lie, "--store", store)
    assert (code, "contradict each other" in err) == (2, True)

    mask = Image.new("L", (40, 32))
    mask.save("black.png")
    mask.paste(255, (0, 0, 25, 32))
    mask.save("mask.png")
    assert run("edit", "rex", "--store", store, *EDIT, "--out", "masked", "--keep", "mask.png")[0] == 0
    mask.paste(255, (0, 0, 30, 32))
    mask.save("other.png")
    image = Path("masked/eta0.6-seed1.png")
    wrong: dict[tuple[object, ...], str] = {
        (image,): "no mask is given",
        (image, "--keep", "other.png"): "other.png is not the mask",
        (image, "--keep", "black.png"): "black.png is black everywhere",
        ("auto/eta2-seed1.png", "--keep", "mask.png"): "made without a mask",
    }
    for tokens, expected in wrong.items():
        code, _, err = run("reproduce", *tokens, "--store", store)
        assert (code, expected in err) == (2, True), err
    assert not Path("outputs/reproduced/eta0.6-seed1.png").exists()
    code, out, err = run("reproduce", image, "--keep", "mask.png", "--store", store, "--json")
    assert (code, json.loads(out)["identical"]) == (0, True), err


def test_what_has_changed_is_named(run: Run, store: Path, base: Path, tmp_path: Path) -> None:
    """Other pixels, settings that lie, and a base or an adapter with another hash."""
    assert run("edit", "rex", "--store", store, "--steps", 2, "--eta", "0.6")[0] == 0
    image = Path("outputs/rex/eta0.6-seed0.png")

    painted = altered(image, tmp_path / "painted.png")
    pixels, values = array(Image.open(image)).astype(np.uint8), read_metadata(image)
    pixels[0, 0] ^= 1
    write_png(Image.fromarray(pixels), painted, values)
    code, _, err = run("reproduce", painted, "--store", store)
    assert (code, "the pixels of" in err and "were changed after" in err) == (2, True)

    lie = altered(image, tmp_path / "lie.png", seed=1, batch=[[0.6, 1]], versions=values["versions"] | {"torch": "1.0"})
    code, _, err = run("reproduce", lie, "--store", store)
    assert (code, "of the pixels" in err, "versions.torch was '1.0'" in err) == (2, True, True)
    assert "of the pixels" in run("reproduce", lie, "--store", store, "--force", "--overwrite")[2]
    assert run("reproduce", lie, "--store", store, "--force", "--overwrite")[0] == 0

    other = altered(image, tmp_path / "other.png", base_fingerprint="0" * 64)
    code, _, err = run("reproduce", other, "--store", store)
    assert (code, "has other weights than" in err, "--base" in err) == (2, True, True)
    code, _, err = run("reproduce", altered(image, other, adapter_sha256="0" * 64), "--store", store)
    assert (code, "adapter rex has changed since it made the image" in err) == (2, True)
    assert run("reproduce", other, "--store", store, "--force")[0] == 0
    assert run("rm", "rex", "--store", store)[0] == 0
    code, _, err = run("reproduce", image, "--store", store)
    assert (code, "no adapter in" in err, "--store" in err) == (2, True, True)


def test_an_image_without_valid_metadata_is_an_error(run: Run, store: Path, tmp_path: Path) -> None:
    """With one message, exit code 2 and nothing written."""
    assert run("edit", "rex", "--store", store, "--steps", 2, "--eta", "0.6")[0] == 0
    image, wrong = Path("outputs/rex/eta0.6-seed0.png"), tmp_path / "wrong.png"
    Image.open(image).save("plain.png")
    Image.open(image).convert("RGB").save("photo.jpg")
    info = PngImagePlugin.PngInfo()
    info.add_text("imagic-lora", json.dumps({"version": 1, "prompt": "x" * 3_000_000}), zip=True)
    Image.open(image).save("huge.png", pnginfo=info)
    for name, expected in {"plain.png": "no imagic-lora metadata", "photo.jpg": "no imagic-lora metadata", "huge.png": "huge.png"}.items():
        code, _, err = run("reproduce", name, "--store", store)
        assert (code, expected in err) == (2, True), err
    lies: dict[str, Any] = {
        "version = 2": {"version": 2},
        "older version": {"version": None},
        "seed = 'x'": {"seed": "x"},
        "eta = 7": {"eta": 7},
        "prompt is missing": {"prompt": None},
        "edit.steps = -1": {"edit": {"steps": -1}},
        "edit.scheduler = 'magic'": {"edit": {"scheduler": "magic"}},
        "runtime.device = 'tpu'": {"runtime": read_metadata(image)["runtime"] | {"device": "tpu"}},
        "batch = []": {"batch": []},
        "contradict": {"batch": [[0.5, 0]]},
        "adapter = '../rex'": {"adapter": "../rex"},
        "hm": {"hm": 1},
        "empty prompt": {"prompt": ""},
    }
    for expected, changes in lies.items():
        code, _, err = run("reproduce", altered(image, wrong, **changes), "--store", store)
        assert (code, expected in err) == (2, True), (expected, err)
    assert not Path("outputs/reproduced/wrong.png").exists()


def test_an_image_without_metadata(run: Run, store: Path) -> None:
    """Has no text at all, nor has the sheet; and it is replaced only when asked."""
    edit = ("edit", "rex", "--store", store, "--steps", 2, "--eta", "0.6")
    assert run(*edit)[0] == 0
    image, sheet = Path("outputs/rex/eta0.6-seed0.png"), Path("outputs/rex/sheet.png")
    assert sorted(Image.open(image).text) == ["imagic-lora", "parameters"]
    assert run(*edit, "--no-metadata")[0] == 0
    assert Image.open(image).text == Image.open(sheet).text == {}
    assert run(*edit, "--no-metadata")[0] == 2
    assert run(*edit, "--no-metadata", "--overwrite")[0] == 0


PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
"""How A1111 finds the pairs of the last line."""


def metadata_of(**changes: Any) -> ImageMetadata:
    """Valid metadata."""
    runtime = {"device": "cpu", "dtype": "fp32", "attention": "sdpa", "vae_tiling": False, "vae_slicing": False, "threads": 1}
    values: dict[str, Any] = {"adapter": "rex", "adapter_sha256": "0" * 64, "base": "/x/sd, new: 1.5.safetensors", "base_fingerprint": "f"}
    values |= {"prompt": "a dog", "eta": 0.7, "seed": 3, "edit": EditConfig(), "scheduler": "PNDMScheduler", "batch": [(0.7, 3)]}
    return ImageMetadata(**(values | {"runtime": runtime, "versions": {"imagic-lora": "1"}, "pixels_sha256": "0" * 64} | changes))


@each(
    "changes, sampler, more",
    [
        ({}, "PLMS", {}),
        ({"scheduler": "DPMSolverMultistepScheduler", "edit": EditConfig(scheduler="dpm++2m-sde")}, "DPM++ 2M SDE", {}),
        ({"scheduler": "UniPCMultistepScheduler", "edit": EditConfig(karras_sigmas=True)}, "UniPC", {"Schedule type": "Karras"}),
        ({"scheduler": "Odd", "edit": EditConfig(start="image", strength=0.5)}, "Odd", {"Denoising strength": "0.5"}),
    ],
)
def test_the_text_is_that_of_a1111(changes: dict[str, Any], sampler: str, more: dict[str, str]) -> None:
    """As its own regular expression reads it; values with a comma or a colon are quoted."""
    lines = a1111_parameters(metadata_of(**changes), (64, 48)).split("\n")
    found = dict(PAIR.findall(lines[-1]))
    assert lines[:-1] == ["a dog"]
    assert json.loads(found.pop("Model")) == "sd, new: 1.5"
    assert found.pop("Steps") == "50"
    expected = {"CFG scale": "7.5", "Seed": "3", "Size": "64x48", "Sampler": sampler, "Imagic eta": "0.7", "Imagic adapter": "rex"}
    assert found == expected | {"Version": "imagic-lora 1"} | more


def test_a_negative_prompt_has_a_line_of_its_own() -> None:
    """Unless it had no part in the image."""
    edit = EditConfig(negative_prompt="a cat, blurred")
    assert a1111_parameters(metadata_of(edit=edit), (8, 8)).split("\n")[1] == "Negative prompt: a cat, blurred"
    off = edit.model_copy(update={"guidance_scale": 1.0})
    assert "Negative" not in a1111_parameters(metadata_of(edit=off), (8, 8))


def test_rename(run: Run, store: Path) -> None:
    """Only the name changes; a name that is taken, invalid or unfinished is refused."""
    before = Store(store).read("rex")
    assert run("rename", "rex", "max", "--store", store)[0] == 0
    after = Store(store).read("max")
    assert (after.record, after.content_sha256) == (before.record, before.content_sha256)
    assert json.loads(run("show", "max", "--store", store, "--json")[1])["name"] == "max"
    assert Store(store).names() == ["max"]
    shutil.copytree(store / "max", store / "rex")
    (store / ".new.checkpoints/embed-000001").mkdir(parents=True)
    for old, new, expected in (
        ("max", "rex", "exists"),
        ("max", "../x", "not a valid name"),
        ("no", "b", "no adapter"),
        ("max", "max", "has this name"),
    ):
        code, _, err = run("rename", old, new, "--store", store)
        assert (code, expected in err) == (2, True), err
    assert "unfinished" in run("rename", "max", "new", "--store", store)[2]
    assert sorted(Store(store).names()) == ["max", "rex"]


def test_import(run: Run, store: Path, tmp_path: Path) -> None:
    """A copy under another name makes the same images; whatever is wrong with a folder is refused, and nothing is stored."""
    there = shutil.copytree(store / "rex", tmp_path / "there/rex.v2")
    (there / "evil.py").write_text("raise SystemExit")
    assert run("import", there, "--store", "mine")[0] == 0
    assert sorted(path.name for path in Path("mine/rex.v2").iterdir()) == sorted(path.name for path in (store / "rex").iterdir())
    assert Store(Path("mine")).read("rex.v2").content_sha256 == Store(store).read("rex").content_sha256
    assert run("edit", "rex.v2", "--store", "mine", "--steps", 2, "--eta", "0.6")[0] == 0
    code, _, err = run("import", there, "--store", "mine")
    assert (code, "exists" in err) == (2, True)

    def broken(name: str, change: Callable[[Path], object]) -> str:
        folder = shutil.copytree(store / "rex", tmp_path / "broken" / name)
        change(folder)
        code, _, err = run("import", folder, "--store", "mine", "--name", "new")
        assert code == 2, name
        return err

    def linked(folder: Path) -> None:
        (folder / "source.png").rename(tmp_path / "elsewhere.png")
        (folder / "source.png").symlink_to(tmp_path / "elsewhere.png")

    def flipped(folder: Path) -> None:
        tensors = load_file(folder / "embeddings.safetensors")
        save_file({name: value + 1 for name, value in tensors.items()}, folder / "embeddings.safetensors")

    def record_of(folder: Path, **source: Any) -> None:
        record = read_manifest(folder, "adapter.json", Record)
        changed = record.model_copy(update={"source": record.source.model_copy(update=source)})
        (folder / "adapter.json").write_bytes(manifest_bytes(changed, record.files))

    assert (Path("mine/rex.v2") / "photo.png").is_file()
    assert "calls the photo preview.png" in broken("photo", lambda folder: record_of(folder, file="preview.png"))
    assert "is not the photo" in broken("sha256", lambda folder: record_of(folder, sha256="0" * 64))
    assert "is a link" in broken("link", linked)
    assert "is missing or has changed" in broken("changed", flipped)
    assert "not a valid manifest" in broken("record", lambda folder: (folder / "adapter.json").write_text("{}"))
    assert "not a valid manifest" in broken("empty", lambda folder: (folder / "adapter.json").unlink())
    assert Store(Path("mine")).names() == ["rex.v2"]


@pytest.mark.filterwarnings("ignore:.*shows no change")
def test_a_file_of_prompts(run: Run, store: Path) -> None:
    """A folder for each, so that no two share a file; the same as each prompt by itself."""
    Path("prompts.txt").write_text("a cat\n\na cat!\na dog\na cat\n")
    assert list(prompt_folders(Path("prompts.txt"), Path()).values()) == ["a cat", "a cat!", "a dog"]
    Path("odd.txt").write_bytes("a cat\r\na\u2028dog\x0cjumps\rno".encode())
    assert list(prompt_folders(Path("odd.txt"), Path()).values()) == ["a cat", "a\u2028dog\x0cjumps", "no"]
    edit = ("edit", "rex", "--store", store, "--steps", 2, "--eta", "0.6")
    code, out, _ = run(*edit, "--prompt-file", "prompts.txt", "--json")
    written = json.loads(out)
    files = [picture["file"] for picture in written["pictures"]]
    folders = ["outputs/rex/1-a-cat", "outputs/rex/2-a-cat", "outputs/rex/3-a-dog"]
    assert (code, files) == (0, [f"{folder}/eta0.6-seed0.png" for folder in folders])
    assert [picture["prompt"] for picture in written["pictures"]] == ["a cat", "a cat!", "a dog"]
    assert written["sheets"] == [f"{folder}/sheet.png" for folder in folders]
    assert run(*edit, "--prompt", "a cat", "--out", "alone")[0] == 0
    assert np.array_equal(array(Image.open("alone/eta0.6-seed0.png")), array(Image.open(files[0])))
    kept = ("--seed", "0:2", "--keep", "auto", "--save-mask", "--guidance-scale", 30)
    code, out, err = run(*edit, *kept, "--prompt-file", "prompts.txt", "--overwrite", "--json")
    assert code == 0, err
    assert [(one["prompt"], one["seed"]) for one in json.loads(out)["pictures"]] == [
        (prompt, seed) for prompt in ("a cat", "a cat!", "a dog") for seed in (0, 1)
    ]
    assert run(*edit, *kept, "--prompt", "a cat!", "--out", "alone", "--overwrite")[0] == 0
    for name in ("eta0.6-seed1.png", "eta0.6-seed1.mask.png"):
        assert np.array_equal(array(Image.open(f"alone/{name}")), array(Image.open(f"{folders[1]}/{name}")))
    for content, expected in {b"": "0 prompts", b"\xff\xfe\xfa": "not UTF-8", b"a\n" * 2**20: "larger than"}.items():
        Path("wrong.txt").write_bytes(content)
        code, _, err = run(*edit, "--prompt-file", "wrong.txt")
        assert (code, expected in err) == (2, True), err
    assert "leave out one" in run(*edit, "--prompt-file", "prompts.txt", "--prompt", "x")[2]
    assert run(*edit, "--prompt-file", "none.txt")[0] == 2


@pytest.mark.filterwarnings("ignore:.*shows no change")
def test_eta_is_searched_for_every_prompt_of_a_file(run: Run, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the prompt of each; the images are those of the etas that were found."""
    Path("prompts.txt").write_text("a cat\na dog\n")
    asked: list[str | None] = []

    def searched(_editor: object, _adapter: object, _seed: int, _config: object, prompt: str | None) -> dict[str, float]:
        asked.append(prompt)
        return {"eta": 0.2 * len(asked) + 0.1}

    monkeypatch.setattr(editing, "searched_eta", searched)
    code, out, err = run("edit", "rex", "--store", store, "--steps", 2, "--eta", "auto", "--prompt-file", "prompts.txt", "--json")
    assert code == 0, err
    written = json.loads(out)
    assert [prompt or Store(store).read("rex").record.prompt for prompt in asked] == ["a cat", "a dog"]
    assert [one["prompt"] for one in written["auto"]] == ["a cat", "a dog"]
    found = [one["eta"] for one in written["auto"]]
    assert [(one["eta"], one["prompt"]) for one in written["pictures"]] == list(zip(found, ("a cat", "a dog"), strict=True))
    assert [Path(one["file"]).name for one in written["pictures"]] == [image_name(eta, 0) for eta in found]
    assert all(Path(one["file"]).is_file() for one in written["pictures"])
