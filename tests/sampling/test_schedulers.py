"""Schedulers, negative prompts and rescaled guidance: the image is that of diffusers' own pipeline, called with the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from common import array, each, opened, slow_but
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
)
from PIL import Image
from tiny import save_tiny, save_tiny_sdxl

from imagic_lora.adapters.adapter import Adapter
from imagic_lora.bases.base import Base
from imagic_lora.bases.loading.known import VARIABLE
from imagic_lora.core.config import EditConfig, Scheduler
from imagic_lora.core.errors import ImagicError, ImagicWarning
from imagic_lora.photos.canvas import Canvas, to_canvas
from imagic_lora.sampling.checks import check_edit, check_scheduler
from imagic_lora.sampling.editor import Editor
from imagic_lora.sampling.generate import generate
from imagic_lora.sampling.pipelines import negative

BY_DIFFUSERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "dpm++2m": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    "dpm++2m-sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": (UniPCMultistepScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "ddim": (DDIMScheduler, {"clip_sample": False}),  # the default of its class would clip what no scheduler without it clips
    "lcm": (LCMScheduler, {}),
}
KARRAS = ("dpm++2m", "dpm++2m-sde", "unipc", "euler")
PROMPTS = ("a cat", "a dog")
SIDE = 32
FAMILIES = {"sd": (save_tiny, StableDiffusionPipeline), "sdxl": (save_tiny_sdxl, StableDiffusionXLPipeline)}


def photo() -> Canvas:
    """A canvas of the size of the tiny bases."""
    pixels = np.random.default_rng(3).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    return to_canvas(Image.fromarray(pixels), SIDE, 8)


def ours(base: Base, config: EditConfig, seeds: tuple[int, ...] = (5,)) -> list[Image.Image]:
    """Images of the first of the prompts."""
    scale = config.guidance_scale
    prompt, null = (base.with_added_conditions(c, SIDE, SIDE, scale) for c in (base.encode_prompt(PROMPTS[0]), base.null()) if c)
    canvas = photo()
    return list(generate(base, [prompt] * len(seeds), list(seeds), config, canvas, negative(base, config, null), [prompt] * len(seeds)))


def theirs(pipe: Any, config: EditConfig, seed: int = 5, **more: Any) -> Image.Image:
    """The image of diffusers' pipeline, by its own text encoders."""
    own = pipe.scheduler
    pipe.scheduler = type(own).from_config(own.config)
    if config.scheduler != "base":
        kind, options = BY_DIFFUSERS[config.scheduler]
        if config.karras_sigmas:
            options = options | {"use_karras_sigmas": True}
        pipe.scheduler = kind.from_config(own.config, **options)
    given = {"guidance_scale": config.guidance_scale, "num_inference_steps": config.steps} | more
    if config.guidance_rescale:
        given["guidance_rescale"] = config.guidance_rescale
    pipe.set_progress_bar_config(disable=True)
    image = pipe(PROMPTS[0], negative_prompt=config.negative_prompt, **given, generator=torch.Generator().manual_seed(seed)).images[0]
    pipe.scheduler = own
    return image


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the folder of a tiny base by the name of its family."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = FAMILIES[family][0](tmp_path_factory.mktemp(family))
        return made[family]

    return make


def changes(**values: Any) -> EditConfig:
    """Settings of four steps."""
    return EditConfig(**({"steps": 4, "guidance_scale": 3.0, "negative_prompt": PROMPTS[1]} | values))


CASES = [
    changes(),
    changes(guidance_rescale=0.7),
    *(changes(scheduler=name) for name in BY_DIFFUSERS),
    *(changes(scheduler=name, karras_sigmas=True) for name in KARRAS),
]


@pytest.mark.parametrize("family", slow_but(["sd"], FAMILIES))
def test_the_image_is_that_of_diffusers(family: str, tiny: Callable[[str], Path]) -> None:
    """Within one level of a pixel, whatever the scheduler; and every option gives another image."""
    base, found = opened(tiny(family)), []
    pipe = FAMILIES[family][1].from_pretrained(tiny(family))
    for config in CASES:
        (image,) = ours(base, config)
        assert np.abs(array(image) - array(theirs(pipe, config, height=SIDE, width=SIDE))).max() <= 1, config
        if config.scheduler != "ddim" and (config.scheduler != "euler" or config.karras_sigmas):  # each is the base's own somewhere
            found.append(image.tobytes())
    found.append(ours(base, changes(negative_prompt=""))[0].tobytes())
    assert len(set(found)) == len(found)


