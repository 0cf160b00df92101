"""Layers of a U-Net and a VAE on symbolic tensors."""

from __future__ import annotations

from dataclasses import dataclass

from ...bases.layers import BLOCK_4BIT
from ...core.errors import ImagicError
from ..optimizer_states import state_bytes
from .tape import SymbolicTensor, Tape

_FP32 = 4  # bytes of an element


class NotPlanned(ImagicError):
    """The memory of a model cannot be predicted: it has parts that have no symbolic counterpart."""


@dataclass
class LayerOptions:
    """Precision of the layers, and what is trained.

    Args:
        itemsize: bytes of an element in the arithmetic.
        weight_itemsize: bytes of an element of a weight; if it differs from ``itemsize``, autocast is on.
        trained: the weights are trained.
        rank: of LoRA layers; 0 for none.
        targets: names of the layers that LoRA adapts.
        adapters: number of LoRA layers on each of these: one for every photo that is fitted together, all in one batch.
        quantize: quantization of linear layers: ``none``, ``nf4`` or ``int8``.
        fp32_norms: autocast runs normalization layers in fp32, as it does on CUDA and not on the CPU.
        optimizer: name of the optimizer whose states are counted.
    """

    itemsize: int
    weight_itemsize: int
    trained: bool = False
    rank: int = 0
    targets: tuple[str, ...] = ()
    adapters: int = 1
    quantize: str = "none"
    fp32_norms: bool = True
    optimizer: str = "adam8bit"

    @property
    def autocast(self) -> bool:
        """Whether autocast is on."""
        return self.weight_itemsize != self.itemsize


