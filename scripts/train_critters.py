"""Make the embedded bases from nothing: ``python scripts/train_critters.py``, or ``make critters``.

Trains the VAE, the judge, CLIP, and the text encoder with the U-Net, in this order, on rendered images and their captions, and writes a
folder with the layout of ``imagic_lora/critters/data``. ``--transformer-of BASE``, or ``make critters-dit``, trains the flow transformer of
``critters-dit`` with the VAE and the text encoder of a finished base, and writes ``imagic_lora/critters/dit``.

The state is saved every two minutes: the same command resumes after an interruption, and skips what is finished.
docs/internals/embedded-base.md documents the recipe, its time and its results.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from critters_run import Run, Settings, pictures, tensor, tokenizer, tokens
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig

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
DIT: dict[str, Any] = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 8,
    "out_channels": 8,
    "num_layers": 5,
    "num_attention_heads": 6,
    "attention_head_dim": 32,
    "joint_attention_dim": 128,
    "caption_projection_dim": 192,
    "pooled_projection_dim": 128,
    "pos_embed_max_size": 4,
    "qk_norm": "rms_norm",
}
VISION: dict[str, Any] = {
    "image_size": SIZE,
    "patch_size": 8,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "projection_dim": 128,
}
SCHEDULE: dict[str, Any] = {  # that of Stable Diffusion, with v-prediction
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "v_prediction",
}
SHIFT = 1.0  # of the transformer's levels of noise while it samples and is fitted; 1 leaves them evenly spaced
VAE_NOISE = 0.1  # standard deviation of the noise that the decoder is trained with and that the encoder predicts as its own
BATCH = {"vae": 16, "judge": 64, "clip": 96, "unet": 64, "transformer": 32}


def text_config(words: CLIPTokenizer) -> CLIPTextConfig:
    """The configuration of the text encoder for a tokenizer."""
    special: dict[str, Any] = {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=512,
        projection_dim=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=32,
        **special,
    )


def finished_vae(settings: Settings) -> Any:
    """The VAE that was trained, in single precision."""
    vae: Any = AutoencoderKL.from_pretrained(settings.parts / "vae")
    return vae.float().to(settings.device).eval()


def train_vae(settings: Settings, steps: int) -> None:
    """Trains the VAE with L1 and MSE, a penalty on the size of latents, and noise of a fixed standard deviation on them."""
    vae: Any = AutoencoderKL(**VAE)
    data = pictures(settings)
    run = Run(settings, "vae", vae, steps, lr=1.5e-3, muon=4e-3)

    def loss_of(rng: np.random.Generator) -> torch.Tensor:
        x = tensor(data[rng.integers(0, len(data), BATCH["vae"])], settings.device)
        latents = vae.encode(x).latent_dist
        mean = latents.mean.float()
        y = vae.decode(mean + VAE_NOISE * torch.randn_like(mean)).sample.float()
        declared = (latents.logvar.float() - 2 * math.log(VAE_NOISE)).square().mean()
        return F.l1_loss(y, x) + F.mse_loss(y, x) + 1e-3 * mean.square().mean() + 1e-4 * declared

    for _ in run.train(loss_of):
        pass
    averaged: Any = run.averaged()
    with torch.no_grad():  # the scaling factor gives latents unit variance, as in Stable Diffusion
        x = tensor(data[:1000], settings.device)
        averaged.register_to_config(scaling_factor=round(1 / averaged.encode(x).latent_dist.mean.std().item(), 5))
    averaged.half().save_pretrained(settings.out / "vae")


def train_judge(settings: Settings, steps: int) -> None:
    """Trains the judge on renders and on VAE round trips of noisy latents; a third of the images is blurred, and noise is added to all.

    So the judge also reads generated images, which are less sharp than renders.
    """
    vae, judge, data = finished_vae(settings), Judge(), pictures(settings)
    run = Run(settings, "judge", judge, steps, lr=2e-3)

    def loss_of(rng: np.random.Generator) -> torch.Tensor:
        indices = rng.integers(0, len(data), BATCH["judge"])
        x = tensor(data[indices], settings.device)
        with torch.no_grad():
            z = vae.encode(x[:40]).latent_dist.mean
            noise_level = 1 - 0.75 * run.step / steps  # decreases
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
    judge.save(settings.out / "judge.safetensors")


def train_clip(settings: Settings, steps: int) -> None:
    """Trains CLIP; equal captions in a batch are all targets of each other's images."""
    words, data = tokenizer(settings.parts), pictures(settings)
    vision = CLIPVisionConfig(**VISION)
    clip = CLIPModel(CLIPConfig(text_config=text_config(words).to_dict(), vision_config=vision.to_dict(), projection_dim=128))
    run = Run(settings, "clip", clip, steps, lr=1e-3)

    def loss_of(rng: np.random.Generator) -> torch.Tensor:
        indices = rng.integers(0, len(data), BATCH["clip"])
        draw = random.Random(int(rng.integers(2**62)))
        texts = [sample_caption(scene_at("train", int(k)), draw) for k in indices]
        images = tensor(data[indices], settings.device)
        logits = clip(input_ids=tokens(words, texts, settings.device), pixel_values=images).logits_per_text
        same = torch.tensor([[float(a == b) for a in texts] for b in texts], device=settings.device)
        same = same / same.sum(1, keepdim=True)
        return (F.cross_entropy(logits.float(), same) + F.cross_entropy(logits.float().T, same)) / 2

    for _ in run.train(loss_of):
        pass
    run.averaged()
    clip.half().save_pretrained(settings.out / "clip")