@pytest.mark.slow
@each("name", list(BY_DIFFUSERS))
def test_from_the_photo_too(name: Scheduler, tiny: Callable[[str], Path]) -> None:
    """As diffusers' pipeline for the mode of the photo's encoding; the steps of the strength alone."""
    base, config = opened(tiny("sd")), changes(scheduler=name, start="image", strength=0.75)
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(tiny("sd"))
    latents = base.encode_image(photo().pixels)
    assert np.abs(array(ours(base, config)[0]) - array(theirs(pipe, config, image=latents, strength=0.75))).max() <= 1


@each("name", get_args(Scheduler))
def test_an_image_depends_on_its_own_seed_alone(name: Scheduler, tiny: Callable[[str], Path]) -> None:
    """Whatever else is in its batch; the noise of an SDE solver too."""
    base, config = opened(tiny("sd")), changes(scheduler=name)
    first, second = ours(base, config, (5, 6))
    assert np.abs(array(first) - array(ours(base, config)[0])).max() <= 1
    assert np.abs(array(second) - array(ours(base, config, (6,))[0])).max() <= 1
    assert first.tobytes() != second.tobytes()


def test_settings_that_a_scheduler_or_a_start_cannot_take(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Are refused by name."""
    base = opened(tiny("sd"))
    for name in ("base", "ddim", "lcm"):
        with pytest.raises(ImagicError, match="Karras sigmas with scheduler"):
            check_scheduler(base, changes(scheduler=name, karras_sigmas=True))
    for settings in ({"scheduler": "euler"}, {"karras_sigmas": True}):
        with pytest.raises(ImagicError, match="with start inverted"):
            check_edit([0.5], [0], changes(start="inverted", **settings), "a cat")
    check_edit([0.5], [0], changes(start="inverted", scheduler="ddim"), "a cat")
    with pytest.raises(ImagicError, match="for which diffusers uses StableDiffusionImg2ImgPipeline"):
        ours(base, changes(start="image", guidance_rescale=0.5))
    with pytest.raises(ImagicError, match="ddim_eta 1 with scheduler UniPCMultistepScheduler"):
        ours(base, changes(scheduler="unipc", ddim_eta=1.0))
    with pytest.raises(ImagicError, match="51 steps with scheduler LCMScheduler"):
        check_scheduler(base, changes(scheduler="lcm", steps=51))
    with pytest.raises(ImagicError, match="takes the guidance scale as an input"):
        negative(opened(save_tiny(tmp_path / "guided", guided=True)), changes(), None)
    with pytest.warns(ImagicWarning, match="is not distilled"):
        check_scheduler(base, changes(scheduler="lcm"))


def test_a_distilled_base_is_sampled_at_its_own_timesteps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another scheduler is refused where it samples at others."""
    entries = tmp_path / "bases.yaml"
    entries.write_text(json.dumps({"fast": {"source": str(save_tiny(tmp_path / "base", scheduler="euler")), "few_steps": 4}}))
    monkeypatch.setenv(VARIABLE, str(entries))
    base = opened(Path("fast"))
    assert base.process.trained_timesteps is not None
    check_scheduler(base, changes(scheduler="euler"))
    for config in (changes(scheduler="lcm"), changes(scheduler="euler", steps=5), changes(scheduler="euler", karras_sigmas=True)):
        with pytest.raises(ImagicError, match="other timesteps than fast was distilled at"):
            check_scheduler(base, config)


def test_an_edit_is_led_away_from_its_negative_prompt(folder: Path, fitted: Callable[..., Adapter]) -> None:
    """By the embedding of that prompt; the empty one is that of the adapter. Without guidance it has no part."""
    editor, adapter = Editor(opened(folder)), fitted("lora")

    def edited(**values: Any) -> np.ndarray:
        return array(next(iter(editor.edit(adapter, [0.6], [5], changes(**values)))).image)

    plain, away = edited(negative_prompt=""), edited()
    assert not np.array_equal(plain, away)
    assert not np.array_equal(away, edited(negative_prompt="a house"))
    assert np.array_equal(edited(guidance_scale=1.0), edited(guidance_scale=1.0, negative_prompt=""))


@each("prompt", ["a (red:1.3) cat", "a cat, (very big:0.5)"])
def test_weights_in_a_prompt_are_not_read_as_text_without_a_word(prompt: str) -> None:
    """Negative prompts too."""
    with pytest.warns(ImagicWarning, match="weights in prompts are not supported"):
        check_edit([0.5], [0], EditConfig(), prompt)
    with pytest.warns(ImagicWarning, match="weights in prompts are not supported"):
        check_edit([0.5], [0], EditConfig(negative_prompt=prompt), "a cat")
    check_edit([0.5], [0], EditConfig(), "a cat (a big one) at 10:30")
