"""Quality of the embedded base: ``python scripts/critters_report.py``.

Prints the PSNR of the VAE, the accuracy of the judge, how often samples follow their prompt according to the judge, how strongly the U-Net
responds to the words for each factor of the identity, and how often CLIP finds the caption of a held-out image. Writes
``docs/critters-samples.png``.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.utils import logging
from PIL import Image
from torch import Tensor

from imagic_lora.bases.base import Base
from imagic_lora.bases.loading.known import CRITTERS
from imagic_lora.bases.loading.registry import load_base
from imagic_lora.bases.process import Diffusion
from imagic_lora.bench.metrics import CritterAlignment, pixels
from imagic_lora.bench.scores import IDENTITY_LIMIT
from imagic_lora.core.conditioning import Conditioning, concatenate
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
def reconstructed(folder: Path, images: Tensor) -> tuple[float, Tensor]:
    """Mean PSNR in dB of the VAE round trip of images, and the reconstructed images; ``[B, 3, 64, 64]`` in [-1, 1]."""
    vae: Any = AutoencoderKL.from_pretrained(folder / "vae").float().eval()
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


def samples(folder: Path, scenes: list[Scene], guidance: float) -> list[Image.Image]:
    """One sample for the caption of each scene, by diffusers alone."""
    logging.disable_progress_bar()
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
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
def gains(base: Base, scenes: list[Scene], timesteps: tuple[int, ...]) -> dict[str, list[float]]:
    """Response of the U-Net to the words for each factor of the identity.

    Two predictions of the clean latents, from the same noisy latents, have captions of scenes that differ in that factor by half its range.
    Their difference is projected on the true difference: 1 is all of it, 0 nothing. The noisy latents are half way between both scenes.

    Args:
        base: with epsilon or v prediction.
        scenes: what the captions describe before a factor is moved.
        timesteps: of 1,000.

    Returns:
        For each factor, the response at each timestep.
    """
    assert isinstance(base.process, Diffusion)
    alphas, velocity = base.process.scheduler.alphas_cumprod, base.prediction_type == "v_prediction"
    clean = encoded(base, scenes)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).to(clean)

    def conditioning(some: list[Scene]) -> Conditioning:
        return concatenate([base.encode_prompt(longest_caption(scene)) for scene in some])

    def response(name: str) -> list[float]:
        moved = [displaced(scene, name) for scene in scenes]
        difference, first, second = encoded(base, moved) - clean, conditioning(scenes), conditioning(moved)
        half_way, size = clean + difference / 2, difference.square().sum()

        def gain(timestep: int) -> float:
            times, alpha = torch.full((len(scenes),), timestep), alphas[timestep]
            noised = base.noised(half_way, noise, times)
            predicted = base.predict(noised, times, first) - base.predict(noised, times, second)
            to_clean = (1 - alpha).sqrt() if velocity else ((1 - alpha) / alpha).sqrt()
            return ((predicted * difference).sum() / size * to_clean).item()

        return [gain(timestep) for timestep in timesteps]

    return {name: response(name) for name in ("facing", *IDENTITY)}


def show(title: str, figures: dict[str, float]) -> None:
    """Prints one line of percentages; ``figures`` are in [0, 1]."""
    print(f"{title:46}" + "  ".join(f"{name} {100 * value:5.1f}%" for name, value in figures.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=CRITTERS, help="folder of the base, its judge and its CLIP")
    parser.add_argument("--pictures", type=int, default=500, help="number of held-out renders")
    parser.add_argument("--samples", type=int, default=500, help="number of samples from prompts")
    parser.add_argument("--guidance", type=float, default=3.0, help="guidance scale of the samples")
    parser.add_argument("--out", type=Path, default=DOCS / "critters-samples.png")
    args = parser.parse_args()
    held_out = [scene_at("heldout", k) for k in range(args.pictures)]
    renders = pixels([render(scene) for scene in held_out])
    decibels, back = reconstructed(args.base, renders)
    print(f"VAE round trip of {args.pictures} held-out images: {decibels:.2f} dB PSNR")
    judge = Judge.load(args.base / "judge.safetensors")
    read, read_back = readings(judge, renders), readings(judge, back)
    show("judge on held-out renders", agreement(read, held_out))
    show("judge on their VAE round trips", agreement(read_back, held_out))
    show_identity("identity on renders, errors", read, held_out)
    show_identity("identity on round trips, errors", read_back, held_out)
    show_identity("against another one's identity", read, with_other_identities(held_out))
    scenes = [scene_at("heldout", 10_000 + k) for k in range(args.samples)]
    images = samples(args.base, scenes, args.guidance)
    read_samples = readings(judge, pixels(images))
    show(f"{args.samples} samples at guidance {args.guidance:g}, by the judge", agreement(read_samples, scenes))
    base = load_base(str(args.base), resolve_runtime(MemoryConfig(device="cpu", dtype="fp32")))
    for name, shares in gains(base, held_out[:64], TIMESTEPS).items():
        print(f"{'response to ' + name + ', at ' + ', '.join(map(str, TIMESTEPS)):46}{' '.join(f'{share:5.2f}' for share in shares)}")
    texts = [caption(scene) for scene in held_out[:100]]
    scores = CritterAlignment.load(args.base).scores([to_image(render_) for render_ in renders[:100]], texts)
    right = [texts[int(scores[k].argmax())] == texts[k] for k in range(100)]
    print(f"CLIP finds the caption of an image among 100: {sum(right)}%")
    cells = [(caption(scene).removeprefix("a ").removeprefix("an "), image) for scene, image in zip(scenes, images, strict=True)][:64]
    args.out.parent.mkdir(exist_ok=True)
    sheet([cells[k : k + 8] for k in range(0, len(cells), 8)], "64 samples from prompts, not selected", cell=160).save(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
