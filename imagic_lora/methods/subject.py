"""DreamBooth (arXiv 2208.12242) and textual inversion (arXiv 2208.01618) as methods of editing: they learn the subject of the photo."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import ClassVar

from ..adapters.store import Store
from ..bases.base import Base
from ..core.config import RunConfig
from ..photos.png import write_png
from ..sampling.editor import Editor
from ..training.fit import fit
from .generated import generation_passes
from .imagic import run_fit, unmonitored
from .method import Context, Cost, EditRequest, EditResult, Method, Need, Passes, metered

RARE_WORD, NEW_WORD = "sks", "<subject>"
_ARTICLE = re.compile(r"^(?:an?|the|my)\s+", re.IGNORECASE)


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
