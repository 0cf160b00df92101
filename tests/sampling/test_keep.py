"""Edits pasted into their photo: what must not change stays byte for byte."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from common import PROMPT, each, opened, tiny_config
from photos.building import bytes_of, noise
from PIL import Image
from pydantic import ValidationError

from imagic_lora.adapters.adapter import Adapter
from imagic_lora.adapters.contents import read_canvas, read_original
from imagic_lora.adapters.record import Record
from imagic_lora.adapters.store import Store
from imagic_lora.bases.base import Base
from imagic_lora.core.config import EditConfig
from imagic_lora.core.errors import ImagicError, ImagicWarning
from imagic_lora.photos.reading import read_photo
from imagic_lora.photos.region import Region
from imagic_lora.sampling.editor import Edit, Editor
from imagic_lora.sampling.keep import read_keep
from imagic_lora.training.fit import fit, result

REGION = Region(2500, 1000, 600, 448)
CONFIG = EditConfig(steps=2, guidance_scale=3.0)


@pytest.fixture(scope="module")
def base(folder: Path) -> Base:
    return opened(folder)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A photo of 12 megapixels, taken with the camera turned: 4000 x 3000 when upright."""
    path = tmp_path_factory.mktemp("large") / "photo.tiff"
    Image.fromarray(noise(4000, 3000, 3)).save(path, tiffinfo={274: 6})
    return path


@pytest.fixture(scope="module")
def fit_to(folder: Path, base: Base, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Adapter]:
    """Fits the embedding to a photo in a few steps; tests must not change the adapter."""

    def made(photo: Path, **options) -> Adapter:
        store = Store(tmp_path_factory.mktemp("store"))
        adapter = result(fit(photo, PROMPT, tiny_config(folder, "embedding", embed={"steps": 1}), store, "one", base=base, **options))
        assert adapter is not None
        return adapter

    return made


@pytest.fixture(scope="module")
def of_region(fit_to: Callable[..., Adapter], large: Path) -> Adapter:
    return fit_to(large, region=REGION)


def test_a_region_of_12_megapixels_is_edited_and_every_other_byte_stays(of_region: Adapter, base: Base, large: Path) -> None:
    """With and without --keep auto, against the upright photo as it is read; the canvas is that of the region alone."""
    photo = np.asarray(read_photo(large).image)
    assert photo.shape == (3000, 4000, 3)
    canvas = read_canvas(of_region)
    assert canvas.size == REGION.size
    part = np.s_[REGION.y : REGION.y + REGION.height, REGION.x : REGION.x + REGION.width]
    (alone,) = Editor(base).edit(of_region, [0.9], [0], CONFIG)
    assert alone.image.size == REGION.size
    reference = np.asarray(alone.image).copy()
    reference[100:300, 50:350] ^= 0x80
    for keep in (None, "auto"):
        kept = read_keep(of_region, keep)
        assert kept is not None
        assert kept.metadata == {"region": [*REGION]} | ({"keep": "auto"} if keep else {})
        unchanged = [Edit(0.0, 0, Image.fromarray(reference))] if keep else []
        (edit,) = kept.pasted([*unchanged, alone], [0.9])
        assert edit.mask is not None
        image, mask = np.asarray(edit.image), np.asarray(edit.mask)
        expected = photo.copy()
        expected[part] = image[part]
        assert np.array_equal(image, expected)
        black, full = mask[part] == 0, mask[part] == 255
        assert np.array_equal(image[part][black], photo[part][black])
        least, most = (200 * 300, 260 * 360) if keep else (550 * 400, 600 * 448)
        assert least <= full.sum() <= most
        assert np.array_equal(image[part][full], np.asarray(alone.image)[full])


def test_the_adapter_keeps_the_file_of_the_photo(of_region: Adapter, large: Path) -> None:
    """Its bytes, in its format; the record has its hash, the region and the size of the whole photo."""
    source = of_region.record.source
    assert (source.file, source.size, source.region) == ("photo.tiff", (4000, 3000), REGION)
    assert (of_region.folder / "photo.tiff").read_bytes() == large.read_bytes()
    assert of_region.record.files["photo.tiff"] == source.sha256 == hashlib.sha256(large.read_bytes()).hexdigest()
    assert of_region.photo_size == large.stat().st_size


