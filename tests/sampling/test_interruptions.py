"""An exception at any step of a change of a base: afterwards the base is bit-equal, or the next call restores it first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from common import array, opened, same, weights
from faults import Clock, by_calls, every_step

from imagic_lora.adapters.adapter import Adapter
from imagic_lora.bases.base import Base
from imagic_lora.core.config import EditConfig
from imagic_lora.sampling.editor import Editor

CONFIG = EditConfig(steps=2, guidance_scale=3.0)
CHANGES = [("lora", "lora"), ("lora", "full"), ("full", "lora"), ("full", "full"), ("lora", "embedding"), ("full", "embedding")]
STRIDE = 7  # of the copies of one state, which are all alike; `make torture` tries every step

Fitted = Callable[..., Adapter]


def state(base: Base) -> tuple[Any, ...]:
    """All of the denoiser but the values of its weights."""
    module = base.denoiser
    parameters = [(name, p.dtype, p.device, p.requires_grad) for name, p in module.named_parameters()]
    hooks = [len(one._forward_hooks) + len(one._forward_pre_hooks) for one in module.modules()]
    peft = bool(getattr(module, "peft_config", None)), bool(getattr(module, "_hf_peft_config_loaded", False))
    return [(name, type(one), one.training) for name, one in module.named_modules()], parameters, hooks, peft


def picture(editor: Editor, adapter: Adapter) -> np.ndarray:
    """One edit."""
    return array(next(editor.edit(adapter, [0.6], [5], CONFIG)).image)


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_an_interrupted_change_of_adapters(folder: Path, fitted: Fitted, before: str, after: str, lasting: bool) -> None:
    """The next edit is bit-equal to one without an interruption, and close gives the base back."""
    first, second = fitted(before), fitted(after, 1)
    base = opened(folder)
    own, bare = weights(base.denoiser), state(base)
    editor = Editor(base)
    expected = picture(editor, second)

    def change(clock: Clock) -> None:
        editor.load(first)
        by_calls(clock, lambda: editor.load(second))

    for clock in every_step(change, lasting=lasting, stride=STRIDE):
        if clock.at and clock.at % 2:
            editor.close()
            assert same(weights(base.denoiser), own)
        assert np.array_equal(picture(editor, second), expected)
    editor.close()
    assert same(weights(base.denoiser), own)
    assert state(base) == bare


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_an_interrupted_close(folder: Path, fitted: Fitted, mode: str, lasting: bool) -> None:
    """One exception: the base is restored before it leaves. Exceptions at every further step: another close completes it."""
    adapter, base = fitted(mode), opened(folder)
    own, bare, editor = weights(base.denoiser), state(base), Editor(base)

    def change(clock: Clock) -> None:
        editor.load(adapter)
        by_calls(clock, editor.close)

    for _ in every_step(change, lasting=lasting, stride=STRIDE):
        if lasting:
            editor.close()
        assert same(weights(base.denoiser), own)
        assert state(base) == bare
