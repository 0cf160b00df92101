"""A new word of textual inversion (arXiv 2208.01618): its vectors, their files in diffusers' layout, and prompts that contain it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from ..bases.base import Base
from ..core.conditioning import Conditioning
from ..core.config import InversionConfig
from ..core.errors import ImagicError
from ..core.tensors import read, safetensors_pieces
from .adapter import Adapter
from .atomic import AtomicWriter
from .record import REMEDY, WORD_FILES

_BRACKETED = re.compile(r"<[^<>\s|]+>")


@dataclass(frozen=True, eq=False)
class PlacedWord:
    """A prompt with the tokens of a word of the vocabulary at the places of the new word, whose vectors replace theirs.

    Args:
        prompt: the prompt with those tokens.
        positions: of the tokens, ``[times * V]``.
        times: how often the word occurs.
        looked_up: the vectors of all tokens of the prompt by text encoder, ``[1, T, D]``.
    """

    prompt: str
    positions: Tensor
    times: int
    looked_up: Mapping[str, Tensor]

    def encode(self, base: Base, rows: Mapping[str, Tensor]) -> Conditioning:
        """Encodes the prompt. Gradients flow to the vectors.

        Args:
            base: encodes it.
            rows: the vectors of the new word by text encoder, ``[V, D]``.
        """
        vectors = {
            name: value.index_copy(1, self.positions, rows[name].repeat(self.times, 1)[None]) for name, value in self.looked_up.items()
        }
        return replace(base.encode_vectors(self.prompt, vectors), vectors={})


@dataclass(frozen=True, eq=False)
class NewWord:
    """A word and its vectors. The vocabulary and the text encoders of the base stay as they are.

    Args:
        text: the word, as prompts write it.
        initial: a word of one token, whose vector the vectors started from.
        rows: the vectors by text encoder, ``[V, D]`` fp32.
    """

    text: str
    initial: str
    rows: Mapping[str, Tensor]

    def occurs(self, prompt: str) -> bool:
        """Whether a prompt contains the word."""
        return word_pattern(self.text).search(prompt) is not None

    @torch.no_grad()
    def encode(self, base: Base, prompt: str) -> Conditioning:
        """Encodes a prompt, which may contain the word.

        Raises:
            ImagicError: as :func:`place`.
        """
        if not self.occurs(prompt):
            return base.encode_prompt(prompt)
        vectors = next(iter(self.rows.values())).shape[0]
        return place(base, prompt, self.text, self.initial, vectors).encode(base, self.rows)


def word_pattern(text: str) -> re.Pattern[str]:
    """Matches a word where it stands alone."""
    return re.compile(rf"(?<!\w){re.escape(text)}(?!\w)")


def word_of(prompt: str, config: InversionConfig) -> str:
    """The new word of a target prompt.

    Raises:
        ImagicError: the prompt does not contain the word of the settings, or without one not exactly one word in angle brackets.
    """
    if config.word is not None:
        if config.word != config.word.strip() or any(letter.isspace() for letter in config.word):
            raise ImagicError(f"--word {config.word!r}", "one word without spaces", "change --word")
        if not word_pattern(config.word).search(prompt):
            expected = f'a prompt with the new word, such as "a photo of {config.word}"'
            raise ImagicError(f"--word {config.word}, which is not in the prompt {prompt!r}", expected, "change the prompt, or --word")
        return config.word
    found = sorted(set(_BRACKETED.findall(prompt)))
    if len(found) != 1:
        got = f"the prompt {prompt!r}, with {'no word' if not found else 'several words'} in angle brackets"
        raise ImagicError(got, 'one new word in angle brackets, such as "a photo of <my-dog>"', "change the prompt, or name it with --word")
    return found[0]


def check_initial_word(config: InversionConfig) -> None:
    """Raises ImagicError if the initial word is missing; whether it is one token says the base, see :func:`checked_word`."""
    if not config.initial_word.strip():
        expected = "a word of the vocabulary of the base that says what the photo shows"
        raise ImagicError("no --initial-word", expected, "add for example --initial-word dog")


def new_word(base: Base, prompt: str, config: InversionConfig) -> NewWord:
    """The new word of a prompt, with the vector of the initial word as each of its vectors.

    Raises:
        ImagicError: as :func:`checked_word`.
    """
    text, initial = checked_word(base, prompt, config)
    looked_up = base.encode_vectors(initial).vectors
    return NewWord(text, initial, {name: value[0, 1:2].repeat(config.vectors, 1) for name, value in looked_up.items()})


def checked_word(base: Base, prompt: str, config: InversionConfig) -> tuple[str, str]:
    """Returns the new word of a prompt and the initial word. Nothing is encoded.

    Raises:
        ImagicError: as :func:`word_of`; the word is in the vocabulary of the base already; the initial word is missing or has several
            tokens.
    """
    text, initial = word_of(prompt, config), config.initial_word.strip()
    if len(base.tokenize(text)) == 3:  # start, the word, end
        raise ImagicError(f"the new word {text}, which is a word of the vocabulary of {base.name}", "a word that it does not have",
                          "choose another word, such as <my-dog>")  # fmt: skip
    if len(base.tokenize(initial)) != 3:
        check_initial_word(config)
        what = f"--initial-word {initial}, which has {len(base.tokenize(initial)) - 2} tokens"
        raise ImagicError(what, f"a word of one token of {base.name} that says what the photo shows", "add for example --initial-word dog")
    return text, initial


@torch.no_grad()
def place(base: Base, prompt: str, text: str, initial: str, vectors: int) -> PlacedWord:
    """Finds the places of a new word in the tokens of a prompt.

    Args:
        prompt: contains the word.
        text: the new word.
        initial: a word of one token.
        vectors: number of vectors of the new word.

    Raises:
        ImagicError: the prompt is so long that the word is cut off.
    """
    pieces = word_pattern(text).split(prompt)
    placeholder = " ".join([initial] * vectors)
    placed, spans = pieces[0], list[tuple[int, int]]()
    for _, piece in pairwise(pieces):
        start = len(placed) + 1
        spans.append((start, start + len(placeholder)))
        placed += f" {placeholder} {piece}"
    tokens = base.tokenize(placed)
    positions = [k for k, token in enumerate(tokens) if any(start <= token.start < token.end <= end for start, end in spans)]
    if len(positions) != len(spans) * vectors:
        got = f"the prompt {prompt!r}, of which the word {text} is cut off: it takes {vectors} tokens each time"
        raise ImagicError(got, "a prompt that the text encoder reads to the end", "shorten it")
    looked_up = base.encode_vectors(placed).vectors
    where = torch.tensor(positions, device=next(iter(looked_up.values())).device)
    return PlacedWord(placed, where, len(spans), looked_up)


def save_word(writer: AtomicWriter, word: NewWord) -> None:
    """Writes the vectors of each text encoder into a file of its own, which ``load_textual_inversion`` of diffusers reads.

    Raises:
        ImagicError: a vector is not finite.
    """
    for encoder, rows in word.rows.items():
        writer.write(WORD_FILES[encoder], safetensors_pieces({word.text: rows.float().cpu()}, {"format": "pt"}))


def read_rows(adapter: Adapter) -> dict[str, Tensor]:
    """Reads the vectors of an adapter's new word by text encoder, ``[V, D]`` fp32.

    Raises:
        ImagicError: a file holds something else than the vectors of the word.
    """
    record, rows = adapter.record, dict[str, Tensor]()
    text = word_of(record.prompt, record.config.inversion)
    for encoder, file in WORD_FILES.items():
        if file not in record.weight_files:
            continue
        stored = read(adapter.listed(file))
        value = stored.get(text)
        if list(stored) != [text] or value is None or value.ndim != 2 or len(value) != record.config.inversion.vectors:
            got = f"{adapter.folder / file} does not hold the {record.config.inversion.vectors} vectors of {text}"
            raise ImagicError(got, "a file written by fit", REMEDY)
        rows[encoder] = value.float()
    return rows


def read_word(adapter: Adapter, base: Base) -> NewWord | None:
    """Reads the new word of an adapter; None for an adapter of another method.

    Raises:
        ImagicError: as :func:`read_rows`; the vectors do not fit the text encoders of the base.
    """
    if adapter.record.config.method != "textual-inversion":
        return None
    rows, vectors = read_rows(adapter), adapter.record.config.inversion.vectors
    expected = {name: (vectors, shape[-1]) for name, shape in base.architecture.vectors.items()}
    if (shapes := {name: tuple(value.shape) for name, value in rows.items()}) != expected:
        raise ImagicError(f"adapter {adapter.name} has vectors of the shapes {shapes}", f"{expected}, as the base has", REMEDY)
    prompt, config = adapter.record.prompt, adapter.record.config.inversion
    return NewWord(
        word_of(prompt, config), config.initial_word.strip(), {name: value.to(base.runtime.device) for name, value in rows.items()}
    )
