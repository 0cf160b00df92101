"""The runs of a base that fit this machine: each mode at each preset, with its plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ...bases.architecture import Architecture
from ...bases.loading.configs import architecture, recipe_for
from ...core.choices import choose_runtime
from ...core.config import Preset, RunConfig, TunedMode
from ...core.errors import ImagicError
from ...core.machine import Card
from ...core.settings.resolve import resolve
from ...memory.limits import gib
from ...memory.plan import Assumed, Plan
from ...memory.prediction import predict
from ...memory.symbolic.layers import NotPlanned

STAGES = ("encode", "embed", "tune", "generate")
"""The stages that are measured. Generation is sampling and decoding, stages of their own in a plan."""
_MODES: tuple[TunedMode, ...] = ("lora", "full")
_PRESETS: tuple[Preset, ...] = ("24gb", "16gb", "12gb", "8gb")


class Predicted(NamedTuple):
    """The predicted peak of a stage, in bytes.

    Args:
        tensors: of all tensors.
        process: of the process, allowances included.
    """

    tensors: int
    process: int


@dataclass(frozen=True)
class MachineRun:
    """A mode at a preset.

    Args:
        run: its settings.
        plan: its predicted memory; None if it cannot be predicted.
        left_out: why it is not measured; None if it is.
    """

    run: RunConfig
    plan: Plan | None
    left_out: str | None = None

    def predicted(self, stage: str) -> Predicted | None:
        """The prediction for one of :data:`STAGES`."""
        if self.plan is None:
            return None
        name = max(("sample", "decode"), key=self.plan.needs) if stage == "generate" else stage
        return Predicted(self.plan.stages[name].total, self.plan.needs(name))


def runs_of(base: str, card: Card | None, free: int) -> list[MachineRun]:
    """Returns the runs of a base, the modes and presets in the order in which they are measured.

    Args:
        base: name of a base, folder, or single file.
        card: the card of this machine; None for the CPU.
        free: free bytes on the device.

    Raises:
        ImagicError: the base cannot be read, or cannot be trained.
    """
    built = architecture(base)
    built.check_trainable(base)
    presets = _PRESETS if card else ("cpu", *_PRESETS)
    return list(_runs(built, base, presets, card, free))


def _runs(built: Architecture, base: str, presets: Sequence[Preset], card: Card | None, free: int) -> Iterator[MachineRun]:
    for mode in _MODES:
        seen: dict[str, Preset] = {}
        for preset in presets:
            given = {"base": base, "preset": preset, "tune": {"mode": mode}}
            run = resolve(given, {}, recipe_for(built, base), large=built.has_large_encoder)
            same = seen.setdefault(run.model_dump_json(exclude={"preset": True, "memory": {"device"}}), preset)
            if same != preset:
                yield MachineRun(run, None, f"the settings of preset {same}")
                continue
            try:
                choices = choose_runtime(run.memory, card)
            except ImagicError as error:
                yield MachineRun(run, None, f"not on this machine: needs {error.expected}")
                continue
            try:
                plan = predict(built, run, Assumed("cuda" if card else "cpu", choices.dtype, choices.optimizer))
            except NotPlanned:
                yield MachineRun(run, None)
                continue
            need = plan.peak_bytes - plan.context
            left_out = f"does not fit: {gib(need)} predicted, {gib(free)} free" if need > free else None
            yield MachineRun(run, plan, left_out)
