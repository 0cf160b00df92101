"""Peak memory of every base, mode and preset: ``python scripts/bench_memory.py`` writes docs/internals/memory-model.md.

Without a card, all figures are predictions: an exact count on fake tensors (``imagic_lora/training/rehearsing/rehearsal.py``) and a quick
one on symbolic sizes (``imagic_lora/memory/prediction.py``). On a card, the same runs are also measured on random weights, by what
``imagic-lora doctor --measure`` runs: the memory that PyTorch allocates and reserves, that of the process, and whether the run completes
within 6, 8, 12 and 16 GiB.
Two plain settings without the package's levers are measured for comparison.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from measuring import settings, table

from imagic_lora.bases.loading.configs import architecture
from imagic_lora.bench.machine.process import measured
from imagic_lora.core.config import Mode, RunConfig
from imagic_lora.core.machine import find_card
from imagic_lora.core.settings.merging import merged
from imagic_lora.core.settings.presets import PRESETS
from imagic_lora.memory.plan import Plan, assume
from imagic_lora.memory.prediction import predict
from imagic_lora.training.rehearsing.rehearsal import rehearse

PAGE = Path("docs/internals/memory-model.md")
CAPS = (6, 8, 12, 16)
MODES: tuple[Mode, ...] = ("lora", "full")
STOCHASTIC = {"memory": {"master_weights": "bf16-stochastic"}}
NF4 = {"memory": {"quantize": "nf4"}}
LADDERS: dict[Mode, list[tuple[str, dict[str, Any]]]] = {
    "full": [
        ("fp32 Adam, autocast with its cache", {"memory": {"optimizer": "adam", "autocast_cache": True}}),
        ("8-bit Adam", {"memory": {"optimizer": "adam8bit"}}),
        ("no autocast cache", {"memory": {"autocast_cache": False}}),
        ("gradient checkpointing", {"memory": {"gradient_checkpointing": True}}),
        ("idle parts released", {"memory": {"idle": "release"}}),
        ("optimizer in backward", {"memory": {"optimizer_in_backward": True}}),
        ("bf16 weights, stochastic rounding", STOCHASTIC),
    ],
    "lora": [
        ("no lever", {"memory": {"optimizer": "adam"}}),
        ("8-bit Adam", {"memory": {"optimizer": "adam8bit"}}),
        ("gradient checkpointing", {"memory": {"gradient_checkpointing": True}}),
        ("idle parts released", {"memory": {"idle": "release"}}),
        ("VAE slicing", {"memory": {"vae_slicing": True}}),
        ("NF4 base", NF4),
    ],
}
PEERS = [("fp32, fp32 Adam, no lever", {"memory": {"dtype": "fp32", "optimizer": "adam"}})]
PEERS += [("fp16, Adam8bit, checkpointing", {"memory": {"dtype": "fp16", "gradient_checkpointing": True}})]

_ABOUT = """# Memory model

Written by `make bench-memory`. For the use of these figures see [memory](../guide/memory.md).

## How the peak is predicted

`imagic_lora/memory/prediction.py` predicts the peak of five stages: encode, embed, tune, sample, decode. It runs U-Net and VAE on *symbolic
tensors* (`imagic_lora/memory/symbolic/`), which have sizes and no values, with a tape that keeps and frees them as autograd does. It needs
no torch and takes milliseconds. What diffusers' callers keep alive, such as the input of an up block, is part of the model. With
`--preview-every` there is a sixth, preview: the larger of sample and decode on top of the states of the optimizer. An evaluation of the
relative loss has no stage: at the batch size of training it needs less than a training step.

`plan --exact` (`imagic_lora/training/rehearsing/rehearsal.py`) is the reference: the real code runs on fake tensors of PyTorch, and a
dispatch mode counts their storages. Normalisations are cast to fp32 as autocast does on a card. bitsandbytes is replaced by modules of the
same size. At true size with random weights SDXL was run on a CPU, one step of each stage (`python scripts/true_size.py`): the tensors held
were within 0.3% of the prediction in mode lora, and up to 2.7% below it in mode full.

Neither counts the workspace of kernels. Two allowances are added: 500 MiB for the CUDA context, and 5% of everything but the weights for
fragmentation. On a CPU 700 MiB for Python and its libraries replace the context.

`imagic_lora/memory/presets.py` chooses the preset, `imagic_lora/memory/levers.py` orders the levers by their cost in time, and
`imagic_lora/memory/limits.py` rejects a run whose plan, without allowances, exceeds the free memory.

## Predicted

MiB of a whole run at the base's own resolution, batch 1, with the settings of the preset. The last column is the quick prediction
(`imagic-lora plan`) divided by the count (`plan --exact`). Preset `cpu` is planned for a CPU, in fp32.
"""
_LADDERS_ABOUT = """### What each lever saves

