"""Editor.pipeline: the edit by a pipeline of diffusers that shares the weights of the base, and what becomes of both."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import MODES, PROMPT, TUNED, array, each, opened, same, tiny_config, weights
from diffusers import (
    ControlNetModel,
    DPMSolverMultistepScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from tiny import save_tiny_sdxl

from imagic_lora.adapters.adapter import Adapter
from imagic_lora.adapters.store import Store
from imagic_lora.bases.altered import check_unaltered
from imagic_lora.bases.base import Base
from imagic_lora.core.config import EditConfig, Mode
from imagic_lora.core.errors import ImagicError
from imagic_lora.sampling.edit_pipeline import EditPipeline
from imagic_lora.sampling.editor import Editor
from imagic_lora.training.fit import fit, result

CONFIG = EditConfig(steps=3, guidance_scale=3.0)
Fitted = Callable[..., Adapter]


@pytest.fixture(scope="module")
def xl(photo_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Mode, Adapter]]:
    """A tiny SDXL base, and its adapters."""
    root, made = tmp_path_factory.mktemp("xl"), dict[Mode, Adapter]()
    folder = save_tiny_sdxl(root / "base")
    for mode in TUNED:
        targets = {"tune": {"targets": "attention"}} if mode == "lora" else {}
        found = result(fit(photo_file, PROMPT, tiny_config(folder, mode, **targets), Store(root / "store"), mode))
        assert found is not None
        made[mode] = found
    return folder, made


def called(edit: EditPipeline, seed: int = 5, **more: Any) -> np.ndarray:
    """The image of a pipeline at the size of the photo."""
    kwargs = {**edit.prompt_kwargs, **edit.sampling_kwargs, **more}
    return array(edit.restored(edit.pipe(**kwargs, generator=torch.Generator().manual_seed(seed)).images[0]))


def ours(editor: Editor, adapter: Adapter, eta: float = 0.6, config: EditConfig = CONFIG, prompt: str | None = None) -> np.ndarray:
    """The edit of seed 5."""
    return array(next(editor.edit(adapter, [eta], [5], config, prompt)).image)


def distance(first: np.ndarray, second: np.ndarray) -> int:
    """The largest difference of a channel, of 255."""
    return int(np.abs(first - second).max())


# The same image


@pytest.mark.parametrize("mode", MODES)
def test_the_pipeline_of_stable_diffusion_makes_the_edit(folder: Path, fitted: Fitted, mode: Mode) -> None:
    """To 1 of 255, at two etas and with another prompt; eta matters."""
    editor, adapter = Editor(opened(folder)), fitted(mode)
    found = []
    for eta, prompt in ((0.0, None), (0.6, None), (0.6, "a dog")):
        with editor.pipeline(adapter, eta, CONFIG, prompt) as edit:
            found.append(called(edit))
        assert distance(found[-1], ours(editor, adapter, eta, prompt=prompt)) <= 1
    assert min(distance(found[0], found[1]), distance(found[1], found[2])) > 1


@pytest.mark.slow
@each("mode", TUNED)
def test_the_pipeline_of_sdxl_makes_the_edit(xl: tuple[Path, dict[Mode, Adapter]], mode: Mode) -> None:
    """To 1 of 255, guided and not. The flow families: tests/bases/."""
    folder, adapter = xl[0], xl[1][mode]
    editor = Editor(opened(folder))
    for scale in (3.0, 1.0):
        config = CONFIG.model_copy(update={"guidance_scale": scale})
        with editor.pipeline(adapter, 0.6, config) as edit:
            image = called(edit)
        assert distance(image, ours(editor, adapter, config=config)) <= 1


@pytest.mark.slow
def test_settings_reach_the_pipeline(folder: Path, fitted: Fitted) -> None:
    """Scheduler, rescaling, a negative prompt and the noise of DDIM, each of which changes the image as it does in an edit."""
    editor, adapter, found = Editor(opened(folder)), fitted("lora"), []
    changes: list[dict[str, Any]] = [
        {}, {"scheduler": "unipc"}, {"guidance_rescale": 0.7}, {"negative_prompt": "a dog"}, {"ddim_eta": 1.0}, {"steps": 4},
    ]  # fmt: skip
    for change in changes:
        config = CONFIG.model_copy(update=change)
        with editor.pipeline(adapter, 0.6, config) as edit:
            found.append(called(edit))
        assert distance(found[-1], ours(editor, adapter, config=config)) <= 1, change
    assert not any(np.array_equal(found[0], image) for image in found[1:])


def test_the_settings_of_the_adapter_are_the_default(folder: Path, fitted: Fitted) -> None:
    """Steps and guidance scale of its record."""
    adapter = fitted("lora")
    with Editor(opened(folder)).pipeline(adapter, 0.6) as edit:
        assert edit.sampling_kwargs == {"guidance_scale": 3.0, "num_inference_steps": 2, "height": 24, "width": 32}


@pytest.mark.slow
def test_vectors_of_tokens_are_interpolated_and_encoded(folder: Path, photo_file: Path, tmp_path: Path) -> None:
    """embed.space input, with the padding at another eta: what an export cannot carry over."""
    config = tiny_config(folder, embed={"space": "input"}, edit={"padding_eta": 0.2})
    adapter = result(fit(photo_file, PROMPT, config, Store(tmp_path), "vectors"))
    assert adapter is not None
    editor, found = Editor(opened(folder)), []
    for padding in (0.2, 1.0):
        config = CONFIG.model_copy(update={"padding_eta": padding})
        with editor.pipeline(adapter, 0.6, config) as edit:
            found.append(edit.prompt_kwargs["prompt_embeds"])
            assert distance(called(edit), ours(editor, adapter, config=config)) <= 1
    assert not torch.equal(*found)


@pytest.mark.slow
def test_an_adapter_of_a_new_word_has_eta_1_alone(folder: Path, photo_file: Path, tmp_path: Path) -> None:
    """Its vectors are in the prompt embeddings."""
    inversion = {"initial_word": "c", "templates": "prompt"}
    config = tiny_config(folder, "embedding", method="textual-inversion", inversion=inversion)
    adapter = result(fit(photo_file, "a <z>", config, Store(tmp_path), "word"))
    assert adapter is not None
    editor = Editor(opened(folder))
    with editor.pipeline(adapter, 1.0, CONFIG, "a <z> on") as edit:
        assert distance(called(edit), ours(editor, adapter, 1.0, prompt="a <z> on")) <= 1
    with pytest.raises(ImagicError, match=r"eta 0\.5 with adapter word"), editor.pipeline(adapter, 0.5):
        pass


@pytest.mark.slow
@each("memory, mode", [({"dtype": "bf16"}, "full"), ({"dtype": "bf16"}, "lora"), ({"idle": "release"}, "lora")])
def test_precision_and_offloading_are_those_of_the_base(folder: Path, fitted: Fitted, memory: dict[str, Any], mode: Mode) -> None:
    """fp32 master weights beside a VAE in bf16 too: the denoiser computes as in an edit."""
    editor, adapter = Editor(opened(folder, mode, **memory)), fitted(mode)
    with editor.pipeline(adapter, 0.6, CONFIG) as edit:
        image = called(edit)
    assert distance(image, ours(editor, adapter)) <= (8 if "dtype" in memory else 1)  # the images are decoded in other batches of work


@pytest.mark.slow
def test_a_quantized_base_is_shared(wide: Path, photo_file: Path, tmp_path: Path) -> None:
    """Its 4-bit weights are the same objects."""
    base = opened(wide, quantize="nf4")
    adapter = result(fit(photo_file, PROMPT, tiny_config(wide, tune={"targets": "attention"}), Store(tmp_path), "one", base=base))
    assert adapter is not None
    editor = Editor(base)
    with editor.pipeline(adapter, 0.6, CONFIG) as edit:
        assert distance(called(edit), ours(editor, adapter)) <= 1


# Going on from there


@pytest.mark.slow
def test_other_pipelines_are_made_of_its_components(folder: Path, fitted: Fitted) -> None:
    """A new ControlNet, which adds nothing, gives the edit; inpainting keeps what is not masked; another scheduler works."""
    editor, adapter = Editor(opened(folder)), fitted("lora")
    with editor.pipeline(adapter, 0.6, CONFIG) as edit:
        parts: dict[str, Any] = dict(edit.pipe.components)
        unet: Any = UNet2DConditionModel.from_pretrained(folder / "unet")
        net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32, 96))  # the tiny VAE scales by 4
        control = StableDiffusionControlNetPipeline(**parts, controlnet=net, requires_safety_checker=False)
        control.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(5)
        hint = Image.new("RGB", (32, 24))
        controlled = control(**edit.prompt_kwargs, **edit.sampling_kwargs, image=hint, generator=generator).images[0]
        assert distance(array(edit.restored(controlled)), ours(editor, adapter)) <= 1
        inpaint = StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
        inpaint.set_progress_bar_config(disable=True)
        half, none = Image.new("L", (32, 24)), Image.new("L", (32, 24))
        half.paste(255, (16, 0, 32, 24))
        kwargs: dict[str, Any] = {**edit.prompt_kwargs, **edit.sampling_kwargs, "image": Image.new("RGB", (32, 24), (200, 30, 30))}
        assert distance(*(array(inpaint(**kwargs, mask_image=mask).images[0]) for mask in (half, none))) > 1
        edit.pipe.scheduler = DPMSolverMultistepScheduler.from_config(edit.pipe.scheduler.config)
        assert distance(called(edit), ours(editor, adapter)) > 1
    with pytest.raises(ImagicError, match="after its with block"):
        control(**edit.prompt_kwargs, **edit.sampling_kwargs, image=hint)


@pytest.mark.slow
def test_image_to_image_of_sdxl_takes_the_embeddings(xl: tuple[Path, dict[Mode, Adapter]]) -> None:
    """Pooled embeddings and size ids fit, too."""
    with Editor(opened(xl[0])).pipeline(xl[1]["lora"], 0.6, CONFIG) as edit:
        pipe = StableDiffusionXLImg2ImgPipeline(**edit.pipe.components, add_watermarker=False)
        pipe.set_progress_bar_config(disable=True)
        kwargs = edit.prompt_kwargs | {"strength": 0.5, "num_inference_steps": 4, "guidance_scale": 3.0}
        assert pipe(**kwargs, image=edit.canvas.photo().resize((32, 24))).images[0].size == (32, 24)


# Lifetime


def changed_by_a_caller(edit: EditPipeline) -> None:
    """What diffusers lets a caller do to a pipeline."""
    pipe = edit.pipe
    pipe.load_lora_weights(_random_lora(pipe.unet), adapter_name="style")
    pipe.unet.set_attn_processor(_Reversed())
    pipe.vae.enable_tiling()
    pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)
    pipe.to(dtype=torch.bfloat16)


class _Reversed:
    """An attention processor that is not the base's."""

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states.flip(-1)


