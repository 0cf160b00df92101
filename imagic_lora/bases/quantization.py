"""Quantization of the linear layers of a frozen denoiser or text encoder, in 4 bits (NF4 of QLoRA, arXiv 2305.14314) or in 8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Linear, Module, Parameter

from .layers import BLOCK_4BIT


def quantize_linear(denoiser: Any, kind: str, dtype: torch.dtype, device: torch.device, skipped: tuple[str, ...] = ()) -> None:
    """Replaces every linear layer in place by a layer with quantized weights on ``device`` that computes in ``dtype``.

    In 4 bits, layers whose number of input features is not a multiple of 64 stay unchanged: the CPU kernel of bitsandbytes uses wrong
    scales for them (measured with 0.50.2). diffusers' own loader quantizes in the same way, but does not support CPUs.

    Args:
        denoiser: a diffusers model, or a text encoder. PEFT recognises the layers when LoRA layers are attached afterwards.
        kind: ``nf4`` or ``int8``.
        dtype, device: of the computation.
        skipped: names of layers inside of their modules that stay unchanged.
    """
    for module in list(denoiser.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is not Linear or name in skipped:
                continue
            if kind == "int8":
                setattr(module, name, Int8Linear(layer, device))
            elif layer.in_features % BLOCK_4BIT == 0:
                setattr(module, name, _quantized(layer, dtype, device))
    if kind == "nf4":
        denoiser.is_loaded_in_4bit = True  # PEFT reads this attribute


class Int8Linear(Linear):
    """A linear layer with 8-bit weights: each row is 127 steps of its largest value (arXiv 2208.07339, section 2.1; weights only).

    Inputs are not quantized. A pass holds the weight in the precision of the input for its duration, the backward pass too.

    Args:
        layer: a linear layer; its bias is kept as it is.
        device: of the weights.
    """

    scales: Tensor

    def __init__(self, layer: Linear, device: torch.device) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        weight = layer.weight.detach().to(device)
        scales = weight.abs().amax(dim=1, keepdim=True).float().div_(127).clamp_(min=torch.finfo(torch.float32).tiny)
        self.weight = Parameter((weight / scales).round_().to(torch.int8), requires_grad=False)
        # no parameter: the precision of a model is that of its parameters of floating point
        self.register_buffer("scales", scales)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        product = _Int8Product.apply(x, self.weight, self.scales)
        return product if self.bias is None else product + self.bias.to(product.dtype)


class _Int8Product(torch.autograd.Function):
    """``x W^T`` for a weight of 8-bit rows; no gradient of the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(weight, scales)
        return x @ weight.to(x.dtype).mul_(scales.to(x.dtype)).T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, scales = ctx.saved_tensors
        return gradient @ weight.to(gradient.dtype).mul_(scales.to(gradient.dtype)), None, None


def _quantized(layer: Linear, dtype: torch.dtype, device: torch.device) -> Module:
    """4-bit version of a linear layer: NF4 weights, one fp32 scale for each block of 64, the bias unchanged."""
    if isinstance(layer.weight, FakeTensor):
        return _Symbolic4bit(layer)
    from bitsandbytes.nn import Linear4bit, Params4bit

    quantized: Any = Linear4bit(
        layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    quantized.support_avx512bf16_for_cpu = False  # the AVX-512 path repacks the weights for inference and then has no gradients
    parameter_class: Any = Params4bit  # Any, because its annotations lack some of the arguments
    weight = parameter_class(layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=False, module=quantized)
    quantized.weight = weight.to(device)  # bitsandbytes quantizes in this call
    quantized.bias = layer.bias
    return quantized


class _Symbolic4bit(Linear):
    """A 4-bit layer for fake tensors, which bitsandbytes does not support: it has the right sizes and does not compute."""

    def __init__(self, layer: Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight = Parameter(torch.empty(layer.weight.numel() // 2, dtype=torch.uint8), requires_grad=False)
        # no parameter: the precision of a model is that of its parameters of floating point, and bitsandbytes has none for scales
        self.register_buffer("scales", torch.empty(layer.weight.numel() // BLOCK_4BIT, dtype=torch.float32))
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        product = _SymbolicProduct.apply(x, self.out_features)
        return product if self.bias is None else product + self.bias


class _SymbolicProduct(torch.autograd.Function):
    """Product with a 4-bit weight that allocates what the real one does: each pass holds the dequantized weight for its duration."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, features: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.shape = x.shape
        dequantized = x.new_empty(features, x.shape[-1])
        return x.new_empty(*x.shape[:-1], len(dequantized))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dequantized = gradient.new_empty(gradient.shape[-1], ctx.shape[-1])
        return gradient.new_empty((*ctx.shape[:-1], dequantized.shape[1])), None