def encoded(settings: Settings) -> torch.Tensor:
    """The scaled latent means of the training images, ``[N, 8, 8, 8]`` float16; encoded once and cached in a file."""
    path = settings.work / f"latents-{settings.pictures}.npy"
    if not path.exists():
        vae, data = finished_vae(settings), pictures(settings)
        with torch.no_grad():
            parts = [vae.encode(tensor(data[k : k + 100], settings.device)).latent_dist.mean for k in range(0, len(data), 100)]
        np.save(path, (torch.cat(parts) * vae.config.scaling_factor).half().cpu().numpy())
    return torch.from_numpy(np.load(path))


def captioned(settings: Settings, words: CLIPTokenizer) -> Callable[[np.random.Generator, int], tuple[torch.Tensor, ...]]:
    """What a denoiser is trained on.

    Returns:
        A function of a generator and a batch size that draws latents with the noise of the VAE, noise, stratified times in [0, 1), and the
        token ids of captions, 10% of which are empty for classifier-free guidance.
    """
    data, vae_noise = encoded(settings), VAE_NOISE * finished_vae(settings).config.scaling_factor

    def batch(rng: np.random.Generator, size: int) -> tuple[torch.Tensor, ...]:
        indices, draw = rng.integers(0, len(data), size), random.Random(int(rng.integers(2**62)))
        captions = ["" if draw.random() < 0.1 else sample_caption(scene_at("train", int(k)), draw) for k in indices]
        clean = data[indices].to(settings.device).float()
        clean = clean + vae_noise * torch.randn_like(clean)
        noise = torch.randn_like(clean)
        times = ((torch.arange(size) + torch.rand(size)) / size).to(settings.device)
        return clean, noise, times, tokens(words, captions, settings.device)

    return batch


def train_unet(settings: Settings, steps: int) -> None:
    """Trains the U-Net and the text encoder together, on images and captions.

    The loss is that of v-prediction (arXiv 2202.00512), truncated above an SNR of 5 (min-SNR, arXiv 2303.09556).
    """
    words = tokenizer(settings.parts)
    batch = captioned(settings, words)
    parts = torch.nn.ModuleDict({"unet": UNet2DConditionModel(**UNET), "text": CLIPTextModel(text_config(words))})
    scheduler: Any = DDIMScheduler(**SCHEDULE)
    alphas = scheduler.alphas_cumprod.to(settings.device)
    run = Run(settings, "unet", parts, steps, lr=6e-4, muon=2e-3, held=0.4)

    def loss_of(rng: np.random.Generator) -> torch.Tensor:
        clean, noise, times, ids = batch(rng, BATCH["unet"])
        timesteps = (1000 * times).long()
        states = parts["text"](ids).last_hidden_state
        predicted = parts["unet"](scheduler.add_noise(clean, noise, timesteps), timesteps, states).sample.float()
        alpha = alphas[timesteps]
        target = scheduler.get_velocity(clean, noise, timesteps)
        weight = (6 * (1 - alpha)).clamp(max=1)  # 6 / (SNR + 1): the error of the clean latents is weighed by min(SNR + 1, 6)
        return ((predicted - target).square().mean((1, 2, 3)) * weight).mean()

    for _ in run.train(loss_of):
        pass
    export_pipeline(settings, run.averaged(), words, scheduler)


