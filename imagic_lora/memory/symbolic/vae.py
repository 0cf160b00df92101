"""Encoder and decoder of an AutoencoderKL on symbolic tensors."""

from __future__ import annotations

from typing import Any

from .layers import Layers
from .tape import SymbolicTensor

_RGB = 3


def vae_forward(config: dict[str, Any], layers: Layers, pixels: int, images: int, decode: bool) -> None:
    """Runs the encoder or the decoder of an ``AutoencoderKL``.

    Args:
        config: of the VAE.
        layers: runs and counts the layers.
        pixels: number of pixels of one image.
        images: number of images.
        decode: True for the decoder (latents to images), False for the encoder.
    """
    block_channels, itemsize = config["block_out_channels"], layers.options.itemsize
    latent = config["latent_channels"]
    in_pixels = images * (pixels // 4 ** (len(block_channels) - 1) if decode else pixels)
    first, last = (latent, _RGB) if decode else (_RGB, 2 * latent)
    order = [*reversed(block_channels)] if decode else block_channels
    if decode and config.get("use_post_quant_conv", True):
        layers.count_weights(latent * latent, latent)  # post_quant_conv
    channels = order[0]
    h = layers.conv(layers.tape.tensor(in_pixels * first, itemsize), first, channels)
    if decode:
        h = _mid_block(layers, h, channels)
    for level, out_channels in enumerate(order):
        held = h  # diffusers' caller holds the input of a block until the block returns
        for _ in range(config["layers_per_block"] + (1 if decode else 0)):
            h, channels = layers.resnet(h, channels, out_channels), out_channels
        if level + 1 < len(order):
            h = layers.tape.op([h], h.numel * 4, h.itemsize) if decode else h
            h = layers.conv(h, channels, channels, stride=1 if decode else 2)
    held = h  # noqa: F841
    if not decode:
        h = _mid_block(layers, h, channels)
    h = layers.silu(layers.norm(h, channels))
    layers.conv(h, channels, last)
    if not decode and config.get("use_quant_conv", True):
        layers.count_weights(4 * latent * latent, 2 * latent)  # quant_conv


def _mid_block(layers: Layers, h: SymbolicTensor, channels: int) -> SymbolicTensor:
    """Two residual blocks with self-attention between them."""
    h = layers.resnet(h, channels, channels)
    n = layers.norm(h, channels)
    q, k, v = (layers.linear(n, channels, channels) for _ in range(3))
    out = layers.linear(layers.attention(q, k, v), channels, channels)
    del q, k, v, n
    h = layers.rescale(layers.add(out, h))
    return layers.resnet(h, channels, channels)
