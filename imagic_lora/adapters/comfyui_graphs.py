"""The graphs of an edit in ComfyUI: that of a checkpoint file for Stable Diffusion, and that of FLUX.2 klein's separate files.

ComfyUI's public code, as read for FLUX.2 klein (``comfy/text_encoders/flux.py``, ``comfy/model_base.py``, ``comfy_extras/nodes_flux.py``):

- Its conditioning is the states of layers 9, 18 and 27 of Qwen3 side by side in the channels, of the prompt in the chat template without
  thinking, padded at the right to 512 tokens. Qwen3 is given the mask of the padding, the transformer is not. That is the conditioning of
  this package, padding included. A shorter one would be filled with zeros at the left.
- The transformer has no pooled embedding. Its latents have 128 channels at a sixteenth of the size of the image.
- ``Flux2Scheduler`` has the noise levels of :class:`~imagic_lora.bases.families.klein.KleinFlow`, and a latent of ``ReferenceLatent`` the
  positions that diffusers gives to a reference image.
- LoRA layers are read as ``lora_transformer_`` and the layer's name in diffusers, the fused layers of the single stream too.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Literal

from ..core.config import EditConfig, Scheduler
from .adapter import Adapter
from .comfyui_workflow import Graph, Link
from .contents import canvas_size

Family = Literal["v1", "v2", "xl", "sd3", "klein"]
STRIP = 5
"""Number of etas of a strip."""
_CHECKPOINTS = {  # the names under which they are published
    "sd15": "v1-5-pruned-emaonly.safetensors",
    "sd21": "v2-1_768-ema-pruned.safetensors",
    "sdxl": "sd_xl_base_1.0.safetensors",
    "sd3-medium": "sd3_medium.safetensors",
    "sd35-medium": "sd3.5_medium.safetensors",
    "klein-base-4b": "flux-2-klein-base-4b.safetensors",
    "klein-base-9b": "flux-2-klein-base-9b.safetensors",
}
_KLEIN_VAE, _KLEIN_TEXT = "flux2-vae.safetensors", "qwen_3_4b.safetensors"
_LARGE_KLEIN_TEXT = "qwen_3_8b_fp8mixed.safetensors"
_SAMPLERS: dict[Scheduler, str] = {
    "base": "euler",
    "euler": "euler",
    "ddim": "ddim",
    "dpm++2m": "dpmpp_2m",
    "dpm++2m-sde": "dpmpp_2m_sde",
    "unipc": "uni_pc",
    "lcm": "lcm",
}


def strip_etas(eta: float) -> list[float]:
    """The etas of the strip of an edit whose default eta is ``eta``."""
    end = max(1.0, eta)
    return [end * k / (STRIP - 1) for k in range(STRIP)]


def reads_photo(config: EditConfig) -> bool:
    """Whether the workflow of an edit loads the photo."""
    return config.start == "image" or config.reference


def model_files(adapter: Adapter, family: Family) -> list[str]:
    """The files of the base that the workflow loads, as paths in ComfyUI's folder: those of the published names, or the user's own."""
    file = checkpoint(adapter.record.base.name)
    if family != "klein":
        return [f"models/checkpoints/{file}"]
    config = adapter.record.config.edit
    text = [f"models/text_encoders/{_text_encoder(adapter)}"] if _own_negative(config) else []
    return [f"models/diffusion_models/{file}", f"models/vae/{_KLEIN_VAE}", *text]


def checkpoint(base: str) -> str:
    """The file name of a base's checkpoint: as it is published, or as the user's own file is called."""
    if base in _CHECKPOINTS:
        return _CHECKPOINTS[base]
    last = PurePosixPath(base.replace("\\", "/")).name
    return last if last.endswith((".safetensors", ".ckpt")) else f"{last}.safetensors"


def graph(adapter: Adapter, family: Family, strip: bool) -> Graph:
    """The workflow of the edit with the default eta, or of a strip over eta."""
    drawn, name, config = Graph(), adapter.name, adapter.record.config.edit
    model, clip, vae = _klein_models(drawn, adapter) if family == "klein" else _checkpoint_models(drawn, adapter)
    if adapter.record.parts:
        lora = drawn.add("LoraLoaderModelOnly", model=model, lora_name=f"{name}.safetensors", strength_model=1.0)
        model = (lora, 0)
    photo = None
    if reads_photo(config):
        loaded = drawn.add("LoadImage", image=f"{name}.png")
        photo = (drawn.add("VAEEncode", pixels=(loaded, 0), vae=vae), 0)
    latent = photo if photo and config.start == "image" else _empty(drawn, adapter, family)
    positive, negative, latent = _conditionings(drawn, adapter, latent, strip)
    if clip is not None:
        negative = (drawn.add("CLIPTextEncode", clip=clip, text=config.negative_prompt), 0)
    if photo and config.reference:
        positive, negative = ((drawn.add("ReferenceLatent", conditioning=one, latent=photo), 0) for one in (positive, negative))
    sampled = (_klein_sampled if family == "klein" else _sampled)(drawn, adapter, model, positive, negative, latent)
    decoded = drawn.add("VAEDecode", samples=(sampled, 0), vae=vae)
    drawn.add("SaveImage", images=(decoded, 0), filename_prefix=f"{name}-strip" if strip else name)
    return drawn


def _own_negative(config: EditConfig) -> bool:
    """Whether a negative prompt is encoded, which nothing but a text encoder can do."""
    return bool(config.negative_prompt) and config.guidance_scale > 1


def _text_encoder(adapter: Adapter) -> str:
    return _LARGE_KLEIN_TEXT if "9b" in adapter.record.base.name.lower() else _KLEIN_TEXT


def _checkpoint_models(drawn: Graph, adapter: Adapter) -> tuple[Link, Link | None, Link]:
    """The denoiser, the text encoders if they are used, and the VAE."""
    loaded = drawn.add("CheckpointLoaderSimple", ckpt_name=checkpoint(adapter.record.base.name))
    return (loaded, 0), (loaded, 1) if _own_negative(adapter.record.config.edit) else None, (loaded, 2)


def _klein_models(drawn: Graph, adapter: Adapter) -> tuple[Link, Link | None, Link]:
    """As :func:`_checkpoint_models`. The text encoder, the larger file, is loaded for a negative prompt alone."""
    model = drawn.add("UNETLoader", unet_name=checkpoint(adapter.record.base.name), weight_dtype="default")
    vae, clip = drawn.add("VAELoader", vae_name=_KLEIN_VAE), None
    if _own_negative(adapter.record.config.edit):
        clip = (drawn.add("CLIPLoader", clip_name=_text_encoder(adapter), type="flux2", device="default"), 0)
    return (model, 0), clip, (vae, 0)


def _empty(drawn: Graph, adapter: Adapter, family: Family) -> Link:
    """A latent of the size of the canvas."""
    kind = {"sd3": "EmptySD3LatentImage", "klein": "EmptyFlux2LatentImage"}.get(family, "EmptyLatentImage")
    width, height = canvas_size(adapter)
    return (drawn.add(kind, width=width, height=height, batch_size=1), 0)


def _conditionings(drawn: Graph, adapter: Adapter, latent: Link, strip: bool) -> tuple[Link, Link, Link]:
    """The positive and the negative conditioning, and the latent, which is repeated for a strip."""
    file, eta = f"{adapter.name}.safetensors", adapter.record.eta
    if not strip:
        node = drawn.add("ImagicConditioning", embeddings=file, eta=eta)
        return (node, 0), (node, 1), latent
    etas = strip_etas(eta)
    node = drawn.add("ImagicEtaBatch", latent=latent, embeddings=file, eta_from=etas[0], eta_to=etas[-1], count=len(etas))
    return (node, 0), (node, 1), (node, 2)


def _skipped(config: EditConfig) -> int:
    """Steps that a start from the photo leaves out."""
    return config.steps - min(int(config.steps * config.strength), config.steps) if config.start == "image" else 0


def _sampled(drawn: Graph, adapter: Adapter, model: Link, positive: Link, negative: Link, latent: Link) -> int:
    """The node that samples from a checkpoint."""
    config = adapter.record.config.edit
    return drawn.add(
        "KSamplerAdvanced",
        model=model,
        positive=positive,
        negative=negative,
        latent_image=latent,
        add_noise="enable",
        noise_seed=0,
        steps=config.steps,
        cfg=max(config.guidance_scale, 1.0),
        sampler_name=_SAMPLERS[config.scheduler],
        scheduler="karras" if config.karras_sigmas else "normal",
        start_at_step=_skipped(config),
        end_at_step=10000,
        return_with_leftover_noise="disable",
    )


def _klein_sampled(drawn: Graph, adapter: Adapter, model: Link, positive: Link, negative: Link, latent: Link) -> int:
    """The node that samples FLUX.2 klein, whose levels depend on the size of the image and on the steps."""
    config, (width, height) = adapter.record.config.edit, canvas_size(adapter)
    guider = drawn.add("CFGGuider", model=model, positive=positive, negative=negative, cfg=max(config.guidance_scale, 1.0))
    noise = drawn.add("RandomNoise", noise_seed=0)
    sampler = drawn.add("KSamplerSelect", sampler_name="euler")
    sigmas = (drawn.add("Flux2Scheduler", steps=config.steps, width=width, height=height), 0)
    if skipped := _skipped(config):
        sigmas = (drawn.add("SplitSigmas", sigmas=sigmas, step=skipped), 1)
    return drawn.add(
        "SamplerCustomAdvanced",
        noise=(noise, 0),
        guider=(guider, 0),
        sampler=(sampler, 0),
        sigmas=sigmas,
        latent_image=latent,
    )
