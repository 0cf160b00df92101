"""Checkpoints: bit-exact, the newest of each stage is kept, and a broken one is renamed with a warning."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common import each, same
from files import failing, forbid, interrupted_removal
from safetensors.torch import save
from torch import Tensor

from imagic_lora.adapters.atomic import atomic_folder
from imagic_lora.core.errors import ImagicError, ImagicWarning, NotFinite
from imagic_lora.core.settings.merging import differences
from imagic_lora.training.resuming.checkpoints import CHECKPOINT, STATE, CheckpointRecord, Checkpoints

INPUTS: dict[str, Any] = {
    "photo": "0f3a",
    "prompt": 'a "cat"\n\U0001f408',
    "seed": 2**63 - 1,
    "latents": [1, 4, 8, 8],
    "quantize": None,
    "embed": {"steps": 3, "learning_rate": 1 / 3, "timesteps": "stratified"},
}


def record(stage: Any = "embed", step: int = 1, **changes: Any) -> CheckpointRecord:
    """Of a stage of very many steps."""
    given = CheckpointRecord(stage=stage, step=step, steps=100_000, inputs=INPUTS, seconds={"embed": 0.1}, threads=1)
    return given.model_copy(update=changes)


def state(number: float = 1.0) -> dict[str, Tensor]:
    """Numbers of all kinds, as a stage may have them."""
    tokens = (number * torch.randn(1, 16, 7, generator=torch.Generator().manual_seed(3))).requires_grad_().transpose(1, 2)
    return {
        "latents": torch.linspace(-1, 1, 9),
        "optimised/tokens": torch.ones(1, 7, 16),
        "trainables/tokens": tokens,
        "trainables/half": tokens.detach().to(torch.bfloat16),
        "optimizer/tokens/step": torch.tensor(3.0),
        "optimizer/tokens/state1": torch.arange(256, dtype=torch.uint8),
        "optimizer/tokens/count": torch.tensor(2**40),
        "losses/embed": torch.tensor([1 / 3, 1e-30, 0.2]),
    }


@pytest.fixture
def saved(tmp_path: Path) -> Checkpoints:
    """A folder for checkpoints, which is not there yet."""
    return Checkpoints(tmp_path / "store" / ".one.checkpoints")


def there(saved: Checkpoints) -> list[str]:
    """The names of all that is in a folder of checkpoints."""
    return sorted(path.name for path in saved.folder.iterdir())


def found(saved: Checkpoints) -> tuple[str, int]:
    """Stage and step of the newest."""
    newest = saved.newest()
    assert newest is not None
    return newest.record.stage, newest.record.step


def test_what_is_saved_comes_back(saved: Checkpoints) -> None:
    """Bit for bit and type for type, by another object; the record too, numbers to the last digit."""
    assert saved.newest() is None
    given = state()
    path = saved.save(record(), given)
    assert sorted(one.name for one in path.iterdir()) == [CHECKPOINT, STATE]
    back = Checkpoints(saved.folder).newest()
    assert back is not None
    assert back.record.model_copy(update={"files": {}}) == record()
    assert differences(back.record.inputs, INPUTS) == []
    assert {name: value.dtype for name, value in back.tensors.items()} == {name: value.dtype for name, value in given.items()}
    assert same(dict(sorted(back.tensors.items())), dict(sorted(given.items())))
    assert not any(value.requires_grad for value in back.tensors.values())


def test_a_group_has_its_own_names(saved: Checkpoints) -> None:
    """Without the prefix; a name that only begins alike is of another."""
    losses = {"losses/embed": torch.ones(1), "losses/tune": torch.zeros(1), "losses2/embed": torch.ones(2), "losses": torch.ones(3)}
    saved.save(record(), {"latents": torch.ones(1)} | losses)
    back = saved.newest()
    assert back is not None
    assert same(dict(sorted(back.group("losses").items())), {"embed": torch.ones(1), "tune": torch.zeros(1)})
    assert back.group("optimised") == {}


def test_the_newest_of_each_stage_is_kept(saved: Checkpoints) -> None:
    """By the number of the step, not by its digits; stage tune is newer than stage embed."""
    for step, kept in ((2, "embed-000002"), (10, "embed-000010"), (100_000, "embed-100000")):
        saved.save(record(step=step), state())
        assert there(saved) == [kept]
        assert found(saved) == ("embed", step)
    for step, kept in ((1, "tune-000001"), (9, "tune-000009"), (10, "tune-000010")):
        saved.save(record("tune", step), state())
        assert there(saved) == ["embed-100000", kept]
        assert found(saved) == ("tune", step)


def test_the_same_step_may_be_saved_again(saved: Checkpoints) -> None:
    """The later one counts."""
    for number in (1.0, 2.0):
        saved.save(record(), state(number))
    back = saved.newest()
    assert back is not None
    assert torch.equal(back.tensors["trainables/tokens"], state(2.0)["trainables/tokens"])
    assert there(saved) == ["embed-000001"]


@each("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_saved(tmp_path: Path, value: float) -> None:
    """The error names it; the older one is still there, and nothing else."""
    saved = Checkpoints(tmp_path / "saved")
    saved.save(record(), state())
    with pytest.raises(NotFinite, match="trainables/tokens holds numbers that are not finite"):
        saved.save(record(step=2), state(value))
    assert there(saved) == ["embed-000001"]
    assert found(saved) == ("embed", 1)


@each("call", ["open", "write", "fsync", "mkdir", "rename"])
def test_a_full_disk_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Whichever call it is that fails."""
    saved = Checkpoints(tmp_path / "saved")
    saved.save(record(), state())
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(errno.ENOSPC))
        with pytest.raises(ImagicError, match="is full"):
            saved.save(record(step=2), state())
    assert found(saved) == ("embed", 1)
    saved.save(record(step=2), state())
    assert there(saved) == ["embed-000002"]


