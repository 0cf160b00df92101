"""Every family and every kind of file: fit and edit in every mode, and plain diffusers makes the same picture from what was stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from common import PROMPT, array, by_diffusers, opened, slow_but, tiny_config
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from original import write_single
from tiny import save_tiny, save_tiny_sdxl

from imagic_lora.adapters.adapter import Adapter
from imagic_lora.adapters.contents import read_canvas, read_embeddings
from imagic_lora.adapters.store import Store
from imagic_lora.bases.base import Base
from imagic_lora.bases.loading.registry import load_base
from imagic_lora.core.config import EditConfig, Mode
from imagic_lora.core.device_config import MemoryConfig
from imagic_lora.core.runtime import resolve_runtime
from imagic_lora.sampling.editor import Editor
from imagic_lora.training.fit import fit, result

FAMILIES: dict[str, Callable[[Path], Path]] = {
    "sd1": lambda folder: save_tiny(folder, scheduler="pndm"),
    "sd2": lambda folder: save_tiny(folder, prediction_type="v_prediction"),
    "sdxl": save_tiny_sdxl,
    "lcm": lambda folder: save_tiny(folder, scheduler="lcm", guided=True),
}
SINGLE = {"sd1-single": "sd1", "sdxl-single": "sdxl"}
BASES = [*FAMILIES, *SINGLE]
Place = Callable[[str], Path]
Fit = Callable[..., Adapter]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Gives the folder of a tiny base of a family, or its single file, whose configs a user's list of bases gives."""
    root = tmp_path_factory.mktemp("families")

    @cache
    def find(name: str) -> Path:
        if name in SINGLE:
            return write_single(find(SINGLE[name]), root / f"{name}.safetensors")
        return FAMILIES[name](root / name)

    listed = root / "bases.yaml"
    listed.write_text(yaml.safe_dump({one: {"source": str(find(one)), "config": str(find(SINGLE[one]))} for one in SINGLE}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IMAGIC_LORA_BASES", str(listed))
        yield find


def called(place: Place, family: str) -> str:
    """What a user calls the base."""
    return family if family in SINGLE else str(place(family))


def open_family(place: Place, family: str, mode: Mode = "lora", **memory: Any) -> Base:
    """Its base on the CPU."""
    return load_base(called(place, family), resolve_runtime(MemoryConfig(device="cpu", **memory)), master_weights=mode == "full")


def by_diffusers_alone(place: Place, family: str) -> Any:
    """Its pipeline, loaded by diffusers."""
    kind: Any = StableDiffusionXLPipeline if family.startswith("sdxl") else StableDiffusionPipeline
    if family in SINGLE:
        return kind.from_single_file(str(place(family)), config=str(place(SINGLE[family])), local_files_only=True)
    return kind.from_pretrained(place(family))


@pytest.fixture(scope="module")
def fit_on(place: Place, photo_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Fit:
    """Gives the adapter of a family and a mode, fitted once."""
    store = Store(tmp_path_factory.mktemp("fitted"))

    @cache
    def make(family: str, mode: Mode) -> Adapter:
        config = tiny_config(place(family), mode, base=called(place, family))
        made = result(fit(photo_file, PROMPT, config, store, f"{family}-{mode}"))
        assert made is not None
        return made

    return make


@pytest.mark.parametrize(
    ("family", "mode"),
    slow_but(
        [("sd1", "lora"), ("sdxl", "lora"), ("sd2", "full")],
        [*((family, "lora") for family in BASES), ("sd2", "full"), ("sdxl", "full"), ("sdxl", "embedding")],
    ),
)
def test_plain_diffusers_makes_the_same_picture(place: Place, fit_on: Fit, family: str, mode: Mode) -> None:
    """To 1 of 255, from the adapter's files alone."""
    adapter, config = fit_on(family, mode), EditConfig(steps=4, guidance_scale=3.0)
    edited = next(Editor(open_family(place, family)).edit(adapter, [0.6], [5], config)).image
    plain = by_diffusers(by_diffusers_alone(place, family), adapter, 0.6, 5, config)
    assert np.abs(array(edited) - array(plain)).max() <= 1


@pytest.mark.parametrize("family", slow_but(["sd1-single", "sdxl", "sd2"], BASES))
def test_both_stages_train_all_that_they_should(place: Place, fit_on: Fit, family: str) -> None:
    """Tokens and pooled embedding change, added conditions do not; the weights change."""
    adapter = fit_on(family, "lora")
    stored = {kind: conditioning.tensors() for kind, conditioning in read_embeddings(adapter).items()}
    shapes = open_family(place, family).architecture.conditioning
    assert {name: tuple(value.shape) for name, value in stored["optimised"].items()} == shapes
    for name in shapes:
        assert torch.equal(stored["optimised"][name], stored["target"][name]) == (name in ("time_ids", "guidance"))
    steps = [loss for losses in adapter.record.losses.values() for loss in losses]
    assert all(loss > 0 for loss in steps)


@pytest.mark.parametrize("family", ["sdxl", pytest.param("lcm", marks=pytest.mark.slow)])
def test_every_start_makes_pictures_of_the_photos_size(place: Place, fit_on: Fit, family: str) -> None:
    """From noise, from the photo, from its own noise at the start and at every step; and eta changes the image."""
    adapter, editor = fit_on(family, "lora"), Editor(open_family(place, family))
    starts: list[tuple[Any, float]] = [("noise", 0.0), ("image", 0.0), ("inverted", 0.0), ("inverted", 1.0)]
    for start, ddim_eta in starts:
        config = EditConfig(steps=4, guidance_scale=3.0, start=start, ddim_eta=ddim_eta)
        pictures = [one.image for one in editor.edit(adapter, [0.0, 1.0], [0], config)]
        assert {picture.size for picture in pictures} == {read_canvas(adapter).size}, (start, ddim_eta)
        assert (array(pictures[0]) != array(pictures[1])).any(), (start, ddim_eta)


def test_sdxl_has_the_conditioning_of_its_pipeline(place: Place) -> None:
    """Tokens of both encoders, the pooled embedding, zeros for the empty prompt, size ids of the image."""
    base, pipe = open_family(place, "sdxl"), StableDiffusionXLPipeline.from_pretrained(place("sdxl"))
    tokens, null, pooled, null_pooled = pipe.encode_prompt(PROMPT)  # pyright: ignore[reportAttributeAccessIssue]
    text, empty = base.encode_prompt(PROMPT), base.null()
    assert empty is not None
    assert text.pooled is not None
    assert torch.equal(text.tokens, tokens)
    assert torch.equal(text.pooled, pooled)
    assert torch.equal(empty.tokens, null)
    assert empty.pooled is not None
    assert torch.equal(empty.pooled, null_pooled)
    assert (empty.tokens == 0).all()
    assert base.with_added_conditions(text, 24, 40, 1.0).extra["time_ids"].tolist() == [[24, 40, 0, 0, 24, 40]]


def test_sdxl_without_zeros_encodes_the_empty_prompt(place: Place, tmp_path: Path) -> None:
    """As its ``model_index.json`` says."""
    save_tiny_sdxl(tmp_path / "base")
    index = tmp_path / "base/model_index.json"
    index.write_text(index.read_text().replace('"force_zeros_for_empty_prompt": true', '"force_zeros_for_empty_prompt": false'))
    base = opened(tmp_path / "base")
    null, empty = base.null(), base.encode_prompt("")
    assert null is not None
    assert torch.equal(null.tokens, empty.tokens)
    assert (null.tokens != 0).any()


def test_the_vae_of_sdxl_stays_wide_in_fp16(place: Place) -> None:
    """It overflows otherwise, and the picture is black; in bf16, and in other families, nothing is wider than asked for."""
    found = {
        (family, dtype): open_family(place, family, dtype=dtype).pipeline("text2image").vae.dtype  # pyright: ignore[reportAttributeAccessIssue]
        for family in ("sd1", "sdxl")
        for dtype in ("fp16", "bf16")
    }
    assert found == {
        ("sd1", "fp16"): torch.float16,
        ("sd1", "bf16"): torch.bfloat16,
        ("sdxl", "fp16"): torch.float32,
        ("sdxl", "bf16"): torch.bfloat16,
    }


@pytest.mark.slow
def test_sdxl_in_half_precision_makes_pictures(place: Place, fit_on: Fit) -> None:
    """From the noise and from the photo, whose encoding is as wide as its decoding; near those in fp32."""
    adapter = fit_on("sdxl", "lora")
    editors = {dtype: Editor(open_family(place, "sdxl", dtype=dtype)) for dtype in ("fp32", "fp16", "bf16")}
    for start in ("noise", "image"):
        config = EditConfig(steps=4, guidance_scale=3.0, start=start)
        found = {dtype: array(next(editor.edit(adapter, [0.6], [5], config)).image) for dtype, editor in editors.items()}
        for dtype in ("fp16", "bf16"):
            assert np.abs(found[dtype] - found["fp32"]).mean() < 10, (start, dtype)
            assert found[dtype].std() > 1, (start, dtype)