def _random_lora(unet: Any) -> dict[str, torch.Tensor]:
    name = next(name for name, module in unet.named_modules() if name.endswith("attn1.to_q"))
    width = dict(unet.named_modules())[name].in_features
    return {f"unet.{name}.lora_A.weight": torch.ones(2, width), f"unet.{name}.lora_B.weight": torch.ones(width, 2)}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")  # PEFT says so of every second LoRA
@pytest.mark.parametrize("mode", MODES)
def test_the_base_is_as_it_was(folder: Path, fitted: Fitted, mode: Mode) -> None:
    """Whatever is done to the pipeline: the next edit is bit for bit the same, and so is the base once the editor is closed."""
    base, adapter = opened(folder), fitted(mode)
    editor, before, vae = Editor(base), weights(base.denoiser), base.pipeline("text2image").vae  # pyright: ignore[reportAttributeAccessIssue]
    vae_before, first = weights(vae), ours(editor, adapter)
    with editor.pipeline(adapter, 0.6, CONFIG) as edit:
        held = {name: value.data_ptr() for name, value in edit.pipe.unet.named_parameters()}
        assert held == {name: value.data_ptr() for name, value in base.denoiser.named_parameters()}
        changed_by_a_caller(edit)
        assert np.array_equal(ours(editor, adapter), first)
    assert np.array_equal(ours(editor, adapter), first)
    editor.close()
    assert same(weights(base.denoiser), before)
    assert same(weights(vae), vae_before)
    check_unaltered(base)


