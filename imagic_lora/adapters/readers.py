"""What other programs make of an export: layers that a reader of kohya's layout leaves out, and prompts that it reads in another way."""

from __future__ import annotations

import re
from collections.abc import Collection

from ..core.errors import ImagicError

_OUTSIDE_OF_BLOCKS = re.compile(  # the names in diffusers, then those in Stability's code
    r"lora_unet_(conv_in|conv_out|(time|add)_embedding_linear_[12]|input_blocks_0_0|out_2|time_embed_[02]|label_emb_0_[02])"
)
_READ_BY_NOBODY = re.compile(  # ComfyUI has other names for these layers of FLUX.2 klein
    r"lora_unet_time_embedding_cond_proj|lora_transformer_(time_guidance_embed_.*|(double|single)_stream_modulation_.*)"
)
_SYNTAX = re.compile(r"[()\[\]{}<>\\]|//|\b(AND|BREAK)\b|\bembedding:")


def check_layers(layers: Collection[str]) -> None:
    """Raises ImagicError if no reader of kohya's layout knows a layer: ComfyUI, A1111 and sd-scripts all leave it out in silence.

    Args:
        layers: names of the layers in that layout.
    """
    if unread := sorted(layer for layer in layers if _READ_BY_NOBODY.fullmatch(layer)):
        layer, kind = ("time_embedding.cond_proj", "conv") if unread[0].startswith("lora_unet") else (unread[0], "mlp")
        remedy = f"use --format diffusers, or fit with --targets attention+{kind}"
        raise ImagicError(f"a LoRA layer on {layer}", "layers that a program reads in the format kohya", remedy)


def notes(layers: Collection[str], prompt: str, openclip: bool) -> list[str]:
    """What a user of the export must know about its readers: one sentence or more each, without text of the prompt.

    Args:
        layers: names of the LoRA layers in that layout.
        prompt: target prompt.
        openclip: whether a text encoder of the base is OpenCLIP's, as in Stable Diffusion 2 and XL.
    """
    found: list[str] = []
    if outside := sorted(layer for layer in layers if _OUTSIDE_OF_BLOCKS.fullmatch(layer)):
        names = ", ".join(f"`{layer}`" for layer in outside)
        found.append(
            f"kohya's sd-scripts read only layers inside of blocks: they leave out {len(outside)} of the {len(layers)} layers, {names}. "
            "ComfyUI and A1111 read all."
        )
    if openclip and "!" in prompt:
        found.append(
            "The target prompt has an exclamation mark. ComfyUI and A1111 read it as punctuation, as imagic-lora does for a base in a "
            "single file. For a base in diffusers' format it is padding, as in diffusers: there the embedding is another one than theirs."
        )
    if _SYNTAX.search(prompt):
        found.append(
            "The target prompt has characters or words that ComfyUI or A1111 read as commands, such as parentheses for the weight of a "
            "word: put a backslash before a parenthesis, or leave them out. The embeddings are those of the plain text."
        )
    return found
