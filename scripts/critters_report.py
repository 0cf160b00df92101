"""The figures and the sheet of the embedded base: ``python scripts/critters_report.py``.

Prints the VAE's fidelity, the judge's own accuracy, how often samples follow their prompt by the judge, how much of the words on the
identity the U-Net hears, and how often CLIP finds the caption of a held-out picture; writes ``docs/critters-samples.png``.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from critters_lessons import changed, sentence
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.utils import logging
from PIL import Image
from torch import Tensor

from imagic_lora.bases.base import Base
from imagic_lora.bases.loading.known import CRITTERS
from imagic_lora.bases.loading.registry import load_base
from imagic_lora.bench.catalogue import defaults
from imagic_lora.bench.metrics import CritterAlignment, pixels
from imagic_lora.bench.scores import SAME
from imagic_lora.core.conditioning import Conditioning, concatenate, interpolate
from imagic_lora.core.config import MemoryConfig
from imagic_lora.core.runtime import resolve_runtime
from imagic_lora.critters import ATTRIBUTES, Scene, caption, longest_caption, render, scene_at
from imagic_lora.critters.judge import Judge, Reading
from imagic_lora.critters.scene import IDENTITY, displaced
from imagic_lora.photos.canvas import to_image, to_pixels
from imagic_lora.photos.sheet import sheet

DOCS = Path(__file__).parent.parent / "docs"
TIMESTEPS = (900, 600, 400)


def batches(values: Tensor, size: int = 50) -> list[Tensor]:
    return list(values.split(size))


@torch.no_grad()
def fidelity(pictures: Tensor) -> tuple[float, Tensor]:
    """Mean PSNR in dB of the VAE round trip over pictures, and the round trips."""
    vae: Any = AutoencoderKL.from_pretrained(CRITTERS / "vae").float().eval()
    back = torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample.clamp(-1, 1) for part in batches(pictures)])
    error = (back - pictures).square().flatten(1).mean(1)
    return (10 * torch.log10(4 / error)).mean().item(), back


def sights(judge: Judge, pictures: Tensor) -> list[Reading]:
    return [one for part in batches(pictures) for one in judge.read_scenes(part)]


def agreement(seen: list[Reading], scenes: list[Scene]) -> dict[str, float]:
    """How often the judge sees what each scene says, by attribute, and all five at once."""
    wrong = [one.changed(scene) for one, scene in zip(seen, scenes, strict=True)]
    right = {name: sum(name not in one for one in wrong) / len(wrong) for name in ATTRIBUTES}
    return right | {"all": sum(not one for one in wrong) / len(wrong)}


def show_identity(title: str, seen: list[Reading], scenes: list[Scene]) -> None:
    """The judge's median error of every factor, in standard deviations over scenes, and its distances."""
    pairs = list(zip(seen, scenes, strict=True))
    factors = {name: median(abs(one.deviations(scene)[name]) for one, scene in pairs) for name in IDENTITY}
    distances = [one.distance(scene) for one, scene in pairs]
    within = sum(distance <= SAME for distance in distances) / len(distances)
    print(f"{title:46}" + "  ".join(f"{name} {value:.2f}" for name, value in factors.items()))
    print(f"{'':46}distance {median(distances):.3f} (median), within {SAME:g}: {100 * within:.1f}%")


def strangers(scenes: list[Scene]) -> list[Scene]:
    """Each scene with the identity of another one, its attributes and its facing kept."""
    others = scenes[1:] + scenes[:1]
    return [replace(scene, **{name: getattr(other, name) for name in IDENTITY}) for scene, other in zip(scenes, others, strict=True)]


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


def encoded(base: Base, scenes: list[Scene]) -> Tensor:
    """Clean latents of renders, ``[B, C, h, w]``."""
    return torch.cat([base.encode_image(to_pixels(render(scene))) for scene in scenes])


@torch.no_grad()
def gains(scenes: list[Scene], timesteps: tuple[int, ...]) -> dict[str, tuple[list[float], list[float]]]:
    """How much is heard of each factor of the identity, at each timestep (of 1,000): of captions that tell all of the scenes, and of
    captions of the scenes before an edit, mixed at the default eta with the sentence that asks for it.

    Two predictions of the clean latents, from the same noisy ones, are told of scenes half a range apart in that factor; what they differ
    by is projected on the true difference: 1 is all of it, 0 nothing. The noisy latents lie half way between the two and favour neither.
    """
    base, eta = load_base("critters", resolve_runtime(MemoryConfig(dtype="fp32"))), defaults("lora").eta
    kept = base.training.alphas_cumprod
    edits = [changed(scene, random.Random(k)) for k, scene in enumerate(scenes)]
    before = [one for one, _ in edits]
    asked = [sentence(scene, name, random.Random(k)) for k, (scene, (_, name)) in enumerate(zip(scenes, edits, strict=True))]
    clean, target = encoded(base, scenes), concatenate([base.encode_prompt(text) for text in asked])
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).to(clean)

    ways = (scenes, 0.0), (before, eta)

    def told(some: list[Scene], eta: float) -> Conditioning:
        return interpolate(target, concatenate([base.encode_prompt(longest_caption(scene)) for scene in some]), eta)

    def heard(name: str) -> tuple[list[float], list[float]]:
        apart = encoded(base, [displaced(scene, name) for scene in scenes]) - clean
        half_way, size = clean + apart / 2, apart.square().sum()

        def gain(timestep: int, one: Conditioning, other: Conditioning) -> float:
            times = torch.full((len(scenes),), timestep)
            noised = base.noised(half_way, noise, times)
            difference = base.predict(noised, times, one) - base.predict(noised, times, other)
            return ((difference * apart).sum() / size * ((1 - kept[timestep]) / kept[timestep]).sqrt()).item()

        whole, mixed = ([told(some, at) for some in (said, [displaced(scene, name) for scene in said])] for said, at in ways)
        return [gain(timestep, *whole) for timestep in timesteps], [gain(timestep, *mixed) for timestep in timesteps]

    return {name: heard(name) for name in ("facing", *IDENTITY)}


def show(title: str, figures: dict[str, float]) -> None:
    print(f"{title:46}" + "  ".join(f"{name} {100 * value:5.1f}%" for name, value in figures.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=500, help="held-out renders")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--out", type=Path, default=DOCS / "critters-samples.png")
    args = parser.parse_args()
    held_out = [scene_at("heldout", k) for k in range(args.pictures)]
    renders = pixels([render(scene) for scene in held_out])
    decibels, back = fidelity(renders)
    print(f"VAE round trip of {args.pictures} held-out pictures: {decibels:.2f} dB PSNR")
    judge = Judge.load()
    seen, seen_back = sights(judge, renders), sights(judge, back)
    show("judge on held-out renders", agreement(seen, held_out))
    show("judge on their VAE round trips", agreement(seen_back, held_out))
    show_identity("identity on renders, errors", seen, held_out)
    show_identity("identity on round trips, errors", seen_back, held_out)
    show_identity("against another one's identity", seen, strangers(held_out))
    asked = [scene_at("heldout", 10_000 + k) for k in range(args.samples)]
    made = samples(asked, args.guidance)
    found = sights(judge, pixels(made))
    show(f"{args.samples} samples at guidance {args.guidance:g}, by the judge", agreement(found, asked))
    for name, (told, mixed) in gains(held_out[:64], TIMESTEPS).items():
        parts = [" ".join(f"{value:5.2f}" for value in some) for some in (told, mixed)]
        print(f"{'of the ' + name + ' it hears, at ' + ', '.join(map(str, TIMESTEPS)):46}told {parts[0]}   mixed {parts[1]}")
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
