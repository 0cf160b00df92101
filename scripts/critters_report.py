"""Quality of the embedded base: ``python scripts/critters_report.py``.

Prints the PSNR of the VAE, the accuracy of the judge, how often samples follow their prompt according to the judge, how strongly the U-Net
responds to the words for each factor of the identity, and how often CLIP finds the caption of a held-out image. Writes
``docs/critters-samples.png``.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from critters_lessons import changed, edit_prompt
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.utils import logging
from PIL import Image
from torch import Tensor

from imagic_lora.bases.base import Base
from imagic_lora.bases.loading.known import CRITTERS
from imagic_lora.bases.loading.registry import load_base
from imagic_lora.bench.catalogue import defaults
from imagic_lora.bench.metrics import CritterAlignment, pixels
from imagic_lora.bench.scores import IDENTITY_LIMIT
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
    """A tensor split into batches."""
    return list(values.split(size))


@torch.no_grad()
def reconstructed(images: Tensor) -> tuple[float, Tensor]:
    """Mean PSNR in dB of the VAE round trip of images, and the reconstructed images; ``[B, 3, 64, 64]`` in [-1, 1]."""
    vae: Any = AutoencoderKL.from_pretrained(CRITTERS / "vae").float().eval()
    back = torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample.clamp(-1, 1) for part in batches(images)])
    error = (back - images).square().flatten(1).mean(1)
    return (10 * torch.log10(4 / error)).mean().item(), back


def readings(judge: Judge, images: Tensor) -> list[Reading]:
    """What the judge reads in each image."""
    return [reading for part in batches(images) for reading in judge.read_scenes(part)]


def agreement(read: list[Reading], scenes: list[Scene]) -> dict[str, float]:
    """How often the judge reads the right value of each attribute, and all five at once."""
    wrong = [reading.changed(scene) for reading, scene in zip(read, scenes, strict=True)]
    right = {name: sum(name not in names for names in wrong) / len(wrong) for name in ATTRIBUTES}
    return right | {"all": sum(not names for names in wrong) / len(wrong)}


def show_identity(title: str, read: list[Reading], scenes: list[Scene]) -> None:
    """Prints the judge's median error of every factor, in standard deviations over scenes, and the distances of identities."""
    pairs = list(zip(read, scenes, strict=True))
    factors = {name: median(abs(reading.deviations(scene)[name]) for reading, scene in pairs) for name in IDENTITY}
    distances = [reading.distance(scene) for reading, scene in pairs]
    within = sum(distance <= IDENTITY_LIMIT for distance in distances) / len(distances)
    print(f"{title:46}" + "  ".join(f"{name} {value:.2f}" for name, value in factors.items()))
    print(f"{'':46}distance {median(distances):.3f} (median), within {IDENTITY_LIMIT:g}: {100 * within:.1f}%")


def with_other_identities(scenes: list[Scene]) -> list[Scene]:
    """Each scene with the identity of the next scene; attributes and facing are kept."""
    others = scenes[1:] + scenes[:1]
    return [replace(scene, **{name: getattr(other, name) for name in IDENTITY}) for scene, other in zip(scenes, others, strict=True)]


