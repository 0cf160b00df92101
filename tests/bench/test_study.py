"""scripts/study.py: a batch of fits is what the product does to one photo after the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import study_eta
from study_batch import Variant, edited, encoded, fitted
from study_store import MEMORY, Study

from imagic_lora.bases.base import Base
from imagic_lora.bases.loading.registry import load_base
from imagic_lora.bench.cases import case_at
from imagic_lora.bench.catalogue import EmbeddedName
from imagic_lora.core.config import EditConfig
from imagic_lora.core.errors import ImagicError
from imagic_lora.core.runtime import resolve_runtime
from imagic_lora.critters import render
from imagic_lora.methods.imagic import Imagic
from imagic_lora.methods.method import Context, EditRequest
from imagic_lora.photos.canvas import to_image

ALONE = "tune.mode=embedding embed.relative=true embed.space=output"
SHORT = "embed.steps=2 tune.steps=2 edit.steps=3 edit.ddim_eta=1"


@pytest.fixture
def loaded(tiny_dit: Path) -> Callable[[str], Base]:
    """Loads a base by its name."""
    return lambda name: load_base(name, resolve_runtime(MEMORY))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param("critters", "edit.start=inverted edit.source_eta=0.3 edit.guidance_scale=2", marks=pytest.mark.slow),
        pytest.param("critters", "edit.start=noise", marks=pytest.mark.slow),
        pytest.param("critters", "edit.start=image tune.mode=embedding", marks=pytest.mark.slow),
        pytest.param("critters", "edit.start=inverted embed.space=input edit.ddim_eta=0", marks=pytest.mark.slow),
        ("critters-dit", "edit.start=inverted embed.space=output embed.tokens=words embed.relative=true embed.learning_rate=0.1"),
        pytest.param("critters-dit", "edit.start=flow edit.source_eta=0.2 embed.space=input edit.ddim_eta=0", marks=pytest.mark.slow),
        pytest.param("critters-dit", f"edit.start=inverted edit.ddim_eta=0 {ALONE}", marks=pytest.mark.slow),
    ],
)
def test_a_batch_of_fits_equals_the_product(loaded: Callable[[str], Base], name: EmbeddedName, changes: str) -> None:
    base, changes = loaded(name), changes if "embedding" in changes else f"{changes} tune.rank=2"
    short = SHORT.replace("tune.steps=2 ", "") if "embedding" in changes else SHORT
    variant, cases = Variant.parse(f"{short} {changes}", name), [case_at(5, index) for index in range(2)]
    variant.check_batched()
    latents = encoded(base, cases)
    images = edited(base, latents, fitted(base, latents, cases, variant), cases, variant)
    for case, image in zip(cases, images, strict=True):
        request = EditRequest(render(case.source), case.prompt, seed=case.index)
        (single,) = Imagic("case", variant.config).edit(Context(base), request)
        levels = np.abs(np.asarray(to_image(image), dtype=int) - np.asarray(single.image, dtype=int))
        assert levels.mean() < 0.1, levels.mean()


@pytest.mark.parametrize("change", ["embed.noise=0.1", "monitoring.early_stop=tune", "tune.mode=full", "resolution=32"])
def test_what_a_batch_does_not_support_is_named(change: str) -> None:
    with pytest.raises(ImagicError, match=change.partition("=")[0]):
        Variant.parse(change).check_batched()


@pytest.mark.usefixtures("tiny_dit")
def test_the_curve_of_eta_of_a_flow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One image and one score for each eta; at eta 1 the target prompt is what the image was made of."""
    monkeypatch.setattr(study_eta, "ETAS", [0.0, 1.0])
    variant = Variant.parse(f"{SHORT} edit.start=noise", "critters-dit")
    (curve,) = study_eta.measured(Study("critters-dit", tmp_path), 5, [case_at(5, 0)], variant)
    assert [point["eta"] for point in curve] == [0, 1]
    assert curve[0]["fidelity"] == 1 != curve[1]["fidelity"]
    assert set(curve[0]["alignments"]) == set(study_eta.KINDS)


def test_passes_are_those_of_the_start() -> None:
    """Twice for each eta with guidance, four times by the difference of velocities, and only the steps that are taken."""
    probes = 4 * study_eta.PROBES

    def passes(**config: object) -> int:
        return study_eta.passes([0.5, 1.0], EditConfig(steps=10, guidance_scale=2.0, **config)) - probes  # pyright: ignore

    assert passes(start="noise") == 2 * 2 * 10
    assert passes(start="inverted", source_eta=0.1) == 2 * 2 * 10 + 10
    assert passes(start="image", strength=0.5) == 2 * 2 * 5
    assert passes(start="flow", strength=0.5) == 2 * 4 * 5
