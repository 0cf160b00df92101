"""The files of a CLIP tokenizer, of which only what cannot name other files is read; and CLIP's own vocabulary. No torch here."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from .vetting import read_json, read_text

TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "tokenizer.json", "vocab.json", "added_tokens.json", "merges.txt")
_TOKENIZER_SETTINGS = (  # of the first two; others could name files
    "bos_token", "eos_token", "unk_token", "pad_token", "additional_special_tokens", "extra_special_tokens", "added_tokens_decoder",
    "model_max_length", "clean_up_tokenization_spaces", "add_prefix_space", "do_lower_case", "errors",
)  # fmt: skip
_NO_PARTS = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
_TOKENIZER_BYTES = 2**23


def tokenizer_files(folder: Path) -> dict[str, str]:
    """The files in a tokenizer's folder: names and vetted text.

    Raises:
        ImagicError: one cannot be read.
    """
    return {name: _vetted(folder / name) for name in TOKENIZER_FILES if (folder / name).exists()}


def shipped_tokenizer(pad: str) -> dict[str, str]:
    """The files of a tokenizer with CLIP's own vocabulary: all bytes, those at the end of a word, what byte pairs make of them, two marks.

    Args:
        pad: the token that fills a short sentence up.
    """
    merges = gzip.decompress((Path(__file__).parent / "vocabulary" / "merges.txt.gz").read_bytes()).decode()
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [*map(chr, printable), *(chr(256 + k) for k in range(len(others)))]
    pairs = ["".join(pair.split()) for pair in merges.splitlines()]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *pairs, "<|startoftext|>", "<|endoftext|>"]
    settings = {"bos_token": words[-2], "eos_token": words[-1], "unk_token": words[-1], "pad_token": pad, "model_max_length": 77}
    return {
        "vocab.json": json.dumps({word: k for k, word in enumerate(words)}),
        "merges.txt": f"#version: 0.2\n{merges}",
        "tokenizer_config.json": json.dumps(settings),
    }


def _vetted(path: Path) -> str:
    if path.suffix == ".txt":
        return read_text(path, _TOKENIZER_BYTES)
    found = read_json(path, _TOKENIZER_BYTES)
    if path.name == "tokenizer.json":  # of its parts transformers makes those anew that are left out here, a CLIP tokenizer's being fixed
        model = found["model"]
        found = _NO_PARTS | {
            "added_tokens": found["added_tokens"],
            "model": {"type": "BPE", "vocab": model["vocab"], "merges": model["merges"]},
        }
    elif path.name in TOKENIZER_FILES[:2]:
        found = {name: found[name] for name in _TOKENIZER_SETTINGS if name in found}
    return json.dumps(found)
