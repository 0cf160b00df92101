"""The command ``compare``: what it refuses before anything is computed, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from common import Run, each
from PIL import Image

import imagic_lora.methods.sampled as sampled


def flags(folder: Path) -> list[str]:
    return ["--base", str(folder), "--device", "cpu"]


@each(
    "extra, words",
    [
        (["--methods", "null-text"], "null-text without a source prompt"),
        (["--methods", "blended-latent"], "blended-latent without a mask"),
        (["--methods", "sdedit", "--mask", "small.png"], "has 3x3 pixels"),
        (["--methods", "nonsense"], "nonsense"),
        (["--methods", "sdedit", "--set", "strenght=1"], "strenght"),
        (["--methods", "sdedit", "--set", "strength=3"], "strength = 3"),
        (["--methods", "sdedit", "--set", "strength"], "--set strength"),
        (["--methods", "fast", "--set", "steps=3"], "--set with --methods fast"),
        (["--methods", "imagic-lora", "--set", "memory.dtype=fp16"], "--set memory"),
        (["--methods", "direct-inversion", "--source", "a cat", "--set", "factors={hat: 2}"], "the word 'hat', which is not in the prompt"),
        (["--methods", "direct-inversion", "--source", "a cat", "--set", "edit=replace"], "2 words in 'a cat' and 3 in"),
        (["--source", " "], "an empty prompt"),
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

    def computing(*_: object) -> None:
        raise AssertionError("something is computed")

    monkeypatch.setattr(sampled, "encode_request", computing)
    Image.new("L", (3, 3), 255).save("small.png")
    Path("taken").mkdir(exist_ok=True)
    Path("taken/file").write_text("mine")
    code, _, err = run("compare", photo_file, "a red dog", *flags(folder), *extra)
    assert code == 2, err
    assert words in err
    assert not Path("outputs/compare").is_dir() or not any(Path("outputs/compare").iterdir())


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
    assert np.asarray(Image.open("made/sheet.png")).size
    assert run(*command)[0] == 2
    assert run(*command, "--overwrite")[0] == 0


def test_a_budget_leaves_out_what_does_not_fit_it(run: Run, folder: Path, photo_file: Path) -> None:
    """Nothing runs in no time, and the reason is in the results."""
    code, out, err = run("compare", photo_file, "a red dog", *flags(folder), "--methods", "sdedit", "--budget", "0.00001", "--json")
    assert code == 0, err
    (method,) = json.loads(out)["methods"]
    assert "of --budget are left" in method["left_out"]
