"""Ablation: one change of the defaults at a time, on the same cases: ``python scripts/ablate_critters.py --cases 60``.

The cases have a seed of their own, so that settings are not chosen on the cases that CritterBench reports. Every case is fitted and edited
with the defaults and with each change, at one eta and one seed. Results are appended to a file, and a later run resumes from it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers.utils import logging
from PIL import Image
from torch import Tensor
from torch.nn import Parameter

from imagic_lora.adapters.lora import attached
from imagic_lora.adapters.store import Store
from imagic_lora.bases.base import Base
from imagic_lora.bases.loading.progress import hide_progress_bars
from imagic_lora.bench.cases import Case, case_at
from imagic_lora.bench.catalogue import budgeted, defaults
from imagic_lora.bench.metrics import CritterAlignment
from imagic_lora.bench.scores import Scorer
from imagic_lora.bench.summary import bootstrapped
from imagic_lora.core.conditioning import Conditioning, interpolate, source_conditionings
from imagic_lora.core.config import RunConfig
from imagic_lora.core.noise import key
from imagic_lora.core.runtime import Processes
from imagic_lora.core.settings import merged
from imagic_lora.critters import render
from imagic_lora.critters.judge import Judge
from imagic_lora.photos.reading import read_photo
from imagic_lora.sampling.editor import Editor
from imagic_lora.sampling.generate import generate
from imagic_lora.training.fit import fit, open_base, result
from imagic_lora.training.objective import denoising_loss
from imagic_lora.training.run import encode_run
from imagic_lora.training.stage import Stage, train

PACE = {"steps", "learning_rate"}
CPU = {"memory": {"device": "cpu", "dtype": "fp32"}}
CHANGES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "timesteps uniform": {"embed": {"timesteps": "uniform"}, "tune": {"timesteps": "uniform"}},
    "targets attention": {"tune": {"targets": "attention"}},
    "targets all": {"tune": {"targets": "all"}},
    "rank 1": {"tune": {"rank": 1}},
    "rank 16": {"tune": {"rank": 16}},
    "min-SNR 5": {},
    "joint": {},
    "joint, half the steps": budgeted("lora", 0.5).model_dump(include={"embed": {"steps"}, "tune": {"steps"}}),
    "DDIM inversion": {"edit": {"ddim_eta": 0.0}},
    "from noise": {"edit": {"start": "noise"}},
    "batch 4, a quarter of the steps": merged(
        budgeted("lora", 0.25).model_dump(include={"embed": PACE, "tune": PACE}), {"embed": {"batch_size": 4}, "tune": {"batch_size": 4}}
    ),
}
SCORES = {"aligned": 100, "attributes": 100, "success": 100, "psnr": 1}  # factors to percent, and dB against the true edit


def fit_and_edit(base: Base, photo: Path, case: Case, config: RunConfig) -> tuple[Image.Image, float]:
    """The edit of a case by fit(), with its two stages in sequence, and the size of the adapter in MB."""
    adapter = result(fit(photo, case.prompt, config, Store(photo.parent), "case", base=base))
    assert adapter is not None
    editor = Editor(base)
    (edit,) = editor.edit(adapter, [config.eta], [case.index], config.edit)
    editor.close()
    return edit.image, adapter.size / 1e6


def fit_jointly_and_edit(base: Base, photo: Path, case: Case, config: RunConfig) -> tuple[Image.Image, float]:
    """The edit of a case with embedding and LoRA layers trained together, and the size of the layers in MB.

    Both learning rates are kept, and the number of steps is the sum of both stages. The trained parameter is the change of the embedding
    divided by the ratio of the rates: for Adam this equals another learning rate.
    """
    run = encode_run(config, base, read_photo(photo), case.prompt, Processes())
    change, scale = Parameter(torch.zeros_like(run.target.tokens)), config.embed.learning_rate / config.tune.learning_rate

    def conditioning() -> Conditioning:
        return replace(run.target, tokens=run.target.tokens + scale * change)

    both = config.tune.model_copy(update={"steps": config.embed.steps + config.tune.steps})
    with attached(base, config.tune, key(config.seed, "lora")) as layers:
        for _ in train(Stage("joint", base, run.latents, conditioning, {"change": change, **layers}, both, config.seed, Processes())):
            pass
        e_opt = replace(run.target, tokens=conditioning().tokens.detach())
        mix = interpolate(run.target, e_opt, config.eta)
        of_photo = source_conditionings(run.target, e_opt, [config.eta], config.edit.source_eta)
        with torch.no_grad():
            (image,) = generate(base, [mix], [case.index], config.edit, run.canvas, run.null, of_photo)
        return image, 4 * sum(layer.numel() for layer in layers.values()) / 1e6


@contextmanager
def weighted(gamma: float) -> Iterator[None]:
    """Multiplies the loss of each sample by ``min(SNR, gamma) / SNR`` of its timestep (arXiv 2303.09556), for epsilon prediction."""

    def loss(base: Base, latents: Tensor, conditioning: Conditioning, noise: Tensor, times: Tensor) -> Tensor:
        alpha = base.training_scheduler.alphas_cumprod[base.timesteps(times)]
        snr = alpha / (1 - alpha)
        return denoising_loss(base, latents, conditioning, noise, times) * snr.clamp_max(gamma) / snr

    with patch("imagic_lora.training.stage.denoising_loss", loss):
        yield


def edited(base: Base, scorer: Scorer, case: Case, change: str, config: RunConfig) -> dict[str, float]:
    """The scores of a case with the given settings, and the size of the adapter in MB."""
    config = config.model_copy(update={"seed": case.index})
    with tempfile.TemporaryDirectory() as folder, weighted(5) if change == "min-SNR 5" else nullcontext():
        photo = Path(folder) / "photo.png"
        render(case.source).save(photo)
        image, size = (fit_jointly_and_edit if change.startswith("joint") else fit_and_edit)(base, photo, case, config)
    score = scorer.score(case, image)
    return {name: float(getattr(score, name)) for name in SCORES} | {"megabytes": size}


def results(file: Path, seed: int, cases: int, changes: list[str]) -> Iterator[dict[str, Any]]:
    """The results of all cases and changes, from the file or computed and appended to it.

    Yields:
        One row per case and change, in the order of the cases.
    """
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    settings = {change: defaults("lora", {**CPU, **CHANGES[change]}) for change in changes}
    rows = {
        (row["change"], row["case"]): row for row in done if row["settings"] == settings.get(row["change"], RunConfig()).model_dump_json()
    }
    base, scorer = open_base(settings[changes[0]]), Scorer(Judge.load(), CritterAlignment.load())
    for index in range(cases):
        for change, config in settings.items():
            if (change, index) not in rows:
                scores = edited(base, scorer, case_at(seed, index), change, config)
                rows[change, index] = {"change": change, "case": index, "settings": config.model_dump_json(), **scores}
                with file.open("a") as opened:
                    opened.write(json.dumps(rows[change, index]) + "\n")
            yield rows[change, index]


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The lines of a Markdown table: each score, and its difference to the defaults on the same cases with a 95% interval."""
    by_change = {change: {row["case"]: row for row in rows if row["change"] == change} for change in CHANGES}
    yield "| change | cases | " + " | ".join(f"{name} | difference" for name in SCORES) + " | MB |"
    yield "|" + "---|" * (3 + 2 * len(SCORES))
    for change, own in by_change.items():
        both = sorted(own.keys() & by_change["defaults"].keys())
        if not both:
            continue
        cells = [change, str(len(both))]
        for name, unit in SCORES.items():
            difference = bootstrapped([unit * (own[case][name] - by_change["defaults"][case][name]) for case in both])
            assert difference is not None
            cells += [f"{unit * sum(own[case][name] for case in both) / len(both):.3g}"]
            cells += [f"{difference.mean:+.2g} [{difference.low:+.2g}, {difference.high:+.2g}]" if change != "defaults" else ""]
        yield "| " + " | ".join([*cells, f"{own[both[0]]['megabytes']:.2f}"]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=60)
    parser.add_argument("--seed", type=int, default=11, help="seed of the cases; the reported results use 7")
    parser.add_argument("--changes", nargs="+", choices=CHANGES, default=list(CHANGES))
    parser.add_argument("--out", type=Path, default=Path("outputs/ablation"))
    args = parser.parse_args()
    logging.set_verbosity_error()
    hide_progress_bars()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for row in results(args.out / f"seed-{args.seed}.jsonl", args.seed, args.cases, args.changes):
        rows.append(row)
        print(f"case {row['case']} {row['change']}: " + " ".join(f"{name} {row[name]:.0f}" for name in SCORES), flush=True)
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