def test_without_the_file_of_the_photo_it_has_to_be_given(
    fit_to: Callable[..., Adapter], base: Base, photo_file: Path, tmp_path: Path
) -> None:
    """The file that it was, by its hash; the same pixels in another file are refused, and so is a photo that is not needed."""
    adapter = fit_to(photo_file, store_photo=False)
    assert (adapter.record.source.file, adapter.photo_size) == (None, 0)
    assert not list(adapter.folder.glob("photo*"))
    with pytest.raises(ImagicError, match=r"does not hold the photo.*--photo FILE"):
        read_keep(adapter, "auto")
    kept = read_keep(adapter, "auto", photo_file)
    assert kept is not None
    assert np.array_equal(np.asarray(kept.composite.photo), np.asarray(read_photo(photo_file).image))
    again = tmp_path / "again.bmp"
    read_photo(photo_file).image.save(again)
    with pytest.raises(ImagicError, match=r"again.bmp is not the photo that adapter one was made from"):
        read_keep(adapter, "auto", again)
    assert read_keep(adapter, None) is None
    with pytest.raises(ImagicError, match="without --keep"):
        read_keep(adapter, None, photo_file)


def test_a_photo_that_fits_the_canvas_is_there_in_every_adapter(fit_to: Callable[..., Adapter], tmp_path: Path) -> None:
    """Neither scaled nor padded: source.png has its pixels, as in adapters of older versions."""
    path = tmp_path / "small.png"
    path.write_bytes(bytes_of(Image.fromarray(noise(32, 32, 3)), "PNG"))
    assert np.array_equal(np.asarray(read_original(fit_to(path, store_photo=False))), noise(32, 32, 3))
    with pytest.raises(ImagicError, match="does not hold the photo"):
        read_original(fit_to(path, store_photo=False, region=Region(0, 0, 16, 16)))


def edits(*shown: tuple[float, int, np.ndarray]) -> list[Edit]:
    return [Edit(eta, seed, Image.fromarray(pixels)) for eta, seed, pixels in shown]


def test_each_edit_is_compared_with_the_image_at_eta_0_of_its_seed(fit_to: Callable[..., Adapter], photo_file: Path) -> None:
    """One mask for each; the images at eta 0 are generated once and kept only if they were asked for."""
    kept = read_keep(fit_to(photo_file), "auto")
    assert kept is not None
    assert (kept.etas([0.5, 0.7]), kept.etas([0.7, 0.0, 0.5])) == ([0.0, 0.5, 0.7], [0.0, 0.7, 0.5])
    photo = np.asarray(kept.composite.photo)
    dark, bright = np.full_like(photo, 40), np.full_like(photo, 140)
    left, right = dark.copy(), bright.copy()
    left[:, :20], right[:, 30:] = 255, 0
    shown = edits((0.0, 1, dark), (0.0, 2, bright), (0.5, 1, left), (0.5, 2, right))
    first, second = kept.pasted(shown, [0.5])
    assert [(first.eta, first.seed), (second.eta, second.seed)] == [(0.5, 1), (0.5, 2)]
    assert np.array_equal(np.asarray(first.image)[:, :19], left[:, :19])
    assert np.array_equal(np.asarray(first.image)[:, 26:], photo[:, 26:])
    assert np.array_equal(np.asarray(second.image)[:, 31:], right[:, 31:])
    assert np.array_equal(np.asarray(second.image)[:, :24], photo[:, :24])
    zero, *_ = kept.pasted(shown, [0.0, 0.5])
    assert zero.eta == 0
    assert np.array_equal(np.asarray(zero.image), photo)


def test_an_edit_that_changes_nothing_is_said(fit_to: Callable[..., Adapter], photo_file: Path) -> None:
    """Its image is the photo."""
    kept = read_keep(fit_to(photo_file), "auto")
    assert kept is not None
    gray = np.full((37, 50, 3), 90, np.uint8)
    with pytest.warns(ImagicWarning, match=r"eta 0.3 and seed 1 shows no change.*raise --eta"):
        (edit,) = kept.pasted(edits((0.0, 1, gray), (0.3, 1, gray)), [0.3])
    assert np.array_equal(np.asarray(edit.image), np.asarray(kept.composite.photo))


