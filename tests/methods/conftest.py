"""Bases of each family."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from common import opened
from tiny import save_tiny_sdxl

from imagic_lora.bases.base import Base
from imagic_lora.bases.loading.registry import load_base
from imagic_lora.core.config import MemoryConfig
from imagic_lora.core.runtime import resolve_runtime


@pytest.fixture(scope="module")
def named(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    """A function that opens a base of each family."""
    root = tmp_path_factory.mktemp("more")

    @cache
    def base(name: str) -> Base:
        if name == "critters":
            return load_base("critters", resolve_runtime(MemoryConfig(device="cpu")))
        return opened(save_tiny_sdxl(root / name) if name == "sdxl" else folders[name])

    return base
