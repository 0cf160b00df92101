"""Tensors that are only sizes, with a tape that keeps and frees them as autograd does. No torch here.

A forward pass written with these (:mod:`imagic_lora.memory.tracker.unet`) says in milliseconds what the real one would hold, at any size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count as counting

_NAMES = counting()


class Meter:
    """Bytes held now, and at the most."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def take(self, size: int) -> None:
        """Counts bytes in; a negative size counts them out."""
        self.now += size
        self.peak = max(self.peak, self.now)

    def touch(self, size: int) -> None:
        """Counts bytes that are held for a moment."""
        self.take(size)
        self.take(-size)


class SymbolicTensor:
    """A tensor of ``count`` elements of ``width`` bytes, held as long as somebody refers to it."""

    def __init__(self, meter: Meter, count: int, width: int, needs_grad: bool = False) -> None:
        self.meter, self.count, self.width, self.needs_grad, self.name = meter, count, width, needs_grad, next(_NAMES)
        meter.take(count * width)

    def __del__(self) -> None:
        self.meter.take(-self.count * self.width)


@dataclass
class _Node:
    """One operation on the tape."""

    out: int
    inputs: list[tuple[int, int, int]]  # name, count and width of every input that needs a gradient
    kept: list[SymbolicTensor]
    trained: list[tuple[int, int]]
    scratch: int
    passes: bool
    again: Callable[[], SymbolicTensor] | None = None


@dataclass
class Tape:
    """Runs symbolic forward and backward passes.

    Args:
        gradients_on: False for a pass that nothing will be trained by.
        frees_gradients: the optimiser steps inside the backward pass.
        step_scratch: bytes that stepping takes for a moment, for each element of the weight.
    """

    gradients_on: bool = True
    frees_gradients: bool = False
    step_scratch: int = 0
    meter: Meter = field(default_factory=Meter)
    _tape: list[_Node] | None = field(default_factory=list)  # None while a checkpointed part runs
    _weights: list[SymbolicTensor] = field(default_factory=list)  # gradients of weights

    def tensor(self, count: int, width: int, needs_grad: bool = False) -> SymbolicTensor:
        """A tensor from outside."""
        return SymbolicTensor(self.meter, count, width, needs_grad)

    def op(
        self,
        inputs: Sequence[SymbolicTensor],
        count: int,
        width: int,
        kept: Sequence[SymbolicTensor] = (),
        keeps_output: bool = False,
        trained: Sequence[tuple[int, int]] = (),
        scratch: int = 0,
        passes: bool = False,
    ) -> SymbolicTensor:
        """An operation with one output.

        Args:
            count, width: of the output.
            kept: tensors that its backward pass needs.
            trained: count and width of each weight gradient that it makes.
            scratch: bytes that its backward pass takes for a moment.
            passes: the gradient of the output is that of the inputs, not a new tensor.
        """
        needs = self.gradients_on and (bool(trained) or any(one.needs_grad for one in inputs))
        out = SymbolicTensor(self.meter, count, width, needs)
        if needs and self._tape is not None:
            wanted = [(one.name, one.count, one.width) for one in inputs if one.needs_grad]
            held = [*kept, out] if keeps_output else list(kept)
            self._tape.append(_Node(out.name, wanted, held, list(trained), scratch, passes))
        return out

    def checkpoint(self, part: Callable[[SymbolicTensor], SymbolicTensor], x: SymbolicTensor) -> SymbolicTensor:
        """A part whose intermediate tensors are made again in the backward pass (arXiv 1604.06174)."""
        if self._tape is None or not self.gradients_on:
            return part(x)
        tape, self._tape = self._tape, None
        out = part(x)
        self._tape = tape
        if out.needs_grad:
            wanted = [(x.name, x.count, x.width)] if x.needs_grad else []
            tape.append(_Node(out.name, wanted, [x], [], 0, False, lambda: part(x)))
        return out

    def backward(self, loss: SymbolicTensor) -> None:
        """The backward pass from a loss; the gradients of weights are left, unless the optimiser frees them."""
        self._run({loss.name: SymbolicTensor(self.meter, loss.count, loss.width)})

    def _run(self, gradients: dict[int, SymbolicTensor]) -> None:
        assert self._tape is not None
        while self._tape:
            node = self._tape.pop()
            if node.out not in gradients:
                continue
            if node.again:
                self._run_again(node, gradients)
                continue
            gradient = gradients.pop(node.out)
            self.meter.touch(node.scratch)
            for count, width in node.trained:
                self._train(count, width)
            for name, count, width in node.inputs:
                new = gradient if node.passes and gradient.count == count else SymbolicTensor(self.meter, count, width)
                gradients.setdefault(name, new)
                del new
            del gradient

    def _run_again(self, node: _Node, gradients: dict[int, SymbolicTensor]) -> None:
        tape, self._tape = self._tape, []
        assert node.again is not None
        inner = {node.again().name: gradients.pop(node.out)}
        self._run(inner)
        for name, count, width in node.inputs:
            gradients.setdefault(name, inner.pop(name, None) or SymbolicTensor(self.meter, count, width))
        self._tape = tape

    def _train(self, count: int, width: int) -> None:
        gradient = SymbolicTensor(self.meter, count, width)
        if self.frees_gradients:
            self.meter.touch(count * self.step_scratch)
        else:
            self._weights.append(gradient)
