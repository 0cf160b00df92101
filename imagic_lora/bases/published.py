"""What bases are made of, without torch: the published sizes of the named ones, and the configs of a folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ImagicError

CRITTERS = Path(__file__).parent.parent / "data" / "critters"


@dataclass(frozen=True)
class Architecture:
    """The configs of a base's components, in diffusers' and transformers' own words.

    Args:
        resolution: side of the square pictures it was made for, in pixels.
    """

    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    scheduler: dict[str, Any]

    @property
    def factor(self) -> int:
        """Pixels of a picture's side to one of its latents."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1)

    @property
    def tokens(self) -> int:
        """Tokens of one conditioning."""
        return self.text_encoder["max_position_embeddings"]

    @property
    def resolution(self) -> int:
        """Side of the square pictures the base was made for, in pixels."""
        return self.unet["sample_size"] * self.factor


_UNET: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
_VAE: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
_TEXT: dict[str, Any] = {"vocab_size": 49408, "max_position_embeddings": 77}
_SCHEDULER = {"clip_sample": False, "steps_offset": 1, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

_NEEDED = {
    "unet": ("block_out_channels", "layers_per_block", "cross_attention_dim", "in_channels", "out_channels", "sample_size"),
    "vae": ("block_out_channels", "layers_per_block", "latent_channels", "sample_size"),
    "text_encoder": ("hidden_size", "intermediate_size", "num_hidden_layers"),
}
_DEFAULTS: dict[str, dict[str, Any]] = {"unet": _UNET, "text_encoder": _TEXT}

PUBLISHED: dict[str, Architecture] = {
    # Stable Diffusion 1.5: an 860M U-Net at 64x64 latents, CLIP ViT-L/14's text encoder (arXiv 2112.10752, its model card)
    "sd15": Architecture(
        _UNET | {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        _VAE | {"sample_size": 512},
        _TEXT | {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        _SCHEDULER | {"prediction_type": "epsilon"},
    ),
    # Stable Diffusion 2.1: heads of 64 channels, linear projections, 23 layers of OpenCLIP ViT-H, 768x768, v-prediction
    "sd21": Architecture(
        _UNET | {"sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
        _VAE | {"sample_size": 768},
        _TEXT | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16, "hidden_act": "gelu"},
        _SCHEDULER | {"prediction_type": "v_prediction"},
    ),
}


def architecture(base: str) -> Architecture:
    """The architecture of a named base, or of a folder in diffusers' format.

    Raises:
        ImagicError: neither, or a config that is missing or is no JSON.
    """
    if base in PUBLISHED:
        return PUBLISHED[base]
    folder = CRITTERS if base == "critters" else Path(base).expanduser()
    if not folder.is_dir():
        names = ", ".join(["critters", *PUBLISHED])
        raise ImagicError(
            f"no architecture known for {base!r}", f"one of {names}, or a folder in diffusers' format", "download it and give its folder"
        )
    files = {"unet": "config.json", "vae": "config.json", "text_encoder": "config.json", "scheduler": "scheduler_config.json"}
    found = Architecture(**{part: _DEFAULTS.get(part, {}) | _config(folder / part / file) for part, file in files.items()})
    odd = [f"{part}.{name}" for part, names in _NEEDED.items() for name in names if not getattr(found, part).get(name)]
    if odd or not isinstance(found.unet["sample_size"], int):
        got = f"{folder} does not say {', '.join(odd or ['unet.sample_size as one number'])}"
        raise ImagicError(got, "the configs of a Stable Diffusion base", "give the folder that holds unet/, vae/, ...")
    return found


def _config(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ImagicError(
            f"{path} cannot be read ({error})", "diffusers' own format", "give the folder that holds unet/, vae/, ..."
        ) from error
