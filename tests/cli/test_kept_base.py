"""An editor that stays loaded between commands of one process: the same images without another loading, and its memory when it is not."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from common import Run

import imagic_lora.bases.loading.registry as registry
from imagic_lora.adapters.adapter import Adapter
from imagic_lora.adapters.store import Store
from imagic_lora.core.machine import free_host_memory, reusable_memory
from imagic_lora.photos.reading import read_metadata
from imagic_lora.sampling.kept import KeptEditor

EDIT = ("edit", "rex", "--steps", 2, "--overwrite")


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The bases that were loaded."""
    found, load = [], registry.load_base

    def counted(name: str, *arguments: Any) -> Any:
        found.append(name)
        return load(name, *arguments)

    monkeypatch.setattr(registry, "load_base", counted)
    return found


@pytest.fixture
def run(run: Run, tmp_path: Path, fitted: Callable[..., Adapter]) -> Run:
    """Runs a command in a folder whose store has the adapters ``rex`` and ``full``."""
    for name, mode in (("rex", "lora"), ("full", "full")):
        shutil.copytree(fitted(mode).folder, tmp_path / "adapters" / name)
    return run


def pixels(name: str = "rex") -> dict[str, str]:
    return {path.name: read_metadata(path)["pixels_sha256"] for path in Path("outputs", name).glob("eta*.png")}


def test_later_edits_take_the_base_and_make_the_same_images(run: Run, loaded: list[str]) -> None:
    """Other settings, another adapter of the same base, a sweep in between; each image is that of a process of its own."""
    commands = [
        (*EDIT, "--eta", 0.7),
        (*EDIT, "--eta", 1, "--scheduler", "euler", "--prompt", "a bird"),
        ("sweep", "rex", "--steps", 2, "--eta", "0.4,1", "--seeds", 1),
        ("edit", "full", "--steps", 2, "--eta", 0.7),
        (*EDIT, "--eta", 0.4, "--start", "inverted"),
    ]
    for command in commands:
        code, _, err = run(*command)
        assert code == 0, err
    expected = pixels() | pixels("full")
    assert len(loaded) == len(commands)
    shutil.rmtree("outputs")
    loaded.clear()
    kept = KeptEditor()
    for command in commands:
        with kept.reused():
            assert run(*command)[0] == 0
    assert len(loaded) == 1
    assert pixels() | pixels("full") == expected


@pytest.mark.slow
def test_another_base_other_levers_and_changed_files_load_anew(run: Run, loaded: list[str], tmp_path: Path) -> None:
    kept, source = KeptEditor(), Path(Store(Path("adapters")).read("rex").record.base.name)
    shutil.copytree(source, tmp_path / "base")
    same, calls = ("--base", tmp_path / "base"), []
    for flags in (same, same, (*same, "--vae-slicing"), same, (*same, "--force"), (), ()):
        with kept.reused():
            assert run(*EDIT, *flags)[0] == 0
        calls.append(len(loaded))
    assert calls == [1, 1, 2, 3, 4, 5, 5]
    with kept.reused():
        assert run(*EDIT, *same)[0] == 0
    config = tmp_path / "base" / "model_index.json"
    config.write_text(config.read_text() + "\n")
    with kept.reused():
        assert run(*EDIT, *same)[0] == 0
    assert len(loaded) == 7


def test_the_memory_of_a_kept_base_counts_as_free_and_is_freed(run: Run) -> None:
    """While a command has not opened it; after release, and after a command that fails, nothing of it is left."""
    kept = KeptEditor()
    with kept.reused():
        assert run(*EDIT)[0] == 0
        assert reusable_memory("cpu") == 0  # in use
    editor = kept._editor
    assert editor is not None
    size, gone = sum(one.nbytes for one in editor.base.denoiser.parameters()), weakref.ref(editor.base.denoiser)
    del editor
    assert reusable_memory("cpu") == 0
    with kept.reused():
        assert reusable_memory("cpu") >= size
        assert reusable_memory("cuda") == 0
        assert free_host_memory() > size
    assert gone() is not None
    kept.release()
    assert gone() is None
    with kept.reused():
        assert run(*EDIT)[0] == 0
    with pytest.raises(ZeroDivisionError), kept.reused():
        raise ZeroDivisionError
    assert kept._editor is None
