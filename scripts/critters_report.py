"""The figures and the sheet of the embedded base: ``python scripts/critters_report.py``.

Prints the VAE's fidelity, the judge's own accuracy, how often samples follow their prompt by the judge, and how often CLIP finds the
caption of a held-out picture; writes ``docs/critters-samples.png``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.utils import logging
from PIL import Image
from torch import Tensor

from imagic_lora.bases.registry import CRITTERS
from imagic_lora.critters import ATTRIBUTES, Scene, caption, render, scene_at
from imagic_lora.critters.judge import Judge
from imagic_lora.images import sheet, to_image
from imagic_lora.metrics import CritterAlignment, pixels

DOCS = Path(__file__).parent.parent / "docs"


def batches(values: Tensor, size: int = 50) -> list[Tensor]:
    return list(values.split(size))


@torch.no_grad()
def fidelity(pictures: Tensor) -> tuple[float, Tensor]:
    """Mean PSNR in dB of the VAE round trip over pictures, and the round trips."""
    vae: Any = AutoencoderKL.from_pretrained(CRITTERS / "vae").float().eval()
    back = torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample.clamp(-1, 1) for part in batches(pictures)])
    error = (back - pictures).square().flatten(1).mean(1)
    return (10 * torch.log10(4 / error)).mean().item(), back


def agreement(judge: Judge, pictures: Tensor, scenes: list[Scene]) -> dict[str, float]:
    """How often the judge sees what each scene says, by attribute."""
    seen = [one for part in batches(pictures) for one in judge.see(part)]
    return {name: sum(s[name] == getattr(scene, name) for s, scene in zip(seen, scenes, strict=True)) / len(scenes) for name in ATTRIBUTES}


def samples(scenes: list[Scene], guidance: float) -> list[Image.Image]:
    """One sample for the full caption of each scene, by plain diffusers."""
    logging.disable_progress_bar()
    pipe = StableDiffusionPipeline.from_pretrained(CRITTERS, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pictures: list[Image.Image] = []
    for start in range(0, len(scenes), 50):
        part = scenes[start : start + 50]
        generators = [torch.Generator().manual_seed(start + k) for k in range(len(part))]
        prompts = [caption(scene) for scene in part]
        output = pipe(prompts, height=64, width=64, guidance_scale=guidance, num_inference_steps=30, generator=generators)
        pictures += output.images  # pyright: ignore[reportAttributeAccessIssue]
    return pictures


def show(title: str, figures: dict[str, float]) -> None:
    print(f"{title:46}" + "  ".join(f"{name} {100 * value:5.1f}%" for name, value in figures.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=500, help="held-out renders")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--out", type=Path, default=DOCS / "critters-samples.png")
    args = parser.parse_args()
    held_out = [scene_at("heldout", k) for k in range(args.pictures)]
    renders = pixels([render(scene) for scene in held_out])
    decibels, back = fidelity(renders)
    print(f"VAE round trip of {args.pictures} held-out pictures: {decibels:.2f} dB PSNR")
    judge = Judge.load()
    show("judge on held-out renders", agreement(judge, renders, held_out))
    show("judge on their VAE round trips", agreement(judge, back, held_out))
    asked = [scene_at("heldout", 10_000 + k) for k in range(args.samples)]
    made = samples(asked, args.guidance)
    found = agreement(judge, pixels(made), asked)
    show(f"{args.samples} samples at guidance {args.guidance:g}, by the judge", found)
    seen = judge.see(pixels(made))
    both = [s["pose"] == a.pose and s["animal"] == a.animal for s, a in zip(seen, asked, strict=True)]
    print(f"{'pose and animal both':46}{100 * sum(both) / len(both):.1f}%")
    texts = [caption(scene) for scene in held_out[:100]]
    scores = CritterAlignment.load().scores([to_image(one) for one in renders[:100]], texts)
    right = [texts[int(scores[k].argmax())] == texts[k] for k in range(100)]
    print(f"CLIP finds the caption of a picture among 100: {sum(right)}%")
    cells = [(caption(scene).removeprefix("a ").removeprefix("an "), image) for scene, image in zip(asked, made, strict=True)][:64]
    args.out.parent.mkdir(exist_ok=True)
    sheet([cells[k : k + 8] for k in range(0, len(cells), 8)], "64 samples from prompts, not selected", cell=160).save(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
