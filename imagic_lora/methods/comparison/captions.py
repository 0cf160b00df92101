"""A caption of the photo by a model of transformers: from a folder, from the cache of the hub, or from the hub. It runs on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from ...core.errors import ImagicError
from ...sampling.sweeps.metrics import model_options

CAPTIONER = "Salesforce/blip-image-captioning-large"
"""Hub id of the default captioner: unlike the smaller one of the same authors it is published in safetensors. 1.9 GB."""
_LONGEST = 30  # tokens of a caption


@torch.no_grad()
def captioned(photo: Image.Image, source: str, offline: bool) -> str:
    """Returns a caption of a photo, by greedy decoding: the same one each time.

    Args:
        photo: RGB.
        source: folder or hub id of a captioner, such as BLIP (arXiv 2201.12086).
        offline: whether only the cache of the hub is used.

    Raises:
        ImagicError: the model is not there, is no captioner, or gives an empty caption.
    """
    try:
        model: Any = AutoModelForImageTextToText.from_pretrained(source, **model_options(offline))
        processor: Any = AutoProcessor.from_pretrained(source, local_files_only=offline)
        inputs = processor(images=photo, return_tensors="pt")
        tokens = model.eval().generate(**inputs, max_new_tokens=_LONGEST, do_sample=False)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
        got = f"--source auto: captioner {source} cannot be loaded ({reason})"
        how = "leave out --offline to download it" if offline else "check the name and the connection"
        expected = "a folder or a hub id of a captioner of transformers, such as BLIP, in safetensors"
        raise ImagicError(got, expected, f'{how}, name a folder with --captioner, or write --source "a caption"') from error
    caption = " ".join(processor.batch_decode(tokens, skip_special_tokens=True)[0].split())
    if not caption:
        got = f"--source auto: captioner {source} gives an empty caption"
        raise ImagicError(got, "a caption of the photo", 'use another --captioner, or write --source "a caption"')
    return caption
