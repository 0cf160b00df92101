"""The key of a study, which says what is behind the ids of its page, and the file of answers of a rater."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...core.errors import ImagicError, unreadable
from ...core.validation import first_problem

KEY, PAGE = "key.json", "study.html"
_ANSWERS = "a file of answers that the page of the study exports"
_MAX_BYTES = 2**26  # of a key or a file of answers

Model = TypeVar("Model", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class KeyQuestion(_Strict):
    """A question of a study.

    Args:
        item: name of the photo in the results.
        prompt: the target prompt.
        photo: id of the photo on the page.
        edits: ids of the edits, by method; two.
    """

    item: str
    prompt: str
    photo: str
    edits: dict[str, str]


class Shown(_Strict):
    """A question as a rater sees it: ids of the question and of the edits on both sides."""

    question: str
    left: str
    right: str


class Key(_Strict):
    """The content of ``key.json``.

    Args:
        study: id of the study: a hash of its images, prompts, methods and sheets.
        methods: the method that the study is about, and those that it is compared with.
        seed: seed of order and sides.
        questions: the questions, by id.
        sheets: what each rater sees, from rater 1 on.
    """

    version: Literal[1] = 1
    study: str
    methods: list[str]
    seed: int
    questions: dict[str, KeyQuestion]
    sheets: list[list[Shown]]


class Choice(Shown):
    """An answer: the question as it was shown, the id of the chosen edit, and the seconds it took."""

    chosen: str
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False, strict=False)]


class Answers(_Strict):
    """The file that the page exports.

    Args:
        study: id of the study.
        rater: number of the rater, from 1.
        answers: in the order of the rater's sheet.
        checksum: of all choices, see :func:`checksum`.
    """

    version: Literal[1]
    study: str
    rater: int
    answers: list[Choice]
    checksum: str


def checksum(study: str, rater: int, answers: Sequence[Choice]) -> str:
    """Returns the checksum of answers: FNV-1a of 32 bits, which the page computes too.

    It finds a file that was changed by accident. It is no signature.
    """
    lines = [study, str(rater), *(f"{one.question}:{one.left}:{one.right}:{one.chosen}" for one in answers)]
    value = 0x811C9DC5
    for byte in "|".join(lines).encode():
        value = (value ^ byte) * 0x01000193 % 2**32
    return f"{value:08x}"


def read_key(folder: Path) -> Key:
    """Reads the key of a study from the folder that ``study make`` wrote.

    Raises:
        ImagicError: it cannot be read.
    """
    return _read(folder / KEY, Key, "the folder that study make wrote, with its key.json")


def read_answers(paths: Sequence[Path], key: Key) -> dict[int, Answers]:
    """Reads the answers of a study by the number of the rater. A file that is given twice counts once.

    Raises:
        ImagicError: a file cannot be read or was changed, belongs to another study, or two files of one rater differ.
    """
    found: dict[int, tuple[Path, Answers]] = {}
    for path in paths:
        answers = _read(path, Answers, _ANSWERS)
        _check(path, answers, key)
        earlier, same = found.setdefault(answers.rater, (path, answers))
        if same != answers:
            got = f"{earlier} and {path} are different answers of rater {answers.rater}"
            raise ImagicError(got, "one file of answers for each number of a rater", "leave one out, and give each person a number")
    return {rater: answers for rater, (_, answers) in sorted(found.items())}


def study_of(path: Path) -> str:
    """Returns the id of the study that a file of answers belongs to.

    Raises:
        ImagicError: it cannot be read, or the id is none.
    """
    study = _read(path, Answers, _ANSWERS).study
    if not study.isalnum():
        raise ImagicError(f"{path}: study = {study!r}", _ANSWERS, "check the path; the file may be damaged")
    return study


def _check(path: Path, answers: Answers, key: Key) -> None:
    """Raises ImagicError unless the answers are those of a rater to all questions of the rater's sheet."""
    if answers.study != key.study:
        got = f"{path} belongs to study {answers.study}, and the key to study {key.study}"
        raise ImagicError(got, "answers of the same study", "give the folder of their study by --study, or leave the file out")
    remedy = "ask the rater for the exported file again, or leave it out"
    if not 1 <= answers.rater <= len(key.sheets):
        raise ImagicError(f"{path} is of rater {answers.rater}", f"a rater from 1 to {len(key.sheets)}", remedy)
    sheet = key.sheets[answers.rater - 1]
    if [(one.question, one.left, one.right) for one in answers.answers] != [(one.question, one.left, one.right) for one in sheet]:
        got = f"{path} does not answer the questions of rater {answers.rater} in their order"
        raise ImagicError(got, f"all {len(sheet)} questions, unchanged", remedy)
    wrong = [one.question for one in answers.answers if one.chosen not in (one.left, one.right)]
    if wrong or checksum(answers.study, answers.rater, answers.answers) != answers.checksum:
        got = f"{path} was changed" + (f": question {wrong[0]} has no such edit" if wrong else "")
        raise ImagicError(got, "answers as the page exported them", remedy)


def _read(path: Path, model: type[Model], expected: str) -> Model:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ImagicError(f"{path} has more than {_MAX_BYTES:,} bytes", expected, "check the path")
        return model.model_validate_json(path.read_bytes())
    except OSError as error:
        raise unreadable(path, error) from error
    except ValidationError as error:
        raise ImagicError(f"{path}: {first_problem(error).got}", expected, "check the path; the file may be damaged") from error


def method_of(question: KeyQuestion) -> Mapping[str, str]:
    """Returns the methods of a question by the ids of their edits."""
    return {picture: method for method, picture in question.edits.items()}
