"""Peak memory of every base, mode and preset: ``python scripts/bench_memory.py`` writes docs/memory.md.

Without a card all is predicted: counted on tensors without values (``imagic_lora/training/rehearsal.py``) and drawn in sizes
(``imagic_lora/memory/plan.py``). On a card the same runs are also measured on random weights, each in a process of its own: what PyTorch
allocates and reserves, what nvidia-smi says, whether they complete under a cap of 6, 8, 12 and 16 GiB; and so are two plain peer settings.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging

from imagic_lora.adapters.full import unfrozen
from imagic_lora.adapters.lora import attached
from imagic_lora.bases.loading.configs import architecture
from imagic_lora.core.config import Mode, RunConfig
from imagic_lora.core.runtime import Processes, resolve_runtime
from imagic_lora.core.settings import PRESETS, merged, recipe_of, resolve
from imagic_lora.memory.limits import is_out_of_memory
from imagic_lora.memory.plan import Plan, assume, predict
from imagic_lora.training.embed import embed_stage
from imagic_lora.training.rehearsal import random_base, random_text, rehearse
from imagic_lora.training.tune import tune_stage

PAGE = Path("docs/memory.md")
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


def settings(base: str, mode: Mode, preset: str, *changes: dict[str, Any]) -> RunConfig:
    given = merged({"base": base, "preset": preset, "tune": {"mode": mode}}, *changes)
    return resolve(given, {}, recipe_of(base))


def mib(size: float) -> str:
    return f"{size / 2**20:,.0f}"


def exact(run: RunConfig) -> Plan:
    return rehearse(architecture(run.base), run, assume(run))


def predicted_table() -> list[str]:
    """Every base, mode and preset."""
    lines = ["| base | mode | preset | encode | embed | tune | sample | decode | with allowances | drawn / counted |", "|" + "---|" * 10]
    cases: list[tuple[str, Mode, str, dict[str, Any]]] = []
    for base, mode, preset in itertools.product(("sd15", "sd21", "sdxl", "critters"), MODES, PRESETS):
        cases.append((base, mode, preset, {}))
    for base in ("sd15", "sd21", "sdxl"):
        cases.append((base, "full", "8gb", STOCHASTIC))
    cases.append(("sdxl", "lora", "8gb", NF4))
    for base, mode, preset, change in cases:
        run = settings(base, mode, preset, change)
        counted, drawn = exact(run), predict(architecture(base), run)
        stages = " | ".join(mib(peak.total) for peak in counted.stages.values())
        name = ", ".join([mode, *(value for group in change.values() for value in group.values())])
        ratio = drawn.peak_bytes / counted.peak_bytes
        lines.append(f"| {base} | {name} | {preset} | {stages} | **{mib(counted.peak_bytes)}** | {ratio:.3f} |")
        print(lines[-1], flush=True)
    return lines


def ladder_table(mode: Mode) -> list[str]:
    """Levers pulled one after the other, SD 1.5 at 512 pixels, batch 1: the worst stage and what each lever took off it."""
    lines = ["| levers, each added to those above | worst stage | peak MiB | saved | tune MiB | saved |", "|" + "---|" * 6]
    change: dict[str, Any] = {}
    before: tuple[int, int] | None = None
    for name, lever in LADDERS[mode]:
        change = merged(change, lever)
        plan = rehearse(architecture("sd15"), run := settings("sd15", mode, "auto", change), assume(run))
        now = plan.stages[worst := max(plan.stages, key=lambda stage: plan.stages[stage].total)].total, plan.stages["tune"].total
        saved = [mib(b - n) if before else "" for b, n in zip(before or now, now, strict=True)]
        lines.append(f"| {name} | {worst} | {mib(now[0])} | {saved[0]} | {mib(now[1])} | {saved[1]} |")
        print(lines[-1], flush=True)
        before = now
    return lines


def on_the_card(run: RunConfig, cap: float | None) -> dict[str, Any]:
    """Two steps of both stages, a denoising step and a decoding on random weights; this process's memory at its worst."""
    if cap:
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap * 2**30 / torch.cuda.get_device_properties(0).total_memory))
    found: dict[str, Any] = {"completed": False}
    try:
        card = architecture(run.base)
        base = random_base(card, run, resolve_runtime(run.memory))
        side = run.resolution or base.resolution
        latents = base.encode_image(torch.zeros(1, 3, side, side))
        base.offload_encoders()
        text = random_text(base, side, side)
        stage = embed_stage(base, latents, text, run.embed, 0, Processes())
        for k in range(2):
            stage.step(k)
        del stage
        with attached(base, run.tune, 0) if run.tune.mode == "lora" else unfrozen(base, restore=False) as trainables, torch.enable_grad():
            stage = tune_stage(base, latents, text, trainables, run.tune, 0, Processes())
            for k in range(2):
                stage.step(k)
            del stage
            with torch.no_grad():
                count = 2 * run.edit.batch_size
                base.predict(latents.expand(count, -1, -1, -1), torch.zeros(count, dtype=torch.int64, device="cuda"), text)
                base.decode(latents.expand(run.edit.batch_size, -1, -1, -1))
        found["completed"] = True
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    asked = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    used = [line.split(",") for line in subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()]
    process = sum(int(size) for pid, size in used if int(pid) == os.getpid()) or max((int(size) for _, size in used), default=0)
    memory = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved(), "process": process * 2**20}
    return found | memory


