"""The command sweep, the suggested eta that it stores, and the search of edit."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from common import Run, each
from PIL import Image

from imagic_lora.adapters.adapter import Adapter
from imagic_lora.adapters.record import EtaRecord
from imagic_lora.adapters.store import Store
from imagic_lora.cli.sweeping import report
from imagic_lora.photos.reading import read_metadata, read_photo
from imagic_lora.sampling.sweeps.scores import PROBES
from imagic_lora.sampling.sweeps.suggest import COARSE, RULE, RULES, SEARCHED, Curves, band

SWEEP = ("sweep", "rex", "--eta", "0.5,1", "--steps", 2)


@pytest.fixture
def run(run: Run, tmp_path: Path, fitted: Callable[..., Adapter]) -> Run:
    """Runs a command in a folder whose store has one adapter, ``rex``."""
    shutil.copytree(fitted("lora").folder, tmp_path / "adapters" / "rex")
    return run


def test_sweep_writes_a_sheet_a_plot_and_every_score(run: Run) -> None:
    """Rows of seeds, columns of etas with 0 first, a row before tuning above; the table and both JSONs agree; the rule's suggestion."""
    code, out, err = run(*SWEEP, "--seeds", 2, "--before-tuning", "--json")
    assert code == 0, err
    found = json.loads(out)
    rows = [(row["eta"], row["seed"], row["tuned"]) for row in found["scores"]]
    assert rows == [(e, s, True) for e in (0, 0.5, 1) for s in (0, 1)] + [(e, 0, False) for e in (0, 0.5, 1)]
    curves = Curves.of(SimpleNamespace(**row) for row in found["scores"] if row["tuned"])
    good = band(curves)
    assert (found["suggested"], found["rule"]) == (RULES[RULE](curves), RULE)
    assert found["band"] == (list(good) if good else None)
    folder = Path("outputs/rex/sweep")
    written = json.loads((folder / "scores.json").read_text())
    assert written == {name: value for name, value in found.items() if name not in ("sheet", "plot", "table", "stored")}
    table = list(csv.DictReader((folder / "scores.csv").read_text().splitlines()))
    assert [{name: str(value) for name, value in row.items()} for row in found["scores"]] == table
    assert read_photo(folder / "sheet.png").image.size == (8 + 4 * 200, 34 + 3 * (192 + 24 + 8))
    assert read_metadata(folder / "plot.png")["adapter"] == "rex"
    assert found["sheet"] == str(folder / "sheet.png")
    again = json.loads(run(*SWEEP, "--seeds", 1, "--json")[1])
    assert again["scores"][0]["alignment"] == pytest.approx(found["scores"][0]["alignment"], rel=1e-3)


def test_the_images_of_a_sweep_are_those_of_edit(run: Run) -> None:
    """Every point of the plot has its image, made as ``edit`` makes it; ``reproduce`` makes it again; another sweep replaces them all."""
    images = Path("outputs/rex/sweep/images")
    rows = json.loads(run(*SWEEP, "--seeds", 2, "--before-tuning", "--json")[1])["scores"]
    named = {row["file"]: (row["eta"], row["seed"]) for row in rows if row["tuned"]}
    assert {f"images/{path.name}" for path in images.iterdir()} == set(named)
    assert {row["file"] for row in rows if not row["tuned"]} == {""}
    for file, made in named.items():
        metadata = read_metadata(images.parent / file)
        assert (metadata["eta"], metadata["seed"]) == made
    code, _, err = run("reproduce", images / "eta0.5-seed1.png")
    assert code == 0, err
    assert run("edit", "rex", "--eta", 0.5, "--seed", 1, "--steps", 2)[0] == 0
    pixels = [
        np.asarray(read_photo(path).image).astype(int) for path in (images / "eta0.5-seed1.png", Path("outputs/rex/eta0.5-seed1.png"))
    ]
    assert abs(pixels[0] - pixels[1]).max() <= 1  # of another batch
    (images / "mine.png").write_bytes(b"")
    assert run("sweep", "rex", "--eta", "0.3,0.4", "--seeds", 1, "--steps", 2)[0] == 0
    assert {path.name for path in images.iterdir()} == {"eta0-seed0.png", "eta0.3-seed0.png", "eta0.4-seed0.png", "mine.png"}


