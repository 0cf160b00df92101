"""Tokens of words, alignment of prompts, and what attention becomes by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from common import each, opened
from transformers import CLIPTokenizer

from imagic_lora.bases.base import Base
from imagic_lora.bases.loading.tokenizers import shipped_tokenizer
from imagic_lora.bases.tokens import Token
from imagic_lora.core.errors import ImagicError
from imagic_lora.methods.attention.words import Alignment, Prompt, Rule, aligned

LENGTH = 77


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that tokenizes a prompt with CLIP's vocabulary, as the bases do."""
    folder = tmp_path_factory.mktemp("clip")
    for name, content in shipped_tokenizer().items():
        (folder / name).write_text(content)
    tokenizer = CLIPTokenizer.from_pretrained(folder)

    def prompt(text: str) -> Prompt:
        encoded = tokenizer(text, truncation=True, max_length=LENGTH, return_offsets_mapping=True)
        return Prompt(text, [Token(number, *span) for number, span in zip(encoded.input_ids, encoded.offset_mapping, strict=True)])

    return prompt


def origins(alignment: Alignment) -> list[int]:
    """For each position of the target the position of the source, or -1 where it keeps its own attention."""
    return [-1 if own else int(column.argmax()) for own, column in zip(alignment.own, alignment.matrix.T, strict=True)]


# made by Google's own aligner (arXiv 2208.01626); -1 is what its alpha switches off
@each(
    "source, target, expected",
    [
        ("a cat here", "a red cat here", [0, 1, -1, 2, 3, 4, 6, 7, 8, 9]),
        ("a cat here", "a dog here", [0, 1, -1, 3, 4, 5, 6, 7, 8, 9]),
        ("a red cat here", "a cat here", [0, 1, 3, 4, 5, 5, 6, 7, 8, 9]),
        ("a cat", "a cat and a dog", [0, 1, 2, -1, -1, -1, 3, 7, 8, 9]),
    ],
)
def test_refine_is_that_of_the_authors(clip: Any, source: str, target: str, expected: list[int]) -> None:
    """Words that both prompts have, the end token with the end token, positions behind it with themselves."""
    alignment = aligned("refine", clip(source), clip(target), LENGTH)
    assert origins(alignment)[:10] == expected
    assert set(alignment.matrix.unique().tolist()) == {0.0, 1.0}


@each("rule", ["refine", "replace"])
def test_equal_prompts_align_every_token_with_itself(clip: Any, rule: Rule) -> None:
    """So that the target takes all attention of the source."""
    prompt = clip("a photo of a Siberian husky, jumping")
    alignment = aligned(rule, prompt, prompt, LENGTH)
    assert torch.equal(alignment.matrix, torch.eye(LENGTH))
    assert not alignment.own.any()


def test_replace_goes_word_by_word(clip: Any) -> None:
    """As many tokens one to one; another number evenly over all of them; what follows stays aligned, and so does the end."""
    source, target = clip("a cat on grass"), clip("a siberianhusky on mud")
    (_, new), (_, old) = target.words()[1], source.words()[1]
    assert (len(old), len(new)) == (1, 3)
    alignment = aligned("replace", source, target, LENGTH)
    assert torch.equal(alignment.matrix[old[0], new], torch.full((3,), 1 / 3))
    places = origins(alignment)
    assert places[:9] == [0, 1, 2, 2, 2, 3, 4, 5, 6]
    assert places[-3:] == [LENGTH - 5, LENGTH - 4, LENGTH - 3]
    assert not alignment.own.any()
    back = aligned("replace", target, source, LENGTH)
    assert torch.equal(back.matrix[new, old[0]], torch.ones(3))
    assert origins(back)[3:5] == [5, 6]
    assert origins(back)[-2:] == [LENGTH - 1, LENGTH - 1]


def test_replace_needs_as_many_words(clip: Any) -> None:
    """The message has both numbers."""
    with pytest.raises(ImagicError, match=r"3 words in 'a cat here' and 4 in 'a red cat here' with edit replace"):
        aligned("replace", clip("a cat here"), clip("a red cat here"), LENGTH)


@each(
    "text, word, pieces",
    [
        ("a cat, and another cat", "cat", ["cat", "cat"]),
        ("A Jumping corgi-dog.", "jumping", ["Jumping"]),
        ("A Jumping corgi-dog.", "corgi-dog", ["corgi", "-", "dog"]),
        ("A Jumping corgi-dog.", "dog", ["dog"]),
        ("a red  car", "Red car", ["red", "car"]),
        ("an élève, İstanbul", "élève", ["é", "l", "è", "ve"]),
        ("黒猫 on snow", "黒猫", ["黒", "黒", "黒", "猫", "猫", "猫"]),
        ("what's this?", "this?", ["this", "?"]),
    ],
)
def test_tokens_of_words(clip: Any, text: str, word: str, pieces: list[str]) -> None:
    """Whole words in all their places, in any case and script, with or without punctuation."""
    prompt = clip(text)
    assert [text[prompt.tokens[k].start : prompt.tokens[k].end] for k in prompt.positions(word)] == pieces


@each("word", ["ca", "dog", "", "cat cat", "a.cat"])
def test_a_word_that_is_not_in_the_prompt_is_an_error(clip: Any, word: str) -> None:
    """Nor are parts of words words."""
    with pytest.raises(ImagicError, match=r"the word .*, which is not in the prompt 'a cat and another cat'"):
        clip("a cat and another cat").positions(word)


def test_a_word_that_is_cut_off_is_an_error(clip: Any) -> None:
    """It is in the prompt, and not encoded."""
    with pytest.raises(ImagicError, match="the word 'dog', which is behind the last of 75 tokens"):
        clip("cat " * 80 + "dog").positions("dog")


def test_replace_with_words_that_are_cut_off(clip: Any) -> None:
    """What is encoded is aligned, and nothing fails."""
    alignment = aligned("replace", clip("cat " * 80), clip("dog " * 80), LENGTH)
    assert torch.equal(alignment.matrix, torch.eye(LENGTH))


def test_tokens_of_a_base_are_those_that_it_encodes(folder: Path) -> None:
    """From the start to the end token, also where the prompt is too long."""
    base: Base = opened(folder)
    tokenizer: Any = base.pipeline("text2image").tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    for text in ("a cat", "a cat and a dog and a bird", ""):
        tokens = base.tokenize(text)
        assert [token.id for token in tokens] == tokenizer(text, truncation=True, max_length=16).input_ids
        assert "".join(text[token.start : token.end] for token in tokens) == text.replace(" ", "")[:14]
        assert {(token.start, token.end) for token in (tokens[0], tokens[-1])} == {(0, 0)}
