"""Nodes for ComfyUI that turn the embeddings of an edit by Imagic (arXiv 2210.09276) into conditionings. Needs ComfyUI alone.

Made by imagic-lora. The embeddings are files in ``models/imagic``: ``target`` (of the target prompt), ``optimised`` (of the photo) and
``null`` (of the empty prompt), each with ``tokens`` [1, T, D] and, where the family has it, ``pooled`` [1, P]. Where the mixtures of
an edit are outputs of the text encoder, ``etas`` [N] and ``mixed``, with ``tokens`` [N, T, D] and ``pooled`` [N, P], replace the first two.
"""

import os

import folder_paths  # pyright: ignore[reportMissingImports]
import safetensors.torch
import torch

KIND = "imagic"
folder_paths.add_model_folder_path(KIND, os.path.join(folder_paths.models_dir, KIND))  # noqa: PTH118
SIZES = ("height", "width", "crop_h", "crop_w", "target_height", "target_width")  # ComfyUI's names of the size ids of SDXL
CHOICES = ("FLOAT", {"default": 0.7, "min": 0.0, "max": 2.0, "step": 0.05, "round": 0.001})


def files() -> tuple:
    """The input that chooses a file of embeddings."""
    return ([name for name in folder_paths.get_filename_list(KIND) if name.endswith(".safetensors")],)


def read(name: str) -> dict:
    """The tensors of a file of embeddings."""
    path = folder_paths.get_full_path(KIND, name)
    if path is None:
        raise FileNotFoundError(f"{name} is not in models/{KIND}: copy it there")
    tensors = safetensors.torch.load_file(path)
    mixtures = {"mixed.tokens"} if "etas" in tensors else {"target.tokens", "optimised.tokens"}
    missing = (mixtures | {"null.tokens"}) - tensors.keys()
    if missing:
        raise ValueError(f"{name} holds no {', '.join(sorted(missing))}: it is no file of imagic-lora export --format comfyui")
    return tensors


def conditioning(tensors: dict, tokens: torch.Tensor, pooled: torch.Tensor | None) -> list:
    """A CONDITIONING: tokens [N, T, D] with, if there are any, the pooled embeddings [N, P] and the sizes of SDXL."""
    extra: dict = {} if pooled is None else {"pooled_output": pooled}
    if "target.time_ids" in tensors:
        extra.update(zip(SIZES, (int(value) for value in tensors["target.time_ids"][0]), strict=True))
    return [[tokens, extra]]


def mixed(tensors: dict, etas: list) -> list:
    """The CONDITIONING of each eta, as one batch: eta * target + (1 - eta) * optimised, or the one that the file has for it."""
    if "etas" in tensors:
        rows = [row(tensors["etas"].tolist(), eta) for eta in etas]
        pooled = tensors.get("mixed.pooled")
        return conditioning(tensors, tensors["mixed.tokens"][rows].float(), None if pooled is None else pooled[rows].float())

    def mix(name: str) -> torch.Tensor:
        target, optimised = tensors[f"target.{name}"].float(), tensors[f"optimised.{name}"].float()
        return torch.cat([eta * target + (1 - eta) * optimised for eta in etas])

    return conditioning(tensors, mix("tokens"), mix("pooled") if "target.pooled" in tensors else None)


def row(stored: list, eta: float) -> int:
    """The position of an eta among those of a file."""
    nearest = min(range(len(stored)), key=lambda k: abs(stored[k] - eta))
    if abs(stored[nearest] - eta) > 1e-3:
        listed = ", ".join(f"{one:g}" for one in stored)
        raise ValueError(f"this edit has no conditioning for eta {eta:g}. Expected: one of {listed}. Or export it again with --eta")
    return nearest


def negative(tensors: dict) -> list:
    """The CONDITIONING of the empty prompt."""
    pooled = tensors.get("null.pooled")
    return conditioning(tensors, tensors["null.tokens"].float(), None if pooled is None else pooled.float())


class _Node:
    CATEGORY = "conditioning/imagic"
    FUNCTION = "run"

    @classmethod
    def IS_CHANGED(cls, embeddings: str, **_: object) -> float:
        """A file that was exported again is read again."""
        path = folder_paths.get_full_path(KIND, embeddings)
        return os.path.getmtime(path) if path else 0.0  # noqa: PTH204


class ImagicConditioning(_Node):
    """The conditioning of an edit. Eta 0 reproduces the photo, eta 1 is the target prompt itself."""

    RETURN_TYPES = ("CONDITIONING", "CONDITIONING")
    RETURN_NAMES = ("positive", "negative")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"embeddings": files(), "eta": CHOICES}}

    def run(self, embeddings: str, eta: float) -> tuple:
        tensors = read(embeddings)
        return mixed(tensors, [eta]), negative(tensors)


class ImagicEtaBatch(_Node):
    """A strip: the conditionings of evenly spaced etas, and a latent repeated for them so that all start from the same noise."""

    RETURN_TYPES = ("CONDITIONING", "CONDITIONING", "LATENT")
    RETURN_NAMES = ("positive", "negative", "latent")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        count = ("INT", {"default": 5, "min": 1, "max": 64})
        return {"required": {"embeddings": files(), "latent": ("LATENT",), "eta_from": CHOICES, "eta_to": CHOICES, "count": count}}

    def run(self, embeddings: str, latent: dict, eta_from: float, eta_to: float, count: int) -> tuple:
        samples = latent["samples"]
        if len(samples) != 1:
            raise ValueError(f"Imagic eta batch got {len(samples)} latents. Expected: one, which it repeats for every eta")
        etas = [eta_from + (eta_to - eta_from) * k / max(count - 1, 1) for k in range(count)]
        repeated = {name: value for name, value in latent.items() if name != "noise_mask"}
        repeated["samples"] = samples.repeat(count, *[1] * (samples.ndim - 1))
        repeated["batch_index"] = list(latent.get("batch_index", [0]))[:1] * count
        if "noise_mask" in latent:
            mask = latent["noise_mask"]
            repeated["noise_mask"] = mask[:1].expand(count, *mask.shape[1:])
        tensors = read(embeddings)
        return mixed(tensors, etas), negative(tensors), repeated


NODE_CLASS_MAPPINGS = {"ImagicConditioning": ImagicConditioning, "ImagicEtaBatch": ImagicEtaBatch}
NODE_DISPLAY_NAME_MAPPINGS = {"ImagicConditioning": "Imagic conditioning", "ImagicEtaBatch": "Imagic eta batch"}
