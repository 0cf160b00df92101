"""Figure of null-text inversion's ablations: ``python scripts/null_text_figure.py --cases 8 --out outputs/null-text``.

PSNR of the reconstruction over the number of optimisation steps at each sampling step (figure 4 of arXiv 2211.09794), on photos of
CritterBench, without Prompt-to-Prompt. PSNR is taken to the photo, so that the VAE alone (``vqae``) is the upper bound, and DDIM inversion
at the same guidance scale (no steps) the lower one. Writes ``null-text.png`` and ``null-text.json``. Results in the folder are reused, so
that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from matplotlib import pyplot as plt

from imagic_lora.bases.base import Base
from imagic_lora.bases.loading.registry import load_base
from imagic_lora.bench.cases import case_at
from imagic_lora.bench.metrics import psnr
from imagic_lora.cli.console import progress
from imagic_lora.core.config import MemoryConfig
from imagic_lora.core.runtime import resolve_runtime
from imagic_lora.critters import render
from imagic_lora.methods.inversions.null_text import Ablation, NullTextConfig, NullTextInversion
from imagic_lora.methods.method import EditRequest
from imagic_lora.methods.sampled import encode_request

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


def jobs(cases: int, inner: Sequence[int]) -> list[tuple[Ablation, int, int]]:
    """Ablation, inner steps and case of every point: the two bounds without inner steps, and each ablation with them."""
    bounds: list[tuple[Ablation, int]] = [("vqae", 0), ("none", 0)]
    points = bounds + [(ablation, steps) for ablation in ABLATIONS if ablation != "vqae" for steps in inner if steps]
    return [(ablation, steps, index) for ablation, steps in points for index in range(cases)]


def figure(values: dict[str, float], inner: Sequence[int], path: Path) -> None:
    """Draws the mean PSNR of each ablation over the inner steps.

    Args:
        values: PSNR by ``ABLATION/STEPS/CASE``.
        inner: numbers of inner steps.
        path: the PNG file.
    """
    means: dict[tuple[str, int], float] = {}
    for ablation in ABLATIONS:
        for steps in (0, *inner):
            found = [value for key, value in values.items() if key.startswith(f"{ablation}/{steps}/")]
            if found:
                means[ablation, steps] = float(np.mean(found))
    plot, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    axis.axhline(means["vqae", 0], color="black", label="VAE alone (vqae)")
    axis.axhline(means["none", 0], color="black", linestyle="--", label="DDIM inversion")
    for ablation in ABLATIONS:
        points = [(steps, means[ablation, steps]) for steps in inner if steps and (ablation, steps) in means]
        if points and ablation != "vqae":
            axis.plot(*zip(*points, strict=True), marker="o", label="null-text inversion" if ablation == "none" else ablation)
    axis.set(xlabel="optimisation steps at each sampling step", ylabel="PSNR of the reconstruction, dB")
    axis.legend(fontsize=8)
    plot.savefig(path, dpi=120)


def main() -> None:
    """Measures every point and draws the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", type=int, default=8, help="number of photos")
    parser.add_argument("--seed", type=int, default=1, help="seed of the cases")
    parser.add_argument("--steps", type=int, default=50, help="number of sampling steps")
    parser.add_argument("--guidance-scale", type=float, default=7.5)
    parser.add_argument("--inner", type=int, nargs="+", default=[1, 2, 5, 10, 20], help="optimisation steps at each sampling step")
    parser.add_argument("--out", type=Path, default=Path("outputs/null-text"), help="folder of the figure and the values")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    file, settings = given.out / "null-text.json", {"seed": given.seed, "steps": given.steps, "guidance_scale": given.guidance_scale}
    stored: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    values: dict[str, float] = stored.get("psnr", {}) if stored.get("settings") == settings else {}
    base = load_base("critters", resolve_runtime(MemoryConfig(dtype="fp32")))
    others = tuple(case_at(given.seed, given.cases + index).source_prompt for index in range(8))
    wanted = jobs(given.cases, given.inner)
    for ablation, inner, index in progress(iter(wanted), len(wanted), "points x photos"):
        if (key := f"{ablation}/{inner}/{index}") not in values:
            config = NullTextConfig(
                steps=given.steps, guidance_scale=given.guidance_scale, inner_steps=inner, ablation=ablation, other_captions=others
            )
            values[key] = reconstruction_psnr(base, given.seed, index, config)
            file.write_text(json.dumps({"settings": settings, "psnr": values}, indent=1) + "\n", encoding="utf-8")
    figure(values, given.inner, given.out / "null-text.png")


if __name__ == "__main__":
    main()
