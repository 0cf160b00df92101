"""Tokenizer and text encoder configuration of the embedded base, and the transfer of weights from another base."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTokenizer

from imagic_lora.bases.loading.known import CRITTERS
from imagic_lora.critters import sample_caption, scene_at


def tokenizer() -> CLIPTokenizer:
    """The byte-pair tokenizer in the package; if there is none, it is trained on captions first.

    Words that occur in no caption are split into letters, so every prompt can be encoded.
    """
    path = CRITTERS / "tokenizer"
    if not path.exists():
        rng = random.Random(0)
        bpe = Tokenizer(models.BPE(unk_token=None, end_of_word_suffix="</w>"))
        bpe.normalizer = normalizers.Lowercase()
        bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False)])
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=1000, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False)
        bpe.train_from_iterator((sample_caption(scene_at("train", k), rng) for k in range(5000)), trainer)
        model = json.loads(bpe.to_str())["model"]
        words = [*sorted(alphabet), *(f"{c}</w>" for c in sorted(alphabet)), *("".join(m) for m in model["merges"])]
        words += ["<|startoftext|>", "<|endoftext|>"]
        vocab = {word: k for k, word in enumerate(dict.fromkeys(words))}
        merges: Any = [tuple(m) for m in model["merges"]]
        CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=32).save_pretrained(path)
    return CLIPTokenizer.from_pretrained(path)


def text_config(words: CLIPTokenizer) -> CLIPTextConfig:
    """The configuration of the text encoder for a tokenizer."""
    special: dict[str, Any] = {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=512,
        projection_dim=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=32,
        **special,
    )


def adopt(model: Any, words: CLIPTokenizer, other: Any, folder: Path) -> None:
    """Copies the weights of a model of the same sizes; rows of the token embedding are matched by the token's text.

    Args:
        model: changed in place.
        words: tokenizer of ``model``.
        other: the model that is copied.
        folder: base that ``other`` belongs to, with its tokenizer.
    """
    own, mine, theirs = model.state_dict(), words.get_vocab(), CLIPTokenizer.from_pretrained(folder / "tokenizer").get_vocab()
    for name, value in other.state_dict().items():
        if name.endswith("token_embedding.weight"):
            for token in mine.keys() & theirs.keys():
                own[name][mine[token]] = value[theirs[token]]
        else:
            own[name].copy_(value)
