"""Quality of an embedded base: ``python scripts/critters_report.py``, or ``--base critters-dit``.

Prints the PSNR of the VAE, the accuracy of the judge, how often samples follow their prompt according to the judge, how strongly the
denoiser responds to the words for each factor of the identity, and how often CLIP finds the caption of a held-out image. Writes
``docs/critters-samples.png``, or that of another base.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline, StableDiffusionPipeline
from diffusers.utils import logging
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from imagic_lora.bases.base import Base
from imagic_lora.bases.loading.configs import folder_of_parts
from imagic_lora.bases.loading.known import known_base
from imagic_lora.bases.loading.registry import load_base, locate
from imagic_lora.bases.process import Diffusion
from imagic_lora.bench.metrics import CritterAlignment, pixels
from imagic_lora.bench.scores import IDENTITY_LIMIT
from imagic_lora.core.conditioning import Conditioning, concatenate
from imagic_lora.core.device_config import MemoryConfig
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


class Prompts:
    """The pipeline of a base by diffusers alone, and the kwargs that it takes for prompts.

    Args:
        folder: folder of the base.
        parts: folder with VAE, tokenizer and text encoder; the same one for a base with a U-Net.
    """

    def __init__(self, folder: Path, parts: Path) -> None:
        logging.disable_progress_bar()
        self.flow = folder != parts
        if self.flow:  # the pipeline encodes no prompt with one CLIP text encoder
            self.words = CLIPTokenizer.from_pretrained(parts / "tokenizer")
            self.text: Any = CLIPTextModel.from_pretrained(parts / "text_encoder").float()
            vae: Any = AutoencoderKL.from_pretrained(parts / "vae").float()
            vae.register_to_config(shift_factor=0.0)  # for which this pipeline has no default
            none: dict[str, Any] = {f"{kind}{number}": None for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")}
            self.pipe: Any = StableDiffusion3Pipeline.from_pretrained(folder, vae=vae, dtype=torch.float32, **none)
        else:
            self.pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
        self.pipe.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def kwargs(self, prompts: list[str]) -> dict[str, Any]:
        """The kwargs for prompts."""
        if not self.flow:
            return {"prompt": prompts}
        found: dict[str, Any] = {}
        for prefix, texts in (("", prompts), ("negative_", [""] * len(prompts))):
            ids = self.words(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
            output = self.text(ids)
            found |= {f"{prefix}prompt_embeds": output.last_hidden_state, f"{prefix}pooled_prompt_embeds": output.pooler_output}
        return found


def samples(folder: Path, parts: Path, scenes: list[Scene], guidance: float) -> list[Image.Image]:
    """One sample for the caption of each scene, by diffusers alone; arguments as for :class:`Prompts`."""
    prompts = Prompts(folder, parts)
    images: list[Image.Image] = []
    for start in range(0, len(scenes), 50):
        part = scenes[start : start + 50]
        generators = [torch.Generator().manual_seed(start + k) for k in range(len(part))]
        sampling = {"height": 64, "width": 64, "guidance_scale": guidance, "num_inference_steps": 30, "generator": generators}
        images += prompts.pipe(**prompts.kwargs([caption(scene) for scene in part]), **sampling).images
    return images


def encoded(base: Base, scenes: list[Scene]) -> Tensor:
    """Clean latents of renders, ``[B, C, h, w]``."""
    return torch.cat([base.encode_image(to_pixels(render(scene))) for scene in scenes])


@torch.no_grad()
def gains(base: Base, scenes: list[Scene], timesteps: tuple[int, ...]) -> dict[str, list[float]]:
    """Response of the denoiser to the words for each factor of the identity.

    Two predictions of the clean latents, from the same noisy latents, have captions of scenes that differ in that factor by half its range.
    Their difference is projected on the true difference: 1 is all of it, 0 nothing. The noisy latents are half way between both scenes.

    Args:
        base: with epsilon or v prediction, or a flow.
        scenes: what the captions describe before a factor is moved.
        timesteps: of 1,000; of a flow, 1,000 times the level of noise.

    Returns:
        For each factor, the response at each timestep.
    """
    diffusion = base.process if isinstance(base.process, Diffusion) else None
    clean = encoded(base, scenes)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).to(clean)

    def to_clean(timestep: int) -> float:
        """What a difference of predictions is multiplied by to become one of clean latents, times -1."""
        if diffusion is None:
            return timestep / 1000
        alpha: float = diffusion.scheduler.alphas_cumprod[timestep].item()
        return (1 - alpha) ** 0.5 if base.prediction_type == "v_prediction" else ((1 - alpha) / alpha) ** 0.5

    def conditioning(some: list[Scene]) -> Conditioning:
        return concatenate([base.encode_prompt(longest_caption(scene)) for scene in some])

    def response(name: str) -> list[float]:
        moved = [displaced(scene, name) for scene in scenes]
        difference, first, second = encoded(base, moved) - clean, conditioning(scenes), conditioning(moved)
        half_way, size = clean + difference / 2, difference.square().sum()

        def gain(timestep: int) -> float:
            times = torch.full((len(scenes),), timestep if diffusion else timestep / 1000)
            noised = base.noised(half_way, noise, times)
            predicted = base.predict(noised, times, first) - base.predict(noised, times, second)
            return ((predicted * difference).sum() / size).item() * to_clean(timestep)

        return [gain(timestep) for timestep in timesteps]

    return {name: response(name) for name in ("facing", *IDENTITY)}


def show(title: str, figures: dict[str, float]) -> None:
    """Prints one line of percentages; ``figures`` are in [0, 1]."""
    print(f"{title:46}" + "  ".join(f"{name} {100 * value:5.1f}%" for name, value in figures.items()))


def show_readings(parts: Path, judge: Judge, scenes: list[Scene], renders: Tensor) -> None:
    """Prints the PSNR of the VAE in a folder, and what the judge reads in renders ``[B, 3, 64, 64]`` of scenes and in their round trips."""
    decibels, back = reconstructed(parts, renders)
    print(f"VAE round trip of {len(scenes)} held-out images: {decibels:.2f} dB PSNR")
    read, read_back = readings(judge, renders), readings(judge, back)
    show("judge on held-out renders", agreement(read, scenes))
    show("judge on their VAE round trips", agreement(read_back, scenes))
    show_identity("identity on renders, errors", read, scenes)
    show_identity("identity on round trips, errors", read_back, scenes)
    show_identity("against another one's identity", read, with_other_identities(scenes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="critters", help="name of the base, or its folder, which has its judge and its CLIP")
    parser.add_argument("--pictures", type=int, default=500, help="number of held-out renders")
    parser.add_argument("--samples", type=int, default=500, help="number of samples from prompts")
    parser.add_argument("--guidance", type=float, default=3.0, help="guidance scale of the samples")
    parser.add_argument("--out", type=Path, help="image of the samples; default: docs/critters-samples.png, or that of another name")
    args = parser.parse_args()
    folder = locate(args.base)
    parts = folder_of_parts(known_base(args.base).entry) or folder
    args.out = args.out or DOCS / f"{known_base(args.base).built_in or folder.name}-samples.png"
    held_out, judge = [scene_at("heldout", k) for k in range(args.pictures)], Judge.load(parts / "judge.safetensors")
    renders = pixels([render(scene) for scene in held_out])
    show_readings(parts, judge, held_out, renders)
    scenes = [scene_at("heldout", 10_000 + k) for k in range(args.samples)]
    images = samples(folder, parts, scenes, args.guidance)
    read_samples = readings(judge, pixels(images))
    show(f"{args.samples} samples at guidance {args.guidance:g}, by the judge", agreement(read_samples, scenes))
    base = load_base(args.base, resolve_runtime(MemoryConfig(device="cpu", dtype="fp32")))
    for name, shares in gains(base, held_out[:64], TIMESTEPS).items():
        print(f"{'response to ' + name + ', at ' + ', '.join(map(str, TIMESTEPS)):46}{' '.join(f'{share:5.2f}' for share in shares)}")
    count = min(100, len(held_out))
    texts = [caption(scene) for scene in held_out[:count]]
    scores = CritterAlignment.load(parts).scores([to_image(render_) for render_ in renders[:count]], texts)
    right = [texts[int(scores[k].argmax())] == texts[k] for k in range(count)]
    print(f"CLIP finds the caption of an image among {count}: {100 * sum(right) / count:.0f}%")
    cells = [(caption(scene).removeprefix("a ").removeprefix("an "), image) for scene, image in zip(scenes, images, strict=True)][:64]
    args.out.parent.mkdir(exist_ok=True)
    sheet([cells[k : k + 8] for k in range(0, len(cells), 8)], "64 samples from prompts, not selected", cell=160).save(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
