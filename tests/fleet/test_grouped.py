"""``batch --together``: what differs from fits one by one is the rounding, and who shares a group."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from batches import Batch
from common import Run
from PIL import Image
from safetensors.torch import load_file

from imagic_lora.adapters.store import Store
from imagic_lora.core.errors import ImagicError
from imagic_lora.fleet.batch import grouped
from imagic_lora.fleet.table import Table
from imagic_lora.training import together as together_module
from imagic_lora.training.resuming.checkpoints import Checkpoints


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of photos that are fitted together, one for each group."""
    found: list[int] = []
    original = together_module.fit_together

    def counted(items: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        found.append(len(items))
        return original(items, *args, **kwargs)

    monkeypatch.setattr(together_module, "fit_together", counted)
    return found


def tensors(store: Path, name: str) -> dict[str, Any]:
    """The tensors of an adapter by file and name."""
    files = sorted((store / name).rglob("*.safetensors"))
    assert files
    return {f"{file.name}:{key}": value for file in files for key, value in load_file(file).items()}


def test_photos_together_are_the_photos_one_by_one(batch: Batch, sizes: list[int]) -> None:
    """One group of three, edits included; the tensors agree to 1e-3 of their norm; a second run does nothing."""
    assert batch()[0] == 0
    Path("adapters").rename("single")
    shutil.rmtree("out")
    code, rows, said = batch("--together", "8", "--edit", "seed=0")
    assert (code, sizes, list(rows)) == (0, [3], ["p0", "p1", "p2"]), said
    assert all(row["state"] == "done" and row["seconds"] > 0 and len(row["images"]) == 1 for row in rows.values())
    for name in rows:
        assert Store(Path("adapters")).read(name).record.runtime["together"] == "3"
        alone, shared = tensors(Path("single"), name), tensors(Path("adapters"), name)
        assert alone.keys() == shared.keys()
        for key, value in alone.items():
            assert float((value - shared[key]).norm()) <= 1e-3 * float(value.norm()) + 1e-6, key
    assert batch("--together", "8", "--edit", "seed=0")[0] == 0
    assert sizes == [3]


def test_a_photo_that_fails_leaves_its_group(batch: Batch, photos: Path, sizes: list[int]) -> None:
    """It alone is failed; without its fault it is fitted by the next run."""
    good = (photos.parent / "p1.png").read_bytes()
    (photos.parent / "p1.png").write_bytes(good[: len(good) // 2])
    code, rows, _ = batch("--together", "8")
    assert code == 3
    assert {name: row["state"] for name, row in rows.items()} == {"p0": "done", "p1": "failed", "p2": "done"}
    assert sizes == [2]
    (photos.parent / "p1.png").write_bytes(good)
    assert batch("--together", "8", "--retry-failed")[0] == 0


def test_a_stopped_group_goes_on_from_its_checkpoints(batch: Batch, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first run stops in stage 2 with three checkpoints; the second resumes them all, together."""
    resumed: list[bool] = []
    original = together_module.fit_together

    def stopped(items: Any, *args: Any, stop: Any, **kwargs: Any) -> Any:
        resumed.extend(item.resume for item in items)
        steps = iter(range(100))
        return original(items, *args, stop=(lambda: next(steps) > 11) if len(resumed) == 3 else stop, **kwargs)

    monkeypatch.setattr(together_module, "fit_together", stopped)
    assert batch("--together", "3")[0] == 130
    assert all(Checkpoints(Store(Path("adapters")).checkpoints(name)).any() for name in ("p0", "p1", "p2"))
    assert batch("--together", "3")[0] == 0
    assert resumed == [False] * 3 + [True] * 3


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_without_memory_for_all_they_are_fitted_one_by_one(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a warning that says so."""

    def refused(*args: Any, **kwargs: Any) -> Any:
        raise ImagicError("out of memory with 3 photos together", "less", "fit fewer photos together")
        yield

    monkeypatch.setattr(together_module, "fit_together", refused)
    code, rows, said = batch("--together", "3")
    assert "one by one instead of together" in " ".join(said.split())
    assert (code, {row["state"] for row in rows.values()}) == (0, {"done"})


def test_groups_have_one_canvas_and_the_same_settings(photos: Path, run: Run, folder: Path) -> None:
    """Photos of another shape, another rank or mode full are apart; a group has no more photos than asked for."""
    Image.new("RGB", (20, 60), "red").save(photos.parent / "tall.png")
    for k in range(3, 6):
        shutil.copy(photos.parent / "p0.png", photos.parent / f"p{k}.png")
    rows = ["p0,2,lora,0", "p1,2,lora,1", "tall,2,lora,2", "p3,4,lora,3", "p4,,full,4", "p5,2,lora,5"]
    photos.write_text("photo,prompt,name,rank,mode,seed\n" + "".join(f"{r.split(',')[0]}.png,a cat,{r}\n" for r in rows))
    flags = {"base": str(folder), "memory": {"device": "cpu"}}
    entries = Table(photos, flags, {}).entries()

    def names(together: int | None) -> list[set[str]]:
        return [{entry.name for entry in group} for group in grouped(entries, together)]

    assert sorted(map(sorted, names(8))) == [["p0", "p1", "p5"], ["p3"], ["p4"], ["tall"]]
    assert sorted(map(len, names(2))) == [1, 1, 1, 1, 2]
    assert sorted(map(len, names(None))) == [1, 1, 1, 3]
    assert all(len(group) == 1 for group in names(1))


@pytest.mark.parametrize("given", [("--together", "0"), ("--together", "some"), ("--together", "auto", "--ray", "local")])
def test_wrong_numbers_are_refused(batch: Batch, given: tuple[str, ...]) -> None:
    """Before anything is read."""
    code, _, said = batch(*given)
    assert code == 2
    assert "--together" in said
