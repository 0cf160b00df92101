"""How gradients become steps: one optimiser after the backward pass, or one a parameter, inside it if asked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter

from ..core.errors import ImagicError
from ..core.noise import key
from ..core.runtime import Processes, Runtime
from ..memory.optimizer_states import scales_8bit, states_8bit

_MAPS = ("qmap1", "qmap2")
_FP16_SCALE = 1024.0  # keeps small gradients above fp16's underflow on their way back


def build_optimizer(name: str, parameters: Iterable[Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """Adam with its states in 32 bits (``adam``), or in 8 bits by blocks (``adam8bit``, arXiv 2110.02861).

    Tensors under 4,096 elements keep 32-bit states in either. Fake tensors, which a plan steps, get states of the same size.
    """
    parameters = list(parameters)
    if name == "adam":
        return torch.optim.Adam(parameters, lr=learning_rate, fused=True)
    if any(isinstance(parameter, FakeTensor) for parameter in parameters):
        return _Sized8bit(parameters, {})
    from bitsandbytes.optim import Adam8bit

    return Adam8bit(parameters, lr=learning_rate)


class _Sized8bit(torch.optim.Optimizer):
    """The states of Adam8bit without its arithmetic, which bitsandbytes refuses on fake tensors."""

    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None and not self.state[parameter]:
                self.state[parameter] = {"states": torch.empty(states_8bit(parameter.numel()), dtype=torch.uint8)}


def loss_scale(runtime: Runtime) -> float:
    """The constant that the loss is multiplied by before the backward pass, and the gradients divided by after it."""
    return _FP16_SCALE if runtime.dtype == torch.float16 else 1.0


class Updates(ABC):
    """The updates of some parameters.

    :attr:`cast_finite` is a flag on the device, False for good once a gradient was not finite.

    Args:
        trainables: parameters by name.
        scale: that gradients are divided by.
    """

    def __init__(self, trainables: Mapping[str, Parameter], scale: float) -> None:
        self.trainables, self.scale = dict(trainables), scale
        self.finite = torch.ones((), dtype=torch.bool, device=next(iter(self.trainables.values())).device)

    @abstractmethod
    def backward(self, loss: Tensor, step: int, processes: Processes) -> None:
        """The backward pass of a scaled loss and the update of every parameter; the gradients are gone afterwards.

        Args:
            step: enters the key of whatever is drawn.
        """

    @abstractmethod
    def optimizer_of(self, name: str) -> tuple[torch.optim.Optimizer, Parameter]:
        """The optimiser of a trainable, and what it steps in its stead: the trainable itself, or its fp32 copy."""

    def state_dict(self) -> dict[str, Tensor]:
        """The live states as ``TRAINABLE/STATE``, the same whichever way the optimisers work; empty before the first step."""
        found: dict[str, Tensor] = {}
        for name in self.trainables:
            optimizer, parameter = self.optimizer_of(name)
            for part, value in optimizer.state[parameter].items():
                if part not in _MAPS:
                    found[f"{name}/{part}"] = value if isinstance(value, Tensor) else torch.tensor(value)
        return found

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`state_dict`.

        Raises:
            ImagicError: the states are not those of these optimisers.
        """
        for name, weight in self.trainables.items():
            optimizer, parameter = self.optimizer_of(name)
            mine = {part.removeprefix(f"{name}/"): value for part, value in state.items() if part.startswith(f"{name}/")}
            if mine and {part: (value.dtype, tuple(value.shape)) for part, value in mine.items()} != _forms(optimizer, weight):
                raise ImagicError(f"states of {name} that are not this optimiser's", "those of the same optimiser", "begin anew")
            optimizer.state[parameter] = {part: _as_held(value, parameter.device) for part, value in mine.items()} | _maps(optimizer, mine)


def build_updates(trainables: Mapping[str, Parameter], learning_rate: float, runtime: Runtime, seed: int) -> Updates:
    """The updates that the levers of a runtime ask for."""
    stochastic = any(parameter.dtype != torch.float32 for parameter in trainables.values())
    if runtime.memory.optimizer_in_backward or stochastic:
        return PerParameterUpdates(trainables, runtime, learning_rate, seed)
    return JointUpdates(trainables, runtime, learning_rate)