def test_a_mask_of_the_user_is_recorded_by_its_hash(fit_to: Callable[..., Adapter], photo_file: Path, tmp_path: Path) -> None:
    """Its images need no image at eta 0; a mask of another size is refused by name."""
    adapter, path = fit_to(photo_file), tmp_path / "mask.png"
    mask = Image.new("L", (50, 37))
    mask.paste(255, (10, 10, 30, 30))
    mask.save(path)
    kept = read_keep(adapter, path)
    assert kept is not None
    assert kept.etas([0.5]) == [0.5]
    assert kept.metadata == {"keep": {"mask": hashlib.sha256(path.read_bytes()).hexdigest()}}
    (edit,) = kept.pasted(edits((0.5, 0, np.full((37, 50, 3), 90, np.uint8))), [0.5])
    black = np.asarray(mask) == 0
    assert np.array_equal(np.asarray(edit.image)[black], np.asarray(kept.composite.photo)[black])
    assert (np.asarray(edit.image)[12:28, 12:28] == 90).all()
    mask.resize((32, 24)).save(path)
    with pytest.raises(ImagicError, match=r"mask.png has 32x24 pixels.*the size of the photo, 50x37 pixels"):
        read_keep(adapter, path)


def test_a_region_that_no_base_can_edit_is_refused_before_training(folder: Path, base: Base, photo_file: Path, tmp_path: Path) -> None:
    """Outside of the photo, or smaller than the smallest image of the base; nothing is stored."""
    for region, message in ((Region(40, 0, 20, 20), "of a photo of 50x37 pixels"), (Region(0, 0, 20, 7), "at least 8x8 pixels")):
        with pytest.raises(ImagicError, match=message):
            next(fit(photo_file, PROMPT, tiny_config(folder), Store(tmp_path / "store"), "one", base=base, region=region))
    assert Store(tmp_path / "store").names() == []


def test_a_fit_of_another_region_is_not_resumed(folder: Path, base: Base, photo_file: Path, tmp_path: Path) -> None:
    """Though its canvas has the same size."""
    store, config = Store(tmp_path), tiny_config(folder, "embedding")
    steps = fit(photo_file, PROMPT, config, store, "one", base=base, region=Region(0, 0, 24, 24))
    next(steps)
    steps.close()
    with pytest.raises(ImagicError, match=r"region was \[0, 0, 24, 24\], is \[8, 0, 24, 24\]"):
        next(fit(photo_file, PROMPT, config, store, "one", base=base, region=Region(8, 0, 24, 24), resume=True))
    assert result(fit(photo_file, PROMPT, config, store, "one", base=base, region=Region(0, 0, 24, 24), resume=True)) is not None


@each(
    "change, message",
    [
        ({"region": [3999, 0, 2, 2]}, "region 3999,0,2,2 of a photo of 4000x3000 pixels"),
        ({"file": "source.png"}, "is not the photo"),
        ({"file": "photo.png"}, "not listed"),
    ],
)
def test_a_record_that_lies_about_the_photo_is_refused(change: dict[str, object], message: str, of_region: Adapter) -> None:
    """By what it says."""
    fields = of_region.record.model_dump(mode="json")
    lying = Adapter(of_region.folder, Record.model_validate(fields | {"source": fields["source"] | change}))
    with pytest.raises(ImagicError, match=message):
        read_canvas(lying) if "region" in change else read_original(lying)


def test_a_record_without_region_and_file_is_that_of_older_versions(of_region: Adapter) -> None:
    """The keys are left out, so that older versions read the record of an adapter without them; unknown keys stay refused."""
    fields = of_region.record.model_dump(mode="json")
    del fields["source"]["region"], fields["source"]["file"]
    assert Record.model_validate(fields).model_dump(mode="json") == fields
    with pytest.raises(ValidationError):
        Record.model_validate(fields | {"source": fields["source"] | {"mask": "x"}})
