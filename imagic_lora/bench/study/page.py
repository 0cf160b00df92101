"""The page that raters open, and its key."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ...photos.page import page_template
from ...photos.png import png
from ...photos.reading import read_photo
from .key import Key, KeyQuestion, Shown
from .planning import Question, Trial

_SIDE = 768  # longest side of an image on the page, in pixels
_SMALL = 256  # images up to this size are stored without loss
_QUALITY = 92


@dataclass(frozen=True)
class Study:
    """A study, ready to be written.

    Args:
        key: what is behind the ids.
        page: the HTML page.
    """

    key: Key
    page: str


def make_study(
    questions: Sequence[Question], sheets: Sequence[Sequence[Trial]], methods: Sequence[str], seed: int, images: Mapping[Path, str]
) -> Study:
    """Makes the page and the key of a study.

    The page names no method. Its ids are numbers in random order, and its images are encoded again, without metadata. It loads nothing:
    images are data URLs, and its content security policy forbids all connections.

    Args:
        questions: from :func:`~imagic_lora.bench.study.planning.questions_of`.
        sheets: what each rater sees.
        methods: the methods of the study.
        seed: of the order of the ids.
        images: the images by their files, from :func:`data_url`.
    """
    files = list(dict.fromkeys(path for one in questions for path in (one.item.photo, *(one.item.edits[name] for name in one.methods))))
    pictures = dict(zip(files, _ids("p", len(files), seed), strict=True))
    encoded = {pictures[path]: images[path] for path in files}
    names = _ids("q", len(questions), seed)
    found = {name: _key_question(question, pictures) for name, question in zip(names, questions, strict=True)}
    shown = [[_shown(trial, questions, names, pictures) for trial in sheet] for sheet in sheets]
    key = Key(study="", methods=list(methods), seed=seed, questions=dict(sorted(found.items())), sheets=shown)
    encoded = dict(sorted(encoded.items()))
    digest = hashlib.sha256(key.model_dump_json().encode() + json.dumps(encoded).encode()).hexdigest()[:12]
    key = key.model_copy(update={"study": digest})
    return Study(key, _page(key, encoded))


def _ids(prefix: str, count: int, seed: int) -> list[str]:
    """Ids of equal length in random order."""
    width = len(str(count))
    return [f"{prefix}{number + 1:0{width}}" for number in random.Random(f"imagic-lora/ids/{prefix}/{seed}").sample(range(count), count)]


def _key_question(question: Question, pictures: Mapping[Path, str]) -> KeyQuestion:
    item = question.item
    edits = {method: pictures[item.edits[method]] for method in question.methods}
    return KeyQuestion(item=item.name, prompt=item.prompt, photo=pictures[item.photo], edits=edits)


def _shown(trial: Trial, questions: Sequence[Question], names: Sequence[str], pictures: Mapping[Path, str]) -> Shown:
    question = questions[trial.question]
    left, right = (pictures[question.item.edits[method]] for method in (reversed(question.methods) if trial.swapped else question.methods))
    return Shown(question=names[trial.question], left=left, right=right)


def _page(key: Key, pictures: Mapping[str, str]) -> str:
    """The HTML page. All text is escaped, also within the JSON of its script."""
    data = {
        "study": key.study,
        "questions": {name: {"prompt": one.prompt, "photo": one.photo} for name, one in key.questions.items()},
        "sheets": [[(one.question, one.left, one.right) for one in sheet] for sheet in key.sheets],
        "pictures": pictures,
    }
    return page_template(Path(__file__).parent).render(data=data, raters=len(key.sheets), shown=len(key.sheets[0]))


def data_url(path: Path) -> str:
    """Returns an image as a data URL, without metadata: small ones as PNG, larger ones scaled down to the page and as JPEG.

    Raises:
        ImagicError: the image cannot be read.
    """
    small = read_photo(path).image.copy()
    small.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    if max(small.size) <= _SMALL:
        kind, content = "png", png(small, None)
    else:
        file = io.BytesIO()
        small.save(file, "JPEG", quality=_QUALITY, subsampling=0)
        kind, content = "jpeg", file.getvalue()
    return f"data:image/{kind};base64," + base64.b64encode(content).decode("ascii")
