"""The tokens of a prompt, as a base describes them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Token(NamedTuple):
    """A token of a prompt.

    Args:
        id: number of the token in the vocabulary.
        start, end: first character of the prompt that it stands for, and the one after the last; equal for the start and the end token.
    """

    id: int
    start: int
    end: int


class VectorMasks(NamedTuple):
    """Which vectors of a prompt are of its words, and which are padding, both ``[1, T]`` bool; neither: the start and the end token."""

    words: Tensor
    padding: Tensor
