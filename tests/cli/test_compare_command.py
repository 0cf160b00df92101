"""The command ``compare``: what it refuses before anything is computed, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import Run, each, read_comparison
from models import save_captioner, save_clip, save_dino
from PIL import Image
from tiny import save_inpainting
from transformers import BlipForConditionalGeneration, BlipProcessor

import imagic_lora.cli.comparing.models as models
from imagic_lora.bases.families.sd import StableDiffusion
from imagic_lora.methods.comparison.captions import captioned

P2P_EDIT_FRIENDLY = ("--set", "inversion=edit-friendly", "--set", "steps=4")


def flags(folder: Path) -> list[str]:
    return ["--base", str(folder), "--device", "cpu"]


def pixels(file: str) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image)


def computes(*_: object, **__: object) -> None:
    """Stands in for everything that a model computes."""
    raise AssertionError("something is computed")


@each(
    "extra, words",
    [
        (["--methods", "null-text"], "null-text without a source prompt"),
        (["--methods", "blended-latent"], "blended-latent without a mask"),
        (["--methods", "sdedit", "--mask", "small.png"], "has 3x3 pixels"),
        (["--methods", "all", "--mask", "point.png"], "a mask whose area is smaller than"),
        (["--methods", "blended-latent", "--mask", "dark.png"], "a mask whose lightest value is 127"),
        (["--methods", "nonsense"], "nonsense"),
        (["--methods", "sdedit", "--set", "strenght=1"], "strenght"),
        (["--methods", "sdedit", "--set", "strength=3"], "strength = 3"),
        (["--methods", "sdedit", "--set", "strength"], "--set strength"),
        (["--methods", "fast", "--set", "steps=3"], "--set with --methods fast"),
        (["--methods", "imagic-lora", "--set", "memory.dtype=fp16"], "--set memory"),
        (["--methods", "direct-inversion", "--source", "a cat", "--set", "factors={hat: 2}"], "the word 'hat', which is not in the prompt"),
        (["--methods", "direct-inversion", "--source", "a cat", "--set", "edit=replace"], "2 words in 'a cat' and 3 in"),
        (["--methods", "edit-friendly", "--set", "steps=4"], "skip 36 with 4 steps"),
        (
            ["--methods", "prompt-to-prompt", "--source", "a cat", "--set", "inversion=edit-friendly", "--set", "steps=4"],
            "skip 36 with 4 steps",
        ),
        (["--methods", "dreambooth"], "dreambooth without a subject"),
        (["--methods", "textual-inversion,sdedit"], "textual-inversion without a subject"),
        (["--methods", "fast", "--subject", "cat"], "--subject cat without such a method"),
        (["--methods", "dreambooth", "--subject", " "], "--subject ' '"),
        (["--methods", "textual-inversion", "--subject", "<cat>"], "--subject '<cat>'"),
        (["--methods", "textual-inversion", "--subject", "pipe organ"], "--initial-word pipe organ, which has"),
        (["--methods", "dreambooth", "--subject", "cat", "--set", "tune.mode=full"], "--set tune.mode of method dreambooth"),
        (["--methods", "dreambooth", "--subject", "cat", "--set", "dreambooth.class_prompt=a dog"], "--set dreambooth.class_prompt of"),
        (["--methods", "dreambooth", "--subject", "cat", "--set", "embed.steps=3"], "--set embed.steps of method dreambooth"),
        (["--methods", "textual-inversion", "--subject", "cat", "--set", "inversion.word=<x>"], "--set inversion.word of"),
        (["--methods", "imagic-lora", "--set", "inversion.vectors=3"], "--set vectors of method imagic-lora"),
        (["--methods", "embedding-only", "--set", "tune.rank=3"], "--set of method embedding-only: --rank together with --mode embedding"),
        (["--methods", "imagic-lora", "--set", "edit.strength=0.5"], "--strength together with --start"),
        (["--methods", "magicmix", "--set", "steps=1"], "strength 0.6 with 1 steps"),
        (["--methods", "diffedit", "--set", "mask_strength=0.01"], "strength 0.01 with 50 steps"),
        (["--source", " "], "an empty prompt"),
        (["--methods", "sdedit,direct-inversion", "--source", "a cat", "--budget", "nan"], "--budget nan"),
        (["--budget", "0"], "--budget 0"),
        (["--captioner", "x"], "--captioner without --source auto"),
        (["--offline"], "--offline without"),
        (["--source", "auto", "--captioner", "no-such-folder", "--offline"], "captioner no-such-folder cannot be loaded"),
        (["--out", "taken"], "is no comparison"),
    ],
)
def test_bad_input_is_refused_before_anything_is_computed(
    run: Run, folder: Path, photo_file: Path, monkeypatch, extra: list[str], words: str
) -> None:
    """Exit code 2, one message, and no method has encoded the photo."""

    for work in ("encode_prompt", "encode_image", "predict", "decode"):
        monkeypatch.setattr(StableDiffusion, work, computes)
    Image.new("L", (3, 3), 255).save("small.png")
    with Image.open(photo_file) as photo:
        point, dark = Image.new("L", photo.size), Image.new("L", photo.size, 127)
    point.putpixel((3, 3), 255)
    point.save("point.png")
    dark.save("dark.png")
    Path("taken").mkdir(exist_ok=True)
    Path("taken/file").write_text("mine")
    code, _, err = run("compare", photo_file, "a red dog", *flags(folder), *extra)
    assert code == 2, err
    assert words in err
    assert not Path("outputs/compare").is_dir() or not any(Path("outputs/compare").iterdir())


def test_the_refusals_would_notice_a_computation(run: Run, folder: Path, photo_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in for a computation is reached by a comparison that may run."""
    monkeypatch.setattr(StableDiffusion, "encode_prompt", computes)
    with pytest.raises(AssertionError, match="something is computed"):
        run("compare", photo_file, "a red dog", *flags(folder), "--methods", "sdedit")


