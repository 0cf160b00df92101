"""Textual inversion (arXiv 2208.01618): the stage that trains the vectors of a new word; everything else is frozen."""

from __future__ import annotations

from dataclasses import replace

from torch.nn import Parameter

from ..adapters.word import NewWord, place
from ..core.conditioning import Conditioning
from ..core.noise import key
from .run import Run
from .stage import Stage

TEMPLATES = tuple(
    text + " {}"
    for text in (
        "a photo of a", "a rendering of a", "a cropped photo of the", "the photo of a", "a photo of a clean", "a photo of a dirty",
        "a dark photo of the", "a photo of my", "a photo of the cool", "a close-up photo of a", "a bright photo of the",
        "a cropped photo of a", "a photo of the", "a good photo of the", "a photo of one", "a close-up photo of the", "a rendition of the",
        "a photo of the clean", "a rendition of a", "a photo of a nice", "a good photo of a", "a photo of the nice",
        "a photo of the small", "a photo of the weird", "a photo of the large", "a photo of a cool", "a photo of a small",
    )
)  # fmt: skip
"""The templates of the paper for objects (its appendix)."""


class WordStage(Stage):
    """Trains the vectors of a new word at prompts that contain it.

    Args:
        run: the run, with the word that it starts from.

    Raises:
        ImagicError: the word is cut off from one of the prompts.
    """

    def __init__(self, run: Run) -> None:
        assert run.word is not None
        self.word, self._extra = run.word, run.target.extra
        templates = TEMPLATES if run.config.inversion.templates == "object" else ()
        self._prompts, prompt = [template.format(self.word.text) for template in templates] or [run.prompt], run.prompt
        vectors = run.config.inversion.vectors
        self._placed = {
            text: place(run.base, text, self.word.text, self.word.initial, vectors) for text in dict.fromkeys([prompt, *self._prompts])
        }
        rows = {name: Parameter(value.clone()) for name, value in self.word.rows.items()}
        super().__init__(
            "embed", run.base, run.latents, lambda: self._encoded(prompt), rows, run.config.embed, run.config.seed, run.processes
        )

    def conditioning_at(self, k: int, samples: range) -> Conditioning:
        return self._encoded(self._prompts[key(self.seed, "template", k) % len(self._prompts)])

    def _encoded(self, prompt: str) -> Conditioning:
        return replace(self._placed[prompt].encode(self.base, self.trainables), extra=self._extra)

    def found(self) -> NewWord:
        """The word with its current vectors."""
        return replace(self.word, rows={name: value.detach().clone() for name, value in self.trainables.items()})
