"""Half of an AutoencoderKL on symbolic tensors."""

from __future__ import annotations

from typing import Any

from .layers import Layers
from .tape import SymbolicTensor


def vae_forward(config: dict[str, Any], layers: Layers, pixels: int, pictures: int, decode: bool) -> None:
    """Half of an ``AutoencoderKL`` in sizes.

    Args:
        pixels: of one picture.
        decode: latents to picture; picture to latents otherwise.
    """
    channels, width = config["block_out_channels"], layers.options.width
    latent = config["latent_channels"]
    area = pictures * (pixels // 4 ** (len(channels) - 1) if decode else pixels)
    ends = (latent, 3) if decode else (3, 2 * latent)
    order = [*reversed(channels)] if decode else channels
    if decode:
        layers._own(latent * latent, latent)  # post_quant_conv
    here = order[0]
    h = layers.conv(layers.tape.tensor(area * ends[0], width), ends[0], here)
    if decode:
        h = _middle(layers, h, here)
    for k, outside in enumerate(order):
        came = h  # the caller holds what it gave a block
        for _ in range(config["layers_per_block"] + (1 if decode else 0)):
            h, here = layers.resnet(h, here, outside, None, 0), outside
        if k + 1 < len(order):
            h = layers.tape.op([h], h.count * 4, h.width) if decode else h
            h = layers.conv(h, here, here, shrink=1 if decode else 2)
    came = h  # noqa: F841
    if not decode:
        h = _middle(layers, h, here)
    h = layers.silu(layers.norm(h, here))
    layers.conv(h, here, ends[1])
    if not decode:
        layers._own(4 * latent * latent, 2 * latent)  # quant_conv


def _middle(layers: Layers, h: SymbolicTensor, channels: int) -> SymbolicTensor:
    h = layers.resnet(h, channels, channels, None, 0)
    n = layers.norm(h, channels)
    q, k, v = (layers.linear(n, channels, channels) for _ in range(3))
    out = layers.linear(layers.attend(q, k, v), channels, channels)
    del q, k, v, n
    h = layers.scaled(layers.add(out, h))
    return layers.resnet(h, channels, channels, None, 0)
