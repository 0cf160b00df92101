"""Train the embedded base from scratch: ``python scripts/train_critters.py vae|judge|clip|unet``.

The seed determines the result, on a CPU or a GPU. The state is saved every two minutes under ``--work``, and training resumes from it. The
averaged weights are written into the package at the end. docs/internals/embedded-base.md documents the recipe and its results.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from critters_batches import Batches, loss
from critters_lessons import EDITS_EVERY, GROUP, Edits, scaled, tensor, tokens
from critters_run import Run, drawn_neighbour, pictures
from critters_words import adopt, text_config, tokenizer
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig

from imagic_lora.bases.loading.known import CRITTERS
from imagic_lora.critters import ATTRIBUTES, SIZE, sample_caption, scene_at
from imagic_lora.critters.judge import FACINGS, Judge, identity_targets
from imagic_lora.critters.scene import IDENTITY

VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (16, 32, 64, 64),
    "layers_per_block": 1,
    "latent_channels": 8,
    "norm_num_groups": 8,
    "sample_size": SIZE,
}
UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 8,
    "out_channels": 8,
    "layers_per_block": 1,
    "block_out_channels": (128, 192),
    "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    "cross_attention_dim": 128,
    "attention_head_dim": 4,
    "norm_num_groups": 16,
}
VAE_NOISE = 0.1  # standard deviation of the noise that the decoder is trained with and that the encoder predicts as its own


def train_vae(args: argparse.Namespace) -> None:
    """Trains the VAE with L1 and MSE, a penalty on the size of latents, and noise of a fixed standard deviation on them."""
    vae: Any = AutoencoderKL(**VAE)
    data = pictures(args.work, args.pictures)
    run = Run(args, vae, lr=1.5e-3)

    def loss_of(rng: np.random.Generator) -> torch.Tensor:
        x = tensor(data[rng.integers(0, len(data), 16)], args.device)
        latents = vae.encode(x).latent_dist
        mean = latents.mean.float()
        y = vae.decode(mean + VAE_NOISE * torch.randn_like(mean)).sample.float()
        declared = (latents.logvar.float() - 2 * math.log(VAE_NOISE)).square().mean()
        return F.l1_loss(y, x) + F.mse_loss(y, x) + 1e-3 * mean.square().mean() + 1e-4 * declared

    for _ in run.train(loss_of):
        pass
    export_vae(args, run)


def export_vae(args: argparse.Namespace, run: Run) -> None:
    """Writes the averaged VAE with the scaling factor that gives its latents unit variance, as in Stable Diffusion."""
    vae: Any = run.averaged()
    with torch.no_grad():
        x = tensor(pictures(args.work, args.pictures)[:1000], args.device)
        vae.register_to_config(scaling_factor=round(1 / vae.encode(x).latent_dist.mean.std().item(), 5))
    vae.half().save_pretrained(CRITTERS / "vae")


def latents(args: argparse.Namespace) -> np.ndarray:
    """The scaled latent means of the training images, ``[N, 8, 8, 8]`` float16; encoded once by the exported VAE and cached in a file."""
    path = args.work / f"latents-{args.pictures}.npy"
    if not path.exists():
        vae: Any = AutoencoderKL.from_pretrained(CRITTERS / "vae").to(args.device).eval()
        data = pictures(args.work, args.pictures, drawn_neighbour)
        with torch.autocast(args.device, torch.bfloat16):
            parts = [scaled(vae, data[k : k + 100], args.device).half().cpu().numpy() for k in range(0, len(data), 100)]
        np.save(path, np.concatenate(parts))
    return np.load(path)


def train_unet(args: argparse.Namespace) -> None:
    """Trains the U-Net and the text encoder together on the batches of ``critters_batches.py``."""
    words = tokenizer()
    unet: Any = UNet2DConditionModel(**UNET)
    text = CLIPTextModel(text_config(words))
    if args.start_from:
        unet.load_state_dict(UNet2DConditionModel.from_pretrained(args.start_from / "unet").float().state_dict())
        adopt(text, words, CLIPTextModel.from_pretrained(args.start_from / "text_encoder"), args.start_from)
    if args.device == "cpu":  # 1.5 times as fast: the backward pass of fused attention is slow on a CPU
        unet.to(memory_format=torch.channels_last).set_attn_processor(AttnProcessor())
        text.set_attn_implementation("eager")
    scheduler: Any = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    data = torch.from_numpy(latents(args))
    vae_noise = json.loads((CRITTERS / "vae" / "config.json").read_text())["scaling_factor"] * VAE_NOISE
    run = Run(args, torch.nn.ModuleDict({"unet": unet, "text": text}), lr=2e-4 if args.start_from else 6e-4, held=0.4)
    vae: Any = AutoencoderKL.from_pretrained(CRITTERS / "vae")
    vae.to(args.device).eval()
    groups = args.batch // GROUP
    loud, edited, paired = (round(share * groups) for share in (args.loud, args.edits, args.ways))
    batches = Batches(data, scheduler, vae_noise, groups, loud, edited, paired, loud_from=args.loud_from, device=args.device)
    edits_file = args.work / "edits.pt"
    edits = Edits.load(edits_file)

    def loss_of(rng: np.random.Generator) -> torch.Tensor:
        if edited and (not len(edits) or run.step % EDITS_EVERY == 0):
            edits.add(Edits.create(run.module, words, vae, scheduler, rng, args.pictures), edits_file)  # a small set would be memorised
        return loss(run.module, words, scheduler, batches.sample(rng, edits))

    for step in run.train(loss_of):
        if args.export_every and step % args.export_every == 0:
            run.ema.store(run.module.parameters())
            export_pipeline(run, words, scheduler)
            run.ema.restore(run.module.parameters())
    export_pipeline(run, words, scheduler)


def export_pipeline(run: Run, words: CLIPTokenizer, scheduler: Any) -> None:
    """Writes the whole base in diffusers' format, in half precision, with the averaged weights."""
    parts: Any = run.averaged()
    unet, text = UNet2DConditionModel(**UNET), CLIPTextModel(text_config(words))
    unet.load_state_dict(parts["unet"].state_dict())
    text.load_state_dict(parts["text"].state_dict())
    vae: Any = AutoencoderKL.from_pretrained(CRITTERS / "vae", dtype=torch.float16)
    vae.register_to_config(_name_or_path="critters")  # instead of the folder it was loaded from
    without: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionPipeline(vae, text.half(), words, unet.half(), scheduler, **without).save_pretrained(CRITTERS)
    config = CRITTERS / "text_encoder" / "config.json"  # else transformers loads it in half precision and diffusers the rest in single
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    run.module.train()


