"""The editor: any adapter at any time gives the picture it gives alone."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import KINDS, MODES, array, opened, same, weights
from diffusers import DDIMScheduler
from tiny import save_tiny
from torch import Tensor

from imagic_lora.adapter import Adapter
from imagic_lora.bases.base import Base
from imagic_lora.conditioning import Conditioning
from imagic_lora.config import EditConfig, Mode
from imagic_lora.editor import Editor
from imagic_lora.errors import ImagicError
from imagic_lora.generate import generate, inverted
from imagic_lora.images import to_image

CONFIG = EditConfig(steps=2, guidance_scale=3.0)
Fitted = Callable[..., Adapter]


def pictures(editor: Editor, adapter: Adapter, config: EditConfig = CONFIG, etas: Sequence[float] = (0.6,), **more) -> np.ndarray:
    """Edits as arrays, [N, H, W, 3]."""
    given: dict[str, Any] = {"seeds": [5]} | more
    return np.stack([array(edit.image) for edit in editor.edit(adapter, etas, config=config, **given)])


@pytest.mark.parametrize(("first", "second"), [(("lora", 0), ("lora", 1)), (("lora", 0), ("full", 0)), (("full", 0), ("full", 1))])
def test_swapped_adapters_do_not_mix(folder: Path, fitted: Fitted, first: tuple, second: tuple) -> None:
    """A, B, A in one editor are bit for bit A, A and B, each in an editor of its own; and A is not B."""
    a, b = fitted(*first), fitted(*second)
    editor = Editor(opened(folder))
    swapped = [pictures(editor, adapter) for adapter in (a, b, a)]
    alone_a, alone_b = (pictures(Editor(opened(folder)), adapter) for adapter in (a, b))
    assert np.array_equal(swapped[0], alone_a)
    assert np.array_equal(swapped[1], alone_b)
    assert np.array_equal(swapped[2], alone_a)
    assert not np.array_equal(alone_a, alone_b)


@pytest.mark.parametrize("mode", MODES)
def test_close_gives_the_base_back(folder: Path, fitted: Fitted, mode: Mode) -> None:
    """Bit-equal, and the editor can go on."""
    base = opened(folder)
    editor, before = Editor(base), weights(base.denoiser)
    first = pictures(editor, fitted(mode))
    assert not same(weights(base.denoiser), before)
    editor.close()
    assert same(weights(base.denoiser), before)
    assert np.array_equal(pictures(editor, fitted(mode)), first)


def test_the_weights_of_an_adapter_matter(folder: Path, fitted: Fitted) -> None:
    """The same embedding on the bare base gives another picture."""
    adapter, base = fitted("lora"), opened(folder)
    stored = adapter.embeddings()
    bare = next(generate(base, [stored["optimised"]], [5], CONFIG, adapter.canvas(), stored["null"], stored["optimised"]))
    assert np.abs(pictures(Editor(base), adapter, etas=[0])[0] - array(bare)).max() > 1


def test_an_adapter_of_another_base_is_refused(fitted: Fitted, tmp_path: Path) -> None:
    """The error names the base that it was made for, and nothing is put on."""
    base = opened(save_tiny(tmp_path, seed=1))
    before = weights(base.denoiser)
    with pytest.raises(ImagicError, match=f"made for base {fitted('lora').record.base.name}"):
        pictures(Editor(base), fitted("lora"))
    assert same(weights(base.denoiser), before)


@pytest.mark.parametrize("eta", [-0.01, 2.01, float("nan"), float("inf")])
def test_an_eta_out_of_range_is_refused(folder: Path, fitted: Fitted, eta: float) -> None:
    """Before any picture is made, wherever it stands in the list."""
    with pytest.raises(ImagicError, match="eta"):
        next(Editor(opened(folder)).edit(fitted("lora"), [0.5, eta], [0], CONFIG))


@pytest.mark.parametrize("start", ["noise", "image", "inverted"])
@pytest.mark.parametrize("batch_size", [2, 5])
def test_pictures_do_not_depend_on_the_batch_size(folder: Path, fitted: Fitted, start: str, batch_size: int) -> None:
    """Six pictures in batches of 2, or of 5 and 1, are those made one at a time, to rounding; and they differ among themselves."""
    editor, adapter = Editor(opened(folder)), fitted("lora")
    config = CONFIG.model_copy(update={"start": start, "ddim_eta": 0.5})
    sizes = [config.model_copy(update={"batch_size": size}) for size in (1, batch_size)]
    one, many = (pictures(editor, adapter, sized, [0.2, 0.8], seeds=[0, 1, 2]) for sized in sizes)
    assert np.abs(one - many).max() <= 1
    assert min(np.abs(one[i] - one[j]).max() for i in range(6) for j in range(i)) > 1


def test_edits_come_in_order(folder: Path, fitted: Fitted) -> None:
    """For every eta, every seed."""
    edits = Editor(opened(folder)).edit(fitted("lora"), [0.2, 0.8], [3, 4], CONFIG.model_copy(update={"batch_size": 3}))
    assert [(edit.eta, edit.seed) for edit in edits] == [(0.2, 3), (0.2, 4), (0.8, 3), (0.8, 4)]


def test_start_from_the_image_by_strength(folder: Path, fitted: Fitted) -> None:
    """Pictures differ with the strength and from those from noise; the weakest is nearest to the decoded photo."""
    base, adapter = opened(folder), fitted("lora")
    canvas, editor = adapter.canvas(), Editor(base)
    photo = canvas.restored(to_image(base.decode(base.encode_image(canvas.pixels))[0]))
    config = CONFIG.model_copy(update={"start": "image", "steps": 10})
    weak, middle, strong = (pictures(editor, adapter, config.model_copy(update={"strength": s}))[0] for s in (0.1, 0.5, 1.0))
    far = [np.abs(one - array(photo)).mean() for one in (weak, middle, strong)]
    assert far == sorted(far)
    assert far[0] < far[1] < far[2]
    assert not np.array_equal(strong, pictures(editor, adapter, CONFIG)[0])


def inverted_by_hand(base: Base, clean: Tensor, source: Conditioning, steps: int) -> Tensor:
    """DDIM backwards, in float64 but for the denoiser: x_s = sqrt(a_s) x_0 + sqrt(1 - a_s) noise, both as they are predicted at x_t."""
    scheduler = DDIMScheduler.from_config(base.training.config)
    scheduler.set_timesteps(steps)
    alphas, x = scheduler.alphas_cumprod.double(), clean.double()
    now = scheduler.final_alpha_cumprod.double()
    with torch.no_grad():
        for t in reversed(scheduler.timesteps.tolist()):
            answer = base.predict(x.float(), torch.tensor([t]), source).double()
            if base.prediction_type == "v_prediction":
                noise, predicted = now.sqrt() * answer + (1 - now).sqrt() * x, now.sqrt() * x - (1 - now).sqrt() * answer
            else:
                noise, predicted = answer, (x - (1 - now).sqrt() * answer) / now.sqrt()
            now = alphas[t]
            x = now.sqrt() * predicted + (1 - now).sqrt() * noise
    return x


@pytest.mark.parametrize("kind", KINDS)
def test_the_inverted_noise_is_ddim_backwards(folders: dict[str, Path], fitted: Fitted, kind: str) -> None:
    """As the equations have it."""
    base, adapter = opened(folders[kind]), fitted("lora", 0, kind)
    canvas, source = adapter.canvas(), adapter.embeddings()["optimised"]
    expected = inverted_by_hand(base, base.encode_image(canvas.pixels), source, 10)
    torch.testing.assert_close(inverted(base, canvas, source, 10).double(), expected, rtol=1e-3, atol=1e-3)


def test_the_seed_of_inverted_noise_has_no_say(folder: Path, fitted: Fitted) -> None:
    """The picture is that of the photo's own noise."""
    editor, config = Editor(opened(folder)), CONFIG.model_copy(update={"start": "inverted"})
    assert np.array_equal(*(pictures(editor, fitted("lora"), config, seeds=[seed]) for seed in (1, 2)))


