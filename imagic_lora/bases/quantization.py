"""The linear layers of a frozen denoiser in 4 bits (NF4 of QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Linear, Module, Parameter

from .layers import BLOCK_4BIT


def quantize_linear(denoiser: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Replaces every linear layer by one on ``device`` that holds its weights in 4 bits and computes in ``dtype``.

    Layers whose rows are not whole blocks of 64 stay as they are: bitsandbytes' CPU kernel takes wrong scales for them (measured, 0.50.2).
    diffusers' own loader does the same as this, but refuses to on a CPU.

    Args:
        denoiser: a diffusers model; LoRA layers attached to it afterwards know its layers by themselves.
    """
    for module in list(denoiser.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is Linear and layer.in_features % BLOCK_4BIT == 0:
                setattr(module, name, _quantized(layer, dtype, device))
    denoiser.is_loaded_in_4bit = True  # PEFT asks for this


def _quantized(layer: Linear, dtype: torch.dtype, device: torch.device) -> Module:
    if isinstance(layer.weight, FakeTensor):
        return _Symbolic4bit(layer)
    from bitsandbytes.nn import Linear4bit, Params4bit

    new: Any = Linear4bit(
        layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    new.support_avx512bf16_for_cpu = False  # it would repack the weights for inference alone
    kind: Any = Params4bit  # it takes more than its annotation says
    weight = kind(layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=False, module=new)
    new.weight = weight.to(device)  # this quantises
    new.bias = layer.bias
    return new


class _Symbolic4bit(Linear):
    """A 4-bit layer that has the sizes but does not compute, for a plan's fake tensors, which bitsandbytes refuses."""

    def __init__(self, layer: Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight = Parameter(torch.empty(layer.weight.numel() // 2, dtype=torch.uint8), requires_grad=False)
        self.scales = Parameter(torch.empty(layer.weight.numel() // BLOCK_4BIT), requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        out = _SizedProduct.apply(x, self.out_features)
        return out if self.bias is None else out + self.bias


class _SizedProduct(torch.autograd.Function):
    """Forward and backward each unpack the weight for a moment."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, features: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.shape = x.shape
        unpacked = x.new_empty(features, x.shape[-1])
        return x.new_empty(*x.shape[:-1], len(unpacked))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        unpacked = gradient.new_empty(gradient.shape[-1], ctx.shape[-1])
        return gradient.new_empty((*ctx.shape[:-1], unpacked.shape[1])), None
