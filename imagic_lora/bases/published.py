"""What bases are made of, without torch: the published sizes of the named ones, and the configs of a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ImagicError
from .vetting import read_json, vet_sizes

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

_TEXT_SETTINGS = (  # of the text encoder; others are for training, or for libraries to find code and files by
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "hidden_act",
    "layer_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
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


def local_folder(name: str) -> Path | None:
    """The folder of that name, if there is one."""
    try:
        folder = Path(name).expanduser()
        return folder if folder.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # too long a name; the home of nobody; a name that cannot be one
        return None


def architecture(base: str) -> Architecture:
    """The architecture of a named base, or of a folder in diffusers' format.

    Raises:
        ImagicError: neither, or as :func:`read_architecture`.
    """
    if base in PUBLISHED:
        return PUBLISHED[base]
    folder = CRITTERS if base == "critters" else local_folder(base)
    if folder is None:
        names = ", ".join(["critters", *PUBLISHED])
        raise ImagicError(
            f"no architecture known for {base!r}", f"one of {names}, or a folder in diffusers' format", "download it and give its folder"
        )
    return read_architecture(folder)


def read_architecture(folder: Path) -> Architecture:
    """What the configs in a folder say.

    Raises:
        ImagicError: one is missing or cannot be read, or they do not describe a Stable Diffusion base.
    """
    files = {"unet": "config.json", "vae": "config.json", "text_encoder": "config.json", "scheduler": "scheduler_config.json"}
    parts = {part: _DEFAULTS.get(part, {}) | read_json(folder / part / file) for part, file in files.items()}
    parts["text_encoder"] = {name: parts["text_encoder"][name] for name in _TEXT_SETTINGS if name in parts["text_encoder"]}
    vet_sizes(folder, parts)
    return Architecture(**parts)