@pytest.mark.slow
@each("first, second", [("lora", "full"), ("full", "lora"), ("embedding", "lora")])
def test_in_the_block_the_adapter_stays(folder: Path, fitted: Fitted, first: Mode, second: Mode) -> None:
    """Another adapter, the base without it, and closing are refused by name; then all go on as if nothing had been asked."""
    editor, mine, other = Editor(opened(folder)), fitted(first), fitted(second)
    with ExitStack() as stack:
        edit = stack.enter_context(editor.pipeline(mine, 0.6, CONFIG))
        with pytest.raises(ImagicError, match=f"load adapter {other.name} while a pipeline of adapter {mine.name} is in use"):
            ours(editor, other)
        with pytest.raises(ImagicError, match="close the Editor while"):
            editor.close()
        with pytest.raises(ImagicError, match="is in use: an unfinished fit or an Editor"):
            Editor(editor.base).load(other)
        if first != "embedding":
            with pytest.raises(ImagicError, match="while a pipeline"):
                next(editor.edit(mine, [0.6], [5], CONFIG, tuned=False))
        with editor.pipeline(mine, 1.0, CONFIG) as too:
            assert distance(called(too), called(edit)) > 1
        image = called(edit)
    assert distance(image, ours(editor, mine)) <= 1
    assert distance(ours(editor, other), image) > 1
    for gone in (edit, too):
        with pytest.raises(ImagicError, match=f"a call of the pipeline of adapter {mine.name} after its with block"):
            called(gone)


