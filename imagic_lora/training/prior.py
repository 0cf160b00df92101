"""DreamBooth's prior preservation (arXiv 2208.12242): pictures of the class by the frozen base, and the stage that trains beside them."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import Parameter

from ..adapters.durable import write_bytes
from ..adapters.writing import writable
from ..bases.base import Base
from ..core.conditioning import Conditioning, concatenate
from ..core.config import RunConfig, TuneConfig
from ..core.errors import ImagicError, ImagicWarning, Stopped
from ..core.noise import key
from ..core.runtime import Processes, to_device
from ..memory.out_of_memory import explain_out_of_memory
from ..photos.canvas import Canvas, to_pixels
from ..photos.png import png
from ..photos.reading import read_photo
from ..sampling.generate import generate
from .resuming.interrupting import stop_while_sampling
from .run import Run
from .stage import Batch, Stage, StepReport, cycled

CLASS = "class"
"""Name of what comes before stage 2: the generation of the class pictures."""


@dataclass(frozen=True, eq=False)
class Prior:
    """What a base knows of a class.

    Args:
        latents: of the class pictures, ``[N, C, h, w]`` fp32 in host memory.
        conditioning: of the class prompt, with added conditions.
    """

    latents: Tensor
    conditioning: Conditioning


def check_class_prompt(config: RunConfig, prompt: str) -> None:
    """Raises ImagicError if the class prompt of a run with class pictures is missing or is the prompt itself."""
    if not config.prior:
        return
    class_prompt = config.dreambooth.class_prompt.strip()
    if not class_prompt or class_prompt == prompt.strip():
        got = "--method dreambooth without a --class-prompt" if not class_prompt else f"--class-prompt {class_prompt!r}, the prompt itself"
        remedy = 'add for example --class-prompt "a photo of a dog", or use --prior-weight 0 for no class pictures'
        raise ImagicError(got, "the prompt without the rare word", remedy)


def class_folder(base: Base, config: RunConfig, width: int, height: int) -> tuple[Path, dict[str, Any]]:
    """The folder of class pictures in the cache of the user, and all that they depend on besides their number.

    Args:
        base: the frozen base.
        config: settings of the run.
        width, height: of the pictures, in pixels.
    """
    sampling = config.edit.model_dump(mode="json", include={
        "guidance_scale", "steps", "negative_prompt", "guidance_rescale", "scheduler", "karras_sigmas", "ddim_eta"
    })  # fmt: skip
    depends = {
        "base": base.fingerprint,
        "class_prompt": config.dreambooth.class_prompt.strip(),
        "class_seed": config.dreambooth.class_seed,
        "sampling": sampling,
        "size": [width, height],
        "precision": [_dtype_name(base.denoiser.dtype), _dtype_name(base.runtime.dtype), base.runtime.memory.quantize],
    }
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise ImagicError("no home directory for the class pictures", "a cache folder", "set XDG_CACHE_HOME") from error
    name = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]
    return cache / "imagic-lora" / "class-pictures" / name, depends


def _dtype_name(dtype: torch.dtype) -> str:
    """The name of a precision."""
    return str(dtype).removeprefix("torch.")


def missing_pictures(base: Base, config: RunConfig, width: int, height: int) -> int:
    """Returns how many class pictures of a run are not in the cache yet.

    Args:
        base, config, width, height: as for :func:`class_folder`.
    """
    folder, _ = class_folder(base, config, width, height)
    return sum(not (folder / _name(k)).exists() for k in range(config.dreambooth.class_pictures))


def make_prior(run: Run, stop: Callable[[], bool]) -> Generator[StepReport, None, Prior]:
    """Reads the class pictures of a run from the cache, and generates those that are missing. The base is frozen.

    Picture ``i`` depends on its own seed alone, so a larger number of pictures adds to those that are there.

    Args:
        run: the encoded inputs of the fit.
        stop: called before every call of the denoiser.

    Yields:
        A report without a loss for each new picture.

    Raises:
        Stopped: ``stop`` returned True; the pictures so far are in the cache.
        ImagicError: pictures are missing and there are several processes; the cache cannot be written; an image holds NaN.
    """
    base, config = run.base, run.config
    height, width = run.canvas.pixels.shape[2:]
    encoded = base.encode_prompt(config.dreambooth.class_prompt.strip())
    base.offload_encoders()
    conditioning = base.with_added_conditions(encoded, height, width, config.edit.guidance_scale)
    folder, depends = class_folder(base, config, width, height)
    count = config.dreambooth.class_pictures
    images = _stored(folder, count, (width, height))
    missing = [k for k in range(count) if k not in images]
    if missing and run.processes.count > 1:
        got = f"{len(missing)} of {count} class pictures are missing in {folder}, with {run.processes.count} processes"
        raise ImagicError(got, "class pictures that one process has made", "start the same fit without a launcher first, and interrupt it")
    if missing:
        with writable(folder):
            (folder / "class.json").write_text(json.dumps(depends, indent=2) + "\n", encoding="utf-8")
    canvas = Canvas(torch.zeros(1, 3, height, width), (0, 0, width, height), (width, height))
    seeds = [key(config.dreambooth.class_seed, CLASS, k) % 2**32 for k in missing]
    sampling, repeated = config.edit.model_copy(update={"start": "noise"}), [conditioning] * len(missing)
    pictures = generate(base, repeated, seeds, sampling, canvas, run.negative, repeated)
    for done, k in enumerate(missing):
        saved = f"{len(images)} of {count} class pictures are stored; run the same command again to continue"
        with explain_out_of_memory(base.architecture, config, base.runtime, CLASS), stop_while_sampling(base, stop, saved):
            images[k] = next(pictures)
        _write(folder / _name(k), images[k], config.dreambooth.class_prompt)
        yield StepReport(CLASS, count - len(missing) + done + 1, count, None)
        if stop():
            raise Stopped(f"{len(images)} of {count} class pictures are stored; run the same command again to continue")
    ordered = [images[k] for k in range(count)]
    latents = torch.cat([base.encode_image(to_pixels(image)).cpu() for image in ordered])
    run.class_pictures = hashlib.sha256(b"".join(image.tobytes() for image in ordered)).hexdigest()
    return Prior(latents, conditioning)


def _name(k: int) -> str:
    return f"{k:05d}.png"


def _stored(folder: Path, count: int, size: tuple[int, int]) -> dict[int, Image.Image]:
    """The intact pictures of a folder by their number; others are made again, with a warning."""
    images: dict[int, Image.Image] = {}
    for k in range(count):
        path = folder / _name(k)
        if not path.exists():
            continue
        try:
            image = read_photo(path).image
            if image.size != size:
                raise ImagicError(f"{path} is {image.width}x{image.height}", f"{size[0]}x{size[1]} pixels", "delete it")
            images[k] = image
        except ImagicError as error:
            warnings.warn(f"a class picture is made again: {error.got}", ImagicWarning, stacklevel=2)
    return images


def _write(path: Path, image: Image.Image, prompt: str) -> None:
    """Writes a picture atomically: another process may make the same one."""
    write_bytes(path, png(image, {"class_prompt": prompt}))


class PriorStage(Stage):
    """Stage 2 of DreamBooth: the loss of the photos with the prompt, plus the weighted loss of class pictures with the class prompt.

    A batch has two halves of equal size, each with noise and timesteps of its own; each half is averaged alone.

    Args:
        prior: the class pictures.
        weight: of their loss.
        base, latents, trainables, config, seed, processes: as for :class:`~imagic_lora.training.stage.Stage`.
        target: conditioning of the prompt.
    """

    def __init__(
        self,
        prior: Prior,
        weight: float,
        base: Base,
        latents: Tensor,
        target: Conditioning,
        trainables: Mapping[str, Parameter],
        config: TuneConfig,
        seed: int,
        processes: Processes,
    ) -> None:
        super().__init__("tune", base, latents, lambda: target, trainables, config, seed, processes)
        self.prior, self.weight = prior, weight

    def batch(self, k: int) -> Batch:
        photo, size = super().batch(k), self.config.batch_size
        noise, times = self.drawn(f"{self.name}/{CLASS}", k)
        pictures = to_device(cycled(self.prior.latents, k, self.processes.samples(size), size * self.processes.count), noise.device)
        return Batch(
            self.base,
            torch.cat([photo.latents.expand_as(noise), pictures.expand_as(noise)]),
            concatenate([photo.conditioning.expand(size), self.prior.conditioning.expand(size)]),
            torch.cat([photo.noise, noise]),
            torch.cat([photo.times, times]),
            photo.scale,
        )

    def loss(self, losses: Tensor) -> Tensor:
        photos, pictures = losses.chunk(2)
        return photos.mean() + self.weight * pictures.mean()
