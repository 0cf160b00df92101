"""Tensors that have a size and no values, and a tape that saves and frees them as PyTorch's autograd does. No torch here.

A forward pass on these tensors (:mod:`imagic_lora.memory.symbolic.unet`) counts in milliseconds the bytes that the real pass holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

_NAMES = count()


class ByteCounter:
    """Counts bytes.

    Attributes:
        now: bytes held.
        peak: the most bytes held so far.
    """

    def __init__(self) -> None:
        self.now = self.peak = 0

    def add(self, size: int) -> None:
        """Adds bytes; a negative size subtracts them."""
        self.now += size
        self.peak = max(self.peak, self.now)

    def add_temporarily(self, size: int) -> None:
        """Adds bytes and subtracts them again, so that they count for the peak alone."""
        self.add(size)
        self.add(-size)


class SymbolicTensor:
    """A tensor without values. Its bytes count as long as a reference to it exists.

    Args:
        counter: counts the bytes.
        numel: number of elements.
        itemsize: bytes of an element.
        needs_grad: as ``requires_grad`` of a tensor in PyTorch.
    """

    def __init__(self, counter: ByteCounter, numel: int, itemsize: int, needs_grad: bool = False) -> None:
        self.counter, self.numel, self.itemsize, self.needs_grad, self.name = counter, numel, itemsize, needs_grad, next(_NAMES)
        counter.add(numel * itemsize)

    def __del__(self) -> None:
        self.counter.add(-self.numel * self.itemsize)


@dataclass
class _Node:
    """An operation on the tape.

    Args:
        out: name of the output.
        inputs: name, numel and itemsize of every input that needs a gradient.
        saved: tensors that the backward pass needs.
        weight_gradients: numel and itemsize of every weight gradient that the backward pass creates.
        scratch: bytes that the backward pass holds temporarily.
        passes_gradient: the gradient of an input is the same tensor as the gradient of the output.
        recompute: runs a checkpointed part again.
    """

    out: int
    inputs: list[tuple[int, int, int]]
    saved: list[SymbolicTensor]
    weight_gradients: list[tuple[int, int]]
    scratch: int
    passes_gradient: bool
    recompute: Callable[[], SymbolicTensor] | None = None


@dataclass
class Tape:
    """Records a symbolic forward pass and runs its backward pass.

    Args:
        gradients_on: False for a forward pass alone, as under ``torch.no_grad``.
        frees_gradients: the optimizer steps inside the backward pass, and frees the gradient of a weight at once.
        step_scratch: bytes that such a step holds temporarily for each element of the weight.
        counter: counts the bytes of all tensors.
    """

    gradients_on: bool = True
    frees_gradients: bool = False
    step_scratch: int = 0
    counter: ByteCounter = field(default_factory=ByteCounter)
    _tape: list[_Node] | None = field(default_factory=list)  # None while a checkpointed part runs
    _weight_gradients: list[SymbolicTensor] = field(default_factory=list)

    def tensor(self, numel: int, itemsize: int, needs_grad: bool = False) -> SymbolicTensor:
        """Creates an input of the pass."""
        return SymbolicTensor(self.counter, numel, itemsize, needs_grad)

    def op(
        self,
        inputs: Sequence[SymbolicTensor],
        numel: int,
        itemsize: int,
        saved: Sequence[SymbolicTensor] = (),
        saves_output: bool = False,
        weight_gradients: Sequence[tuple[int, int]] = (),
        scratch: int = 0,
        passes_gradient: bool = False,
    ) -> SymbolicTensor:
        """Runs an operation with one output.

        Args:
            inputs: tensors that the output depends on.
            numel: number of elements of the output.
            itemsize: bytes of an element of the output.
            saved: tensors that the backward pass needs.
            saves_output: the backward pass needs the output.
            weight_gradients: numel and itemsize of every weight gradient that the backward pass creates.
            scratch: bytes that the backward pass holds temporarily.
            passes_gradient: the gradient of an input is the same tensor as the gradient of the output, and not a new one.
        """
        needs_grad = self.gradients_on and (bool(weight_gradients) or any(x.needs_grad for x in inputs))
        out = SymbolicTensor(self.counter, numel, itemsize, needs_grad)
        if needs_grad and self._tape is not None:
            differentiable = [(x.name, x.numel, x.itemsize) for x in inputs if x.needs_grad]
            all_saved = [*saved, out] if saves_output else list(saved)
            self._tape.append(_Node(out.name, differentiable, all_saved, list(weight_gradients), scratch, passes_gradient))
        return out

    def checkpoint(self, part: Callable[[SymbolicTensor], SymbolicTensor], x: SymbolicTensor) -> SymbolicTensor:
        """Runs a part whose intermediate tensors are recomputed in the backward pass (gradient checkpointing, arXiv 1604.06174).

        Args:
            part: operations on this tape.
            x: the input of the part, which is saved.
        """
        if self._tape is None or not self.gradients_on:
            return part(x)
        tape, self._tape = self._tape, None
        out = part(x)
        self._tape = tape
        if out.needs_grad:
            differentiable = [(x.name, x.numel, x.itemsize)] if x.needs_grad else []
            tape.append(_Node(out.name, differentiable, [x], [], 0, False, lambda: part(x)))
        return out

    def backward(self, loss: SymbolicTensor) -> None:
        """Runs the backward pass from a loss. The weight gradients stay held, unless ``frees_gradients``."""
        self._run({loss.name: SymbolicTensor(self.counter, loss.numel, loss.itemsize)})

    def _run(self, gradients: dict[int, SymbolicTensor]) -> None:
        """Runs the tape backward, and removes its nodes.

        Args:
            gradients: of tensors, by name; changed in place.
        """
        assert self._tape is not None
        while self._tape:
            node = self._tape.pop()
            if node.out not in gradients:
                continue
            if node.recompute:
                self._run_checkpointed(node, gradients)
                continue
            gradient = gradients.pop(node.out)
            self.counter.add_temporarily(node.scratch)
            for numel, itemsize in node.weight_gradients:
                self._add_weight_gradient(numel, itemsize)
            for name, numel, itemsize in node.inputs:
                shares = node.passes_gradient and gradient.numel == numel
                new = gradient if shares else SymbolicTensor(self.counter, numel, itemsize)
                gradients.setdefault(name, new)
                del new
            del gradient

    def _run_checkpointed(self, node: _Node, gradients: dict[int, SymbolicTensor]) -> None:
        tape, self._tape = self._tape, []
        assert node.recompute is not None
        inner = {node.recompute().name: gradients.pop(node.out)}
        self._run(inner)
        for name, numel, itemsize in node.inputs:
            gradients.setdefault(name, inner.pop(name, None) or SymbolicTensor(self.counter, numel, itemsize))
        self._tape = tape

    def _add_weight_gradient(self, numel: int, itemsize: int) -> None:
        gradient = SymbolicTensor(self.counter, numel, itemsize)
        if self.frees_gradients:
            self.counter.add_temporarily(numel * self.step_scratch)
        else:
            self._weight_gradients.append(gradient)
