"""A caption of the photo by a model of transformers: from a folder, from the cache of the hub, or from the hub. It runs on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from ...core.errors import ImagicError
from ...sampling.sweeps.metrics import model_options, offline_hub

CAPTIONER = "Salesforce/blip-image-captioning-large"
"""Hub id of the default captioner: unlike the smaller one of the same authors it is published in safetensors. 1.9 GB."""
_LONGEST = 30  # tokens of a caption


def captioned(photo: Image.Image, source: str, offline: bool) -> str:
    """Returns a caption of a photo; arguments and errors as those of :func:`load_captioner` and of what it returns."""
    return load_captioner(source, offline)(photo)


def load_captioner(source: str, offline: bool) -> Callable[[Image.Image], str]:
    """Loads a captioner, and returns a function that captions a photo, by greedy decoding: the same caption each time.

    The function raises ImagicError if the model is no captioner, or gives an empty caption.

    Args:
        source: folder or hub id of a captioner, such as BLIP (arXiv 2201.12086).
        offline: whether only the cache of the hub is used.

    Raises:
        ImagicError: the model is not there, or is no captioner.
    """
    with _explained(source, offline):
        model: Any = AutoModelForImageTextToText.from_pretrained(source, **model_options(offline)).eval()
        processor: Any = AutoProcessor.from_pretrained(source, local_files_only=offline)

    @torch.no_grad()
    def caption(photo: Image.Image) -> str:
        with _explained(source, offline):
            inputs = processor(images=photo, return_tensors="pt")
            tokens = model.generate(**inputs, max_new_tokens=_LONGEST, do_sample=False)
        text = " ".join(processor.batch_decode(tokens, skip_special_tokens=True)[0].split())
        if not text:
            got = f"captioner {source} gives an empty caption"
            raise ImagicError(got, "a caption of the photo", "use another --captioner, or write the caption yourself")
        return text

    return caption


@contextmanager
def _explained(source: str, offline: bool) -> Iterator[None]:
    """Converts errors of transformers and the hub into ImagicError."""
    try:
        with offline_hub(offline):
            yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
        how = "leave out --offline to download it" if offline else "check the name and the connection"
        expected = "a folder or a hub id of a captioner of transformers, such as BLIP, in safetensors"
        remedy = f"{how}, name a folder with --captioner, or write the caption yourself"
        raise ImagicError(f"captioner {source} cannot be loaded ({reason})", expected, remedy) from error