class JointUpdates(Updates):
    """One optimiser over all parameters, after the backward pass."""

    def __init__(self, trainables: Mapping[str, Parameter], runtime: Runtime, learning_rate: float) -> None:
        super().__init__(trainables, loss_scale(runtime))
        self.optimizer = build_optimizer(runtime.optimizer, self.trainables.values(), learning_rate)

    def backward(self, loss: Tensor, step: int, processes: Processes) -> None:
        loss.backward()
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
    """One optimiser a parameter: it can step inside the backward pass, and work on weights that are not fp32.

    With ``optimizer_in_backward`` a parameter is stepped as soon as its gradient is complete, and the gradient freed at once, so that no
    two gradients are held together. Bit-identical to the ordinary loop. A gradient that is not finite is not stepped with.

    Weights in bf16 are stepped on an fp32 copy and rounded stochastically (:func:`round_stochastically`), so that steps below their
    resolution move them in the mean (arXiv 2010.06192).

    Raises:
        ImagicError: several processes, whose gradients would have to be averaged before they are used.
    """

    def __init__(self, trainables: Mapping[str, Parameter], runtime: Runtime, learning_rate: float, seed: int) -> None:
        super().__init__(trainables, loss_scale(runtime))
        self.seed, self.inside = seed, runtime.memory.optimizer_in_backward
        self.masters = {name: p if p.dtype == torch.float32 else _empty_master(p) for name, p in self.trainables.items()}
        self.optimizers = {name: build_optimizer(runtime.optimizer, [p], learning_rate) for name, p in self.masters.items()}

    def backward(self, loss: Tensor, step: int, processes: Processes) -> None:
        if not self.inside:
            loss.backward()
            processes.average([p.grad for p in self.trainables.values() if p.grad is not None])
            for name in self.trainables:
                self._update(name, step)
            return
        check_single_process(processes)
        hooks = [p.register_post_accumulate_grad_hook(lambda _, name=name: self._update(name, step)) for name, p in self.trainables.items()]
        try:
            loss.backward()
        finally:
            for hook in hooks:
                hook.remove()

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


def _forms(optimizer: torch.optim.Optimizer, weight: Tensor) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of each state of a weight."""
    whole = torch.float32, tuple(weight.shape)
    if isinstance(optimizer, torch.optim.Adam):
        return {"step": (torch.float32, ()), "exp_avg": whole, "exp_avg_sq": whole}
    scales = scales_8bit(weight.numel())
    states = dict.fromkeys(("state1", "state2"), (torch.uint8, whole[1]) if scales else whole)
    return {"step": (torch.int64, ()), **states, **(dict.fromkeys(("absmax1", "absmax2"), (torch.float32, (scales,))) if scales else {})}


def _as_held(value: Tensor, device: torch.device) -> Tensor | int:
    """A copy on the device; bitsandbytes counts its steps in plain whole numbers."""
    return int(value) if value.dtype == torch.int64 else value.to(device, copy=True)


def _maps(optimizer: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The two tables of 8-bit values that all 8-bit states of bitsandbytes share, made again."""
    if "state1" not in state or state["state1"].dtype != torch.uint8:
        return {}
    if not optimizer.name2qmap:
        optimizer.fill_qmap()
    return dict(zip(_MAPS, (optimizer.name2qmap["dynamic"], optimizer.name2qmap["udynamic"]), strict=True))


def _empty_master(weight: Parameter) -> Parameter:
    """An fp32 parameter that holds the values of a weight only while it is stepped."""
    return Parameter(weight.detach().new_empty(0, dtype=torch.float32))


def check_single_process(processes: Processes) -> None:
    """Raises ImagicError for an optimiser inside the backward pass of several processes."""
    if processes.count > 1:
        raise ImagicError(
            f"--optimizer-in-backward with {processes.count} processes",
            "one process, or an optimiser that waits for the mean of their gradients",
            "use --no-optimizer-in-backward, or start one process",
        )


def _is_true(flag: Tensor) -> bool:
    """Waits for a flag. A plan's fake tensors have no values: taken as true."""
    return isinstance(flag, FakeTensor) or bool(flag)


def round_stochastically(source: Tensor, target: Tensor, seed: int) -> None:
    """Writes fp32 values into a bf16 tensor, up or down at random, so that the mean is the value itself.

    bf16 is the upper half of fp32: noise, uniform over the lower half, is added to the bits before they are cut off. Values that bf16
    holds exactly stay as they are.

    Args:
        source: fp32; it is overwritten.
        target: bf16, of the same shape.
        seed: of the noise, drawn on the device.
    """
    generator = torch.Generator(source.device).manual_seed(seed)
    noise = torch.randint(0, 1 << 16, source.shape, generator=generator, dtype=torch.int32, device=source.device)
    bits = source.view(torch.int32).add_(noise)
    target.copy_(bits.bitwise_and_(-(1 << 16)).view(torch.float32))
