"""Adapters that version 0.1 stored open today: the record keeps its fields, and edits give the same images.

``fixtures/MODE-0.1`` are adapters of the tiny base of :func:`tiny.save_tiny`, fitted with :func:`common.tiny_config` and seed 3.
``fixtures/MODE-0.1-etaETA.png`` are edits of seed 0 by the same version.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from common import TUNED, array, tiny_config
from PIL import Image
from tiny import save_tiny

from imagic_lora.adapters.contents import read_canvas, read_embeddings
from imagic_lora.adapters.record import RECORD
from imagic_lora.adapters.store import Store
from imagic_lora.bases.base import Base
from imagic_lora.core.config import Mode, RunConfig
from imagic_lora.core.settings.merging import merged
from imagic_lora.sampling.editor import Editor
from imagic_lora.training.fit import open_base

FIXTURES = Path(__file__).parent / "fixtures"
ETAS = [0.0, 0.7]
TOLERANCE = 1  # of 255 levels


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """The base of the stored adapters, created again under the name in their records."""
    root = tmp_path_factory.mktemp("formats")
    folder = save_tiny(root / "base", prediction_type="epsilon")
    (root / "bases.yaml").write_text(f"tiny:\n  source: {json.dumps(str(folder))}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IMAGIC_LORA_BASES", str(root / "bases.yaml"))
        return open_base(Store(FIXTURES).read("lora-0.1").record.config)


def test_the_store_lists_adapters_of_version_0_1() -> None:
    """Other files in the folder are not adapters."""
    assert Store(FIXTURES).names() == ["full-0.1", "lora-0.1"]


@pytest.mark.parametrize("mode", TUNED)
def test_a_record_of_version_0_1_keeps_its_fields(mode: Mode) -> None:
    """Every hash matches; the parsed record, written as JSON again, has the values of the file, and the defaults of later settings."""
    adapter = Store(FIXTURES).read(f"{mode}-0.1", verify=True)
    stored = json.loads((adapter.folder / RECORD).read_text())
    del stored["sha256"]
    stored["config"] = merged(RunConfig().model_dump(mode="json"), stored["config"])
    assert adapter.record.model_dump(mode="json") == stored
    record = adapter.record
    assert (record.version, record.name, record.prompt, record.base.name) == (1, f"{mode}-0.1", "a cat", "tiny")
    assert [(part.component, part.mode) for part in record.parts] == [("unet", mode)]
    assert record.config == tiny_config(Path("tiny"), mode, seed=3, monitoring={"convergence_every": 50})
    assert (record.source.size, record.source.box) == ((50, 37), (0, 0, 32, 24))
    assert {*record.losses} == {*record.seconds} == {"embed", "tune"}


@pytest.mark.parametrize("mode", TUNED)
def test_the_files_of_version_0_1_are_read(mode: Mode) -> None:
    """Three embeddings of the tiny base, and the photo on its canvas."""
    adapter = Store(FIXTURES).read(f"{mode}-0.1")
    embeddings = read_embeddings(adapter)
    assert {name: tuple(value.tokens.shape) for name, value in embeddings.items()} == dict.fromkeys(
        ("target", "optimised", "null"), (1, 16, 16)
    )
    canvas = read_canvas(adapter)
    assert tuple(canvas.pixels.shape) == (1, 3, 24, 32)


@pytest.mark.parametrize("mode", TUNED)
def test_an_adapter_of_version_0_1_gives_the_same_images(base: Base, mode: Mode) -> None:
    """At eta 0 and 0.7, to rounding; the images of the two etas differ by more."""
    adapter = Store(FIXTURES).read(f"{mode}-0.1")
    assert adapter.record.base.fingerprint == base.fingerprint
    editor = Editor(base)
    images = [array(edit.image) for edit in editor.edit(adapter, ETAS, [0], adapter.record.config.edit)]
    editor.close()
    for eta, image in zip(ETAS, images, strict=True):
        with Image.open(FIXTURES / f"{mode}-0.1-eta{eta:g}.png") as stored:
            expected = array(stored)
        assert image.shape == expected.shape
        assert np.abs(image - expected).max() <= TOLERANCE
    assert np.abs(images[0] - images[1]).max() > TOLERANCE
