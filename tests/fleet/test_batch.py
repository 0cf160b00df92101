"""Batches on tiny bases: results, failures, interruptions, what is done twice (nothing), locks, edits, the contact sheet."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from batches import TINY, Batch, contents
from common import Run
from filelock import FileLock
from PIL import Image

from imagic_lora.adapters.store import Store
from imagic_lora.fleet.batch import grouped
from imagic_lora.fleet.table import Table
from imagic_lora.fleet.work import Worker
from imagic_lora.training import fit as fit_module
from imagic_lora.training.resuming.checkpoints import Checkpoints


def steps_before(monkeypatch: pytest.MonkeyPatch, at: int, raised: BaseException | None = None) -> list[str]:
    """Counts the steps of all fits; at one of them an exception is raised. Returns the stages of the steps."""
    done: list[str] = []
    original = fit_module._train_and_store

    def counted(*args: Any, **kwargs: Any) -> Iterator[Any]:
        steps = original(*args, **kwargs)
        try:
            while True:
                report = next(steps)
                done.append(report.stage)
                if len(done) == at and raised:
                    steps.close()
                    raise raised
                yield report
        except StopIteration as end:
            return end.value

    monkeypatch.setattr(fit_module, "_train_and_store", counted)
    return done


def test_a_batch_gives_the_adapters_of_single_fits(
    batch: Batch, run: Run, photos: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base is loaded once; the files are those of ``fit``, byte for byte; a second run does nothing."""
    loaded: list[str] = []
    original = fit_module.load_base
    monkeypatch.setattr(fit_module, "load_base", lambda *args, **kwargs: loaded.append(args[0]) or original(*args, **kwargs))
    code, rows, said = batch("--json")
    assert (code, list(rows), len(loaded)) == (0, ["p0", "p1", "p2"], 1)
    assert json.loads(said[said.index("{") :])["done"] == 3
    assert all(
        row["state"] == "done" and row["seconds"] > 0 and set(row["scores"]["relative_loss"]) == {"embed", "tune"} for row in rows.values()
    )
    for k, prompt in enumerate(("a cat", "a dog", "a <b>bird</b>")):
        assert run("fit", photos.parent / f"p{k}.png", prompt, "--base", folder, *TINY, "--seed", k, "--store", "single")[0] == 0
    assert contents() == contents(Path("single"))
    before = {path: path.stat().st_mtime_ns for path in Path("adapters").rglob("*")}
    code, again, said = batch()
    assert (code, again) == (0, rows)
    assert "3 of 3 photos were done" in said
    assert {path: path.stat().st_mtime_ns for path in Path("adapters").rglob("*")} == before


def test_a_bad_photo_does_not_end_the_run(batch: Batch, photos: Path) -> None:
    """It fails with exit code 3, is not tried again unless asked or changed, and is fitted once it is whole."""
    whole = (photos.parent / "p1.png").read_bytes()
    (photos.parent / "p1.png").write_bytes(whole[:60])
    code, rows, said = batch()
    assert code == 3
    assert [row["state"] for row in rows.values()] == ["done", "failed", "done"]
    assert rows["p1"]["error"]["got"] in said
    assert "--retry-failed" in said
    page = Path("out/index.html").read_text()
    assert "2 of 3 photos are done, 1 failed" in page
    assert "&lt;b&gt;bird&lt;/b&gt;" in page
    assert "<b>bird" not in page
    assert "<script" not in page
    assert 'src="http' not in page
    assert page.count('loading="lazy"') == 2
    code, again, said = batch()
    assert (code, again) == (3, rows)
    assert "3 of 3 photos were done or failed before" in said
    assert "Failed: p1" in batch("--retry-failed")[2]
    (photos.parent / "p1.png").write_bytes(whole)
    code, rows, _ = batch()
    assert (code, rows["p1"]["state"]) == (0, "done")
    assert "1 failed" not in Path("out/index.html").read_text()