def train_transformer(settings: Settings, steps: int) -> None:
    """Trains the transformer of ``critters-dit`` on images and captions by flow matching (arXiv 2210.02747, 2403.03206).

    The text encoder stays as it is. Modulations and the last layer begin at zero (adaLN-Zero, arXiv 2212.09748).
    """
    words, loaded = tokenizer(settings.parts), cast(Any, CLIPTextModel).from_pretrained(settings.parts / "text_encoder")
    text: Any = loaded.float().to(settings.device).eval()
    batch, transformer = captioned(settings, words), SD3Transformer2DModel(**DIT)
    for name, parameter in transformer.named_parameters():
        if name.startswith(("norm_out", "proj_out")) or ".norm1" in name:
            torch.nn.init.zeros_(parameter)
    run = Run(settings, "transformer", transformer, steps, lr=6e-4, muon=2e-3, held=0.4)

    def loss_of(rng: np.random.Generator) -> torch.Tensor:
        clean, noise, times, ids = batch(rng, BATCH["transformer"])
        with torch.no_grad():
            states = text(ids)
        sigmas = 1 - times
        noised = torch.lerp(clean, noise, sigmas[:, None, None, None])
        predicted = transformer(noised, states.last_hidden_state, states.pooler_output, 1000 * sigmas).sample.float()
        return (predicted - (noise - clean)).square().mean()

    for _ in run.train(loss_of):
        pass
    run.averaged()
    transformer.cpu().half().save_pretrained(settings.out / "transformer")
    vae, scheduler = finished_vae(settings), FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    scheduler.save_pretrained(settings.out / "scheduler")
    none: dict[str, Any] = dict.fromkeys(("text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"))
    StableDiffusion3Pipeline(transformer, scheduler, vae, text, words, **none).save_config(settings.out)


def export_pipeline(settings: Settings, parts: Any, words: CLIPTokenizer, scheduler: Any) -> None:
    """Writes the whole base in diffusers' format, in half precision."""
    vae: Any = AutoencoderKL.from_pretrained(settings.out / "vae", dtype=torch.float16)
    vae.register_to_config(_name_or_path="critters")  # instead of the folder it was loaded from
    without: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = StableDiffusionPipeline(vae, parts["text"].cpu().half(), words, parts["unet"].cpu().half(), scheduler, **without)
    pipeline.save_pretrained(settings.out)
    config = settings.out / "text_encoder" / "config.json"  # else transformers loads it in half precision and diffusers the rest in single
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))


PARTS: dict[str, tuple[Callable[[Settings, int], None], int, str]] = {
    "vae": (train_vae, 6000, "vae/diffusion_pytorch_model.safetensors"),
    "judge": (train_judge, 5000, "judge.safetensors"),
    "clip": (train_clip, 1000, "clip/model.safetensors"),
    "unet": (train_unet, 6400, "unet/diffusion_pytorch_model.safetensors"),
}
"""Each part with its function, its number of steps, and the weights that it writes last."""
TRANSFORMER: dict[str, tuple[Callable[[Settings, int], None], int, str]] = {
    "transformer": (train_transformer, 4_600, "transformer/diffusion_pytorch_model.safetensors"),
}
"""As :data:`PARTS`, of ``critters-dit``."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=Path("outputs/critters"), help="folder of images, states and logs; the base is WORK/data"
    )
    parser.add_argument(
        "--transformer-of",
        type=Path,
        metavar="BASE",
        help="make the transformer of critters-dit, for the VAE and text encoder of this base",
    )
    parser.add_argument("--seed", type=int, default=0, help="the shipped base has seed 0")
    parser.add_argument("--pictures", type=int, default=40_000, help="number of images in the training set")
    parser.add_argument("--steps", type=float, default=1.0, metavar="FACTOR", help="multiplies the number of steps of every part")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    base: Path | None = args.transformer_of
    settings = Settings(args.work, args.seed, args.pictures, args.device, base)
    record = {"seed": args.seed, "pictures": args.pictures, "steps": args.steps}
    if base:
        parts = [base / "vae" / "diffusion_pytorch_model.safetensors", base / "text_encoder" / "model.safetensors"]
        record["parts"] = hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()
    args.work.mkdir(parents=True, exist_ok=True)
    stored = args.work / "settings.json"
    if stored.exists() and json.loads(stored.read_text()) != record:
        parser.error(f"got {json.dumps(record)}; {stored} has {stored.read_text()}; choose another --work for another base")
    stored.write_text(json.dumps(record))
    for train, steps, weights in (TRANSFORMER if base else PARTS).values():
        if not (settings.out / weights).exists():
            torch.manual_seed(args.seed)
            train(settings, max(1, round(steps * args.steps)))
    for path in sorted(settings.out.rglob("*.safetensors")):
        print(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(settings.out)}")


if __name__ == "__main__":
    main()
