"""A short torture of bases from strangers, and that it can fail: the canaries sing, and whoever is careless is caught."""

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
    """What a canary makes."""
    return tmp_path / "marker"


def test_bases_from_strangers(tmp_path: Path) -> None:
    """Four cases of every kind."""
    verdicts = list(torture(28, 0, tmp_path))
    assert verdicts == [""] * 28


def test_every_case_has_a_name_of_its_own(tmp_path: Path, marker: Path) -> None:
    """So that a verdict tells which."""
    names = Counter(case.name for kind in known(tmp_path, marker) for case in kind)
    assert len(names) > 1000
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize("load", [lambda path: pickle.loads(path.read_bytes()), lambda path: torch.load(path, weights_only=False)])
def test_an_unpickled_canary_sings(tmp_path: Path, marker: Path, load) -> None:
    """Plainly, and by torch, which complains afterwards."""
    (tmp_path / "model.bin").write_bytes(pickled(marker))
    with suppress(RuntimeError, pickle.UnpicklingError):
        load(tmp_path / "model.bin")
    assert marker.is_dir()


def test_an_imported_canary_sings(tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a module by its name."""
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


def _takes_anything(name: str, *_) -> None:
    raise ImagicError("", "", "")


@pytest.mark.parametrize(
    ("careless", "said"), [(_unpickles, "something of it was run"), (_crashes, "KeyError"), (_takes_anything, "refused")]
)
def test_the_careless_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, careless, said: str) -> None:
    """Who unpickles, who lets an error through, and who refuses what is harmless."""
    monkeypatch.setattr(bases, "load_base", careless)
    monkeypatch.setattr(bases, "known", lambda folder, marker: [list(bases._pickles(marker))])
    assert any(said in verdict for verdict in torture(60, 0, tmp_path))
