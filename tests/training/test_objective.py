"""The loss: against the equation, written out in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from common import KINDS, opened
from diffusers import UNet2DConditionModel
from torch import Tensor

from imagic_lora.core.conditioning import Conditioning
from imagic_lora.training.objective import denoising_loss


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents of one photo, its token states, noise and times of three samples."""
    generator = torch.Generator().manual_seed(5)
    latents, tokens, noise = (torch.randn(shape, generator=generator) for shape in [(1, 4, 8, 6), (1, 16, 16), (3, 4, 8, 6)])
    return latents, tokens, noise, torch.tensor([0.02, 0.4, 0.97], dtype=torch.float64)


def explicit(folder: Path, kind: str, latents: Tensor, tokens: Tensor, noise: Tensor) -> Tensor:
    """|| target - f(x_t, t, e) ||^2 of each sample, by hand."""
    steps = torch.tensor([20, 400, 970])
    kept = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)[steps].reshape(3, 1, 1, 1)
    target = noise if kind == "epsilon" else kept.sqrt() * noise - (1 - kept).sqrt() * latents
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").double()
    predicted = unet(kept.sqrt() * latents + (1 - kept).sqrt() * noise, steps, tokens.repeat(3, 1, 1)).sample
    return ((predicted - target) ** 2).mean(dim=(1, 2, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_the_equation(folders: dict[str, Path], kind: str) -> None:
    """[B], one mean of squares a sample."""
    latents, tokens, noise, times = inputs()
    loss = denoising_loss(opened(folders[kind]), latents, Conditioning(tokens), noise, times)
    expected = explicit(folders[kind], kind, latents.double(), tokens.double(), noise.double())
    assert loss.shape == (3,)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_embedding_is_that_of_the_equation(folders: dict[str, Path], kind: str) -> None:
    """It reaches the tokens through a frozen model."""
    latents, tokens, noise, times = inputs()
    trained = tokens.clone().requires_grad_()
    reference = tokens.double().requires_grad_()
    (gradient,) = torch.autograd.grad(denoising_loss(opened(folders[kind]), latents, Conditioning(trained), noise, times).mean(), trained)
    loss = explicit(folders[kind], kind, latents.double(), reference, noise.double()).mean()
    (expected,) = torch.autograd.grad(loss, reference)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