@dataclass
class Layers:
    """Runs layers on a tape, and counts their weights. A call counts the weights of its layer once more, a recomputation included.

    Attributes:
        tape: records the operations.
        options: precision of the layers, and what is trained.
        parameters: number of parameters of the model so far.
        bytes: of the weights.
        lora: number of parameters of LoRA layers.
        states: bytes of the optimizer's states for the weights.
        lora_states: bytes of the optimizer's states for the LoRA layers.
        cache: the weights that autocast has cast and cached; None if its cache is off.
    """

    tape: Tape
    options: LayerOptions
    parameters: int = 0
    bytes: int = 0
    lora: int = 0
    states: int = 0
    lora_states: int = 0
    cache: list[SymbolicTensor] | None = None

    def count_weights(self, *sizes: int, rows: int = 1, quantize: str = "none") -> list[tuple[int, int]]:
        """Counts the weights of a layer.

        Args:
            sizes: number of elements of each weight, the matrix first.
            rows: of the matrix; 1 for a layer without one.
            quantize: quantization of the matrix.

        Returns:
            Numel and itemsize of the gradients of these weights; empty if they are not trained.
        """
        itemsize = self.options.weight_itemsize
        self.parameters += sum(sizes)
        shapes = [(rows, sizes[0] // rows) if rows > 1 else (sizes[0],), *((size,) for size in sizes[1:])]
        self.states += sum(state_bytes(self.options.optimizer, *shape) for shape in shapes)
        match quantize:
            case "nf4":
                self.bytes += sizes[0] // 2 + sizes[0] // BLOCK_4BIT * _FP32 + sum(sizes[1:]) * itemsize
            case "int8":
                self.bytes += sizes[0] + rows * _FP32 + sum(sizes[1:]) * itemsize
            case _:
                self.bytes += sum(sizes) * itemsize
        return [(size, itemsize) for size in sizes] if self.options.trained else []

    def _quantization(self, in_features: int) -> str:
        """The quantization of a linear layer (:mod:`imagic_lora.bases.quantization`)."""
        quantize = self.options.quantize
        return "none" if quantize == "nf4" and in_features % BLOCK_4BIT else quantize

    def cast(self, x: SymbolicTensor, itemsize: int) -> SymbolicTensor:
        """Casts a tensor to another itemsize; a tensor of that itemsize is returned as it is."""
        return x if x.itemsize == itemsize else self.tape.op([x], x.numel, itemsize)

    def _matmul(self, x: SymbolicTensor, numel: int, rows: int, sizes: tuple[int, ...], quantize: str = "none") -> SymbolicTensor:
        """A linear or convolution layer.

        Args:
            numel: number of elements of the output.
            rows: of the matrix, the channels of the output.
            sizes: number of elements of each weight, the matrix first.
            quantize: quantization of the matrix.
        """
        options, itemsize = self.options, self.options.itemsize
        gradients = self.count_weights(*sizes, rows=rows, quantize=quantize)
        x = self.cast(x, itemsize)
        saved, scratch = ([x] if gradients else []), 0
        if options.autocast:  # each use casts the weight, and saves the cast for the backward pass
            saved.append(self.tape.tensor(sum(sizes), itemsize))
            if self.cache is not None:
                self.cache.append(saved[-1])
            scratch = sum(sizes) * itemsize if gradients else 0
        if quantize != "none":  # each use dequantizes the weight
            scratch = sizes[0] * itemsize
            self.tape.counter.add_temporarily(scratch)
        return self.tape.op([x], numel, itemsize, saved, weight_gradients=gradients, scratch=scratch)

    def _add_lora(
        self, x: SymbolicTensor, result: SymbolicTensor, down: int, up: int, inner_numel: int, unfolded: int = 0
    ) -> SymbolicTensor:
        """Adds the output of a LoRA layer, which has fp32 matrices and casts its input to fp32: of PEFT, or one for each photo of a batch.

        Args:
            x: the input of the adapted layer.
            result: the output of the adapted layer.
            down: number of parameters of matrix A.
            up: number of parameters of matrix B.
            inner_numel: number of elements between the two matrices.
            unfolded: the same before the elements of a convolution are summed (:mod:`imagic_lora.adapters.batched`); 0 for a linear layer.
        """
        self.lora += down + up
        optimizer, rank = self.options.optimizer, self.options.rank
        self.lora_states += state_bytes(optimizer, rank, down // rank) + state_bytes(optimizer, up // rank, rank)
        wide, adapters = self.cast(x, _FP32), self.options.adapters
        # those of all photos are stacked, and the stack is saved for the backward pass
        stacks = [[self.tape.tensor(adapters * numel, _FP32)] if adapters > 1 else [] for numel in (down, up)]
        first = unfolded if unfolded and adapters > 1 else inner_numel
        inner = self.tape.op([wide], first, _FP32, [wide, *stacks[0]], weight_gradients=[(adapters * down, _FP32)])
        if first != inner_numel:
            inner = self.tape.op([inner], inner_numel, _FP32)
        outer = self.tape.op([inner], result.numel, _FP32, [inner, *stacks[1]], weight_gradients=[(adapters * up, _FP32)])
        del stacks
        scaled = self.tape.op([outer], result.numel, _FP32)
        del outer
        total = self.tape.op([result, scaled], result.numel, _FP32, passes_gradient=result.itemsize == _FP32)
        return self.cast(total, result.itemsize)

    def linear(self, x: SymbolicTensor, in_features: int, out_features: int, bias: bool = True, name: str = "") -> SymbolicTensor:
        """A linear layer, ``[..., in_features] -> [..., out_features]``.

        Args:
            name: end of the layer's name, as in the LoRA targets.
        """
        rows = x.numel // in_features
        sizes = (in_features * out_features, *([out_features] if bias else []))
        result = self._matmul(x, rows * out_features, out_features, sizes, self._quantization(in_features))
        rank = self.options.rank
        if rank and name in self.options.targets:
            return self._add_lora(x, result, in_features * rank, out_features * rank, rows * rank)
        return result

    def conv(
        self, x: SymbolicTensor, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1, name: str = ""
    ) -> SymbolicTensor:
        """A convolution, ``[B, in_channels, h, w] -> [B, out_channels, h / stride, w / stride]``.

        Args:
            name: end of the layer's name, as in the LoRA targets.
        """
        pixels = x.numel // in_channels // stride**2
        result = self._matmul(x, pixels * out_channels, out_channels, (in_channels * out_channels * kernel**2, out_channels))
        rank = self.options.rank
        if rank and name in self.options.targets:
            unfolded = x.numel // in_channels * rank * kernel**2
            return self._add_lora(x, result, in_channels * rank * kernel**2, out_channels * rank, pixels * rank, unfolded)
        return result

    def norm(self, x: SymbolicTensor, channels: int) -> SymbolicTensor:
        """Group or layer normalization with scale and shift."""
        gradients = self.count_weights(channels, channels)
        x = self.cast(x, _FP32) if self.options.autocast and self.options.fp32_norms else x
        return self.tape.op([x], x.numel, x.itemsize, [x], weight_gradients=gradients)

    def silu(self, x: SymbolicTensor) -> SymbolicTensor:
        """The activation function SiLU."""
        return self.tape.op([x], x.numel, x.itemsize, [x])

    def add(self, x: SymbolicTensor, y: SymbolicTensor) -> SymbolicTensor:
        """A sum of two tensors of one shape; the result has the larger itemsize."""
        return self.tape.op([x, y], x.numel, max(x.itemsize, y.itemsize), passes_gradient=x.itemsize == y.itemsize)

    def rescale(self, x: SymbolicTensor) -> SymbolicTensor:
        """Division by a constant, which diffusers computes even if the constant is 1."""
        return self.tape.op([x], x.numel, x.itemsize)

    def attention(self, q: SymbolicTensor, k: SymbolicTensor, v: SymbolicTensor) -> SymbolicTensor:
        """Scaled dot-product attention that does not store the attention matrix (arXiv 2205.14135)."""
        return self.tape.op([q, k, v], q.numel, q.itemsize, [q, k, v], saves_output=True)

    def resnet(
        self, x: SymbolicTensor, in_channels: int, out_channels: int, time_embedding: SymbolicTensor | None = None, time_channels: int = 0
    ) -> SymbolicTensor:
        """A residual block.

        Args:
            time_embedding: ``[B, time_channels]``; None for a block without one.
        """
        h = self.norm(x, in_channels)
        h = self.silu(h)
        h = self.conv(h, in_channels, out_channels, name="conv1")
        if time_embedding:
            shift = self.linear(self.silu(time_embedding), time_channels, out_channels, name="time_emb_proj")
            h = self.tape.op([h, shift], h.numel, h.itemsize, passes_gradient=True)
        h = self.norm(h, out_channels)
        h = self.silu(h)
        h = self.conv(h, out_channels, out_channels, name="conv2")
        if in_channels != out_channels:
            x = self.conv(x, in_channels, out_channels, kernel=1, name="conv_shortcut")
        return self.rescale(self.add(x, h))