def test_an_interrupted_sweep_leaves_no_scores_of_deleted_images(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(*SWEEP, "--seeds", 1)[0] == 0
    folder = Path("outputs/rex/sweep")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("imagic_lora.cli.sweeping.scored", interrupted)
    assert run("sweep", "rex", "--eta", "0.25,0.75", "--steps", 2, "--seeds", 1)[0] == 130
    assert sorted(path.name for path in folder.iterdir()) == ["images"]
    assert sorted(path.name for path in (folder / "images").iterdir()) == ["eta0-seed0.png", "eta0.25-seed0.png", "eta0.75-seed0.png"]


@each("good, appears, said", {
    "inside": ((0.4, 0.8), True, "from 0.40 to 0.80)"),
    "beside the range": ((0.86, 0.98), True, "from 0.86 to 0.98, between the etas of this sweep: look there too)"),
    "none": (None, True, "no eta has both scores good"),
    "no edit": (None, False, "no image shows the edit well; sweep larger ones"),
})  # fmt: skip
def test_a_suggestion_outside_of_the_good_range_says_so(
    good: tuple[float, float] | None, appears: bool, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    suggested = 0.7 if good and good[0] < 0.7 else 1.0
    report({"adapter": "rex", "suggested": suggested, "band": good, "appears": appears, "sheet": "s", "plot": "p"}, False)
    assert said in " ".join(capsys.readouterr().err.split())


def test_the_images_of_a_region_are_pasted_into_the_photo(run: Run, fitted: Callable[..., Adapter], tmp_path: Path) -> None:
    """As ``edit`` pastes them; an adapter that does not hold the photo needs its file."""
    photo = tmp_path / "photo.png"
    Image.effect_mandelbrot((90, 70), (-2, -1, 1, 1), 50).convert("RGB").save(photo)
    fit = (
        "fit",
        photo,
        "a cat",
        "--base",
        Store(Path("adapters")).read("rex").record.base.name,
        "--name",
        "part",
        "--region",
        "10,5,64,48",
    )
    code, _, err = run(*fit, "--embed.steps", 1, "--tune.steps", 1, "--edit.steps", 1, "--rank", 1, "--no-store-photo")
    assert code == 0, err
    sweep = ("sweep", "part", "--eta", "0.5,1", "--seeds", 1, "--steps", 1)
    code, _, err = run(*sweep)
    assert code == 2
    assert "does not hold the photo" in err
    code, _, err = run(*sweep, "--photo", photo)
    assert code == 0, err
    image = Path("outputs/part/sweep/images/eta1-seed0.png")
    made, original = (np.asarray(read_photo(path).image) for path in (image, photo))
    assert (made[:, :10] == original[:, :10]).all()
    assert (made[10:50, 20:70] != original[10:50, 20:70]).any()
    assert run("reproduce", image, "--photo", photo)[0] == 0


def test_a_stored_eta_is_the_default_of_edit(run: Run) -> None:
    """Nothing else in the adapter changes, and it verifies; show names it. Without the flag nothing is stored."""
    before = Store(Path("adapters")).read("rex").record
    assert run(*SWEEP, "--seeds", 1)[0] == 0
    assert Store(Path("adapters")).read("rex").record == before
    code, out, err = run("sweep", "rex", "--eta", "0.5,1", "--seeds", 1, "--batch-size", 1, "--store-eta", "--json")
    assert code == 0, err
    suggested = EtaRecord(eta=json.loads(out)["suggested"], rule=RULE, seeds=1)
    after = Store(Path("adapters")).read("rex").record
    assert (json.loads(out)["stored"], after) == (True, before.model_copy(update={"name": "rex", "suggested": suggested}))
    assert json.loads(run("show", "rex", "--json")[1])["suggested"] == suggested.model_dump()
    pictures = json.loads(run("edit", "rex", "--json")[1])["pictures"]
    assert [picture["eta"] for picture in pictures] == [suggested.eta]


@each(
    "flags, message",
    [
        (("--eta", "0.5"), "expected: at least two etas besides 0"),
        (("--eta", "0.5,3"), "Error: eta 3"),
        (("--seeds", 0), "Error: --seeds 0"),
        (("--seeds", 2, "--start", "inverted"), "Error: 2 seeds with start inverted"),
        (("--prompt", "a dog", "--store-eta"), "Error: --store-eta with --prompt"),
        (("--store-eta",), "Error: --store-eta with other sampling settings"),
        (("--clip", "nobody/nothing", "--offline"), "Error: --clip nobody/nothing cannot be loaded"),
        (("--source-prompt", "a dog"), "Error: --source-prompt without --clip"),
        (("--offline",), "Error: --offline without --clip and --dino"),
        (("--out", "adapters/rex/source.png"), "source.png"),
    ],
)
def test_what_sweep_rejects(run: Run, flags: tuple[object, ...], message: str) -> None:
    """Exit code 2 and one error, and nothing is stored."""
    before = Store(Path("adapters")).read("rex").record
    code, _, err = run("sweep", "rex", "--steps", 3, *flags)
    assert code == 2
    assert message in err
    assert Store(Path("adapters")).read("rex").record == before


def test_scores_by_other_models_are_in_the_table(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every image is scored by every model that was asked for, at the size of the photo on its canvas."""
    import imagic_lora.sampling.sweeps.metrics as metrics

    asked: list[tuple[object, ...]] = []

    def loaded(*arguments: Any) -> Callable[[Any], dict[str, float]]:
        asked.append((*arguments[:2], *arguments[3:]))
        return lambda image: {f"by {arguments[0]}": float(image.width)}

    monkeypatch.setattr(metrics, "clip_metric", loaded)
    monkeypatch.setattr(metrics, "dino_metric", loaded)
    flags = ("--clip", "one", "--dino", "two", "--source-prompt", "a dog", "--offline", "--seeds", 1)
    rows = json.loads(run(*SWEEP, *flags, "--json")[1])["scores"]
    assert asked == [("one", True, "a cat", "a dog"), ("two", True)]
    left, _, right, _ = Store(Path("adapters")).read("rex").record.source.box
    assert [(row["by one"], row["by two"]) for row in rows] == [(right - left, right - left)] * 3
    assert "by two" in Path("outputs/rex/sweep/scores.csv").read_text().splitlines()[0]


def test_one_seed_where_seeds_have_no_effect(run: Run) -> None:
    """DDIM inversion starts from the photo's own noise."""
    rows = json.loads(run(*SWEEP, "--start", "inverted", "--json")[1])["scores"]
    assert {row["seed"] for row in rows} == {0}
    rows = json.loads(run(*SWEEP, "--json")[1])["scores"]
    assert {row["seed"] for row in rows} == {0, 1, 2, 3}


def test_edit_searches_for_an_eta_and_says_what_it_spent(run: Run) -> None:
    """Two passes a guided step, and two for each pair of timestep and noise; the images are those of the eta that was found."""
    code, out, err = run("edit", "rex", "--eta", "auto", "--seed", "3,4", "--steps", 2, "--json")
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    spent = found["auto"]
    assert len(COARSE) < spent["images"] <= SEARCHED
    assert spent["passes"] == spent["images"] * (2 * 2 + 2 * PROBES)
    assert spent["rule"] == RULE
    assert [(picture["eta"], picture["seed"]) for picture in found["pictures"]] == [(spent["eta"], 3), (spent["eta"], 4)]
    assert f"Eta {spent['eta']:g} (auto, rule {RULE}): {spent['images']} images, {spent['passes']} denoiser passes" in err
    assert "auto" not in json.loads(run("edit", "rex", "--eta", "0.5", "--steps", 2, "--json")[1])
