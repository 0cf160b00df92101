"""scripts/study.py: a batch of fits is what the product does to one photo after the other."""

from __future__ import annotations

import numpy as np
import pytest
from study_batch import Variant, edited, encoded, fitted
from study_store import MEMORY

from imagic_lora.bases.base import Base
from imagic_lora.bases.loading.registry import load_base
from imagic_lora.bench.cases import case_at
from imagic_lora.core.errors import ImagicError
from imagic_lora.core.runtime import resolve_runtime
from imagic_lora.critters import render
from imagic_lora.methods.imagic import Imagic
from imagic_lora.methods.method import Context, EditRequest
from imagic_lora.photos.canvas import to_image

SHORT = "embed.steps=2 tune.steps=2 edit.steps=3 edit.ddim_eta=1"


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base("critters", resolve_runtime(MEMORY))


@pytest.mark.parametrize(
    "changes",
    [
        "edit.start=inverted edit.source_eta=0.3 edit.guidance_scale=2",
        "edit.start=noise",
        "edit.start=image tune.mode=embedding",
        "edit.start=inverted embed.space=input edit.ddim_eta=0",
    ],
)
def test_a_batch_of_fits_equals_the_product(base: Base, changes: str) -> None:
    changes = changes if "embedding" in changes else f"{changes} tune.rank=2"
    short = SHORT.replace("tune.steps=2 ", "") if "embedding" in changes else SHORT
    variant, cases = Variant.parse(f"{short} {changes}"), [case_at(5, index) for index in range(2)]
    variant.check_batched()
    latents = encoded(base, cases)
    images = edited(base, latents, fitted(base, latents, cases, variant), cases, variant)
    for case, image in zip(cases, images, strict=True):
        request = EditRequest(render(case.source), case.prompt, seed=case.index)
        (single,) = Imagic("case", variant.config).edit(Context(base), request)
        levels = np.abs(np.asarray(to_image(image), dtype=int) - np.asarray(single.image, dtype=int))
        assert levels.mean() < 0.1, levels.mean()


@pytest.mark.parametrize(
    "change", ["embed.noise=0.1", "embed.relative=true", "monitoring.early_stop=tune", "tune.mode=full", "resolution=32"]
)
def test_what_a_batch_does_not_support_is_named(change: str) -> None:
    with pytest.raises(ImagicError, match=change.partition("=")[0]):
        Variant.parse(change).check_batched()
