"""Layers of a U-Net and a VAE on symbolic tensors."""

from __future__ import annotations

from dataclasses import dataclass

from ...bases.layers import BLOCK_4BIT
from ...core.errors import ImagicError
from ..optimizer_states import states_8bit
from .tape import SymbolicTensor, Tape


class NotPlanned(ImagicError):
    """A model that cannot be planned without running it."""


@dataclass
class LayerOptions:
    """How the layers compute and what of them is trained.

    Args:
        width: bytes of an element in the arithmetic.
        weights: bytes of a weight of the denoiser; other than ``width`` means autocast.
        trained: the weights themselves are trained.
        rank: of LoRA layers, 0 for none.
        targets: layers that have them.
        four_bit: linear layers hold half a byte a weight.
        wide_norms: autocast normalises in fp32, as it does on a card.
    """

    width: int
    weights: int
    trained: bool = False
    rank: int = 0
    targets: tuple[str, ...] = ()
    four_bit: bool = False
    wide_norms: bool = True

    @property
    def mixed(self) -> bool:
        """Whether autocast is at work."""
        return self.weights != self.width


@dataclass
class Layers:
    """The layers that the models are made of; what it draws, it counts, so read the counts before the backward pass draws parts again.

    Attributes:
        parameters: of the model so far.
        bytes: of its weights.
        lora: parameters of LoRA layers.
        states, lora_states: bytes of Adam's 8-bit states for either.
        cache: where autocast's cache of cast weights is kept, if it is.
    """

    tape: Tape
    options: LayerOptions
    parameters: int = 0
    bytes: int = 0
    lora: int = 0
    states: int = 0
    lora_states: int = 0
    cache: list[SymbolicTensor] | None = None

    def _own(self, *sizes: int, four_bit: bool = False) -> list[tuple[int, int]]:
        """Counts parameters; gives the gradients they get."""
        self.parameters += sum(sizes)
        self.states += sum(states_8bit(size) for size in sizes)
        if four_bit:
            self.bytes += sizes[0] // 2 + sizes[0] // BLOCK_4BIT * 4 + sum(sizes[1:]) * self.options.weights
        else:
            self.bytes += sum(sizes) * self.options.weights
        return [(size, self.options.weights) for size in sizes] if self.options.trained else []

    def _packs(self, inside: int) -> bool:
        """Whether a linear layer is held in 4 bits (:mod:`imagic_lora.bases.quantization`)."""
        return self.options.four_bit and inside % BLOCK_4BIT == 0

    def cast(self, x: SymbolicTensor, width: int) -> SymbolicTensor:
        """The same elements in another width."""
        return x if x.width == width else self.tape.op([x], x.count, width)

    def _product(self, x: SymbolicTensor, out: int, sizes: tuple[int, ...], four_bit: bool = False) -> SymbolicTensor:
        options, width = self.options, self.options.width
        trained = self._own(*sizes, four_bit=four_bit)
        x = self.cast(x, width)
        kept, scratch = ([x] if trained else []), 0
        if options.mixed:  # each use casts its weight, and keeps the cast for the backward pass
            kept.append(self.tape.tensor(sum(sizes), width))
            if self.cache is not None:
                self.cache.append(kept[-1])
            scratch = sum(sizes) * width if trained else 0
        if four_bit:
            scratch = sizes[0] * width
            self.tape.meter.touch(scratch)
        return self.tape.op([x], out, width, kept, trained=trained, scratch=scratch)

    def _adapted(self, x: SymbolicTensor, result: SymbolicTensor, down: int, up: int, ranked: int) -> SymbolicTensor:
        """What PEFT adds to a layer: fp32 matrices on an fp32 copy of the input.

        Args:
            down, up: parameters of the two matrices.
            ranked: elements between them.
        """
        self.lora += down + up
        self.lora_states += states_8bit(down) + states_8bit(up)
        wide = self.cast(x, 4)
        inner = self.tape.op([wide], ranked, 4, [wide], trained=[(down, 4)])
        outer = self.tape.op([inner], result.count, 4, [inner], trained=[(up, 4)])
        scaled = self.tape.op([outer], result.count, 4)
        del outer
        return self.cast(self.tape.op([result, scaled], result.count, 4, passes=result.width == 4), result.width)

    def linear(self, x: SymbolicTensor, inside: int, outside: int, bias: bool = True, name: str = "") -> SymbolicTensor:
        """``[.., inside] -> [.., outside]``."""
        rows = x.count // inside
        result = self._product(x, rows * outside, (inside * outside, *([outside] if bias else [])), self._packs(inside))
        rank = self.options.rank
        if rank and name in self.options.targets:
            return self._adapted(x, result, inside * rank, outside * rank, rows * rank)
        return result

    def conv(self, x: SymbolicTensor, inside: int, outside: int, kernel: int = 3, shrink: int = 1, name: str = "") -> SymbolicTensor:
        """``[B, inside, h, w] -> [B, outside, h / shrink, w / shrink]``."""
        pixels = x.count // inside // shrink**2
        result = self._product(x, pixels * outside, (inside * outside * kernel**2, outside))
        rank = self.options.rank
        if rank and name in self.options.targets:
            return self._adapted(x, result, inside * rank * kernel**2, outside * rank, pixels * rank)
        return result

    def norm(self, x: SymbolicTensor, channels: int) -> SymbolicTensor:
        """Group or layer normalisation."""
        trained = self._own(channels, channels)
        x = self.cast(x, 4) if self.options.mixed and self.options.wide_norms else x
        return self.tape.op([x], x.count, x.width, [x], trained=trained)

    def silu(self, x: SymbolicTensor) -> SymbolicTensor:
        """The nonlinearity of the residual blocks."""
        return self.tape.op([x], x.count, x.width, [x])

    def add(self, x: SymbolicTensor, y: SymbolicTensor) -> SymbolicTensor:
        """A residual sum; the wider number wins."""
        return self.tape.op([x, y], x.count, max(x.width, y.width), passes=x.width == y.width)

    def scaled(self, x: SymbolicTensor) -> SymbolicTensor:
        """Division by a constant, which diffusers does even where it is one."""
        return self.tape.op([x], x.count, x.width)

    def attend(self, q: SymbolicTensor, k: SymbolicTensor, v: SymbolicTensor) -> SymbolicTensor:
        """Scaled dot-product attention that holds no matrix of scores (arXiv 2205.14135)."""
        return self.tape.op([q, k, v], q.count, q.width, [q, k, v], keeps_output=True)

    def resnet(self, x: SymbolicTensor, inside: int, outside: int, times: SymbolicTensor | None, embedding: int) -> SymbolicTensor:
        """A residual block.

        Args:
            times: the time embedding, ``[B, embedding]``, where it is told one.
        """
        h = self.norm(x, inside)
        h = self.silu(h)
        h = self.conv(h, inside, outside, name="conv1")
        if times:
            told = self.linear(self.silu(times), embedding, outside, name="time_emb_proj")
            h = self.tape.op([h, told], h.count, h.width, passes=True)
        h = self.norm(h, outside)
        h = self.silu(h)
        h = self.conv(h, outside, outside, name="conv2")
        if inside != outside:
            x = self.conv(x, inside, outside, kernel=1, name="conv_shortcut")
        return self.scaled(self.add(x, h))
