"""The metadata of an image: everything that its pixels depend on, and the text that A1111 reads."""

from __future__ import annotations

import hashlib
import json
import re
from importlib.metadata import version
from typing import Annotated, Any, Literal

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from ..adapters.adapter import Adapter
from ..adapters.manifest import Sha256
from ..adapters.record import Name
from ..bases.base import Base
from ..bases.process import Flow
from ..core.config import EditConfig, FitMethod
from ..core.environment import library_versions
from ..core.text import exact
from ..photos.region import Region
from .checks import SEEDS
from .editor import Edit

_PROGRAM = "imagic-lora"
_SAMPLERS = {  # the names of A1111 by class of diffusers
    "DDIMScheduler": "DDIM",
    "DDPMScheduler": "DDPM",
    "DPMSolverMultistepScheduler": "DPM++ 2M",
    "EulerAncestralDiscreteScheduler": "Euler a",
    "EulerDiscreteScheduler": "Euler",
    "FlowMatchEulerDiscreteScheduler": "Euler",
    "HeunDiscreteScheduler": "Heun",
    "KDPM2AncestralDiscreteScheduler": "DPM2 a",
    "KDPM2DiscreteScheduler": "DPM2",
    "LCMScheduler": "LCM",
    "LMSDiscreteScheduler": "LMS",
    "PNDMScheduler": "PLMS",
    "UniPCMultistepScheduler": "UniPC",
}
Eta = Annotated[float, Field(ge=0, le=2)]
Seed = Annotated[int, Field(ge=0, lt=SEEDS)]
Batch = Annotated[list[tuple[Eta, Seed]], Field(min_length=1, max_length=256)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RuntimeMetadata(_Part):
    """Device, precision and the levers that change the last bits of an image. ``threads`` is the number of CPU threads of PyTorch."""

    device: Literal["cpu", "cuda"]
    dtype: Literal["fp32", "fp16", "bf16"]
    attention: Literal["sdpa", "xformers"]
    vae_tiling: bool
    vae_slicing: bool
    threads: int = Field(ge=1)


class MaskMetadata(_Part):
    """The mask of ``edit --keep MASK.png``: the hash of its file."""

    mask: Sha256


class ImageMetadata(_Part):
    """The JSON of an image, version 1.

    ``adapter_sha256`` is :attr:`~imagic_lora.adapters.adapter.Adapter.content_sha256`. ``forced`` names the base that the adapter was made
    for, if another one was used. ``batch`` holds eta and seed of every image of the batch. ``pixels_sha256`` is the hash of the RGB bytes.
    ``region`` and ``keep`` say how the image was pasted into the photo (:mod:`~imagic_lora.sampling.keep`). ``reference_batch`` is there
    with keep ``auto``: the batch of the image at eta 0 that it was compared with. ``method`` is that of the fit, if it is not imagic: then
    eta is 1, the prompt alone.
    """

    version: Literal[1] = 1
    adapter: Name
    adapter_sha256: Sha256
    base: str
    base_fingerprint: str
    prompt: str
    eta: Eta
    seed: Seed
    edit: EditConfig
    scheduler: str
    batch: Batch
    runtime: RuntimeMetadata
    versions: dict[str, str]
    pixels_sha256: Sha256
    method: Annotated[FitMethod, Field(exclude_if=lambda value: value == "imagic")] = "imagic"
    forced: Annotated[str | None, Field(exclude_if=lambda value: value is None)] = None
    region: Annotated[Region | None, Field(exclude_if=lambda value: value is None)] = None
    keep: Annotated[Literal["auto"] | MaskMetadata | None, Field(exclude_if=lambda value: value is None)] = None
    reference_batch: Annotated[Batch | None, Field(exclude_if=lambda value: value is None)] = None


def image_metadata(adapter: Adapter, base: Base, config: EditConfig, prompt: str) -> dict[str, Any]:
    """Returns the metadata that all images of an edit have in common; :func:`of_image` adds the rest.

    Args:
        adapter: the stored adapter.
        base: the loaded base. If its weights are not those that the adapter was made for, ``forced`` names the latter.
        config: settings of the sampling.
        prompt: the target prompt.
    """
    runtime, made_for = base.runtime, adapter.record.base
    dtype = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[runtime.dtype]
    levers = {name: getattr(runtime.memory, name) for name in ("attention", "vae_tiling", "vae_slicing")}
    common: dict[str, Any] = {
        "version": 1,
        "adapter": adapter.name,
        "adapter_sha256": adapter.content_sha256,
        "base": base.name,
        "base_fingerprint": base.fingerprint,
        "prompt": prompt,
        "edit": config.model_dump(),
        "scheduler": _scheduler_class(base, config),
        "runtime": {"device": runtime.device.type, "dtype": dtype, **levers, "threads": torch.get_num_threads()},
        "versions": {_PROGRAM: version(_PROGRAM), **library_versions()},
    }
    if adapter.record.config.method != "imagic":
        common["method"] = adapter.record.config.method
    return common if base.fingerprint == made_for.fingerprint else common | {"forced": made_for.name}


def of_image(common: dict[str, Any], edit: Edit) -> dict[str, Any]:
    """Returns the metadata of one image.

    Args:
        common: from :func:`image_metadata`.
        edit: the image.
    """
    batch = [list(pair) for pair in edit.batch or ((edit.eta, edit.seed),)]
    values = common | {"eta": edit.eta, "seed": edit.seed, "batch": batch, "pixels_sha256": pixels_sha256(edit.image)}
    return values | ({"reference_batch": [list(pair) for pair in edit.reference_batch]} if edit.reference_batch else {})


def pixels_sha256(image: Image.Image) -> str:
    """Returns the hash of an image's size and RGB bytes."""
    digest = hashlib.sha256(f"{image.width}x{image.height}\n".encode())
    digest.update(image.convert("RGB").tobytes())
    return digest.hexdigest()


def a1111_parameters(metadata: ImageMetadata, size: tuple[int, int]) -> str:
    """Returns the text that A1111 writes into PNG files: the prompt, the negative prompt, and one line of ``name: value`` pairs.

    A value with a comma, a colon or a line break is quoted as JSON. There is no ``Model hash``: A1111 hashes the file of a checkpoint.

    Args:
        metadata: of the image.
        size: width and height of the image in pixels.
    """
    edit = metadata.edit
    sampler = "DPM++ 2M SDE" if edit.scheduler == "dpm++2m-sde" else _SAMPLERS.get(metadata.scheduler, metadata.scheduler)
    pairs = {
        "Steps": edit.steps,
        "Sampler": sampler,
        "Schedule type": "Karras" if edit.karras_sigmas else None,
        "CFG scale": exact(edit.guidance_scale),
        "Seed": metadata.seed,
        "Size": f"{size[0]}x{size[1]}",
        "Model": re.split(r"[/\\]", metadata.base.rstrip("/\\"))[-1].removesuffix(".safetensors"),
        "Denoising strength": exact(edit.strength) if edit.start in ("image", "flow") else None,
        "Imagic adapter": metadata.adapter,
        "Imagic eta": exact(metadata.eta) if metadata.method == "imagic" else None,
        "Version": f"{_PROGRAM} {metadata.versions.get(_PROGRAM, '')}",
    }
    line = ", ".join(f"{name}: {_quoted(value)}" for name, value in pairs.items() if value is not None)
    negative = [f"Negative prompt: {edit.negative_prompt}"] if edit.negative_prompt and edit.guidance_scale > 1 else []
    return "\n".join([metadata.prompt, *negative, line])


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if {",", "\n", ":"} & set(text) else text


def _scheduler_class(base: Base, config: EditConfig) -> str:
    """The class of diffusers that samples, or that samples as we do: Euler's method for a flow; inversion of a diffusion needs DDIM."""
    if isinstance(base.process, Flow):
        return "FlowMatchEulerDiscreteScheduler"
    return "DDIMScheduler" if config.start == "inverted" else type(base.sampler(config.scheduler, config.karras_sigmas)).__name__
