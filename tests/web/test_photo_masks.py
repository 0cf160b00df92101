"""Masks of photos and photos of a subject on disk: what is kept, under which name, and when it goes; class pictures as progress."""

from __future__ import annotations

import base64
import io
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO
from PIL import Image

from imagic_lora.core.config import RunConfig
from imagic_lora.core.errors import ImagicError
from imagic_lora.core.settings.unread import read_instead
from imagic_lora.photos.reading import read_mask, read_photo
from imagic_lora.training.inputs import read_photos
from imagic_lora.training.stage import StepReport
from imagic_lora.web.jobs import Queue
from imagic_lora.web.masks import PhotoMasks
from imagic_lora.web.running import Progress
from imagic_lora.web.uploads import Uploads

SIZE = (40, 20)
OLD = 8 * 24 * 3600


@pytest.fixture
def queue(tmp_path: Path) -> Queue:
    return Queue(tmp_path / "store")


@pytest.fixture
def uploads(queue: Queue) -> Uploads:
    return Uploads(queue)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def half() -> Image.Image:
    """The left half may change; a gray column blends."""
    mask = Image.new("L", SIZE)
    mask.paste(255, (0, 0, 20, 20))
    mask.paste(100, (30, 0, 31, 20))
    return mask


def url(image: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


def pixels(uploads: Uploads, painted: str, file: str) -> np.ndarray:
    """What the command reads of a mask."""
    stored = uploads.add_painted(painted, SIZE) if painted else file
    return np.asarray(read_mask(uploads.path(stored), SIZE).image)


def test_inverting_exchanges_what_may_change_and_what_stays(uploads: Uploads) -> None:
    """Painted masks, files with their gray, nothing, and everything; twice is the mask itself."""
    mask, black = np.asarray(half()), ("", "")
    painted = uploads.inverted(url(half().point([0] * 128 + [255] * 128)), "", SIZE)
    assert (pixels(uploads, *painted) == np.where(mask > 127, 0, 255)).all()
    file = uploads.inverted("", uploads.add_mask("mask.png", png(half()), SIZE), SIZE)
    assert (pixels(uploads, *file) == 255 - mask).all()
    assert (pixels(uploads, *uploads.inverted(*file, SIZE)) == mask).all()
    everything = uploads.inverted(*black, SIZE)
    assert (pixels(uploads, *everything) == 255).all()
    assert uploads.inverted(*everything, SIZE) == black
    assert uploads.inverted("", uploads.add_mask("all.png", png(Image.new("L", SIZE, 255)), SIZE), SIZE) == black
    with pytest.raises(ImagicError):
        uploads.inverted("data:text/html;base64,PGI+", "", SIZE)


def test_photos_of_a_subject_are_a_folder_for_the_command(uploads: Uploads) -> None:
    """In their order; one photo is that photo; names that were not given here are refused."""
    stored = [uploads.add(f"{k}.png", png(Image.new("RGB", (30 + k, 30), (k, 0, 0)))) for k in range(3)]
    assert uploads.together(stored[:1]) == stored[0]
    folder = uploads.folder.parent / uploads.together(list(reversed(stored)))
    found = read_photos(folder, RunConfig(method="dreambooth"))
    assert [photo.image.getpixel((0, 0)) for photo in found] == [(2, 0, 0), (1, 0, 0), (0, 0, 0)]
    with pytest.raises(ImagicError, match="no upload"):
        uploads.together([stored[0], "uploads/../../secret"])
    with pytest.raises(ImagicError, match="no upload"):
        uploads.path(f"uploads/{folder.name}")


def test_unused_uploads_go_after_a_week(queue: Queue, uploads: Uploads) -> None:
    """Folders too; those of jobs, and those that something else keeps, stay."""
    stored = [uploads.add(f"{k}.png", png(Image.new("RGB", (30, 30)))) for k in range(3)]
    used, unused = (uploads.folder.parent / uploads.together(stored) for _ in range(2))
    queue.submit("fit", {"name": "rex", "image": f"uploads/{used.name}"})
    for path in uploads.folder.iterdir():
        os.utime(path, (time.time() - OLD, time.time() - OLD))
    uploads.sweep(stored[:1])
    assert {path.name for path in uploads.folder.iterdir()} == {
        used.name,
        *(stored[0].removeprefix("uploads/") + end for end in ("", ".preview")),
    }
    assert not unused.exists()
    assert read_photo(used / "0002.png").image.size == (30, 30)


def test_a_photo_has_one_mask_as_long_as_it_has_an_adapter(queue: Queue, uploads: Uploads) -> None:
    """It is replaced and removed; one whose file is gone is none; after a week without an adapter it goes."""
    masks = PhotoMasks(queue, uploads)
    photo = uploads.sha256(uploads.add("rex.png", (REPO / "adapters/rex-jumps/photo.png").read_bytes()))
    first, second = (uploads.add_mask("mask.png", png(half()), SIZE) for _ in range(2))
    assert masks.of(photo) == ""
    masks.set(photo, first)
    masks.set(photo, second)
    masks.set("0" * 64, first)
    assert (masks.of(photo), PhotoMasks(queue, uploads).of("0" * 64)) == (second, first)
    for path in masks.folder.iterdir():
        os.utime(path, (time.time() - OLD, time.time() - OLD))
    shutil.copytree(REPO / "adapters/rex-jumps", queue.store / "another-name")
    assert masks.sweep() == [second]
    assert masks.of("0" * 64) == ""
    uploads.path(second).unlink()
    assert masks.of(photo) == ""
    masks.set(photo, "")
    assert not list(masks.folder.iterdir())
    for name, stored in (("../../x", first), ("0" * 63, first), (photo, "uploads/../job.json")):
        with pytest.raises(ImagicError):
            masks.set(name, stored)
    assert masks.of("../../x") == ""


def test_class_pictures_are_progress_before_the_stages(queue: Queue) -> None:
    """They have no loss and belong to no stage of the curve."""
    job = queue.submit("fit", {"name": "rex"})
    progress, run = Progress(queue.events(job.id), queue.folder(job.id)), RunConfig(method="dreambooth")
    progress.step(StepReport("class", 1, 50, None), run)
    progress.step(StepReport("class", 50, 50, None), run)
    events = queue.events(job.id).read()[0]
    assert [(event["kind"], event["label"], event["done"], event["total"]) for event in events] == [
        ("progress", "class pictures", 1, 50), ("progress", "class pictures", 50, 50)
    ]  # fmt: skip


def test_settings_are_those_that_a_method_reads() -> None:
    """The form shows what the command line accepts."""
    paths = ("dreambooth.class_prompt", "inversion.vectors", "embed.steps", "embed.space", "tune.rank", "eta", "base")
    read = {
        method: [path for path in paths if read_instead(method, path) is None] for method in ("imagic", "dreambooth", "textual-inversion")
    }
    assert read == {
        "imagic": ["embed.steps", "embed.space", "tune.rank", "eta", "base"],
        "dreambooth": ["dreambooth.class_prompt", "tune.rank", "base"],
        "textual-inversion": ["inversion.vectors", "embed.steps", "base"],
    }