def test_several_seeds_of_inverted_noise_are_refused(folder: Path, fitted: Fitted) -> None:
    """They would all be the same picture, but for those that DDIM adds noise to."""
    editor, config = Editor(opened(folder)), CONFIG.model_copy(update={"start": "inverted"})
    with pytest.raises(ImagicError, match="2 seeds"):
        pictures(editor, fitted("lora"), config, seeds=[0, 1])
    noisy = pictures(editor, fitted("lora"), config.model_copy(update={"ddim_eta": 1.0}), seeds=[0, 1])
    assert not np.array_equal(noisy[0], noisy[1])


@pytest.mark.parametrize(("steps", "strength"), [(2, 0.3), (1, 0.8), (10, 0.05)])
def test_a_strength_of_less_than_a_step_is_refused(folder: Path, fitted: Fitted, steps: int, strength: float) -> None:
    """Too little noise for one step of the sampler is said, with both settings."""
    config = CONFIG.model_copy(update={"start": "image", "steps": steps, "strength": strength})
    with pytest.raises(ImagicError, match="strength"):
        pictures(Editor(opened(folder)), fitted("lora"), config)


@pytest.mark.parametrize("start", ["noise", "image", "inverted"])
def test_a_picture_has_the_size_of_the_photo(folder: Path, fitted: Fitted, start: str) -> None:
    """50 x 37, though it was worked on at 32 x 24."""
    edits = Editor(opened(folder)).edit(fitted("lora"), [0.5], [0], CONFIG.model_copy(update={"start": start}))
    assert next(edits).image.size == (50, 37)


