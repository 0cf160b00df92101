"""LoRA layers on the denoiser through PEFT, removed exactly; stored in the format of diffusers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from ..bases.altered import altered
from ..bases.base import Base
from ..core.config import TuneConfig
from ..core.errors import ImagicError
from ..core.tensors import open_safetensors, read, safetensors_pieces, shapes
from .atomic import AtomicWriter

LORA_FILE = "pytorch_lora_weights.safetensors"
_METADATA = "lora_adapter_metadata"  # the key under which diffusers reads the LoraConfig
_REMEDY = "fit or copy the adapter again"
_NAME = "imagic"


@dataclass(frozen=True)
class LoraLayers:
    """Stored LoRA layers, in host memory.

    Args:
        rank: of every layer, 1 to 1024.
        alpha: the layers are scaled by ``alpha / rank``; positive.
        targets: suffixes of the names of the adapted layers.
        tensors: for each adapted layer ``<name>.lora_A.weight``, ``[rank, in, ...]``, and ``<name>.lora_B.weight``, ``[out, rank, ...]``.
    """

    rank: int
    alpha: float
    targets: list[str]
    tensors: dict[str, Tensor]


@contextmanager
def attached(base: Base, config: TuneConfig, seed: int) -> Iterator[dict[str, torch.nn.Parameter]]:
    """Adds new LoRA layers to the denoiser while the context is open (:func:`~imagic_lora.bases.altered.altered`).

    Args:
        config: rank, alpha and target layers.
        seed: seed of the initial weights.

    Yields:
        The trainable parameters by name, in fp32 regardless of the base's precision.
    """
    alpha = config.rank if config.alpha is None else config.alpha
    targets = base.lora_targets(config.targets)
    lora = LoraConfig(r=config.rank, lora_alpha=alpha, target_modules=targets)  # pyright: ignore[reportArgumentType]  # PEFT accepts a fractional alpha
    with altered(base, _unloading(base)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            base.denoiser.add_adapter(lora, _NAME)  # pyright: ignore[reportAttributeAccessIssue]
        lora.target_modules = targets  # PEFT replaces a long list by one that is valid for this denoiser only
        trainable = {name: p for name, p in base.denoiser.named_parameters() if p.requires_grad}
        for parameter in trainable.values():
            parameter.data = parameter.data.float()
        yield trainable


def _unloading(base: Base) -> Callable[[], None]:
    """Returns the function of diffusers that removes the layers, whether all of them were added or only some."""
    return base.denoiser.unload_lora  # pyright: ignore[reportAttributeAccessIssue]


def lora_files(base: Base) -> tuple[str, ...]:
    """Returns the names of the files that :func:`save_lora` writes."""
    return (LORA_FILE,)


def save_lora(base: Base, writer: AtomicWriter) -> None:
    """Writes the attached layers to ``pytorch_lora_weights.safetensors``, which ``load_lora_weights(folder)`` of diffusers reads.

    Raises:
        ImagicError: a weight is not finite.
    """
    config = base.denoiser.peft_config[_NAME].to_dict()  # pyright: ignore[reportAttributeAccessIssue]
    config["target_modules"] = sorted(config["target_modules"])
    layers = get_peft_model_state_dict(base.denoiser, adapter_name=_NAME)
    component = base.component
    metadata = json.dumps({f"{component}.{key}": value for key, value in config.items()}, indent=2, sort_keys=True)
    tensors = {f"{component}.{name}": value.float() for name, value in layers.items()}
    writer.write(LORA_FILE, safetensors_pieces(tensors, {"format": "pt", _METADATA: metadata}))


@contextmanager
def loaded_lora(base: Base, layers: LoraLayers) -> Iterator[None]:
    """Loads stored layers into the denoiser while the context is open. Afterwards the denoiser is bit-equal to before.

    Args:
        layers: as :func:`read_lora` returns them. :func:`swap_lora` can replace them while the context is open.
    """
    metadata = {"r": layers.rank, "lora_alpha": layers.alpha, "target_modules": layers.targets}
    with altered(base, _unloading(base)):
        with torch.random.fork_rng(devices=[]):  # low_cpu_mem_usage would draw no numbers, but it patches torch for all threads
            base.denoiser.load_lora_adapter(dict(layers.tensors), prefix=None, metadata=metadata, adapter_name=_NAME)  # pyright: ignore[reportAttributeAccessIssue]
        del layers  # frees them if swap_lora replaces them
        yield


def swap_lora(base: Base, layers: LoraLayers) -> bool:
    """Replaces the loaded layers by others with the same targets. The result is the same as loading the others.

    Args:
        layers: of any rank.

    Returns:
        Whether the layers were replaced. False if no layers or layers with other targets are loaded; then nothing changes.
    """
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
    """Reads the layers of a file that :func:`save_lora` wrote. Other layers can be loaded on the base at the same time.

    Raises:
        ImagicError: the names or shapes of the layers do not fit the base, a number is not finite, or the file has PEFT settings that
            :func:`attached` does not use. Some of these change the base's weights, and one names a module to import.
    """
    rank, alpha, targets = _read_metadata(base, path)
    expected: dict[str, tuple[int, ...]] = {}
    for name, module in base.denoiser.named_modules():
        if not f".{name}".endswith(tuple(f".{target}" for target in targets)):
            continue
        layer = cast(Any, module.get_base_layer() if isinstance(module, BaseTunerLayer) else module)
        linear = isinstance(layer, torch.nn.Linear)  # also true for a 4-bit layer
        inputs, outputs = (layer.in_features, layer.out_features) if linear else (layer.in_channels, layer.out_channels)
        kernel = () if linear else layer.kernel_size
        expected[f"{base.component}.{name}.lora_A.weight"] = (rank, inputs, *kernel)
        expected[f"{base.component}.{name}.lora_B.weight"] = (outputs, rank, *(1 for _ in kernel))
    if shapes(path) != expected:
        raise ImagicError(f"{path} holds tensors of other names or shapes", f"LoRA layers of rank {rank} for {', '.join(targets)}", _REMEDY)
    return LoraLayers(rank, alpha, targets, {name.removeprefix(f"{base.component}."): value for name, value in read(path).items()})


def _read_metadata(base: Base, path: Path) -> tuple[int, float, list[str]]:
    """Reads rank, alpha and target layers from a file's metadata.

    Raises:
        ImagicError: one of them is missing or out of range, or another setting differs from that of :func:`attached`.
    """
    defaults = LoraConfig().to_dict()
    try:
        with open_safetensors(path) as file:
            metadata = json.loads((file.metadata() or {})[_METADATA])
        prefix = f"{base.component}."
        settings = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
        rank, alpha, targets = settings.pop("r"), settings.pop("lora_alpha"), settings.pop("target_modules")
        unsupported = [key for key in metadata if not key.startswith(prefix)]
        unsupported += [key for key, value in settings.items() if key != "peft_version" and (key not in defaults or value != defaults[key])]
        in_range = type(rank) is int and 1 <= rank <= 1024 and type(alpha) in (int, float) and 0 < alpha < float("inf")
        known = type(targets) is list and sorted(targets) in [sorted(layers) for layers in base.architecture.lora_targets.values()]
        if unsupported or not in_range or not known:
            raise ValueError(", ".join(map(repr, unsupported[:3])) or "rank, alpha or target layers out of range")
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ImagicError(f"{path} has unsupported PEFT settings ({error})", "a LoRA file written by fit", _REMEDY) from error
    return rank, alpha, targets
