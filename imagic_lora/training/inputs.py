"""The photos and the prompt of a fit, checked by what its method needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..adapters.word import check_initial_word, word_of
from ..core.config import RunConfig
from ..core.errors import ImagicError, unreadable
from ..photos.canvas import middle_square
from ..photos.reading import Photo, read_photo
from ..photos.region import Region
from ..sampling.checks import check_prompt
from .encode import encode_photo
from .prior import check_class_prompt
from .run import Run

_MOST = 1000  # photos in a folder


def check_inputs(prompt: str, config: RunConfig, region: Region | None) -> None:
    """Checks a prompt, and what the method of a run needs besides.

    Raises:
        ImagicError: the prompt is empty or not UTF-8; it has no new word; the class prompt or the initial word is missing; a region is
            given to a method that makes images of their own.
    """
    check_prompt(prompt)
    if region and config.method != "imagic":
        expected = "the whole photo: the images of this method are not pasted into it"
        raise ImagicError(f"--region together with --method {config.method}", expected, "crop the photo first")
    if config.method == "dreambooth":
        check_class_prompt(config, prompt)
    if config.method == "textual-inversion":
        word_of(prompt, config.inversion)
        check_initial_word(config.inversion)


def read_photos(path: Path, config: RunConfig) -> list[Photo]:
    """Reads the photo of a fit, or all photos of a folder in the order of their names.

    Several photos are cut to the squares in their middles, so that they share one canvas. Hidden files are left out.

    Raises:
        ImagicError: a file is no photo; the folder has none, or more than 1,000 files; a folder is given to method imagic.
    """
    if not path.is_dir():
        return [read_photo(path)]
    if config.method == "imagic":
        got = f"{path} is a folder, with --method imagic"
        raise ImagicError(got, "one photo", "name one photo, use imagic-lora batch for many, or --method dreambooth for one subject")
    try:
        files = sorted(file for file in path.iterdir() if not file.name.startswith(".") and not file.is_dir())
    except OSError as error:
        raise unreadable(path, error) from error
    if not 1 <= len(files) <= _MOST:
        raise ImagicError(f"{path} holds {len(files)} files", f"1 to {_MOST:,} photos of one subject, and nothing else", "check the folder")
    photos = [read_photo(file) for file in files]
    return photos if len(photos) == 1 else [replace(photo, image=middle_square(photo.image)) for photo in photos]


def encode_others(run: Run, others: Sequence[Photo]) -> None:
    """Adds further photos to a run: their latents follow those of the first.

    Raises:
        ImagicError: as :func:`~imagic_lora.training.encode.encode_photo`.
    """
    latents = [encode_photo(run.config, run.base, photo, None)[1] for photo in others]
    run.others, run.latents = others, torch.cat([run.latents, *latents]) if latents else run.latents
