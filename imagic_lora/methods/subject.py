"""DreamBooth (arXiv 2208.12242) and textual inversion (arXiv 2208.01618) as methods of editing: they learn the subject of the photo."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import ClassVar

from ..adapters.store import Store
from ..adapters.word import checked_word
from ..bases.architecture import Architecture
from ..bases.base import Base
from ..core.config import RunConfig
from ..core.errors import ImagicError
from ..photos.canvas import canvas_size
from ..photos.png import write_png
from ..sampling.editor import Editor
from ..training.fit import fit
from ..training.prior import missing_pictures
from .generated import generation_passes
from .imagic import run_fit, unmonitored
from .method import Context, Cost, EditRequest, EditResult, Method, Need, Passes, metered

RARE_WORD, NEW_WORD = "sks", "<subject>"
_ARTICLE = re.compile(r"^(?:an?|the|my)\s+", re.IGNORECASE)


def check_subject(subject: str) -> None:
    """Raises ImagicError for a subject that is no noun: empty, of several lines, in angle brackets, or of more than 100 characters."""
    if not subject.strip() or not subject.isprintable() or "<" in subject or ">" in subject or len(subject) > 100:
        raise ImagicError(f"--subject {subject[:200]!r}", "a noun that names the subject of the photo", "use for example --subject dog")


def with_word(prompt: str, subject: str, word: str) -> str:
    """Puts a word in the place of a noun; where the noun does not occur, the word follows the first article, or begins the prompt.

    Args:
        prompt: such as "a dog jumping".
        subject: the noun, such as "dog".
        word: such as "sks dog".
    """
    noun = re.compile(rf"(?<!\w){re.escape(subject)}(?!\w)", re.IGNORECASE)
    if noun.search(prompt):
        return noun.sub(lambda _: word, prompt, count=1)
    article = _ARTICLE.match(prompt)
    first = word.split()[0]
    return f"{article[0]}{first} {prompt[article.end() :]}" if article else f"{first} {prompt}"


class SubjectMethod(Method):
    """Fits the photo as a subject that a word names, and samples the target prompt with that word, from noise.

    The photo gives nothing but the subject: pose and place follow the prompt and the seed. The cost leaves out the class pictures of
    DreamBooth, which are made once for each noun.

    Args:
        config: settings of the run, of method dreambooth or textual-inversion. The request replaces seed, class prompt and initial word.
    """

    supports = frozenset({"unet"})
    requires: ClassVar[frozenset[Need]] = frozenset({"subject"})

    def __init__(self, config: RunConfig) -> None:
        self.name = config.method
        self.rows = (self.name,)
        self.config = config
        self.settings = {"run": config.model_dump(mode="json")}

    @classmethod
    def check_base(cls, name: str, architecture: Architecture, base: str) -> None:
        """As there; or a fit cannot train the base."""
        super().check_base(name, architecture, base)
        architecture.check_trainable(base)

    def prompts(self, request: EditRequest) -> tuple[str, str, RunConfig]:
        """The prompt of the fit, that of the edit, and the settings for the subject of a request."""
        subject, config = str(request.subject), unmonitored(self.config).model_copy(update={"seed": request.seed})
        if config.method == "textual-inversion":
            inversion = config.inversion.model_copy(update={"initial_word": subject})
            edited = with_word(request.target_prompt, subject, NEW_WORD)
            return f"a {NEW_WORD}", edited, config.model_copy(update={"inversion": inversion})
        dreambooth = config.dreambooth.model_copy(update={"class_prompt": f"a {subject}"})
        word = f"{RARE_WORD} {subject}"
        return f"a {word}", with_word(request.target_prompt, subject, word), config.model_copy(update={"dreambooth": dreambooth})

    def check(self, base: Base, request: EditRequest) -> None:
        """As there; the subject is no noun, or for textual inversion not one word of the vocabulary of the base."""
        super().check(base, request)
        check_subject(str(request.subject))
        if self.config.method == "textual-inversion":
            prompt, _, config = self.prompts(request)
            try:
                checked_word(base, prompt, config.inversion)
            except ImagicError as error:
                got = f"method {self.name} with --subject {request.subject}: {error.got}"
                raise ImagicError(got, error.expected, "use a simpler noun, or another method") from error

    def once(self, base: Base, request: EditRequest) -> int:
        """The passes of the class pictures that are not in the cache yet."""
        _, _, config = self.prompts(request)
        if not config.prior:
            return 0
        width, height = canvas_size(*request.photo.size, config.resolution or base.resolution, base.size_multiple)
        sampling = config.edit.model_copy(update={"start": "noise"})
        return missing_pictures(base, config, width, height) * generation_passes(base, sampling).forward

    def edit(self, context: Context, request: EditRequest) -> Iterator[EditResult]:
        self.check(context.base, request)
        base, (prompt, edited, config) = context.base, self.prompts(request)
        with tempfile.TemporaryDirectory() as folder, closing(Editor(base)) as editor:
            photo = Path(folder) / "photo.png"
            write_png(request.photo, photo, {})
            with metered(base) as meter:
                adapter, cost = run_fit(fit(photo, prompt, config, Store(Path(folder)), "case", base=base), meter)
            trained = cost + Cost(adapter=adapter.size)
            with metered(base) as meter:
                (result,) = editor.edit(adapter, [adapter.record.eta], [request.seed], config.edit, edited)
                yield EditResult(self.name, result.image, trained + meter.cost())

    def passes(self, base: Base) -> dict[str, Passes]:
        trained = sum(stage.steps * stage.batch_size for stage in self.config.stages.values()) * (1 + self.config.prior)
        return {self.name: Passes(trained + generation_passes(base, self.config.edit).forward, trained)}
