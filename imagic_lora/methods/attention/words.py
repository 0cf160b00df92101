"""The tokens of words, and the alignment of the tokens of two prompts (arXiv 2208.01626)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

import torch
from torch import Tensor

from ...bases.tokens import Token
from ...core.errors import ImagicError

Rule = Literal["refine", "replace"]


@dataclass(frozen=True)
class Prompt:
    """A prompt and its tokens.

    Args:
        text: the prompt.
        tokens: its tokens, from the start to the end token, as the base encodes them.
    """

    text: str
    tokens: Sequence[Token]

    def positions(self, word: str) -> list[int]:
        """Returns the positions of the tokens of a word, in all places where the prompt has it, in any case.

        Args:
            word: one or several words, as they stand in the prompt.

        Raises:
            ImagicError: the prompt does not have the word, or its end, where the word is, is cut off.
        """
        wanted = r"\s+".join(map(re.escape, word.split()))
        places = [match.span() for match in re.finditer(rf"(?<!\w){wanted}(?!\w)", self.text, re.IGNORECASE)] if wanted else []
        if not places:
            remedy = "correct the word, or use it in the prompt"
            raise ImagicError(f"the word {word!r}, which is not in the prompt {self.text!r}", "a word of the prompt", remedy)
        positions = sorted({position for place in places for position in self._inside(*place)})
        if not positions:
            got = f"the word {word!r}, which is behind the last of {len(self.tokens) - 2} tokens of {self.text!r} that the base encodes"
            raise ImagicError(got, "a word that is encoded", "shorten the prompt")
        return positions

    def words(self) -> list[tuple[str, list[int]]]:
        """Returns the words between spaces, in order, with the positions of their tokens. A word that is cut off has none."""
        return [(match.group(), self._inside(*match.span())) for match in re.finditer(r"\S+", self.text)]

    def _inside(self, start: int, end: int) -> list[int]:
        return [k for k, token in enumerate(self.tokens) if max(start, token.start) < min(end, token.end)]


@dataclass(frozen=True)
class Alignment:
    """Which tokens of the source prompt the tokens of the target prompt take their attention from.

    Args:
        matrix: ``[T, T]``: the attention to token ``j`` of the target prompt is the sum over ``i`` of ``matrix[i, j]`` times the attention
            to token ``i`` of the source prompt.
        own: ``[T]``: 1 for tokens that keep their own attention, whose column of the matrix is 0; otherwise 0.
    """

    matrix: Tensor
    own: Tensor


def aligned(rule: Rule, source: Prompt, target: Prompt, length: int) -> Alignment:
    """Aligns two prompts.

    Args:
        rule: ``refine``: tokens that both prompts have, by the longest common alignment; new tokens keep their own attention. ``replace``:
            word by word.
        source, target: the prompts.
        length: number ``T`` of tokens that the base encodes, padding included.

    Raises:
        ImagicError: ``replace`` with prompts of different numbers of words.
    """
    return _refined(source, target, length) if rule == "refine" else _replaced(source, target, length)


def _refined(source: Prompt, target: Prompt, length: int) -> Alignment:
    """Aligns tokens as the official code does. Positions behind the target prompt take the attention of the same position."""
    origins = needleman_wunsch([token.id for token in source.tokens], [token.id for token in target.tokens])
    matrix = torch.zeros(length, length)
    for position, origin in enumerate([*origins, *range(len(origins), length)]):
        if origin is not None:
            matrix[origin, position] = 1
    return Alignment(matrix, (matrix.sum(0) == 0).float())


def needleman_wunsch(source: Sequence[int], target: Sequence[int]) -> list[int | None]:
    """Aligns two sequences globally: 1 for a match, -1 for a mismatch, 0 for a gap.

    Of equally good alignments the one is chosen that, from the end, rather skips an item of the target, then one of the source.

    Returns:
        For each item of the target the index of the item of the source beside it, or None beside a gap.
    """
    scores = [[0] * (len(target) + 1) for _ in range(len(source) + 1)]

    def ways(i: int, j: int) -> tuple[int, int, int]:
        """Scores of skipping an item of the target, of the source, and of pairing them."""
        return scores[i][j - 1], scores[i - 1][j], scores[i - 1][j - 1] + (1 if source[i - 1] == target[j - 1] else -1)

    for i in range(1, len(source) + 1):
        for j in range(1, len(target) + 1):
            scores[i][j] = max(ways(i, j))
    origins: list[int | None] = [None] * len(target)
    i, j = len(source), len(target)
    while i and j:
        move = ways(i, j).index(scores[i][j])
        if move == 2:
            origins[j - 1] = i - 1
        i, j = i - (move != 0), j - (move != 1)
    return origins


def _replaced(source: Prompt, target: Prompt, length: int) -> Alignment:
    """Aligns word by word. A word of other tokens in another number spreads the attention to each evenly over its replacement.

    The official code shifts all tokens behind a word that is replaced by one of another number of tokens; here they stay aligned.
    """
    pairs = list(zip_longest(source.words(), target.words()))
    if any(None in pair for pair in pairs):
        got = f"{len(source.words())} words in {source.text!r} and {len(target.words())} in {target.text!r} with edit replace"
        raise ImagicError(got, "prompts of the same number of words between spaces", "change one of the prompts, or use edit refine")
    matrix = torch.zeros(length, length)
    matrix[0, 0] = 1
    for (_, origins), (_, positions) in pairs:
        if len(origins) == len(positions):
            matrix[origins, positions] = 1
        elif origins and positions:
            matrix[torch.tensor(origins)[:, None], torch.tensor(positions)] = 1 / len(positions)
    ends = len(source.tokens) - 1, len(target.tokens) - 1
    for position in range(ends[1], length):
        matrix[min(ends[0] + position - ends[1], length - 1), position] = 1
    return Alignment(matrix, (matrix.sum(0) == 0).float())