def samples(scenes: list[Scene], guidance: float) -> list[Image.Image]:
    """One sample for the caption of each scene, by diffusers alone."""
    logging.disable_progress_bar()
    pipe = StableDiffusionPipeline.from_pretrained(CRITTERS, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    for start in range(0, len(scenes), 50):
        part = scenes[start : start + 50]
        generators = [torch.Generator().manual_seed(start + k) for k in range(len(part))]
        prompts = [caption(scene) for scene in part]
        output = pipe(prompts, height=64, width=64, guidance_scale=guidance, num_inference_steps=30, generator=generators)
        images += output.images  # pyright: ignore[reportAttributeAccessIssue]
    return images


def encoded(base: Base, scenes: list[Scene]) -> Tensor:
    """Clean latents of renders, ``[B, C, h, w]``."""
    return torch.cat([base.encode_image(to_pixels(render(scene))) for scene in scenes])


@torch.no_grad()
def gains(scenes: list[Scene], timesteps: tuple[int, ...]) -> dict[str, tuple[list[float], list[float]]]:
    """Response of the U-Net to the words for each factor of the identity.

    Two predictions of the clean latents, from the same noisy latents, have captions of scenes that differ in that factor by half its range.
    Their difference is projected on the true difference: 1 is all of it, 0 nothing. The noisy latents are half way between both scenes.

    Args:
        timesteps: of 1,000.

    Returns:
        For each factor, the response at each timestep: to captions that name the whole scene; and to captions of the scene before an edit,
        interpolated at the default eta with the prompt that asks for the edit.
    """
    base, eta = load_base("critters", resolve_runtime(MemoryConfig(dtype="fp32"))), defaults("lora").eta
    alphas = base.training_scheduler.alphas_cumprod
    edits = [changed(scene, random.Random(k)) for k, scene in enumerate(scenes)]
    before = [scene for scene, _ in edits]
    prompts = [edit_prompt(scene, name, random.Random(k)) for k, (scene, (_, name)) in enumerate(zip(scenes, edits, strict=True))]
    clean, target = encoded(base, scenes), concatenate([base.encode_prompt(text) for text in prompts])
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).to(clean)
    described = (scenes, 0.0), (before, eta)

    def conditioning(some: list[Scene], eta: float) -> Conditioning:
        return interpolate(target, concatenate([base.encode_prompt(longest_caption(scene)) for scene in some]), eta)

    def response(name: str) -> tuple[list[float], list[float]]:
        difference = encoded(base, [displaced(scene, name) for scene in scenes]) - clean
        half_way, size = clean + difference / 2, difference.square().sum()

        def gain(timestep: int, first: Conditioning, second: Conditioning) -> float:
            times = torch.full((len(scenes),), timestep)
            noised = base.noised(half_way, noise, times)
            predicted = base.predict(noised, times, first) - base.predict(noised, times, second)
            return ((predicted * difference).sum() / size * ((1 - alphas[timestep]) / alphas[timestep]).sqrt()).item()

        whole, mixed = ([conditioning(each, at) for each in (some, [displaced(scene, name) for scene in some])] for some, at in described)
        return [gain(timestep, *whole) for timestep in timesteps], [gain(timestep, *mixed) for timestep in timesteps]

    return {name: response(name) for name in ("facing", *IDENTITY)}


def show(title: str, figures: dict[str, float]) -> None:
    """Prints one line of percentages; ``figures`` are in [0, 1]."""
    print(f"{title:46}" + "  ".join(f"{name} {100 * value:5.1f}%" for name, value in figures.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=500, help="number of held-out renders")
    parser.add_argument("--samples", type=int, default=500, help="number of samples from prompts")
    parser.add_argument("--guidance", type=float, default=3.0, help="guidance scale of the samples")
    parser.add_argument("--out", type=Path, default=DOCS / "critters-samples.png")
    args = parser.parse_args()
    held_out = [scene_at("heldout", k) for k in range(args.pictures)]
    renders = pixels([render(scene) for scene in held_out])
    decibels, back = reconstructed(renders)
    print(f"VAE round trip of {args.pictures} held-out images: {decibels:.2f} dB PSNR")
    judge = Judge.load()
    read, read_back = readings(judge, renders), readings(judge, back)
    show("judge on held-out renders", agreement(read, held_out))
    show("judge on their VAE round trips", agreement(read_back, held_out))
    show_identity("identity on renders, errors", read, held_out)
    show_identity("identity on round trips, errors", read_back, held_out)
    show_identity("against another one's identity", read, with_other_identities(held_out))
    scenes = [scene_at("heldout", 10_000 + k) for k in range(args.samples)]
    images = samples(scenes, args.guidance)
    read_samples = readings(judge, pixels(images))
    show(f"{args.samples} samples at guidance {args.guidance:g}, by the judge", agreement(read_samples, scenes))
    for name, (whole, mixed) in gains(held_out[:64], TIMESTEPS).items():
        parts = [" ".join(f"{value:5.2f}" for value in some) for some in (whole, mixed)]
        print(f"{'response to ' + name + ', at ' + ', '.join(map(str, TIMESTEPS)):46}whole caption {parts[0]}   mixed {parts[1]}")
    texts = [caption(scene) for scene in held_out[:100]]
    scores = CritterAlignment.load().scores([to_image(render_) for render_ in renders[:100]], texts)
    right = [texts[int(scores[k].argmax())] == texts[k] for k in range(100)]
    print(f"CLIP finds the caption of an image among 100: {sum(right)}%")
    cells = [(caption(scene).removeprefix("a ").removeprefix("an "), image) for scene, image in zip(scenes, images, strict=True)][:64]
    args.out.parent.mkdir(exist_ok=True)
    sheet([cells[k : k + 8] for k in range(0, len(cells), 8)], "64 samples from prompts, not selected", cell=160).save(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