def in_a_process(run: RunConfig, cap: float | None = None) -> dict[str, Any]:
    """:func:`on_the_card` in a fresh process."""
    order = [sys.executable, __file__, "--one", run.model_dump_json(), "--cap", str(cap or 0)]
    done = subprocess.run(order, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measured_table() -> list[str]:
    """On a card: presets and peers, without and with caps."""
    caps = " | ".join(f"{cap} GiB" for cap in CAPS)
    lines = [f"| base | run | allocated | reserved | process | predicted / process | {caps} |", "|" + "---|" * (6 + len(CAPS))]
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
        free, plan = in_a_process(run), predict(architecture(base), run)
        capped = ["yes" if in_a_process(run, cap)["completed"] else "no" for cap in CAPS]
        sizes = " | ".join(mib(free[kind]) for kind in ("allocated", "reserved", "process"))
        ratio = plan.peak_bytes / free["process"] if free["process"] else float("nan")
        lines.append(f"| {base} | {name} | {sizes} | {ratio:.2f} | {' | '.join(capped)} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--cap", type=float, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.disable_progress_bar()
    if args.one:
        print(json.dumps(on_the_card(RunConfig.model_validate_json(args.one), args.cap or None)))
        return
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    page = [
        "# Memory",
        "",
        "Written by `make bench-memory`. MiB of the whole run on a card, at the base's own resolution, batch 1, as the preset has it.",
        "",
        "## Predicted",
        "",
        "Counted on tensors without values; kernels' workspace is not in it. The allowances are 500 MiB for the CUDA context and 5% of",
        "all but the weights for fragmentation. The last column compares the quick drawing (`imagic-lora plan`) with the count",
        "(`plan --exact`).",
        "Preset `cpu` is planned for a CPU: fp32, and 700 MiB for Python and its libraries in place of the context.",
        "",
        *predicted_table(),
        "",
        "### What each lever saves",
        "",
        "SD 1.5, 512 x 512, batch 1, four pictures at once; predicted, without allowances. What they cost in time is in `docs/speed.md`.",
    ]
    for mode in MODES:
        page += ["", f"Mode {mode}:", "", *ladder_table(mode)]
    page += ["", "## Measured", ""]
    page += (
        [f"On {card}, random weights.", "", *measured_table()]
        if card
        else ["Not yet: no card was at hand. `make bench-memory` on one adds it."]
    )
    PAGE.write_text("\n".join(page) + "\n", encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