def test_an_error_in_the_block_ends_it(folder: Path, fitted: Fitted) -> None:
    """So does giving it up."""
    editor = Editor(opened(folder))
    with pytest.raises(KeyError), editor.pipeline(fitted("lora"), 0.6, CONFIG):
        raise KeyError
    editor.load(fitted("full"))
    given_up: Any = editor.pipeline(fitted("full"), 0.6, CONFIG)
    given_up.__enter__()
    with pytest.raises(ImagicError, match="is in use"):
        editor.close()
    del given_up
    gc.collect()
    editor.close()


@pytest.mark.slow
def test_a_fit_on_the_base_waits_for_the_editor(folder: Path, fitted: Fitted, photo_file: Path, tmp_path: Path) -> None:
    """Also for the pipeline of an adapter without weights."""
    base: Base = opened(folder)
    editor = Editor(base)
    with editor.pipeline(fitted("embedding"), 0.6, CONFIG), pytest.raises(ImagicError, match="is in use"):
        result(fit(photo_file, PROMPT, tiny_config(folder), Store(tmp_path), "one", base=base))
    editor.close()
    assert result(fit(photo_file, PROMPT, tiny_config(folder), Store(tmp_path), "one", base=base)) is not None


# What is refused


@each(
    "changes, match",
    [
        ({"start": "image"}, "start image. Expected: start noise"),
        ({"start": "inverted", "ddim_eta": 1.0}, "start inverted. Expected: start noise"),
        ({"reference": True}, "a reference image"),
        ({"scheduler": "euler", "ddim_eta": 0.5}, "ddim_eta 0.5 with scheduler EulerDiscreteScheduler"),
        ({"steps": 2000}, "2000 steps"),
    ],
)
def test_what_a_pipeline_cannot_do_is_refused(folder: Path, fitted: Fitted, changes: dict[str, Any], match: str) -> None:
    """By name; the editor can go on."""
    editor = Editor(opened(folder))
    with pytest.raises(ImagicError, match=match), editor.pipeline(fitted("lora"), 0.6, CONFIG.model_copy(update=changes)):
        pass
    editor.close()


@pytest.mark.parametrize("mode", TUNED)
def test_writing_into_the_weights_is_refused(folder: Path, fitted: Fitted, mode: Mode) -> None:
    """They are those of the base."""
    editor = Editor(opened(folder))
    with editor.pipeline(fitted(mode), 0.6, CONFIG) as edit:
        state = weights(edit.pipe.unet)
        with pytest.raises(ImagicError, match="fuse_lora on the denoiser of Editor"):
            edit.pipe.fuse_lora()
        with pytest.raises(ImagicError, match="load_state_dict on the denoiser"):
            edit.pipe.unet.load_state_dict(state)
        assert same(weights(edit.pipe.unet), state)
