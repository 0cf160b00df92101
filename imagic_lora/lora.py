"""LoRA on the denoiser through PEFT, with an exact way back; and weights on disk in diffusers' own format."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from .bases.base import Base
from .config import TuneConfig

LORA_FILE = "pytorch_lora_weights.safetensors"
_NAME = "imagic"


@contextmanager
def attached(base: Base, config: TuneConfig, seed: int) -> Iterator[dict[str, torch.nn.Parameter]]:
    """Fresh LoRA layers on the denoiser, gone again afterwards: then its output is bit-equal to before.

    Args:
        seed: of the initial weights.

    Yields:
        The trainable parameters by name, fp32 whatever the base's precision.
    """
    alpha = config.rank if config.alpha is None else config.alpha
    lora = LoraConfig(r=config.rank, lora_alpha=alpha, target_modules=base.lora_targets(config.targets))  # pyright: ignore[reportArgumentType]  # a fractional alpha is fine
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base.denoiser.add_adapter(lora, _NAME)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        trainable = {name: p for name, p in base.denoiser.named_parameters() if p.requires_grad}
        for parameter in trainable.values():
            parameter.data = parameter.data.float()
        yield trainable
    finally:
        base.denoiser.unload_lora()  # pyright: ignore[reportAttributeAccessIssue]


def save_lora(base: Base, folder: Path) -> None:
    """Writes the attached layers as ``pytorch_lora_weights.safetensors``, which diffusers' ``load_lora_weights(folder)`` reads."""
    config = base.denoiser.peft_config[_NAME].to_dict()  # pyright: ignore[reportAttributeAccessIssue]
    layers = {name: value.float().cpu() for name, value in get_peft_model_state_dict(base.denoiser, adapter_name=_NAME).items()}
    config["target_modules"] = sorted(config["target_modules"])
    part = base.component
    base.pipelines["text2image"].save_lora_weights(  # pyright: ignore[reportAttributeAccessIssue]
        folder, **{f"{part}_lora_layers": layers, f"{part}_lora_adapter_metadata": config}
    )
    canonical(folder / LORA_FILE)


@contextmanager
def loaded_lora(base: Base, folder: Path) -> Iterator[None]:
    """The denoiser with stored layers; bit-equal to the base afterwards."""
    try:
        base.pipeline("text2image").load_lora_weights(folder, adapter_name=_NAME)  # pyright: ignore[reportAttributeAccessIssue]
        yield
    finally:
        base.denoiser.unload_lora()  # pyright: ignore[reportAttributeAccessIssue]


def canonical(path: Path) -> None:
    """Rewrites the header of a safetensors file with its keys in order, so that equal content is equal bytes."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
