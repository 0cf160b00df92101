"""What bases are made of, without torch: the published sizes of the named ones, and the configs of a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ImagicError
from .vetting import TIME_IDS, read_json, vet_sizes, vetted_index

CRITTERS = Path(__file__).parent.parent / "data" / "critters"


@dataclass(frozen=True)
class Architecture:
    """The configs of a base's components, in diffusers' and transformers' own words.

    Args:
        text_encoder_2: of families that have a second one, whose pooled embedding the U-Net is told as well.
        empty_is_zeros: the unconditional embedding is zeros, and not that of the empty sentence.
    """

    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    scheduler: dict[str, Any]
    text_encoder_2: dict[str, Any] | None = None
    empty_is_zeros: bool = False

    @property
    def text_encoders(self) -> dict[str, dict[str, Any]]:
        """The configs of the text encoders by the names of their folders."""
        return {"text_encoder": self.text_encoder} | ({"text_encoder_2": self.text_encoder_2} if self.text_encoder_2 else {})

    @property
    def factor(self) -> int:
        """Pixels of a picture's side to one of its latents."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1)

    @property
    def conditioning(self) -> dict[str, tuple[int, ...]]:
        """The shapes of one conditioning, by name."""
        shapes: dict[str, tuple[int, ...]] = {"tokens": (1, self.text_encoder["max_position_embeddings"], self.unet["cross_attention_dim"])}
        if self.text_encoder_2:
            shapes |= {"pooled": (1, self.text_encoder_2["projection_dim"]), "time_ids": (1, TIME_IDS)}
        return shapes

    @property
    def wide_vae(self) -> bool:
        """Whether the VAE overflows in fp16, as that of SDXL does unless its config says that it was mended."""
        return self.text_encoder_2 is not None and self.vae.get("force_upcast", True)

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
    "layer_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id", "projection_dim",
)  # fmt: skip
_CLIP_L = _TEXT | {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "projection_dim": 768}
_DEFAULTS: dict[str, dict[str, Any]] = {"unet": _UNET, "text_encoder": _TEXT, "text_encoder_2": _TEXT}

PUBLISHED: dict[str, Architecture] = {
    # Stable Diffusion 1.5: an 860M U-Net at 64x64 latents, CLIP ViT-L/14's text encoder (arXiv 2112.10752, its model card)
    "sd15": Architecture(
        _UNET | {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        _VAE | {"sample_size": 512, "scaling_factor": 0.18215},
        _CLIP_L,
        _SCHEDULER | {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "prediction_type": "epsilon"},
    ),
    # Stable Diffusion 2.1: heads of 64 channels, linear projections, 23 layers of OpenCLIP ViT-H, 768x768, v-prediction
    "sd21": Architecture(
        _UNET | {"sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
        _VAE | {"sample_size": 768, "scaling_factor": 0.18215},
        _TEXT
        | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16, "hidden_act": "gelu"}
        | {"projection_dim": 512, "pad_token_id": 1},
        _SCHEDULER | {"_class_name": "DDIMScheduler", "set_alpha_to_one": False, "prediction_type": "v_prediction"},
    ),
    # Stable Diffusion XL 1.0: a 2.6B U-Net at 128x128 latents, CLIP ViT-L and OpenCLIP ViT-bigG, size ids (arXiv 2307.01952)
    "sdxl": Architecture(
        _UNET
        | {
            "sample_size": 128,
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        _VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
        _CLIP_L,
        _SCHEDULER | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", "prediction_type": "epsilon"},
        _TEXT
        | {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20, "hidden_act": "gelu"}
        | {"projection_dim": 1280, "pad_token_id": 1},
        empty_is_zeros=True,
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
    index = vetted_index(folder)
    encoders = [name for name in ("text_encoder", "text_encoder_2") if name in index]
    files = {"unet": "config.json", "vae": "config.json", "scheduler": "scheduler_config.json"} | dict.fromkeys(encoders, "config.json")
    parts = {part: _DEFAULTS.get(part, {}) | read_json(folder / part / file) for part, file in files.items()}
    for part in encoders:
        parts[part] = {name: parts[part][name] for name in _TEXT_SETTINGS if name in parts[part]}
    parts["scheduler"]["_class_name"] = index["scheduler"][1]
    vet_sizes(folder, parts)
    return Architecture(**parts, empty_is_zeros=index.get("force_zeros_for_empty_prompt", True) is True and "text_encoder_2" in index)
