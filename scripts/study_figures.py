"""Figures of the papers on the embedded base: the ablations of null-text inversion, and reweighting by Prompt-to-Prompt."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from matplotlib import pyplot as plt
from study_store import Study

from imagic_lora.bases.base import Base
from imagic_lora.bench.cases import case_at
from imagic_lora.bench.metrics import psnr
from imagic_lora.cli.console import progress
from imagic_lora.critters import render
from imagic_lora.methods.attention.prompt_to_prompt import GeneratedConfig, PromptToPromptText
from imagic_lora.methods.inversions.null_text import Ablation, NullTextConfig, NullTextInversion
from imagic_lora.methods.method import Context, EditRequest
from imagic_lora.methods.sampled import encode_request
from imagic_lora.photos.sheet import sheet

ABLATIONS: tuple[Ablation, ...] = get_args(Ablation)


def reconstruction_psnr(base: Base, seed: int, index: int, config: NullTextConfig) -> float:
    """PSNR of the reconstruction of a photo to the photo itself, in dB.

    Args:
        base: the base.
        seed, index: seed and number of the case.
        config: settings of the inversion.
    """
    case = case_at(seed, index)
    photo = render(case.source)
    encoded = encode_request(base, EditRequest(photo, case.prompt, case.source_prompt, seed=index), config.guidance_scale)
    with torch.no_grad():
        if config.ablation == "vqae":
            latents = encoded.clean
        else:
            latents = NullTextInversion().invert(encoded, config).reconstructed(config.guidance_scale)
        return psnr(encoded.image(latents), photo)


def figure(means: Mapping[tuple[str, int], float], inner: Sequence[int], path: Path) -> None:
    """Draws the mean PSNR of each ablation over the inner steps: ``means`` by ablation and inner steps."""
    plot, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    axis.axhline(means["vqae", 0], color="black", label="VAE alone (vqae)")
    axis.axhline(means["none", 0], color="black", linestyle="--", label="DDIM inversion")
    for ablation in ABLATIONS:
        if ablation != "vqae" and inner:
            label = "null-text inversion" if ablation == "none" else ablation
            axis.plot(inner, [means[ablation, steps] for steps in inner], marker="o", label=label)
    axis.set(xlabel="optimisation steps at each sampling step", ylabel="PSNR of the reconstruction, dB")
    axis.legend(fontsize=8)
    plot.savefig(path, dpi=120)


def study_null_text(args: argparse.Namespace) -> None:
    """Null-text inversion and its ablations.

    PSNR of the reconstruction over the number of optimisation steps at each sampling step (figure 4 of arXiv 2211.09794), without
    Prompt-to-Prompt. PSNR is taken to the photo, so that the VAE alone (``vqae``) is the upper bound, and DDIM inversion at the same
    guidance scale (no steps) the lower one. Writes ``null-text.png`` into the folder of the store.
    """
    study = Study(args.base, args.store)
    others = tuple(case_at(args.seed, args.cases + index).source_prompt for index in range(8))
    inner = [steps for steps in args.inner if steps]
    bounds: list[tuple[Ablation, int]] = [("vqae", 0), ("none", 0)]
    points = bounds + [(ablation, steps) for ablation in ABLATIONS if ablation != "vqae" for steps in inner]
    means: dict[tuple[str, int], float] = {}
    for ablation, steps in progress(iter(points), len(points), f"points of {args.cases} photos"):
        config = NullTextConfig(
            steps=args.steps, guidance_scale=args.guidance_scale, inner_steps=steps, ablation=ablation, other_captions=others
        )
        key = ["null-text", config.model_dump(mode="json")]
        found = [
            study.stored(args.seed, [*key, k], lambda k=k, config=config: reconstruction_psnr(study.base, args.seed, k, config))
            for k in range(args.cases)
        ]
        means[ablation, steps] = float(np.mean(found))
        print(f"{ablation}, {steps} steps: {means[ablation, steps]:.2f} dB")
    figure(means, inner, args.store / "null-text.png")


REWEIGHTED = {"a white bird on the sand": "white", "a black cat on the grass": "black", "a brown dog in the snow": "brown"}
"""The prompts of :func:`study_reweight`, and the word that is reweighted in each."""


def study_reweight(args: argparse.Namespace) -> None:
    """Reweighting by Prompt-to-Prompt.

    Generated images whose attention to one word of the prompt is multiplied by a factor (figure 6 of arXiv 2208.01626): one row for each
    prompt, one column for each factor, all from the noise of ``--seed``. Writes ``prompt-to-prompt.png`` into the folder of the store.
    """
    study, rows = Study(args.base, args.store), []
    for prompt, word in progress(iter(REWEIGHTED.items()), len(REWEIGHTED), "prompts"):
        configs = {
            f"{word} x {factor:g}": GeneratedConfig(steps=args.steps, guidance_scale=args.guidance_scale, factors={word: factor})
            for factor in args.factors
        }
        request = EditRequest(render(case_at(args.seed, 0).source), prompt, prompt, seed=args.seed)
        results = PromptToPromptText(configs).edit(Context(study.base), request)
        rows.append([(label, result.image) for label, result in zip(configs, results, strict=True)])
    args.store.mkdir(parents=True, exist_ok=True)
    sheet(rows, ", ".join(REWEIGHTED), cell=96).save(args.store / "prompt-to-prompt.png")