def test_another_prompt_takes_the_place_of_the_target(folder: Path, fitted: Fitted) -> None:
    """The picture of eta * e_new + (1 - eta) * e_opt, and not that of the adapter's own prompt."""
    base, adapter = opened(folder), fitted("lora")
    stored, editor = adapter.embeddings(), Editor(base)
    edited = pictures(editor, adapter, prompt="a dog")[0]
    mixed = Conditioning(0.6 * base.encode_text("a dog").tokens + (1 - 0.6) * stored["optimised"].tokens)
    expected = next(generate(base, [mixed], [5], CONFIG, adapter.canvas(), stored["null"], stored["optimised"]))
    assert np.array_equal(edited, array(expected))
    assert not np.array_equal(edited, pictures(editor, adapter)[0])
    assert np.array_equal(pictures(editor, adapter, prompt="a cat"), pictures(editor, adapter))


@pytest.mark.parametrize("change", [{"ddim_eta": 1.0}, {"guidance_scale": 8.0}, {"guidance_scale": 1.0}, {"steps": 3}])
def test_settings_of_the_sampler_change_the_picture(folder: Path, fitted: Fitted, change: dict) -> None:
    """Each of them reaches it."""
    editor, adapter = Editor(opened(folder)), fitted("lora")
    assert not np.array_equal(pictures(editor, adapter), pictures(editor, adapter, CONFIG.model_copy(update=change)))


def test_no_guidance_needs_no_null(folder: Path, fitted: Fitted) -> None:
    """A scale of 1, and a base without an unconditional embedding, are the same plain sampling."""
    base, adapter = opened(folder), fitted("lora")
    stored, off = adapter.embeddings(), CONFIG.model_copy(update={"guidance_scale": 1.0})
    one = next(generate(base, [stored["target"]], [5], off, adapter.canvas(), stored["null"], stored["optimised"]))
    other = next(generate(base, [stored["target"]], [5], CONFIG, adapter.canvas(), None, stored["optimised"]))
    assert np.array_equal(array(one), array(other))


@pytest.mark.parametrize("mode", MODES)
def test_an_edit_in_bf16_is_near_that_in_fp32(folder: Path, fitted: Fitted, mode: Mode) -> None:
    """On a base in half precision, and on one with fp32 master weights."""
    exact = pictures(Editor(opened(folder)), fitted(mode))
    for kind in MODES:
        rounded = pictures(Editor(opened(folder, kind, dtype="bf16")), fitted(mode))
        assert np.abs(exact - rounded).mean() < 3


def test_pictures_that_are_not_finite_are_refused(folder: Path, fitted: Fitted) -> None:
    """Rather than shown black."""
    base, adapter = opened(folder), fitted("lora")
    stored = adapter.embeddings()
    broken = Conditioning(torch.full_like(stored["target"].tokens, torch.nan))
    with pytest.raises(ImagicError, match="holds NaN"):
        next(generate(base, [broken], [0], CONFIG, adapter.canvas(), stored["null"], stored["optimised"]))


@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_pictures_are_made_wherever_the_text_encoder_is(folder: Path, fitted: Fitted, place: str) -> None:
    """One that was offloaded, here to the device that cannot compute, does not draw the sampling after it."""
    base, adapter = opened(folder), fitted("lora")
    expected = pictures(Editor(opened(folder)), adapter)
    base._helpers["text_encoder"].to(place)  # pyright: ignore[reportAttributeAccessIssue]
    assert np.array_equal(pictures(Editor(base), adapter), expected)


@pytest.mark.parametrize("prompt", [None, "a dog"])
@pytest.mark.parametrize("idle", ["keep", "release"])
def test_the_text_encoder_rests_while_pictures_are_made(folder: Path, fitted: Fitted, idle: str, prompt: str | None) -> None:
    """Released by the first picture if asked, be there a text to encode or not; the pictures are the same, and the editor can go on."""
    base, adapter = opened(folder, idle=idle), fitted("lora")
    editor, text_encoder = Editor(base), weakref.ref(base._helpers["text_encoder"])
    expected = pictures(Editor(opened(folder)), adapter, prompt=prompt)
    edits = editor.edit(adapter, [0.6], [5], CONFIG, prompt)
    assert np.array_equal(array(next(edits).image), expected[0])
    gc.collect()
    assert (text_encoder() is None) == (idle == "release")
    assert np.array_equal(pictures(editor, adapter, prompt=prompt), expected)


def test_an_empty_prompt_is_refused(folder: Path, fitted: Fitted) -> None:
    """Before anything is sampled."""
    with pytest.raises(ImagicError, match="empty prompt"):
        next(Editor(opened(folder)).edit(fitted("lora"), [0.5], [0], CONFIG, prompt=" "))


def test_noise_of_ddim_is_refused_with_another_sampler(fitted: Fitted, tmp_path: Path) -> None:
    """A sampler that would ignore ddim_eta says so; the weights are those of the adapter's base."""
    editor = Editor(opened(save_tiny(tmp_path / "euler", scheduler="euler")))
    with pytest.raises(ImagicError, match="sampler of kind Euler"):
        next(editor.edit(fitted("lora"), [0.5], [0], CONFIG.model_copy(update={"ddim_eta": 0.5})))
