"""A pipeline of diffusers with an adapter applied, for callers who go on from there: ControlNet, inpainting, schedulers of their own.

Its denoiser and VAE are *views* of the base's: modules of their own on the same weights in memory. What a caller does to a view, such as
loading further LoRA layers, an IP-Adapter or other attention processors, or moving it to another precision, does not reach the base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch.nn import Module, Parameter

from ..bases.base import Base
from ..core.conditioning import Conditioning
from ..core.config import EditConfig
from ..core.errors import ImagicError
from ..photos.canvas import Canvas
from .pipelines import check_ddim_eta, conditioning_kwargs, pipeline_guidance, rescale_kwargs, sampling_pipeline


@dataclass(eq=False)
class Lease:
    """Says whether a pipeline may still be used.

    Args:
        adapter: name of its adapter.
    """

    adapter: str
    open: bool = True


@dataclass(frozen=True)
class EditPipeline:
    """A pipeline of diffusers with an adapter applied, and what to call it with.

    ``pipe(**prompt_kwargs, **sampling_kwargs, generator=torch.Generator().manual_seed(seed))`` makes the edit of that seed.

    Args:
        pipe: the text-to-image pipeline of the family, without text encoders. ``pipe.components`` makes pipelines of other classes.
        prompt_kwargs: what stands for the prompt: ``prompt_embeds``, ``negative_prompt_embeds`` (None without guidance), the pooled
            embeddings and the sizes of the families that have them. ``[1, T, D]`` and ``[1, P]``, on the device.
        sampling_kwargs: ``guidance_scale``, ``num_inference_steps``, ``height``, ``width``, and, where the settings have them,
            ``guidance_rescale`` and ``eta`` (``ddim_eta``).
        canvas: the photo as the adapter was trained on it.
    """

    pipe: Any
    prompt_kwargs: dict[str, Any]
    sampling_kwargs: dict[str, Any]
    canvas: Canvas = field(repr=False)

    def restored(self, image: Image.Image) -> Image.Image:
        """Returns an image of the pipeline as edits have it: without the padding of the canvas, at the size of the photo."""
        return self.canvas.restored(image)


def check_carried_over(config: EditConfig) -> None:
    """Checks that the settings of an edit are those of one call of a text-to-image pipeline.

    Raises:
        ImagicError: the start is not noise, or the photo is a reference image.
    """
    remedy = 'give a config with start "noise" and reference False, and hand the photo to the pipeline that you make of it'
    if config.start != "noise":
        raise ImagicError(f"a pipeline of diffusers with start {config.start}", "start noise, as a text-to-image pipeline has it", remedy)
    if config.reference:
        raise ImagicError("a pipeline of diffusers with a reference image", "reference False", remedy)


def edit_pipeline(
    base: Base, config: EditConfig, conditioning: Conditioning, null: Conditioning | None, canvas: Canvas, lease: Lease
) -> EditPipeline:
    """Returns the pipeline of an edit from noise.

    Args:
        base: the base with the adapter applied.
        config: settings of the sampling.
        conditioning: the conditioning ``e_eta``, with added conditions.
        null: what guidance leads away from, or None.
        canvas: the photo that the adapter was trained on.
        lease: the denoiser of the pipeline raises an ImagicError as soon as it is not open.

    Raises:
        ImagicError: as :func:`check_carried_over`; the base has no pipeline of text to image; the pipeline or its scheduler cannot take
            ``guidance_rescale`` or ``ddim_eta``.
    """
    check_carried_over(config)
    pipe = sampling_pipeline(base, config, "text2image")
    guided = null is not None and config.guidance_scale > 1
    sampling = {
        "guidance_scale": pipeline_guidance(base, config, guided),
        "num_inference_steps": config.steps,
        "height": canvas.pixels.shape[2],
        "width": canvas.pixels.shape[3],
    }
    sampling |= rescale_kwargs(pipe, config, guided)
    check_ddim_eta(pipe.scheduler, config)
    if config.ddim_eta:
        sampling["eta"] = config.ddim_eta
    setattr(pipe, base.component, _denoiser_view(base, lease))
    pipe.vae = _vae_view(pipe.vae)
    return EditPipeline(pipe, conditioning_kwargs(base, conditioning, null if guided else None), sampling, canvas)


def view(module: Module) -> Any:
    """A module of its own on the weights of another: the same values in the same memory, but every module, setting and parameter is new.

    Args:
        module: any module. Quantized weights are the same objects; they cannot be moved to another precision.
    """
    known: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        if type(tensor) is Parameter:
            known[id(tensor)] = Parameter(tensor.detach(), requires_grad=False)
        elif isinstance(tensor, Parameter):
            known |= {id(tensor): tensor, id(state := getattr(tensor, "quant_state", None)): state}
        else:
            known[id(tensor)] = tensor.detach()
    return deepcopy(module, known)


def _denoiser_view(base: Base, lease: Lease) -> Any:
    """A view of the denoiser that computes in the precision of the base, while the lease is open, and whose weights stay as they are."""
    denoiser, runtime = view(base.denoiser), base.runtime
    forward, mixed_precision = denoiser.forward, base.denoiser.dtype != runtime.dtype

    def guarded(*args: Any, **kwargs: Any) -> Any:
        if not lease.open:
            got = f"a call of the pipeline of adapter {lease.adapter} after its with block"
            raise ImagicError(got, "calls inside of the block: afterwards the base may hold another adapter", "call Editor.pipeline again")
        with torch.autocast(runtime.device.type, runtime.dtype, enabled=mixed_precision, cache_enabled=False):
            return forward(*args, **kwargs)

    denoiser.forward = guarded
    denoiser.fuse_lora = _refused("fuse_lora")
    denoiser.load_state_dict = _loading(denoiser)
    return denoiser


def _refused(name: str) -> Callable[..., Any]:
    """A function that raises an ImagicError, in place of one that would write into the weights of the base."""

    def refused(*_: Any, **__: Any) -> Any:
        got = f"{name} on the denoiser of Editor.pipeline, whose weights are those of the loaded base"
        expected = "LoRA layers beside the weights, as load_lora_weights adds them"
        raise ImagicError(got, expected, f"leave out {name}, or load a copy of the base")

    return refused


def _loading(denoiser: Any) -> Callable[..., Any]:
    """``load_state_dict`` for weights that are not those of the base, such as further LoRA layers; others raise an ImagicError."""
    load_state_dict, shared = denoiser.load_state_dict, {parameter.data_ptr() for parameter in denoiser.parameters()}

    def loading(state: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        if any(parameter.data_ptr() in shared and name in state for name, parameter in denoiser.named_parameters()):
            _refused("load_state_dict")()
        return load_state_dict(state, *args, **kwargs)

    return loading


def _vae_view(module: Module) -> Any:
    """A view of the VAE that takes inputs of any precision: that of a base in fp16 may be in fp32, since it overflows in fp16."""
    vae = view(module)
    if "shift_factor" in vae.config and vae.config.shift_factor is None:
        vae.register_to_config(shift_factor=0.0)  # the pipelines of some families add it without asking whether there is one
    for name in ("encode", "decode"):
        setattr(vae, name, _cast(vae, getattr(vae, name)))
    return vae


def _cast(vae: Any, method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of the VAE that converts its first argument to the VAE's precision at the time of the call."""
    return lambda tensor, *args, **kwargs: method(tensor.to(vae.dtype), *args, **kwargs)
