"""Scores pictures, and keeps the scores in a file, so that an interrupted run can resume."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from ...adapters.durable import EventLog
from ...adapters.writing import check_outputs, writable
from ...bases.loading.progress import hide_progress_bars
from ...core.environment import prepare_environment
from ..evaluator.evaluator import Evaluator, Settings
from ..runner import digest, explained, parallel
from .cases import Picture, pixel_hash
from .run import file_hash

LOG, THUMBNAILS = "scores.jsonl", "thumbnails"
_SIDE = 256  # longest side of a thumbnail, in pixels


@dataclass(frozen=True)
class Scored:
    """What came of a picture.

    Args:
        place: number of the picture among those that were given.
        picture: the picture.
        photo: hash of the pixels of its photo; empty if it could not be read.
        values: the measures by name; empty if it failed.
        error: why there are none.
        thumbnail: name of the thumbnail of the picture, without its ending.
    """

    place: int
    picture: Picture
    photo: str = ""
    values: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    thumbnail: str = ""


def scored(pictures: Sequence[Picture], settings: Settings, weights: Mapping[str, str], out: Path, workers: int) -> Iterator[Scored]:
    """Scores pictures. Scores that an earlier run kept are read instead of computed again; a picture that failed is tried again.

    Args:
        pictures: the pictures.
        settings: the metrics, and how pictures are treated.
        weights: what tells the weights of each model from others.
        out: folder of the scores and the thumbnails.
        workers: number of processes.

    Yields:
        Each picture as soon as it is scored.

    Raises:
        ImagicError: the folder cannot be written to.
    """
    check_outputs(out, (LOG,))
    check_outputs(out / THUMBNAILS, ())
    log, missing = EventLog(out / LOG), list[tuple[int, Picture, Settings, str, Path]]()
    kept = _kept(log)
    for place, picture in enumerate(pictures):
        key = _key(picture, settings, weights)
        stored = kept.get(key)
        if stored and all(_thumbnail(out, name).is_file() for name in (key, stored["photo"])):
            yield Scored(place, picture, stored["photo"], stored["values"], thumbnail=key)
        else:
            missing.append((place, picture, settings, key, out))
    for one in parallel(_score, missing, workers):
        if one.error is None:
            with writable(out):
                log.append({"key": one.thumbnail, "photo": one.photo, "values": dict(one.values)})
        yield one


def _kept(log: EventLog) -> dict[str, dict[str, Any]]:
    """The kept scores by their keys."""
    offset, found = 0, dict[str, dict[str, Any]]()
    while True:
        events, after = log.read(offset)
        whole = (event for event in events if isinstance(event.get("values"), dict) and isinstance(event.get("photo"), str))
        found |= {event["key"]: event for event in whole if isinstance(event.get("key"), str)}
        if after == offset:
            return found
        offset = after


def _key(picture: Picture, settings: Settings, weights: Mapping[str, str]) -> str:
    """A hash of everything that the scores of a picture depend on."""
    case = picture.case
    mask = file_hash(case.mask) if isinstance(case.mask, Path) else case.mask
    files = [file_hash(case.photo), file_hash(picture.path) if picture.path else "", mask, picture.strip]
    how = asdict(settings) | {"sources": settings.sources.metrics, "device": ""}
    return digest([files, case.prompt, case.source_prompt, how, sorted(weights.items())])[:32]


def _score(place: int, picture: Picture, settings: Settings, key: str, out: Path) -> Scored:
    """Scores a picture in a worker, and writes its thumbnails."""
    evaluator = loaded(settings)
    photo = ""
    try:
        source = picture.case.read_photo()
        photo = pixel_hash(source)[:32]
        write_thumbnail(source, _thumbnail(out, photo))
        if picture.problem is not None:
            return Scored(place, picture, photo, error=picture.problem, thumbnail=key)
        subject = picture.read(source)
        write_thumbnail(subject.edited, _thumbnail(out, key))
        return Scored(place, picture, photo, evaluator.scores(subject), thumbnail=key)
    except Exception as error:  # a picture that fails must not end the run: it is counted and reported
        return Scored(place, picture, photo, error=explained(error), thumbnail=key)


@cache
def loaded(settings: Settings) -> Evaluator:
    """Returns an evaluator, loaded once a process."""
    prepare_environment()
    hide_progress_bars()
    return Evaluator.load(settings)


def _thumbnail(out: Path, name: str) -> Path:
    return out / THUMBNAILS / f"{name}.jpg"


def write_thumbnail(image: Image.Image, path: Path) -> None:
    """Writes an image at the size of a thumbnail."""
    small = image.copy()
    small.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    small.save(path, "JPEG", quality=85)


def rows_of(pictures: Sequence[Picture]) -> list[str]:
    """Returns the rows of pictures, in the order of their first pictures."""
    return list(dict.fromkeys(picture.row for picture in pictures))