def test_the_older_one_goes_when_the_newer_is_there(saved: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off in between, both are, and the newer is the one."""
    saved.save(record(), state())

    with interrupted_removal(monkeypatch):
        saved.save(record(step=2), state())
    assert there(saved) == ["embed-000001", "embed-000002"]
    assert found(saved) == ("embed", 2)
    saved.save(record(step=3), state())
    assert there(saved) == ["embed-000003"]


def rewritten(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """Changes a file of a checkpoint."""
    return lambda path: (path / name).write_bytes(change((path / name).read_bytes()))


def forged(tensors: dict[str, Tensor], **changes: Any) -> Callable[[Path], object]:
    """Puts another checkpoint in the place of one, with good hashes."""

    def forge(path: Path) -> None:
        shutil.rmtree(path)
        with atomic_folder(path) as made:
            made.write(STATE, [save({name: value.contiguous() for name, value in tensors.items()})])
            made.write_manifest(CHECKPOINT, CheckpointRecord.model_construct(**(dict(record("tune", 5)) | changes)))

    return forge


BREAK: dict[str, Callable[[Path], object]] = {
    "a bit of the state": rewritten(STATE, lambda raw: raw[:-1] + bytes([raw[-1] ^ 1])),
    "a bit of the header": rewritten(STATE, lambda raw: raw[:20] + bytes([raw[20] ^ 1]) + raw[21:]),
    "half a state": rewritten(STATE, lambda raw: raw[: len(raw) // 2]),
    "an empty state": rewritten(STATE, lambda raw: b""),
    "a digit of the record": rewritten(CHECKPOINT, lambda raw: raw.replace(b'"step": 5', b'"step": 6')),
    "half a record": rewritten(CHECKPOINT, lambda raw: raw[: len(raw) // 2]),
    "an empty record": rewritten(CHECKPOINT, lambda raw: b""),
    "garbage": rewritten(CHECKPOINT, lambda raw: b"\xff" * 1000),
    "no state": lambda path: (path / STATE).unlink(),
    "no record": lambda path: (path / CHECKPOINT).unlink(),
    "nothing": lambda path: [one.unlink() for one in path.iterdir()],
    "NaN": forged(state() | {"trainables/tokens": torch.tensor(torch.nan)}),
    "another stage": forged(state(), stage="decode"),
    "step 0": forged(state(), step=0),
    "a step below 0": forged(state(), step=-1),
    "a step beyond the last": forged(state(), step=100_001),
    "steps without end": forged(state(), steps=10**9),
    "another version": forged(state(), version=2),
}


@each("breaking", BREAK)
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_a_broken_one_is_renamed_and_the_older_one_used(tmp_path: Path, breaking: Callable[[Path], object]) -> None:
    """Once, with a warning that names it and says where it is now; nothing of it is lost."""
    saved = Checkpoints(tmp_path / "saved")
    saved.save(record(step=20), state())
    path = saved.save(record("tune", 5), state())
    breaking(path)
    content = {one.name: one.read_bytes() for one in path.iterdir()}
    with pytest.warns(ImagicWarning, match=rf"a broken checkpoint is skipped and renamed to {path}\.broken: .+") as caught:
        assert found(saved) == ("embed", 20)
    assert len(caught) == 1
    assert there(saved) == ["embed-000020", "tune-000005.broken"]
    assert {one.name: one.read_bytes() for one in path.with_name("tune-000005.broken").iterdir()} == content
    assert found(saved) == ("embed", 20)


def test_a_forgery_of_nothing_is_as_good_as_the_real_one(saved: Checkpoints) -> None:
    """So that the checkpoints above are rejected for what was changed."""
    forged(state())(saved.save(record("tune", 5), state()))
    assert found(saved) == ("tune", 5)


def test_where_none_is_whole_there_is_none(saved: Checkpoints) -> None:
    """But there is something: nobody may take it for a new beginning."""
    assert not saved.any()
    for stage in ("embed", "tune"):
        (saved.save(record(stage), state()) / STATE).unlink()
    with pytest.warns(ImagicWarning, match="renamed to") as caught:
        assert saved.newest() is None
    assert len(caught) == 2
    assert there(saved) == ["embed-000001.broken", "tune-000001.broken"]
    assert saved.newest() is None
    assert saved.any()


def test_a_renamed_broken_one_replaces_an_earlier_one(saved: Checkpoints) -> None:
    """Of the same step, broken before."""
    for _ in range(2):
        path = saved.save(record(), state())
        (path / STATE).unlink()
        with pytest.warns(ImagicWarning, match="renamed to"):
            assert saved.newest() is None
    assert there(saved) == ["embed-000001.broken"]


def test_another_process_renames_nothing(saved: Checkpoints) -> None:
    """It finds the same one, silently, before and after the main one has."""
    saved.save(record(step=20), state())
    path = saved.save(record("tune", 5), state())
    (path / STATE).unlink()
    for _ in range(2):
        newest = saved.newest(rename_broken=False)
        assert newest is not None
        assert newest.record.stage == "embed"
        assert there(saved) == ["embed-000020", "tune-000005"]


def test_a_folder_of_another_user_is_named(saved: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a fit: it may not be read; or it may be read, but a broken checkpoint in it cannot be renamed."""
    (saved.save(record(), state()) / STATE).write_bytes(b"")
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing(errno.EACCES))
        with pytest.raises(ImagicError, match=r"cannot be written to \(Permission denied\)"):
            saved.newest()
    forbid(monkeypatch, saved.folder)
    with pytest.raises(ImagicError, match=r"cannot be read \(Permission denied\)"):
        saved.any()


