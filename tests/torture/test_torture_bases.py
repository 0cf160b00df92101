"""A short torture with untrusted bases, and checks that it detects unsafe code."""

from __future__ import annotations

import importlib
import pickle
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from imagic_lora.core.errors import ImagicError
from torture import bases
from torture.bases import MODULE, code, known, pickled, torture


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """The folder that a canary creates when it is run."""
    return tmp_path / "marker"


def test_untrusted_bases(tmp_path: Path) -> None:
    """Four cases of every type."""
    verdicts = list(torture(28, 0, tmp_path))
    assert verdicts == [""] * 28


def test_every_case_has_a_name_of_its_own(tmp_path: Path, marker: Path) -> None:
    """A verdict identifies its case."""
    names = Counter(case.name for kind in known(tmp_path, marker) for case in kind)
    assert len(names) > 1000
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize("load", [lambda path: pickle.loads(path.read_bytes()), lambda path: torch.load(path, weights_only=False)])
def test_an_unpickled_canary_is_detected(tmp_path: Path, marker: Path, load) -> None:
    """By pickle, and by torch, which raises an error afterwards."""
    (tmp_path / "model.bin").write_bytes(pickled(marker))
    with suppress(RuntimeError, pickle.UnpicklingError):
        load(tmp_path / "model.bin")
    assert marker.is_dir()


def test_an_imported_canary_is_detected(tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a module, by its name."""
    (tmp_path / f"{MODULE}.py").write_text(code(marker))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module(MODULE)
    del sys.modules[MODULE]
    assert marker.is_dir()


def _unpickles(name: str, *_) -> None:
    for path in Path(name, "unet").glob("*"):
        with suppress(RuntimeError, pickle.UnpicklingError, EOFError, OSError):
            torch.load(path, weights_only=False)
    raise ImagicError("", "", "")


def _crashes(name: str, *_) -> None:
    raise KeyError(name)


def _rejects_everything(name: str, *_) -> None:
    raise ImagicError("", "", "")


@pytest.mark.parametrize(
    ("loader", "said"), [(_unpickles, "something of it was run"), (_crashes, "KeyError"), (_rejects_everything, "refused")]
)
def test_unsafe_loaders_are_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loader, said: str) -> None:
    """A loader that unpickles, one that raises another error, and one that rejects everything."""
    monkeypatch.setattr(bases, "load_base", loader)
    monkeypatch.setattr(bases, "known", lambda folder, marker: [list(bases._pickles(marker))])
    assert any(said in verdict for verdict in torture(60, 0, tmp_path))
