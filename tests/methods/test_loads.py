"""The predicted peak memory of methods: against a count of every tensor while they run, and at the size of Stable Diffusion 1.5."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from common import each, opened
from PIL import Image
from tiny import save_inpainting
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Module

from imagic_lora.bases.base import Base
from imagic_lora.bases.loading.configs import architecture
from imagic_lora.bases.loading.known import SHIPPED
from imagic_lora.core.runtime import DTYPES, Runtime
from imagic_lora.core.settings.recipes import recipe_of
from imagic_lora.core.settings.resolve import resolve
from imagic_lora.memory.tracker import Tracker
from imagic_lora.methods.attention.control import AttentionControl
from imagic_lora.methods.attention.words import Alignment
from imagic_lora.methods.catalogue import SAMPLING
from imagic_lora.methods.comparison.candidates import candidate, predicted_peak
from imagic_lora.methods.method import Context, EditRequest
from imagic_lora.methods.sampled import SamplingMethod
from imagic_lora.sampling.attention import map_bytes, tapped
from imagic_lora.training.rehearsing.fake_tensors import convert
from imagic_lora.training.rehearsing.random_base import random_base, random_conditioning

GIB = 2**30


def short(name: str) -> SamplingMethod[Any]:
    """A method of four steps at guidance scale 3."""
    kind = SAMPLING[name]
    skip = {"skip": 1} if name == "edit-friendly" else {}
    return kind({name: kind.config_class.model_validate({"steps": 4, "guidance_scale": 3.0} | skip)})


def wanted() -> EditRequest:
    photo, mask = Image.radial_gradient("L").resize((64, 64)).convert("RGB"), Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    return EditRequest(photo, "a red dog sitting", "a cat sitting", mask)


@pytest.mark.slow
@each("name", [name for name, method in SAMPLING.items() if "unet" in method.supports])
def test_the_predicted_peak_is_that_of_a_run(named: Any, name: str) -> None:
    """Within 3%, allowances not included, whether it has guidance, gradients or attention maps."""
    check_peak(named("critters"), short(name))


@pytest.mark.slow
def test_the_predicted_peak_of_an_inpainting_model_is_that_of_a_run(tmp_path: Path) -> None:
    check_peak(opened(save_inpainting(Path(SHIPPED["critters"].source), tmp_path / "base")), short("inpaint"))


def check_peak(base: Base, method: SamplingMethod[Any]) -> None:
    pipe = base.pipeline("inpaint" if base.architecture.inpaints else "text2image")
    with Tracker() as tracker:
        for module in (base.denoiser, pipe.vae):  # the text encoder is loaded while it encodes, and released
            tracker.adopt([*module.parameters(), *module.buffers()])
        held = tracker.now
        tracker.reset_peak()
        list(method.edit(Context(base), wanted()))
    peak, need = predicted_peak(method, base)
    assert peak is not None
    assert need is not None
    assert tracker.peak == pytest.approx(need, rel=0.03)
    assert tracker.peak - held == pytest.approx(need - held, rel=0.35)


class Changes(AttentionControl):
    """Changes the words in every step; the number of steps is a tensor, which a fake one does not tell."""

    def _changes_words(self) -> bool:
        return True


@pytest.mark.slow
def test_the_maps_of_stable_diffusion_fit_their_prediction() -> None:
    """Of Prompt-to-Prompt on self-attention of 64x64 positions, where they are most of the peak: at least 95% of the sum, and below it."""
    plan = resolve({"base": "sd15", "tune": {"mode": "embedding"}, "memory": {"dtype": "fp16"}}, {}, recipe_of("sd15"))
    runtime = Runtime(torch.device("cpu"), DTYPES["fp16"], "adam", plan.memory.model_copy(update={"attention": "sdpa"}), {})
    with FakeTensorMode(), patch.object(Module, "_apply", convert), Tracker() as tracker, torch.no_grad():
        base: Any = random_base(architecture("sd15"), plan, runtime)
        latents, times = torch.zeros(3, 4, 64, 64, dtype=torch.float16), torch.zeros(3, dtype=torch.int64)
        tokens = random_conditioning(base, 512, 512).expand(3).tokens.half()
        change = Changes(Alignment(torch.eye(77), torch.ones(77)), torch.ones(77), torch.full((77,), 10), 10, 64**2, None)

        def peak() -> int:
            held = tracker.now
            tracker.reset_peak()
            base.denoiser(latents, times, tokens)
            return tracker.peak - held

        without = peak()
        with tapped(base, change):
            measured = peak()
        predicted = without + map_bytes(base, 3, 64**2)
    assert 4 * GIB < 0.95 * predicted <= measured <= predicted


def test_a_method_that_does_not_fit_is_left_out_with_the_reason(named: Any) -> None:
    """By a byte; the method runs where it just fits."""
    base: Base = named("critters")
    method = short("null-text")
    _, need = predicted_peak(method, base)
    assert need is not None
    fits, misses = (candidate(method, base, wanted(), need - less, named=False) for less in (0, 1))
    assert fits.method is method
    assert fits.left_out is None
    assert misses.method is None
    assert misses.left_out == f"needs {need / 2**20:.1f} MiB (predicted), and {(need - 1) / 2**20:.1f} MiB is free"