def train_judge(args: argparse.Namespace) -> None:
    """Trains the judge on renders and on VAE round trips of noisy latents; a third of the images is blurred, and noise is added to all.

    So the judge also reads generated images, which are less sharp than renders.
    """
    vae: Any = AutoencoderKL.from_pretrained(CRITTERS / "vae").to(args.device).eval()
    judge = Judge()
    data = pictures(args.work, args.pictures)
    run = Run(args, judge, lr=2e-3)

    def loss_of(rng: np.random.Generator) -> torch.Tensor:
        indices = rng.integers(0, len(data), 64)
        x = tensor(data[indices], args.device)
        with torch.no_grad():
            z = vae.encode(x[:40]).latent_dist.mean
            noise_level = 1 - 0.75 * run.step / args.steps  # decreases
            spread = 4 * noise_level * VAE_NOISE * torch.rand(len(z), 1, 1, 1, device=x.device)
            x[:40] = vae.decode(z + spread * torch.randn_like(z)).sample.clamp(-1, 1).float()
        x[::3] = F.avg_pool2d(F.pad(x[::3], (1, 1, 1, 1), "replicate"), 3, 1)
        x = x + 0.2 * noise_level * torch.rand(len(x), 1, 1, 1, device=x.device) * torch.randn_like(x)
        scenes = [scene_at("train", int(k)) for k in indices]
        outputs = {name: output.float() for name, output in judge(x).items()}
        identity = torch.tensor([identity_targets(scene) for scene in scenes], device=x.device)
        losses = [F.smooth_l1_loss(outputs["identity"], identity, beta=0.2) * len(IDENTITY)]
        for name, values in {**ATTRIBUTES, "facing": FACINGS}.items():
            right = torch.tensor([values.index(getattr(s, name)) for s in scenes], device=x.device)
            losses.append(F.cross_entropy(outputs[name], right))
        return torch.stack(losses).sum()

    for _ in run.train(loss_of):
        pass
    run.averaged()
    judge.save(CRITTERS / "judge.safetensors")


