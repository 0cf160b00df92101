"""Parameter updates: one optimizer after the backward pass, or one per parameter, optionally during the backward pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter

from ...core.errors import ImagicError
from ...core.noise import key
from ...core.runtime import Processes, Runtime
from ..resuming.checkpoints import START_OVER
from .optimizers import QUANTIZATION_MAPS, build_optimizer, quantization_maps, restored_state, state_layout

_FP16_LOSS_SCALE = 1024.0  # a power of two, so dividing is exact; keeps small gradients from underflowing in fp16


def loss_scale(runtime: Runtime) -> float:
    """Returns the constant that multiplies the loss before the backward pass and divides the gradients after it."""
    return _FP16_LOSS_SCALE if runtime.dtype == torch.float16 else 1.0


class Updates(ABC):
    """Runs the backward pass and updates parameters.

    Args:
        trainables: parameters by name.
        scale: the loss scale; gradients are divided by it.

    Attributes:
        finite: bool scalar on the device; it becomes False and stays False when a gradient is not finite.
    """

    def __init__(self, trainables: Mapping[str, Parameter], scale: float) -> None:
        self.trainables, self.scale = dict(trainables), scale
        self.finite = torch.ones((), dtype=torch.bool, device=next(iter(self.trainables.values())).device)

    def backward(self, loss: Tensor, step: int, processes: Processes) -> None:
        """Runs the backward pass, updates every parameter and frees the gradients.

        Args:
            loss: the loss multiplied by ``scale``, a scalar.
            step: index of the step; random numbers depend on it.
            processes: the processes that average their gradients.
        """
        loss.backward()
        self.apply(step, processes)

    @abstractmethod
    def apply(self, step: int, processes: Processes) -> None:
        """Updates every parameter after a backward pass and frees the gradients. Arguments as for :meth:`backward`."""

    @abstractmethod
    def optimizer_of(self, name: str) -> tuple[torch.optim.Optimizer, Parameter]:
        """Returns the optimizer of a trainable and the parameter it updates: the trainable or its fp32 master copy."""

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the optimizer states as ``TRAINABLE/STATE`` without copying; empty before the first step.

        The format does not depend on the subclass, so a state can be loaded into either.
        """
        states: dict[str, Tensor] = {}
        for name in self.trainables:
            optimizer, parameter = self.optimizer_of(name)
            for state_name, value in optimizer.state[parameter].items():
                if state_name not in QUANTIZATION_MAPS:
                    states[f"{name}/{state_name}"] = value if isinstance(value, Tensor) else torch.tensor(value)
        return states

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Loads states that :meth:`state_dict` returned.

        Raises:
            ImagicError: the names, dtypes or shapes of the states do not match these optimizers.
        """
        for name, weight in self.trainables.items():
            optimizer, parameter = self.optimizer_of(name)
            saved = {full.removeprefix(f"{name}/"): value for full, value in state.items() if full.startswith(f"{name}/")}
            layout = {state_name: (value.dtype, tuple(value.shape)) for state_name, value in saved.items()}
            if saved and layout != state_layout(optimizer, weight):
                got = f"the saved optimizer states of {name} have other names, dtypes or shapes than those of this optimizer"
                raise ImagicError(got, "states of the same optimizer", START_OVER)
            restored = {state_name: restored_state(value, parameter.device) for state_name, value in saved.items()}
            optimizer.state[parameter] = restored | quantization_maps(optimizer, saved)


def build_updates(
    trainables: Mapping[str, Parameter], learning_rate: float, runtime: Runtime, seed: int, optimizer: str | None = None
) -> Updates:
    """Returns the updates for the memory levers of a runtime and the precision of the trainables.

    Args:
        trainables: parameters by name, in fp32 or bf16.
        learning_rate: the learning rate of the optimizer.
        runtime: the runtime of the base.
        seed: seed of the stochastic rounding of bf16 parameters.
        optimizer: name of the optimizer; None for that of the runtime.
    """
    optimizer = optimizer or runtime.optimizer
    stochastic = any(parameter.dtype != torch.float32 for parameter in trainables.values())
    if runtime.memory.optimizer_in_backward or stochastic:
        return PerParameterUpdates(trainables, runtime, learning_rate, seed, optimizer)
    return JointUpdates(trainables, runtime, learning_rate, optimizer)


class JointUpdates(Updates):
    """Updates all parameters with one optimizer after the backward pass."""

    def __init__(self, trainables: Mapping[str, Parameter], runtime: Runtime, learning_rate: float, optimizer: str) -> None:
        super().__init__(trainables, loss_scale(runtime))
        self.optimizer = build_optimizer(optimizer, self.trainables.values(), learning_rate)

    def apply(self, step: int, processes: Processes) -> None:
        gradients = [p.grad for p in self.trainables.values() if p.grad is not None]
        processes.average(gradients)
        if self.scale != 1:
            torch._foreach_div_(gradients, self.scale)
        norms = torch.stack(torch._foreach_norm(gradients))
        self.finite = self.finite & norms.isfinite().all()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def optimizer_of(self, name: str) -> tuple[torch.optim.Optimizer, Parameter]:
        return self.optimizer, self.trainables[name]


class PerParameterUpdates(Updates):
    """Updates each parameter with its own optimizer, optionally during the backward pass and on bf16 weights.

    With ``optimizer_in_backward`` a parameter is updated as soon as its gradient is complete, and the gradient is freed immediately, so
    that only one gradient exists at a time. The result is bit-identical to :class:`JointUpdates`. A parameter whose gradient is not
    finite is not updated.

    A bf16 weight is updated on an fp32 copy and rounded stochastically (:func:`round_stochastically`), so that updates below its
    resolution take effect in expectation (arXiv 2010.06192).

    Args:
        trainables: parameters by name, in fp32 or bf16.
        runtime: the runtime of the base.
        learning_rate: the learning rate of every optimizer.
        seed: seed of the stochastic rounding.
        optimizer: name of the optimizer.
    """

    def __init__(self, trainables: Mapping[str, Parameter], runtime: Runtime, learning_rate: float, seed: int, optimizer: str) -> None:
        super().__init__(trainables, loss_scale(runtime))
        self.seed, self.in_backward = seed, runtime.memory.optimizer_in_backward
        self.masters = {name: p if p.dtype == torch.float32 else _empty_master(p) for name, p in self.trainables.items()}
        self.optimizers = {name: build_optimizer(optimizer, [p], learning_rate) for name, p in self.masters.items()}

    def backward(self, loss: Tensor, step: int, processes: Processes) -> None:
        if not self.in_backward:
            super().backward(loss, step, processes)
            return
        check_single_process(processes)
        running, hooks = True, []

        def update(name: str) -> None:
            if running:  # an interruption can leave a hook on a parameter of the base
                self._update(name, step)

        try:
            for name, p in self.trainables.items():
                hooks.append(p.register_post_accumulate_grad_hook(lambda _, name=name: update(name)))
            loss.backward()
        finally:
            running = False
            for hook in hooks:
                hook.remove()

    def apply(self, step: int, processes: Processes) -> None:
        processes.average([p.grad for p in self.trainables.values() if p.grad is not None])
        for name in self.trainables:
            self._update(name, step)

    @torch.no_grad()
    def _update(self, name: str, step: int) -> None:
        weight, master = self.trainables[name], self.masters[name]
        gradient, weight.grad = weight.grad, None
        if gradient is None:
            return
        if self.scale != 1:
            gradient.div_(self.scale)
        finite = torch.linalg.vector_norm(gradient).isfinite()
        self.finite = self.finite & finite
        if not _is_true(finite):
            return
        if master is not weight:
            master.data = weight.float()
        master.grad, gradient = gradient.to(master.dtype), None
        self.optimizers[name].step()
        master.grad = None
        if master is not weight:
            round_stochastically(master.data, weight, key(self.seed, "rounding", step, name))
            master.data = master.data.new_empty(0)

    def optimizer_of(self, name: str) -> tuple[torch.optim.Optimizer, Parameter]:
        return self.optimizers[name], self.masters[name]


def _empty_master(weight: Parameter) -> Parameter:
    """Returns an empty fp32 parameter; it holds the values of the weight only during its update."""
    return Parameter(weight.detach().new_empty(0, dtype=torch.float32))


def check_single_process(processes: Processes) -> None:
    """Checks that ``optimizer_in_backward`` runs in one process; with more, gradients must be averaged before they are used.

    Raises:
        ImagicError: there are several processes.
    """
    if processes.count > 1:
        raise ImagicError(
            f"--optimizer-in-backward with {processes.count} processes",
            "one process, or an optimizer that runs after the gradients are averaged",
            "use --no-optimizer-in-backward, or start one process",
        )


def _is_true(flag: Tensor) -> bool:
    """Reads a flag from the device. The fake tensors of a memory plan have no values and count as true."""
    return isinstance(flag, FakeTensor) or bool(flag)


def round_stochastically(source: Tensor, target: Tensor, seed: int) -> None:
    """Writes fp32 values into a bf16 tensor, rounded up or down at random so that the expected result equals the value.

    bf16 is the upper half of fp32: uniform noise over the lower 16 bits is added to the bits before they are truncated. Values that
    bf16 represents exactly do not change.

    Args:
        source: fp32 values; they are overwritten.
        target: bf16 tensor of the same shape.
        seed: seed of the noise, which is drawn on the device.
    """
    generator = torch.Generator(source.device).manual_seed(seed)
    noise = torch.randint(0, 1 << 16, source.shape, generator=generator, dtype=torch.int32, device=source.device)
    bits = source.view(torch.int32).add_(noise)
    target.copy_(bits.bitwise_and_(-(1 << 16)).view(torch.float32))
