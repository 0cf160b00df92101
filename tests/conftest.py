"""Tiny random-weight bases, a tiny photo, and adapters fitted to it."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import collecting  # noqa: F401  # first: it turns the garbage collection off
import numpy as np
import pytest
import torch
from common import KINDS, PROMPT, Run, opened, tiny_config
from PIL import Image
from tiny import save_tiny, save_tiny_critters_dit, save_tiny_sdxl

import imagic_lora.cli.app as cli
import imagic_lora.cli.console as console
from imagic_lora.adapters.adapter import Adapter
from imagic_lora.adapters.store import Store
from imagic_lora.bases.base import Base
from imagic_lora.bases.loading.known import SHIPPED
from imagic_lora.bases.loading.registry import load_base
from imagic_lora.core.config import Mode
from imagic_lora.core.device_config import MemoryConfig
from imagic_lora.core.runtime import resolve_runtime
from imagic_lora.training.fit import fit, result

torch.backends.mkldnn.enabled = False  # oneDNN prepares every convolution, which takes longer than those of tiny bases
if "PYTEST_XDIST_WORKER" in os.environ:  # one thread for each worker and its child processes
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_itemcollected(item: pytest.Item) -> None:
    """``make test-web`` collects one folder only."""
    if item.get_closest_marker("web") and not item.path.is_relative_to(Path(__file__).parent / "web"):
        raise pytest.UsageError(f"{item.nodeid} is marked web. Expected: a test in tests/web. Move it there.")


def pytest_collection_finish() -> None:
    """Exempts what is imported by now from garbage collection, which otherwise looks at half a million objects again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def plans(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the cache of rehearsals, which is not the user's own."""
    folder = tmp_path_factory.mktemp("plans")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("imagic_lora.memory.rehearsed._folder", lambda: folder)
        yield folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of a tiny base for each prediction type."""
    root = tmp_path_factory.mktemp("bases")
    return {kind: save_tiny(root / kind, prediction_type=kind) for kind in KINDS}


@pytest.fixture(scope="session")
def dit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Transformer and scheduler of a small ``critters-dit`` with random weights."""
    return save_tiny_critters_dit(tmp_path_factory.mktemp("dit") / "base")


@pytest.fixture
def tiny_dit(dit_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The name ``critters-dit`` is a small base with random weights; returns its folder."""
    monkeypatch.setitem(SHIPPED, "critters-dit", SHIPPED["critters-dit"].model_copy(update={"source": str(dit_folder)}))
    return dit_folder


@pytest.fixture(scope="session")
def folder(folders: dict[str, Path]) -> Path:
    """The tiny base that predicts the noise."""
    return folders["epsilon"]


@pytest.fixture(scope="module")
def named(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    """A function that opens a base of each kind: prediction types, spacings, families, and eight latent channels."""
    root = tmp_path_factory.mktemp("more")

    @cache
    def base(name: str) -> Base:
        if name == "critters":
            return load_base("critters", resolve_runtime(MemoryConfig(device="cpu")))
        if name == "sdxl":
            return opened(save_tiny_sdxl(root / name))
        if name == "sample":
            return opened(save_tiny(root / name, prediction_type="sample"))  # pyright: ignore[reportArgumentType]
        if name == "trailing":
            folder = save_tiny(root / name, scheduler="euler")
            config = folder / "scheduler" / "scheduler_config.json"
            linspace = config.read_text()
            assert "linspace" in linspace
            config.write_text(linspace.replace("linspace", "trailing"))
            return opened(folder)
        return opened(folders[name])

    return base


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose linear layers have rows of a multiple of 64 values, the block size of 4-bit quantization."""
    return save_tiny(tmp_path_factory.mktemp("wide") / "base", width=128)


@pytest.fixture(scope="session")
def photo_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A photo of 50 x 37 pixels, which has to be cropped and scaled."""
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    down, across = np.mgrid[0:37, 0:50]
    Image.fromarray(np.stack([5 * across, 6 * down, 128 + 100 * np.sin(across / 4)], axis=-1).astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="session")
def fitted(folders: dict[str, Path], photo_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Adapter]:
    """A function that returns the adapter of a mode, seed and prediction type, fitted once; tests must not change it."""
    store = Store(tmp_path_factory.mktemp("adapters"))

    @cache
    def make(mode: Mode, seed: int, kind: str) -> Adapter:
        adapter = result(fit(photo_file, PROMPT, tiny_config(folders[kind], mode, seed=seed), store, f"{mode}-{seed}-{kind}"))
        assert adapter is not None
        return adapter

    def fitted_adapter(mode: Mode, seed: int = 0, kind: str = "epsilon") -> Adapter:
        return make(mode, seed, kind)

    return fitted_adapter


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in an empty folder: its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console.err, "width", 200)

    def command(*tokens: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main([str(token) for token in tokens])
        out, err = capsys.readouterr()
        return code, out, " ".join(err.split())

    return command
