"""LoRA on the denoiser through PEFT, with an exact way back; and weights on disk in diffusers' own format."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from ..bases.base import Base
from ..bases.layers import LORA_TARGETS
from ..core.config import TuneConfig
from ..core.errors import ImagicError
from ..core.tensors import opened, read, safetensors_pieces, shapes
from .atomic import AtomicWriter

LORA_FILE = "pytorch_lora_weights.safetensors"
_METADATA = "lora_adapter_metadata"  # where diffusers looks for PEFT's settings
_REMEDY = "fit or copy the adapter again"
_NAME = "imagic"


@dataclass(frozen=True)
class LoraLayers:
    """Stored LoRA layers, in host memory.

    Args:
        targets: ends of the names of the layers that they adapt.
        tensors: for each of those layers ``<name>.lora_A.weight``, ``[rank, in, ...]``, and ``<name>.lora_B.weight``, ``[out, rank, ...]``.
    """

    rank: int
    alpha: float
    targets: list[str]
    tensors: dict[str, Tensor]


@contextmanager
def attached(base: Base, config: TuneConfig, seed: int) -> Iterator[dict[str, torch.nn.Parameter]]:
    """Fresh LoRA layers on the denoiser, gone again afterwards: then its output is bit-equal to before.

    Args:
        seed: of the initial weights.

    Yields:
        The trainable parameters by name, fp32 whatever the base's precision.
    """
    alpha = config.rank if config.alpha is None else config.alpha
    targets = base.lora_targets(config.targets)
    lora = LoraConfig(r=config.rank, lora_alpha=alpha, target_modules=targets)  # pyright: ignore[reportArgumentType]  # a fractional alpha is fine
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base.denoiser.add_adapter(lora, _NAME)  # pyright: ignore[reportAttributeAccessIssue]
    lora.target_modules = targets  # PEFT makes of a long list one that is right for this denoiser alone
    try:
        trainable = {name: p for name, p in base.denoiser.named_parameters() if p.requires_grad}
        for parameter in trainable.values():
            parameter.data = parameter.data.float()
        yield trainable
    finally:
        base.denoiser.unload_lora()  # pyright: ignore[reportAttributeAccessIssue]


def lora_files(base: Base) -> tuple[str, ...]:
    """The files of :func:`save_lora`."""
    return (LORA_FILE,)


def save_lora(base: Base, writer: AtomicWriter) -> None:
    """Writes the attached layers as ``pytorch_lora_weights.safetensors``, which diffusers' ``load_lora_weights(folder)`` reads.

    Raises:
        ImagicError: a weight is not finite.
    """
    config = base.denoiser.peft_config[_NAME].to_dict()  # pyright: ignore[reportAttributeAccessIssue]
    config["target_modules"] = sorted(config["target_modules"])
    layers = get_peft_model_state_dict(base.denoiser, adapter_name=_NAME)
    part = base.component
    told = json.dumps({f"{part}.{key}": value for key, value in config.items()}, indent=2, sort_keys=True)
    tensors = {f"{part}.{name}": value.float() for name, value in layers.items()}
    writer.write(LORA_FILE, safetensors_pieces(tensors, {"format": "pt", _METADATA: told}))


@contextmanager
def loaded_lora(base: Base, layers: LoraLayers) -> Iterator[None]:
    """The denoiser with stored layers, or those that :func:`swap_lora` puts in their place; bit-equal to the base afterwards."""
    told = {"r": layers.rank, "lora_alpha": layers.alpha, "target_modules": layers.targets}
    try:
        with torch.random.fork_rng(devices=[]):  # low_cpu_mem_usage draws nothing, but patches torch for every thread meanwhile
            base.denoiser.load_lora_adapter(dict(layers.tensors), prefix=None, metadata=told, adapter_name=_NAME)  # pyright: ignore[reportAttributeAccessIssue]
        del layers  # they may be swapped for others
        yield
    finally:
        base.denoiser.unload_lora()  # pyright: ignore[reportAttributeAccessIssue]


def swap_lora(base: Base, layers: LoraLayers) -> bool:
    """Puts layers of any rank in the place of loaded ones with the same targets, as if they had been loaded; False where there are none."""
    modules: dict[str, Any] = dict(base.denoiser.named_modules())
    loaded = {name for name, module in modules.items() if isinstance(module, BaseTunerLayer)}
    if loaded != {key.rsplit(".", 2)[0] for key in layers.tensors}:
        return False
    for key, value in layers.tensors.items():
        name, matrix, _ = key.rsplit(".", 2)
        layer, weight = modules[name], modules[f"{name}.{matrix}.{_NAME}"].weight
        weight.data = value.to(weight.device, weight.dtype)
        layer.r[_NAME], layer.lora_alpha[_NAME], layer.scaling[_NAME] = layers.rank, layers.alpha, layers.alpha / layers.rank
    return True


def read_lora(base: Base, path: Path) -> LoraLayers:
    """The layers of a file of :func:`save_lora`; others may be on the base meanwhile.

    Raises:
        ImagicError: layers that the base does not have, other shapes, numbers that are not finite, or settings of PEFT that are not ours:
            some of those change the base's weights, and one names a module to import.
    """
    rank, alpha, targets = _read_metadata(base, path)
    expected: dict[str, tuple[int, ...]] = {}
    for name, module in base.denoiser.named_modules():
        if not f".{name}".endswith(tuple(f".{target}" for target in targets)):
            continue
        layer, one = f"{base.component}.{name}", cast(Any, module.get_base_layer() if isinstance(module, BaseTunerLayer) else module)
        linear = isinstance(one, torch.nn.Linear)  # one in 4 bits is, too
        wide, high = (one.in_features, one.out_features) if linear else (one.in_channels, one.out_channels)
        kernel = () if linear else one.kernel_size
        expected[f"{layer}.lora_A.weight"] = (rank, wide, *kernel)
        expected[f"{layer}.lora_B.weight"] = (high, rank, *(1 for _ in kernel))
    if shapes(path) != expected:
        raise ImagicError(f"{path} holds tensors of other names or shapes", f"LoRA layers of rank {rank} for {', '.join(targets)}", _REMEDY)
    return LoraLayers(rank, alpha, targets, {name.removeprefix(f"{base.component}."): value for name, value in read(path).items()})


def _read_metadata(base: Base, path: Path) -> tuple[int, float, list[str]]:
    """The rank, the alpha and the layers that a file's metadata tells of, if all else it tells is what :func:`attached` would have."""
    usual = LoraConfig().to_dict()
    try:
        with opened(path) as file:
            told = json.loads((file.metadata() or {})[_METADATA])
        part = f"{base.component}."
        mine = {key.removeprefix(part): value for key, value in told.items() if key.startswith(part)}
        rank, alpha, targets = mine.pop("r"), mine.pop("lora_alpha"), mine.pop("target_modules")
        odd = [key for key in told if not key.startswith(part)]
        odd += [key for key, value in mine.items() if key != "peft_version" and (key not in usual or value != usual[key])]
        right = type(rank) is int and 1 <= rank <= 1024 and type(alpha) in (int, float) and 0 < alpha < float("inf")
        if odd or not right or type(targets) is not list or sorted(targets) not in [sorted(layers) for layers in LORA_TARGETS.values()]:
            raise ValueError(", ".join(map(repr, odd[:3])) or "rank, alpha or layers out of range")
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ImagicError(f"{path} has settings that are not ours ({error})", "a LoRA file as fit writes it", _REMEDY) from error
    return rank, alpha, targets
