"""Exports of adapters that make images of a prompt, DreamBooth's and those of a new word: their pages, and A1111's layout of a word."""

from __future__ import annotations

import json

from torch import Tensor

from .adapter import Adapter
from .record import WORD_FILES
from .word import read_rows, word_of

_PAGE = """# {name}, a subject of {photos}

Made by imagic-lora with method {method} (arXiv {paper}) for this prompt:

    {prompt}

with this base:

    {base}

## Use

{use}

The images were sampled in {steps} steps at guidance scale {guidance:g}.
"""
_PAPERS = {"dreambooth": "2208.12242", "textual-inversion": "2208.01618"}
_A1111_WORD = """Copy `{name}.safetensors` to the folder `embeddings` of A1111 or ComfyUI. The name of the file is the word: write
`{name}` in A1111, or `embedding:{name}` in ComfyUI, in place of the new word of the prompt above. Rename the file if `{name}` is a
word of your prompts."""
_DIFFUSERS_WORD = """In diffusers:

    pipe.load_textual_inversion(folder, weight_name="{first}")
{second}
Then write the new word of the prompt above in any prompt."""
_SECOND = """    pipe.load_textual_inversion(
        folder, weight_name="{file}", text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2
    )
"""


def a1111_word(adapter: Adapter) -> dict[str, Tensor]:
    """The vectors of a new word as A1111 and ComfyUI read them: ``emb_params``, or ``clip_l`` and ``clip_g`` for SDXL, ``[V, D]``."""
    rows = read_rows(adapter)
    if len(rows) == 1:
        return {"emb_params": next(iter(rows.values()))}
    return {"clip_l": rows["text_encoder"], "clip_g": rows["text_encoder_2"]}


def word_use(adapter: Adapter, a1111: bool) -> str:
    """How another program uses the files of a new word.

    Args:
        a1111: whether they are in A1111's layout, or in that of diffusers.
    """
    if a1111:
        return _A1111_WORD.format(name=adapter.name)
    second = WORD_FILES["text_encoder_2"]
    both = second in adapter.record.weight_files
    return _DIFFUSERS_WORD.format(first=WORD_FILES["text_encoder"], second=_SECOND.format(file=second) if both else "")


def subject_page(adapter: Adapter, use: str) -> bytes:
    """The page that explains an export. User text is placed in indented code blocks, where Markdown has no effect."""
    record = adapter.record
    if record.config.method == "textual-inversion":
        use += f"\n\nThe new word is:\n\n    {json.dumps(word_of(record.prompt, record.config.inversion))}"
    else:
        use += "\n\nUse the prompt above, or another one with the same rare word."
    count = 1 + len(record.source.others)
    text = _PAGE.format(
        name=adapter.name,
        photos="one photo" if count == 1 else f"{count} photos",
        method=record.config.method,
        paper=_PAPERS[record.config.method],
        prompt=json.dumps(record.prompt),
        base=json.dumps(record.base.name),
        use=use,
        steps=record.config.edit.steps,
        guidance=record.config.edit.guidance_scale,
    )
    return text.encode()