def test_an_unexpected_error_stays_with_its_photo(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its traceback is in the results; the base is as it was, so that the next photo is fitted as ever."""
    steps_before(monkeypatch, 5, RuntimeError("odd"))
    code, rows, _ = batch()
    assert (code, rows["p0"]["state"], rows["p1"]["state"]) == (3, "failed", "done")
    assert "RuntimeError: odd" in rows["p0"]["error"]["traceback"]
    monkeypatch.undo()


@pytest.mark.parametrize("at", [2, *(pytest.param(at, marks=pytest.mark.slow) for at in (8, 11))])
def test_an_interrupted_batch_goes_on(batch: Batch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, at: int) -> None:
    """Of six steps a photo: within a stage of the first or the second photo. No step is done twice, and the bytes are the same."""
    assert batch()[0] == 0
    whole = contents()
    shutil.rmtree("adapters")
    shutil.rmtree("out")
    done = steps_before(monkeypatch, at, KeyboardInterrupt())
    code, _, said = batch()
    assert code == 130
    assert f"{(at - 1) // 6} of 3 photos are stored or failed; the same command continues" in said
    assert f"{(at - 1) // 6} of 3 photos are done" in Path("out/index.html").read_text()
    code, rows, _ = batch()
    assert (code, len(rows)) == (0, 3)
    assert len(done) == 18
    assert contents() == whole
    assert not [path.name for path in Path("adapters").iterdir() if path.name.startswith(".")]


def test_what_a_killed_driver_left_is_completed(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter without a line in the results, half a line, and checkpoints beside an adapter that is done."""
    assert batch()[0] == 0
    whole = contents()
    lines = Path("out/results.jsonl").read_text().splitlines()
    Path("out/results.jsonl").write_text(lines[0] + "\n" + lines[1][:50])
    shutil.rmtree("out/thumbnails")
    shutil.rmtree("adapters/p2")
    done = steps_before(monkeypatch, 0)
    code, rows, _ = batch()
    assert (code, sorted(rows), len(done)) == (0, ["p0", "p1", "p2"], 6)
    assert rows["p1"]["seconds"] > 0
    assert contents() == whole
    assert len(list(Path("out/thumbnails").iterdir())) == 3
    Checkpoints(Store(Path("adapters")).checkpoints("p0")).folder.joinpath("embed-000003").mkdir(parents=True)
    entry = Table(Path("photos/list.csv"), {"base": "critters", "memory": {"device": "cpu"}}, {}).entries()[0]
    assert entry.name == "p0"


@pytest.mark.slow
def test_other_adapters_are_not_replaced_unasked(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed setting, prompt or photo is named before anything starts; --overwrite fits these again, and no other."""
    assert batch()[0] == 0
    whole = contents()
    Image.new("RGB", (20, 20), "white").save("photos/p2.png")
    Path("photos/list.csv").write_text("photo,prompt,seed\np0.png,a cat,0\np1.png,a horse,1\np2.png,a <b>bird</b>,2\n")
    code, _, said = batch()
    assert code == 2
    assert "/adapters/p1 is another adapter: prompt was 'a dog', is 'a horse'" in said
    assert "/adapters/p2 is another adapter: the photo was another file" in said
    assert contents() == whole
    done = steps_before(monkeypatch, 8, KeyboardInterrupt())
    assert batch("--overwrite")[0] == 130
    code, rows, _ = batch("--overwrite")
    assert (code, len(rows), len(done)) == (0, 3, 12)  # an interrupted run with --overwrite goes on, too
    assert rows["p1"]["prompt"] == Store(Path("adapters")).read("p1").record.prompt == "a horse"


@pytest.mark.slow
def test_overwrite_discards_the_checkpoints_of_another_fit(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    steps_before(monkeypatch, 2, KeyboardInterrupt())
    assert batch()[0] == 130
    code, rows, _ = batch("--targets", "all")
    assert (code, rows["p0"]["state"]) == (0, "done")  # stage 1 does not depend on it
    shutil.rmtree("adapters")
    shutil.rmtree("out")
    steps_before(monkeypatch, 2, KeyboardInterrupt())
    assert batch()[0] == 130
    code, rows, _ = batch("--embed.learning-rate", "0.002")
    assert code == 3
    assert "this run differs" in rows["p0"]["error"]["got"]
    code, rows, _ = batch("--embed.learning-rate", "0.002", "--overwrite", "--retry-failed")
    assert (code, rows["p0"]["state"]) == (0, "done")


def test_one_driver_a_list_and_a_folder(batch: Batch, photos: Path, run: Run, folder: Path) -> None:
    Path("out").mkdir()
    with FileLock("out/.lock"):
        code, _, said = batch()
    assert code == 2
    assert "another batch" in said
    assert batch()[0] == 0
    other = next(name for name in [*Path("adapters").iterdir(), None] if name is None or name.name.startswith(".batch"))
    assert other is None  # the lock is gone with its owner
    twin = photos.with_name("other.csv")
    twin.write_bytes(photos.read_bytes())
    before = Path("out/results.jsonl").read_bytes()
    code, _, said = run("batch", twin, "--base", folder, *TINY, "--out", "out")
    assert (code, Path("out/results.jsonl").read_bytes()) == (2, before)
    assert f"out holds the results of the list {photos.resolve()}" in said
    photos.unlink()  # as if it was renamed
    assert run("batch", twin, "--base", folder, *TINY, "--out", "out")[0] == 0


def test_an_adapter_whose_edit_fails_is_shown(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """The photo has failed, and its adapter is in the results and on the page."""
    monkeypatch.setattr(Worker, "_edits", lambda self, entry, *_: 1 / 0 if entry.name == "p1" else ([], {}))
    code, rows, _ = batch("--edit", "seed=0")
    assert code == 3
    assert (rows["p1"]["state"], Path(rows["p1"]["adapter"]).name) == ("failed", "p1")
    assert Path("out/thumbnails/p1.fit.jpg").exists()


def test_a_full_disk_ends_the_run(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done stays; with room again the same command goes on, and nothing is a failure of its photo."""
    full = True
    original = os.write

    def write(handle: int, data: Any) -> int:
        if full and Path("adapters/p0").exists():
            name = str(Path(f"/proc/self/fd/{handle}").readlink())
            if "p1" in name and "checkpoint" in name:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(handle, data)

    monkeypatch.setattr(os, "write", write)
    code, rows, said = batch()
    assert (code, list(rows)) == (2, ["p0"])
    assert "full" in said
    full = False
    code, rows, _ = batch()
    assert (code, [row["state"] for row in rows.values()]) == (0, ["done"] * 3)


def test_a_store_that_cannot_be_written_to(run: Run, photos: Path, folder: Path) -> None:
    Path("file").write_text("")
    code, _, said = run("batch", photos, "--base", folder, *TINY, "--store", "file/store")
    assert code == 2
    assert "cannot be written" in said


@pytest.mark.slow
def test_edits_of_a_batch_are_those_of_edit(batch: Batch, run: Run) -> None:
    code, rows, _ = batch("--edit", "eta=0.5:0.7:0.2 seed=1,3")
    assert code == 0
    assert [(one["eta"], one["seed"]) for one in rows["p0"]["images"]] == [(0.5, 1), (0.5, 3), (0.7, 1), (0.7, 3)]
    assert set(rows["p0"]["scores"]["ssim"]) == {Path(one["file"]).name for one in rows["p0"]["images"]}
    assert run("edit", "p1", "--eta", "0.5:0.7:0.2", "--seed", "1,3", "--device", "cpu", "--out", "edited")[0] == 0
    for image in Path("edited").glob("eta*.png"):
        assert Image.open(image).tobytes() == Image.open(Path("out/images/p1") / image.name).tobytes(), image
    before = Path("out/images/p0/sheet.png").stat().st_mtime_ns
    assert batch("--edit", "eta=0.5:0.7:0.2 seed=1,3")[0] == 0
    assert Path("out/images/p0/sheet.png").stat().st_mtime_ns == before
    Path("out/images/p0/eta0.5-seed1.png").unlink()
    assert batch("--edit", "eta=0.5:0.7:0.2 seed=1,3")[0] == 0  # only what is missing
    assert Path("out/images/p0/eta0.5-seed1.png").exists()
    assert 'alt="photo and edits of p0"' in Path("out/index.html").read_text()
    for wrong in ("eta", "eta=0.5 eta=1", "steps=3", "eta=x", "seed=-1", "eta=3", "seed=4294967296"):
        assert batch("--edit", wrong)[0] == 2


@pytest.mark.slow
def test_photos_of_several_bases_and_modes(photos: Path, run: Run, folders: dict[str, Path]) -> None:
    """A base is opened once for each kind that the list has; mode full needs another precision of it."""
    first, second = folders["epsilon"], folders["v_prediction"]
    lines = [f"p0.png,a,{first},lora,a,2", f"p1.png,b,{second},embedding,b,", f"p2.png,c,{first},full,c,2", f"p1.png,d,{first},lora,d,2"]
    photos.write_text("\n".join(["photo,prompt,base,mode,name,tune.steps", *lines]))
    entries = Table(photos, {"memory": {"device": "cpu"}}, {}).entries()
    assert [[entry.name for entry in group] for group in grouped(entries)] == [["a"], ["d"], ["b"], ["c"]]
    steps = ("--device", "cpu", "--embed.steps", 2, "--edit.steps", 2)
    code, _, said = run("batch", photos, *steps, "--out", "out")
    assert code == 0, said
    found = {name: Store(Path("adapters")).read(name).record for name in Store(Path("adapters")).names()}
    assert {name: (record.base.name, record.config.tune.mode) for name, record in found.items()} == {
        "a": (str(first), "lora"), "b": (str(second), "embedding"), "c": (str(first), "full"), "d": (str(first), "lora"),
    }  # fmt: skip


def test_a_launcher_is_refused(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    code, _, said = batch()
    assert code == 2
    assert "without accelerate launch" in said