def train_clip(args: argparse.Namespace) -> None:
    """Trains CLIP; equal captions in a batch are all targets of each other's images."""
    words = tokenizer()
    vision = CLIPVisionConfig(
        image_size=SIZE,
        patch_size=8,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        projection_dim=128,
    )
    clip = CLIPModel(CLIPConfig(text_config=text_config(words).to_dict(), vision_config=vision.to_dict(), projection_dim=128))
    if args.start_from:
        adopt(clip, words, CLIPModel.from_pretrained(args.start_from / "clip"), args.start_from)
    data = pictures(args.work, args.pictures)
    run = Run(args, clip, lr=1e-3)

    def loss_of(rng: np.random.Generator) -> torch.Tensor:
        indices = rng.integers(0, len(data), 96)
        draw = random.Random(int(rng.integers(2**62)))
        texts = [sample_caption(scene_at("train", int(k)), draw) for k in indices]
        logits = clip(input_ids=tokens(words, texts, args.device), pixel_values=tensor(data[indices], args.device)).logits_per_text
        same = torch.tensor([[float(a == b) for a in texts] for b in texts], device=args.device)
        same = same / same.sum(1, keepdim=True)
        return (F.cross_entropy(logits.float(), same) + F.cross_entropy(logits.float().T, same)) / 2

    for _ in run.train(loss_of):
        pass
    run.averaged()
    clip.half().save_pretrained(CRITTERS / "clip")


PARTS: dict[str, tuple[Callable[[argparse.Namespace], None], int]] = {
    "vae": (train_vae, 6500),
    "judge": (train_judge, 5000),
    "clip": (train_clip, 1000),
    "unet": (train_unet, 2200),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--steps", type=int, help="total number of steps (default: that of the shipped weights)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=80_000, help="number of images in the training set")
    parser.add_argument("--batch", type=int, default=64, help="batch size of the U-Net's training, in images")
    parser.add_argument(
        "--start-from",
        type=Path,
        metavar="FOLDER",
        help="initialise the U-Net and text encoder (with a third of the learning rate), or the CLIP, from another base",
    )
    parser.add_argument(
        "--loud", type=float, default=0.25, metavar="SHARE", help="share of each U-Net batch whose captions name everything in the image"
    )
    parser.add_argument(
        "--edits",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="share of edits in each U-Net batch, with embeddings optimised as by Imagic",
    )
    parser.add_argument(
        "--ways",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of each U-Net batch, within --edits, of pairs of edit and photo at one sampler step; version 6 has none",
    )
    parser.add_argument("--loud-from", type=float, default=0.3, metavar="TIME", help="smallest timestep of the --loud share, in [0, 1)")
    parser.add_argument(
        "--export-every",
        type=int,
        default=0,
        metavar="STEPS",
        help="write the averaged U-Net this often; 0: only at the end",
    )
    parser.add_argument("--work", type=Path, default=Path("outputs/critters"), help="folder of training images, state and logs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    train, steps = PARTS[args.part]
    if not 0 <= args.ways <= args.edits <= 1:
        parser.error(f"got --ways {args.ways:g} and --edits {args.edits:g}; expected 0 <= ways <= edits <= 1")
    args.steps = args.steps or steps
    args.work.mkdir(parents=True, exist_ok=True)
    train(args)


if __name__ == "__main__":
    main()
