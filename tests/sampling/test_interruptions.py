"""An exception at any step of a change of a base: afterwards the base is bit-equal, or the next call restores it first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common import PROMPT, opened, same, slow_but, tiny_config, weights
from faults import Clock, by_calls, every_step
from torch import Tensor

from imagic_lora.adapters.adapter import Adapter
from imagic_lora.adapters.compress import compress
from imagic_lora.adapters.store import Store
from imagic_lora.bases.base import Base
from imagic_lora.core.config import Mode
from imagic_lora.core.errors import ImagicError
from imagic_lora.sampling.editor import Editor
from imagic_lora.training.fit import fit, result

CHANGES: list[tuple[Mode, Mode]] = [
    ("lora", "lora"), ("lora", "full"), ("full", "lora"), ("full", "full"), ("lora", "embedding"), ("full", "embedding"),
]  # fmt: skip
MOST = 8  # steps of a change; `make torture` tries many more

Fitted = Callable[..., Adapter]


def state(base: Base) -> tuple[Any, ...]:
    """All of the denoiser but the values of its weights."""
    module = base.denoiser
    parameters = [(name, p.dtype, p.device, p.requires_grad, p.grad) for name, p in module.named_parameters()]
    hooks = [len(one._forward_hooks) + len(one._forward_pre_hooks) for one in module.modules()]
    hooks += [len(getattr(p, "_post_accumulate_grad_hooks", None) or ()) for p in module.parameters()]
    peft = bool(getattr(module, "peft_config", None)), bool(getattr(module, "_hf_peft_config_loaded", False))
    return [(name, type(one), one.training) for name, one in module.named_modules()], parameters, hooks, peft


@pytest.mark.parametrize("lasting", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["once", "lasting"])
@pytest.mark.parametrize(("before", "after"), slow_but(CHANGES[:1], CHANGES))
def test_an_interrupted_change_of_adapters(folder: Path, fitted: Fitted, before: Mode, after: Mode, lasting: bool) -> None:
    """The next load is that of a new editor, bit for bit, or close gives the base back."""
    first, second, base = fitted(before), fitted(after, 1), opened(folder)
    own, bare, editor = weights(base.denoiser), state(base), Editor(base)
    editor.load(second)
    expected, loaded = weights(base.denoiser), state(base)

    def change(clock: Clock) -> None:
        editor.load(first)
        by_calls(clock, lambda: editor.load(second))

    for number, _ in enumerate(every_step(change, lasting=lasting, most=MOST)):
        if number % 2:
            editor.close()
            assert same(weights(base.denoiser), own)
            assert state(base) == bare
        editor.load(second)
        assert same(weights(base.denoiser), expected)
        assert state(base) == loaded


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_an_interrupted_close(folder: Path, fitted: Fitted, mode: Mode) -> None:
    """The base is restored before the exception leaves."""
    adapter, base = fitted(mode), opened(folder)
    own, bare, editor = weights(base.denoiser), state(base), Editor(base)

    def change(clock: Clock) -> None:
        editor.load(adapter)
        by_calls(clock, editor.close)

    for _ in every_step(change, most=2 * MOST):
        assert same(weights(base.denoiser), own)
        assert state(base) == bare


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("use", ["close", "another editor", "fit"])
def test_a_base_that_could_not_be_restored_is_restored_before_its_next_use(
    folder: Path, photo_file: Path, fitted: Fitted, tmp_path: Path, mode: Mode, use: str
) -> None:
    """Exceptions go on until the close has given up: the editor, another one and a fit each restore the base before they use it."""
    base = opened(folder, "full")
    own, bare, editor = weights(base.denoiser), state(base), Editor(base)
    uses: dict[str, Callable[[], object]] = {
        "close": editor.close,
        "another editor": lambda: Editor(base).load(fitted("embedding")),
        "fit": lambda: result(fit(photo_file, PROMPT, tiny_config(folder, "embedding"), Store(tmp_path), "one", base=base, overwrite=True)),
    }

    def change(clock: Clock) -> None:
        editor.load(fitted(mode))
        by_calls(clock, editor.close)

    for _ in every_step(change, lasting=True, most=3):
        assert base.alteration
        uses[use]()
        assert same(weights(base.denoiser), own)
        assert state(base) == bare


def test_a_base_in_use_is_refused_by_name(folder: Path, photo_file: Path, fitted: Fitted, tmp_path: Path) -> None:
    """An editor has an adapter loaded: neither a fit nor another editor takes that base for its own; closed, both may."""
    base, store = opened(folder), Store(tmp_path)
    editor, other = Editor(base), Editor(base)
    editor.load(fitted("lora"))
    tuned = weights(base.denoiser)

    def fitting() -> object:
        return result(fit(photo_file, PROMPT, tiny_config(folder, "embedding"), store, "one", base=base))

    for refused in (
        fitting,
        lambda: other.load(fitted("lora", 1)),
        lambda: other.load(fitted("full")),
        lambda: other.load(fitted("embedding")),
    ):
        with pytest.raises(ImagicError, match="is in use: an unfinished fit or an Editor"):
            refused()
        assert same(weights(base.denoiser), tuned)
    editor.close()
    fitting()
    other.load(fitted("lora", 1))


@pytest.mark.parametrize("mode", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_an_interrupted_fit(folder: Path, photo_file: Path, tmp_path: Path, mode: Mode) -> None:
    """At any step, its training and the writing of its adapter among them: the base is as it was, and the name can be written again."""
    base, store, config = opened(folder, "full"), Store(tmp_path), tiny_config(folder, mode)
    own, bare = weights(base.denoiser), state(base)

    def change(clock: Clock) -> None:
        by_calls(clock, lambda: result(fit(photo_file, PROMPT, config, store, "one", base=base, overwrite=True)))

    for _ in every_step(change, most=MOST):
        assert same(weights(base.denoiser), own)
        assert state(base) == bare
        store.check_free("one", overwrite=True)


@pytest.mark.parametrize("in_backward", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_fit_after_an_interrupted_step_of_another(folder: Path, photo_file: Path, tmp_path: Path, in_backward: bool) -> None:
    """An interruption between the gradients and their use leaves neither gradients nor hooks: the next fit is as on a new base."""
    config, calls = tiny_config(folder, "full"), [(torch, "_foreach_norm"), (torch.linalg, "vector_norm")]
    calls += [(Tensor, "register_post_accumulate_grad_hook")]

    def fitting(base: Base, name: str) -> Adapter:
        adapter = result(fit(photo_file, PROMPT, config, Store(tmp_path), name, base=base, overwrite=True))
        assert adapter
        return adapter

    expected = fitting(opened(folder, "full", optimizer_in_backward=in_backward), "expected").record.files
    base = opened(folder, "full", optimizer_in_backward=in_backward)
    bare = state(base)
    for _ in every_step(lambda clock: by_calls(clock, lambda: fitting(base, "one"), calls), most=5):
        assert state(base) == bare
    found = fitting(base, "one").record.files
    assert {name: digest for name, digest in found.items() if name.endswith(".safetensors")} == {
        name: digest for name, digest in expected.items() if name.endswith(".safetensors")
    }


def test_an_interrupted_compression(folder: Path, fitted: Fitted, tmp_path: Path) -> None:
    """The base is as it was, and the adapter too."""
    base, store = opened(folder), Store(tmp_path)
    own, bare = weights(base.denoiser), state(base)

    def change(clock: Clock) -> None:
        by_calls(clock, lambda: compress(fitted("full"), base, 2, store, "small", True))

    for _ in every_step(change, most=MOST):
        assert same(weights(base.denoiser), own)
        assert state(base) == bare


def test_an_interrupted_move_is_completed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the next one to any device, although the first of the module's tensors is there already."""
    base, moves = opened(folder), []
    encoder = base._helpers["text_encoder"]
    with monkeypatch.context() as patch:
        patch.setattr(type(encoder), "to", lambda self, device: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            base._move(encoder, torch.device("meta"))
        patch.setattr(type(encoder), "to", lambda self, device: moves.append(device))
        base._move(encoder)
        base._move(encoder)
    assert moves == [base.runtime.device]