def test_a_comparison_writes_a_sheet_a_page_and_results(run: Run, folder: Path, photo_file: Path) -> None:
    """Two methods run, one that needs a mask is left out with the reason by a group; an earlier comparison is not replaced unasked."""
    command = ["compare", photo_file, "a red dog", *flags(folder), "--methods", "sdedit", "--set", "steps=4", "--out", "made", "--json"]
    code, out, err = run(*command)
    assert code == 0, err
    found = json.loads(out)
    (method,) = found["methods"]
    assert method["name"] == "sdedit"
    assert method["cost"]["forward"] == method["predicted"]["passes"]["forward"] == 6
    assert set(method["scores"]) == {"alignment", "fidelity", "ssim"}
    with Image.open(photo_file) as photo, Image.open("made/sdedit.png") as image:
        assert image.size == photo.size
    page = Path("made/index.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "http" not in page
    assert page.count("<img") == page.count(" alt=")
    assert json.loads(Path("made/results.json").read_text(encoding="utf-8"))["methods"] == found["methods"]
    assert pixels("made/sheet.png").size
    assert run(*command)[0] == 2
    assert run(*command, "--overwrite")[0] == 0


def test_a_mask_limits_the_edit_and_is_shown(run: Run, folder: Path, photo_file: Path) -> None:
    """Outside it the photo is kept bit for bit; what DiffEdit finds is written; with --overwrite no older file stays."""
    with Image.open(photo_file) as opened:
        photo = opened.convert("RGB")
    mask = Image.new("L", photo.size)
    mask.paste(255, (0, 0, 20, photo.height))
    mask.save("mask.png")
    command = ("compare", photo_file, "a red dog", *flags(folder), "--mask", "mask.png", "--out", "made")
    code, _, err = run(*command, "--methods", "blended-latent,diffedit")
    assert code == 0, err
    found = read_comparison("made")
    assert found["blended-latent"]["scores"]["outside"] == 0
    edit = pixels("made/blended-latent.png")
    assert np.array_equal(edit[:, 20:], np.asarray(photo)[:, 20:])
    assert not np.array_equal(edit[:, :20], np.asarray(photo)[:, :20])
    changed = np.square(pixels("made/diffedit.png").astype(float) - np.asarray(photo))[:, 20:]
    assert found["diffedit"]["scores"]["outside"] == pytest.approx(np.sqrt(changed.mean()))
    assert found["diffedit"]["images"] == {"mask": "diffedit.mask.png"}
    assert pixels("made/diffedit.mask.png").shape[:2] == edit.shape[:2]
    page = Path("made/index.html").read_text(encoding="utf-8")
    assert "the mask: white may change" in page
    assert "diffedit: mask" in page
    assert run(*command, "--methods", "sdedit", "--overwrite")[0] == 0
    assert not Path("made/diffedit.png").exists()


def test_an_inpainting_base_inpaints_and_nothing_else(run: Run, folder: Path, photo_file: Path, tmp_path: Path) -> None:
    """A group says why the others are left out, and on another base why inpaint is; a fit and its plan are refused."""
    base = save_inpainting(folder, tmp_path / "inpainting")
    with Image.open(photo_file) as photo:
        mask = Image.new("L", photo.size)
    mask.paste(255, (0, 0, 20, mask.height))
    mask.save("mask.png")
    code, _, err = run("compare", photo_file, "a red dog", *flags(base), "--mask", "mask.png", "--methods", "all", "--out", "made")
    assert code == 0, err
    found = read_comparison("made")
    assert [name for name, method in found.items() if method["left_out"] is None] == ["inpaint"]
    assert found["inpaint"]["predicted"]["passes"]["forward"] == found["inpaint"]["cost"]["forward"] == 100
    assert found["inpaint"]["predicted"]["peak_bytes"] > 0
    assert found["inpaint"]["scores"]["outside"] == 0
    assert found["sdedit"]["left_out"] == "needs a transformer or unet"
    assert "prompt-only" not in found
    code, _, err = run("compare", photo_file, "a red dog", *flags(folder), "--mask", "mask.png", "--methods", "inpaint", "--out", "other")
    assert code == 2
    assert "a unet" in err
    for command in (("fit", photo_file, "a red dog", "--name", "x"), ("plan",)):
        code, _, err = run(*command, *flags(base))
        assert code == 2
        assert "an inpainting model" in err


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dino(tmp_path_factory.mktemp("dino"))


def test_other_models_score_the_edits(run: Run, folder: Path, photo_file: Path, dino_folder: Path, tmp_path: Path) -> None:
    """CLIP, its direction with a source prompt, and DINOv2: on the page and in the results."""
    tail = ("--clip", save_clip(tmp_path / "clip"), "--dino", dino_folder, "--offline", "--out", "made")
    code, _, err = run("compare", photo_file, "a red dog", *flags(folder), "--methods", "sdedit", "--source", "a cat", *tail)
    assert code == 0, err
    scores = read_comparison("made")["sdedit"]["scores"]
    assert set(scores) == {"alignment", "fidelity", "ssim", "clip", "clip_direction", "dino"}
    with Image.open(photo_file) as photo, Image.open("made/sdedit.png") as edit:
        found = models.dino_metric(str(dino_folder), True, photo.convert("RGB"))(edit)
    assert scores["dino"] == pytest.approx(found["dino"], abs=1e-6)
    page = Path("made/index.html").read_text(encoding="utf-8")
    assert all(f'<th scope="col">{name}</th>' in page for name in scores)


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_captioner(tmp_path_factory.mktemp("captioner"))


def test_a_caption_is_that_of_transformers(captioner: Path) -> None:
    """By the model's own classes, greedily; another photo has another caption; twice the same."""
    model: Any = BlipForConditionalGeneration.from_pretrained(captioner)
    processor: Any = BlipProcessor.from_pretrained(captioner)
    found = []
    for photo in (Image.linear_gradient("L").convert("RGB"), Image.new("RGB", (50, 37), (200, 30, 90))):
        tokens = model.generate(**processor(images=photo, return_tensors="pt"), max_new_tokens=30, do_sample=False)
        caption = captioned(photo, str(captioner), True)
        assert caption == processor.decode(tokens[0], skip_special_tokens=True).strip()
        assert caption == captioned(photo, str(captioner), True)
        found.append(caption)
    assert found[0] != found[1]


@pytest.mark.filterwarnings("ignore:the prompt is longer than the 14 tokens")
def test_source_auto_captions_the_photo(run: Run, folder: Path, photo_file: Path, captioner: Path) -> None:
    """The caption is printed, stored and shown, and is the source prompt of the methods."""
    with Image.open(photo_file) as photo:
        caption = captioned(photo.convert("RGB"), str(captioner), True)
    command = ("compare", photo_file, "a red dog", *flags(folder), "--methods", "ddim-inversion", "--set", "steps=2")
    code, _, err = run(*command, "--source", "auto", "--captioner", captioner, "--offline", "--out", "auto")
    assert code == 0, err
    assert f"Source prompt: {caption}" in err
    summary = json.loads(Path("auto/results.json").read_text(encoding="utf-8"))
    assert summary["source_prompt"] == caption
    assert summary["captioner"] == str(captioner)
    assert f"(by {captioner})" in Path("auto/index.html").read_text(encoding="utf-8")
    assert run(*command, "--source", caption, "--out", "given")[0] == 0
    assert np.array_equal(pixels("auto/ddim-inversion.png"), pixels("given/ddim-inversion.png"))


def test_an_empty_caption_or_another_model_is_an_error(
    run: Run, folder: Path, photo_file: Path, captioner: Path, dino_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is computed."""
    for work in ("encode_prompt", "encode_image", "predict"):
        monkeypatch.setattr(StableDiffusion, work, computes)
    command = ("compare", photo_file, "a red dog", *flags(folder), "--source", "auto", "--offline", "--captioner")
    code, _, err = run(*command, dino_folder)
    assert code == 2
    assert "cannot be loaded" in err
    monkeypatch.setattr(BlipForConditionalGeneration, "generate", lambda *_, **__: torch.tensor([[5, 2]]))
    code, _, err = run(*command, captioner)
    assert code == 2
    assert "gives an empty caption" in err