def test_what_was_loaded_outlives_its_files(saved: Checkpoints) -> None:
    """And those that are written over them."""
    path = saved.save(record(), state())
    back = saved.newest()
    assert back is not None
    (path / STATE).write_bytes(bytes((path / STATE).stat().st_size))
    saved.clear()
    assert same(dict(sorted(back.tensors.items())), dict(sorted(state().items())))


def test_clearing_removes_them_all(saved: Checkpoints) -> None:
    """Broken and half-written ones too, and nothing besides; a second time there is nothing to do."""
    saved.save(record(), state())
    for name in ("embed-000001.broken", ".tune-000001.part"):
        (saved.folder / name).mkdir()
    (saved.folder.parent / "one").mkdir()
    assert saved.any()
    for _ in range(2):
        saved.clear()
        assert not saved.any()
        assert saved.newest() is None
        assert [path.name for path in saved.folder.parent.iterdir()] == ["one"]


def test_what_was_never_whole_is_nothing(saved: Checkpoints) -> None:
    """A writer that was cut off in the middle of its first one leaves nothing to go on from, and the next clears up."""
    (saved.folder / ".embed-000001.part").mkdir(parents=True)
    assert not saved.any()
    assert saved.newest() is None
    saved.save(record(), state())
    assert there(saved) == ["embed-000001"]


def test_what_was_cut_off_at_another_step_is_cleared_up(saved: Checkpoints) -> None:
    """By the next one that is saved."""
    (saved.folder / ".embed-000007.part").mkdir(parents=True)
    saved.save(record(step=5), state())
    assert there(saved) == ["embed-000005"]
