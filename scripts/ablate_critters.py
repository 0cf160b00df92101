"""One change of the defaults at a time, on the same cases: ``python scripts/ablate_critters.py --cases 60``.

The cases are drawn from a seed of their own, so that what is chosen by them can be claimed by CritterBench's. Every case is fitted and
edited with the defaults and with each change, at one eta and one seed; what is done is kept in a file and not done again.
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
SCORES = {"aligned": 100, "attributes": 100, "success": 100, "psnr": 1}  # per cent, and dB to the true edit


def separately(base: Base, photo: Path, case: Case, config: RunConfig) -> tuple[Image.Image, float]:
    """The edit of a case by both stages after each other, as fit has them, and the megabytes of the adapter."""
    adapter = result(fit(photo, case.text, config, Store(photo.parent), "case", base=base))
    assert adapter is not None
    editor = Editor(base)
    (edit,) = editor.edit(adapter, [config.eta], [case.index], config.edit)
    editor.close()
    return edit.image, adapter.size / 1e6


def jointly(base: Base, photo: Path, case: Case, config: RunConfig) -> tuple[Image.Image, float]:
    """The edit of a case with embedding and layers trained together, at the rates and with all the steps of both stages.

    The embedding is trained as a multiple of its change, which is another rate to Adam.
    """
    run = encode_run(config, base, read_photo(photo), case.text, Processes())
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
    """The loss of each sample times ``min(SNR, gamma) / SNR`` of its timestep (arXiv 2303.09556, for bases that predict the noise)."""

    def loss(base: Base, latents: Tensor, conditioning: Conditioning, noise: Tensor, times: Tensor) -> Tensor:
        kept = base.training.alphas_cumprod[base.timesteps(times)]
        ratio = kept / (1 - kept)
        return denoising_loss(base, latents, conditioning, noise, times) * ratio.clamp_max(gamma) / ratio

    with patch("imagic_lora.training.stage.denoising_loss", loss):
        yield


def edited(base: Base, scorer: Scorer, case: Case, change: str, config: RunConfig) -> dict[str, float]:
    """The scores of a case at some settings, and the size of the adapter."""
    config = config.model_copy(update={"seed": case.index})
    with tempfile.TemporaryDirectory() as folder, weighted(5) if change == "min-SNR 5" else nullcontext():
        photo = Path(folder) / "photo.png"
        render(case.source).save(photo)
        image, size = (jointly if change.startswith("joint") else separately)(base, photo, case, config)
    score = scorer.score(case, image)
    return {name: float(getattr(score, name)) for name in SCORES} | {"megabytes": size}


def results(kept: Path, seed: int, cases: int, changes: list[str]) -> Iterator[dict[str, Any]]:
    """What was done before, and what is done now: case by case, all changes of one before the next."""
    done = [json.loads(line) for line in kept.read_text().splitlines()] if kept.is_file() else []
    settings = {change: defaults("lora", {**CPU, **CHANGES[change]}) for change in changes}
    found = {
        (one["change"], one["case"]): one for one in done if one["settings"] == settings.get(one["change"], RunConfig()).model_dump_json()
    }
    base, scorer = open_base(settings[changes[0]]), Scorer(Judge.load(), CritterAlignment.load())
    for index in range(cases):
        for change, config in settings.items():
            if (change, index) not in found:
                scores = edited(base, scorer, case_at(seed, index), change, config)
                found[change, index] = {"change": change, "case": index, "settings": config.model_dump_json(), **scores}
                with kept.open("a") as file:
                    file.write(json.dumps(found[change, index]) + "\n")
            yield found[change, index]


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Each score, and its difference to the defaults on the same cases with a 95% interval."""
    by = {change: {row["case"]: row for row in rows if row["change"] == change} for change in CHANGES}
    yield "| change | cases | " + " | ".join(f"{name} | difference" for name in SCORES) + " | MB |"
    yield "|" + "---|" * (3 + 2 * len(SCORES))
    for change, own in by.items():
        both = sorted(own.keys() & by["defaults"].keys())
        if not both:
            continue
        cells = [change, str(len(both))]
        for name, unit in SCORES.items():
            apart = bootstrapped([unit * (own[case][name] - by["defaults"][case][name]) for case in both])
            assert apart is not None
            cells += [f"{unit * sum(own[case][name] for case in both) / len(both):.3g}"]
            cells += [f"{apart.mean:+.2g} [{apart.low:+.2g}, {apart.high:+.2g}]" if change != "defaults" else ""]
        yield "| " + " | ".join([*cells, f"{own[both[0]]['megabytes']:.2f}"]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=60)
    parser.add_argument("--seed", type=int, default=11, help="of the cases; 7 is that of the claims")
    parser.add_argument("--changes", nargs="+", choices=CHANGES, default=list(CHANGES))
    parser.add_argument("--out", type=Path, default=Path("outputs/ablation"))
    asked = parser.parse_args()
    logging.set_verbosity_error()
    hide_progress_bars()
    asked.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for row in results(asked.out / f"seed-{asked.seed}.jsonl", asked.seed, asked.cases, asked.changes):
        rows.append(row)
        print(f"case {row['case']} {row['change']}: " + " ".join(f"{name} {row[name]:.0f}" for name in SCORES), flush=True)
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