SD 1.5, 512 x 512, batch 1, four images at once; predicted, without allowances. What the levers cost in time: [speed](speed.md).
"""


def mib(size: float) -> str:
    """A size in bytes as text, in whole MiB."""
    return f"{size / 2**20:,.0f}"


def exact(run: RunConfig) -> Plan:
    """The plan of a run, counted on fake tensors."""
    return rehearse(architecture(run.base), run, assume(run))


def predicted_rows() -> Iterator[list[str]]:
    """The predicted peaks of every base, mode and preset."""
    cases: list[tuple[str, Mode, str, dict[str, Any]]] = []
    for base, mode, preset in itertools.product(("sd15", "sd21", "sdxl", "critters"), MODES, PRESETS):
        cases.append((base, mode, preset, {}))
    for base in ("sd15", "sd21", "sdxl"):
        cases.append((base, "full", "8gb", STOCHASTIC))
    cases.append(("sdxl", "lora", "8gb", NF4))
    for base, mode, preset, change in cases:
        run = settings(base, mode, preset, change)
        counted, quick = exact(run), predict(architecture(base), run)
        name = ", ".join([mode, *(value for group in change.values() for value in group.values())])
        stages = [mib(peak.total) for peak in counted.stages.values()]
        yield [base, name, preset, *stages, f"**{mib(counted.peak_bytes)}**", f"{quick.peak_bytes / counted.peak_bytes:.3f}"]


def ladder_rows(mode: Mode) -> Iterator[list[str]]:
    """Memory levers added one after the other to SD 1.5 at 512 pixels, batch 1: the peak of the worst stage and what each lever saves."""
    change: dict[str, Any] = {}
    before: tuple[int, int] | None = None
    for name, lever in LADDERS[mode]:
        change = merged(change, lever)
        plan = exact(settings("sd15", mode, "auto", change))
        now = plan.stages[worst := max(plan.stages, key=lambda stage: plan.stages[stage].total)].total, plan.stages["tune"].total
        saved = [mib(b - n) if before else "" for b, n in zip(before or now, now, strict=True)]
        yield [name, worst, mib(now[0]), saved[0], mib(now[1]), saved[1]]
        before = now


def in_a_process(run: RunConfig, cap: float | None = None) -> dict[str, Any]:
    """Peak memory of a run on random weights, in a process of its own: a few steps of each stage, and images.

    Args:
        run: the settings of the run.
        cap: memory limit of PyTorch in GiB, or None.

    Returns:
        ``completed``, and ``allocated``, ``reserved`` and ``process`` in bytes.
    """
    card = find_card()
    assert card is not None
    limit = int(cap * 2**30) if cap else None
    messages = list(measured(run, seconds=0.0, end=None, free=card.free, random_weights=True, cap=limit))
    stages = [message["measured"] for message in messages if "measured" in message]
    peaks = {kind: max((stage[kind] for stage in stages), default=0) for kind in ("allocated", "reserved", "process")}
    return {"completed": not any("out_of_memory" in message for message in messages), **peaks}


def measured_rows() -> Iterator[list[str]]:
    """The measured peaks of presets and plain settings on a card, without and with memory limits."""
    cases = [
        (base, f"{mode}, {preset}", settings(base, mode, preset))
        for base in ("sd15", "sd21")
        for mode in MODES
        for preset in PRESETS
        if preset != "cpu"
    ]
    cases += [("sd15", "full, 8gb, bf16-stochastic", settings("sd15", "full", "8gb", STOCHASTIC))]
    cases += [("sd15", f"full, peer: {name}", settings("sd15", "full", "auto", change)) for name, change in PEERS]
    for base, name, run in cases:
        unlimited, plan = in_a_process(run), predict(architecture(base), run)
        capped = ["yes" if in_a_process(run, cap)["completed"] else "no" for cap in CAPS]
        sizes = [mib(unlimited[kind]) for kind in ("allocated", "reserved", "process")]
        ratio = plan.peak_bytes / unlimited["process"] if unlimited["process"] else float("nan")
        yield [base, name, *sizes, f"{ratio:.2f}", *capped]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    logging.disable_progress_bar()
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    stages = ("encode", "embed", "tune", "sample", "decode")
    predicted = table(("base", "mode", "preset", *stages, "with allowances", "quick / exact"), predicted_rows())
    page = [*_ABOUT.splitlines(), "", *predicted, "", *_LADDERS_ABOUT.splitlines()]
    for mode in MODES:
        columns = ("levers, each added to those above", "worst stage", "peak MiB", "saved", "tune MiB", "saved")
        page += ["", f"Mode {mode}:", "", *table(columns, ladder_rows(mode))]
    page += ["", "## Measured", ""]
    if card:
        columns = ("base", "run", "allocated", "reserved", "process", "predicted / process", *(f"{cap} GiB" for cap in CAPS))
        page += [f"On {card}, random weights.", "", *table(columns, measured_rows())]
    else:
        page += ["Not yet: no card was available. `make bench-memory` on one adds it."]
    PAGE.write_text("\n".join(page) + "\n", encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
