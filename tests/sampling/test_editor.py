"""The editor: any adapter at any time gives the picture it gives alone."""

from __future__ import annotations

import gc
import shutil
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from bench_swaps import measured, random_adapter
from common import KINDS, MODES, PROMPT, TUNED, array, by_diffusers, each, loaded, opened, output, same, slow_but, tiny_config, weights
from diffusers import DDIMScheduler, StableDiffusionPipeline
from tiny import save_tiny
from torch import Tensor

from imagic_lora.adapters.adapter import Adapter
from imagic_lora.adapters.contents import read_canvas, read_embeddings
from imagic_lora.adapters.store import Store
from imagic_lora.bases.base import Base
from imagic_lora.bases.loading.configs import architecture
from imagic_lora.core.conditioning import Conditioning, interpolate
from imagic_lora.core.config import EditConfig, Mode
from imagic_lora.core.errors import ImagicError
from imagic_lora.core.runtime import resolve_runtime
from imagic_lora.photos.canvas import to_image
from imagic_lora.sampling import editor as module
from imagic_lora.sampling.editor import Editor
from imagic_lora.sampling.generate import generate
from imagic_lora.sampling.inversion import invert, record_noise
from imagic_lora.training.fit import fit, result
from imagic_lora.training.rehearsing.random_base import random_base

EXAMPLES = Path(__file__).parents[2] / "adapters"
CONFIG = EditConfig(steps=2, guidance_scale=3.0)
Fitted = Callable[..., Adapter]


def pictures(editor: Editor, adapter: Adapter, config: EditConfig = CONFIG, etas: Sequence[float] = (0.6,), **more) -> np.ndarray:
    """Edits as arrays, [N, H, W, 3]."""
    given: dict[str, Any] = {"seeds": [5]} | more
    return np.stack([array(edit.image) for edit in editor.edit(adapter, etas, config=config, **given)])


@pytest.fixture(scope="module")
def alone(folder: Path) -> Callable[..., np.ndarray]:
    """Gives the edits of an adapter in an editor and a base of its own, made once; tests must not change them."""
    known: dict[str, np.ndarray] = {}

    def make(adapter: Adapter, config: EditConfig = CONFIG, etas: Sequence[float] = (0.6,), **more) -> np.ndarray:
        key = repr((adapter.folder, config, tuple(etas), more))
        if key not in known:
            known[key] = pictures(Editor(opened(folder)), adapter, config, etas, **more)
        return known[key]

    return make


@pytest.fixture(scope="module")
def narrow(folder: Path, photo_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Adapter]:
    """Gives an adapter of another rank, alpha or choice of layers than the fixtures' own."""
    store = Store(tmp_path_factory.mktemp("narrow"))

    def make(name: str, **tune) -> Adapter:
        config = tiny_config(folder, tune={"steps": 2, "alpha": 3.0} | tune)
        made = result(fit(photo_file, PROMPT, config, store, name, overwrite=True))
        assert made is not None
        return made

    return make


ORDERS = [
    "lora other full full_too low high fewer lora bare lora full bare full other",
    "lora other lora full lora full full_too full low lora low high lora high fewer lora fewer bare lora bare full bare full_too other",
]


@pytest.mark.parametrize("order", slow_but(ORDERS[:1], ORDERS), ids=["each kind of change", "and back again"])
def test_swapped_adapters_do_not_mix(folder: Path, fitted: Fitted, narrow: Fitted, alone: Fitted, order: str) -> None:
    """Adapters of any mode, of other ranks and other layers, loaded in turn into one editor, give bit for bit what each gives alone."""
    adapters = {"lora": fitted("lora"), "other": fitted("lora", 1), "full": fitted("full"), "full_too": fitted("full", 1)}
    adapters |= {"bare": fitted("embedding"), "low": narrow("low", rank=1), "high": narrow("high", rank=9)}
    adapters["fewer"] = narrow("fewer", targets="attention")
    editor = Editor(opened(folder))
    for k, name in enumerate(order.split()):
        assert np.array_equal(pictures(editor, adapters[name]), alone(adapters[name])), f"load {k}: {name}"
    found = [alone(adapter).tobytes() for adapter in adapters.values()]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("mode", TUNED)
def test_close_gives_the_base_back(folder: Path, fitted: Fitted, mode: Mode) -> None:
    """Bit-equal, and the editor can go on."""
    base = opened(folder)
    editor, before = Editor(base), weights(base.denoiser)
    first = pictures(editor, fitted(mode))
    assert not same(weights(base.denoiser), before)
    editor.close()
    assert same(weights(base.denoiser), before)
    assert np.array_equal(pictures(editor, fitted(mode)), first)


def test_mode_embedding_is_plain_sampling_on_the_base(folder: Path, fitted: Fitted) -> None:
    """At every eta bit for bit the image that diffusers' own pipeline gives for the interpolated embedding, also after other adapters."""
    editor, adapter = Editor(opened(folder)), fitted("embedding")
    before, pipe = weights(editor.base.denoiser), StableDiffusionPipeline.from_pretrained(folder)
    for adapter_before in (None, fitted("lora"), fitted("full")):
        if adapter_before:
            editor.load(adapter_before)
        edits = list(editor.edit(adapter, [0.0, 0.6, 1.0], [5], CONFIG.model_copy(update={"batch_size": 1})))
        assert same(weights(editor.base.denoiser), before)
        for edit in edits:
            assert np.array_equal(array(edit.image), array(by_diffusers(pipe, adapter, edit.eta, 5, CONFIG)))
    assert len({edit.image.tobytes() for edit in edits}) == 3


def test_a_stored_embedding_is_edited_on_any_start(folder: Path, fitted: Fitted) -> None:
    """From the photo and from its own noise, as with other adapters."""
    editor, adapter = Editor(opened(folder)), fitted("embedding")
    for start, ddim_eta in (("image", 0.0), ("inverted", 0.0), ("inverted", 1.0)):
        config = CONFIG.model_copy(update={"start": start, "ddim_eta": ddim_eta})
        first, last = pictures(editor, adapter, config, etas=[0.0, 1.0])
        assert not np.array_equal(first, last)


def test_mode_embedding_on_a_quantised_base(wide: Path, photo_file: Path, tmp_path: Path) -> None:
    """The fit and the edit both use the 4-bit denoiser; the edit is plain sampling on it."""
    base = opened(wide, quantize="nf4")
    adapter = result(fit(photo_file, PROMPT, tiny_config(wide, "embedding"), Store(tmp_path), "one", base=base))
    assert adapter is not None
    assert adapter.record.config.memory.quantize == "nf4"
    stored, canvas = read_embeddings(adapter), read_canvas(adapter)
    mixed = interpolate(stored["target"], stored["optimised"], 0.6)
    bare = opened(wide, quantize="nf4")
    expected = next(generate(bare, [mixed], [5], CONFIG, canvas, stored["null"], [stored["optimised"]]))
    assert np.array_equal(pictures(Editor(base), adapter)[0], array(expected))
    exact = next(generate(opened(wide), [mixed], [5], CONFIG, canvas, stored["null"], [stored["optimised"]]))
    assert not np.array_equal(array(exact), array(expected))


def test_the_weights_of_an_adapter_matter(folder: Path, fitted: Fitted) -> None:
    """The same embedding on the bare base gives another picture."""
    adapter, base = fitted("lora"), opened(folder)
    stored = read_embeddings(adapter)
    bare = next(generate(base, [stored["optimised"]], [5], CONFIG, read_canvas(adapter), stored["null"], [stored["optimised"]]))
    assert np.abs(pictures(Editor(base), adapter, etas=[0])[0] - array(bare)).max() > 1


def test_an_adapter_of_another_base_is_refused(fitted: Fitted, tmp_path: Path) -> None:
    """The error names the base that it was made for, and nothing is loaded."""
    base = opened(save_tiny(tmp_path, seed=1))
    before = weights(base.denoiser)
    with pytest.raises(ImagicError, match=f"made for base {fitted('lora').record.base.name}"):
        pictures(Editor(base), fitted("lora"))
    assert same(weights(base.denoiser), before)


@each("eta", [-0.01, 2.01, float("nan"), float("inf")])
def test_an_eta_out_of_range_is_refused(folder: Path, fitted: Fitted, eta: float) -> None:
    """Before any picture is made, wherever it stands in the list."""
    with pytest.raises(ImagicError, match="eta"):
        next(Editor(opened(folder)).edit(fitted("lora"), [0.5, eta], [0], CONFIG))


@pytest.mark.parametrize(("start", "batch_size"), [("noise", 2), ("image", 5), ("inverted", 5)])
def test_pictures_do_not_depend_on_the_batch_size(folder: Path, fitted: Fitted, start: str, batch_size: int) -> None:
    """Six pictures in batches of 2, or of 5 and then 1, are those made one at a time, to rounding; and they differ among themselves."""
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
    canvas, editor = read_canvas(adapter), Editor(base)
    photo = canvas.restored(to_image(base.decode(base.encode_image(canvas.pixels))[0]))
    config = CONFIG.model_copy(update={"start": "image", "steps": 10})
    weak, middle, strong = (pictures(editor, adapter, config.model_copy(update={"strength": s}))[0] for s in (0.1, 0.5, 1.0))
    far = [np.abs(one - array(photo)).mean() for one in (weak, middle, strong)]
    assert far == sorted(far)
    assert far[0] < far[1] < far[2]
    assert not np.array_equal(strong, pictures(editor, adapter, CONFIG)[0])


def inverted_by_hand(base: Base, clean: Tensor, source: Conditioning, steps: int) -> Tensor:
    """DDIM backwards, in float64 but for the denoiser: x_s = sqrt(a_s) x_0 + sqrt(1 - a_s) noise, both as they are predicted at x_t.

    A velocity is converted to noise at the timestep that the denoiser gets.
    """
    scheduler = DDIMScheduler.from_config(base.scheduler().config)
    scheduler.set_timesteps(steps)
    alphas, x = scheduler.alphas_cumprod.double(), clean.double()
    now = scheduler.final_alpha_cumprod.double()
    with torch.no_grad():
        for t in reversed(scheduler.timesteps.tolist()):
            answer = base.predict(x.float(), torch.tensor([t]), source).double()
            velocity = base.prediction_type == "v_prediction"
            noise = alphas[t].sqrt() * answer + (1 - alphas[t]).sqrt() * x if velocity else answer
            predicted = (x - (1 - now).sqrt() * noise) / now.sqrt()
            now = alphas[t]
            x = now.sqrt() * predicted + (1 - now).sqrt() * noise
    return x


@pytest.mark.parametrize("kind", KINDS)
def test_the_inverted_noise_is_ddim_backwards(folders: dict[str, Path], fitted: Fitted, kind: str) -> None:
    """As the equations have it."""
    base, adapter = opened(folders[kind]), fitted("lora", 0, kind)
    canvas, source = read_canvas(adapter), read_embeddings(adapter)["optimised"]
    clean = base.encode_image(canvas.pixels)
    (found,) = invert(base, canvas, clean, EditConfig(steps=10), source)
    torch.testing.assert_close(found.double(), inverted_by_hand(base, clean, source, 10), rtol=1e-3, atol=1e-3)


def recorded_by_hand(base: Base, clean: Tensor, source: Conditioning, steps: int, eta: float, seed: int) -> list[Tensor]:
    """The noised photo at the first step; then for each step the next noised photo less the mean that DDIM has for it (arXiv 2010.02502,
    equation 12), in float64 but for the denoiser."""
    scheduler = DDIMScheduler.from_config(base.scheduler().config)
    scheduler.set_timesteps(steps)
    alphas = [scheduler.alphas_cumprod[t].double() for t in scheduler.timesteps] + [scheduler.final_alpha_cumprod.double()]
    draws = torch.randn(steps, *clean.shape[1:], generator=torch.Generator().manual_seed(seed)).double()
    path = [alphas[k].sqrt() * clean.double() + (1 - alphas[k]).sqrt() * draws[k] for k in range(steps)] + [clean.double()]
    found = [path[0]]
    with torch.no_grad():
        for k, t in enumerate(scheduler.timesteps.tolist()):
            now, then, x = alphas[k], alphas[k + 1], path[k]
            answer = base.predict(x.float(), torch.tensor([t]), source).double()
            v = base.prediction_type == "v_prediction"
            noise = now.sqrt() * answer + (1 - now).sqrt() * x if v else answer
            predicted = now.sqrt() * x - (1 - now).sqrt() * answer if v else (x - (1 - now).sqrt() * answer) / now.sqrt()
            variance = eta**2 * (1 - then) / (1 - now) * (1 - now / then)
            found.append(path[k + 1] - then.sqrt() * predicted - (1 - then - variance).sqrt() * noise)
    return found


@pytest.mark.parametrize(("kind", "ddim_eta"), [("epsilon", 0.5), ("v_prediction", 1.0)])
def test_the_recorded_noise_is_what_the_steps_lack(folders: dict[str, Path], fitted: Fitted, kind: str, ddim_eta: float) -> None:
    """As the equations have it."""
    base, adapter = opened(folders[kind]), fitted("lora", 0, kind)
    canvas, source = read_canvas(adapter), read_embeddings(adapter)["optimised"]
    clean = base.encode_image(canvas.pixels)
    expected = recorded_by_hand(base, clean, source, 10, ddim_eta, 3)
    found = record_noise(base, canvas, clean, EditConfig(steps=10, ddim_eta=ddim_eta), source, 3)
    torch.testing.assert_close(torch.stack(found).double(), torch.stack(expected), rtol=1e-3, atol=1e-3)


def test_recorded_noise_reproduces_the_photo(folder: Path, fitted: Fitted) -> None:
    """At eta 0 and without guidance, all but what the VAE loses, whatever the seed; at eta 1 the seed matters."""
    base, adapter = opened(folder), fitted("lora")
    editor, canvas = Editor(base), read_canvas(adapter)
    photo = array(canvas.restored(to_image(base.decode(base.encode_image(canvas.pixels))[0])))
    config = CONFIG.model_copy(update={"start": "inverted", "ddim_eta": 1.0, "guidance_scale": 1.0})
    back = pictures(editor, adapter, config, [0.0, 1.0], seeds=[1, 2])
    assert np.abs(back[:2] - photo).max() <= 1
    assert np.abs(back[2] - back[3]).max() > 1


@pytest.mark.parametrize(("ddim_eta", "steps"), [pytest.param(0.0, 50, marks=pytest.mark.slow), (1.0, 20)])
def test_a_photo_inverted_on_the_way_comes_back_from_there(folder: Path, fitted: Fitted, ddim_eta: float, steps: int) -> None:
    """With a source eta of 0.4: the photo at it and below it, which without one there is at eta 0 alone."""
    editor, adapter = Editor(opened(folder)), fitted("lora")
    plain = CONFIG.model_copy(update={"start": "inverted", "ddim_eta": ddim_eta, "guidance_scale": 1.0, "steps": steps})
    on_the_way = pictures(editor, adapter, plain.model_copy(update={"source_eta": 0.4}), [0.0, 0.2, 0.4, 1.0])
    usual = pictures(editor, adapter, plain, [0.0, 0.2, 0.4, 1.0])  # as many: a batch of another size rounds otherwise on some CPUs
    photo = usual[0].astype(float)
    farther = [np.abs(picture.astype(float) - photo).mean() for picture in (*on_the_way, usual[2])]
    assert np.array_equal(on_the_way[0], usual[0])
    if ddim_eta:
        assert max(farther[:3]) < 1 < farther[4]
    assert farther[2] < farther[4] < farther[3] * 2
    assert not np.array_equal(on_the_way[3], usual[3])


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


@each("steps, strength", [(2, 0.3), (1, 0.8), (10, 0.05)])
def test_a_strength_of_less_than_a_step_is_refused(folder: Path, fitted: Fitted, steps: int, strength: float) -> None:
    """Too little noise for one step of the sampler is said, with both settings."""
    config = CONFIG.model_copy(update={"start": "image", "steps": steps, "strength": strength})
    with pytest.raises(ImagicError, match="strength"):
        pictures(Editor(opened(folder)), fitted("lora"), config)


@each("start", ["noise", "image", "inverted"])
def test_a_picture_has_the_size_of_the_photo(folder: Path, fitted: Fitted, start: str) -> None:
    """50 x 37, though it was worked on at 32 x 24."""
    edits = Editor(opened(folder)).edit(fitted("lora"), [0.5], [0], CONFIG.model_copy(update={"start": start}))
    assert next(edits).image.size == (50, 37)


def test_another_prompt_takes_the_place_of_the_target(folder: Path, fitted: Fitted) -> None:
    """The picture of eta * e_new + (1 - eta) * e_opt, and not that of the adapter's own prompt."""
    base, adapter = opened(folder), fitted("lora")
    stored, editor = read_embeddings(adapter), Editor(base)
    edited = pictures(editor, adapter, prompt="a dog")[0]
    mixed = Conditioning(0.6 * base.encode_prompt("a dog").tokens + (1 - 0.6) * stored["optimised"].tokens)
    expected = next(generate(base, [mixed], [5], CONFIG, read_canvas(adapter), stored["null"], [stored["optimised"]]))
    assert np.array_equal(edited, array(expected))
    assert not np.array_equal(edited, pictures(editor, adapter)[0])
    assert np.array_equal(pictures(editor, adapter, prompt="a cat"), pictures(editor, adapter))


@each("change", [{"ddim_eta": 1.0}, {"guidance_scale": 8.0}, {"guidance_scale": 1.0}, {"steps": 3}])
def test_settings_of_the_sampler_change_the_picture(fitted: Fitted, alone: Fitted, change: dict) -> None:
    """Each of them reaches it."""
    assert not np.array_equal(alone(fitted("lora")), alone(fitted("lora"), CONFIG.model_copy(update=change)))


def test_no_guidance_needs_no_null(folder: Path, fitted: Fitted) -> None:
    """A scale of 1, and a base without an unconditional embedding, are the same plain sampling."""
    base, adapter = opened(folder), fitted("lora")
    stored, off = read_embeddings(adapter), CONFIG.model_copy(update={"guidance_scale": 1.0})
    one = next(generate(base, [stored["target"]], [5], off, read_canvas(adapter), stored["null"], [stored["optimised"]]))
    other = next(generate(base, [stored["target"]], [5], CONFIG, read_canvas(adapter), None, [stored["optimised"]]))
    assert np.array_equal(array(one), array(other))


@pytest.mark.parametrize("mode", MODES)
def test_an_edit_in_bf16_is_near_that_in_fp32(folder: Path, fitted: Fitted, alone: Fitted, mode: Mode) -> None:
    """On a base in half precision, and on one with fp32 master weights."""
    exact = alone(fitted(mode))
    for kind in TUNED:
        rounded = pictures(Editor(opened(folder, kind, dtype="bf16")), fitted(mode))
        assert np.abs(exact - rounded).mean() < 3


def test_pictures_that_are_not_finite_are_refused(folder: Path, fitted: Fitted) -> None:
    """Rather than returned as black images."""
    base, adapter = opened(folder), fitted("lora")
    stored = read_embeddings(adapter)
    broken = Conditioning(torch.full_like(stored["target"].tokens, torch.nan))
    with pytest.raises(ImagicError, match="holds NaN"):
        next(generate(base, [broken], [0], CONFIG, read_canvas(adapter), stored["null"], [stored["optimised"]]))


@each("place", ["cpu", "meta"])
def test_pictures_are_made_wherever_the_text_encoder_is(folder: Path, fitted: Fitted, alone: Fitted, place: str) -> None:
    """One that was offloaded, here to the device that cannot compute, does not draw the sampling after it."""
    base, adapter = opened(folder), fitted("lora")
    expected = alone(adapter)
    base._helpers["text_encoder"].to(place)  # pyright: ignore[reportAttributeAccessIssue]
    assert np.array_equal(pictures(Editor(base), adapter), expected)


@each("prompt, idle", [(None, "release"), ("a dog", "release"), ("a dog", "keep")])
def test_the_text_encoder_is_offloaded_while_pictures_are_made(
    folder: Path, fitted: Fitted, alone: Fitted, idle: str, prompt: str | None
) -> None:
    """Released by the first picture if asked, be there a text to encode or not; the pictures are the same, and the editor can go on."""
    base, adapter = opened(folder, idle=idle), fitted("lora")
    editor, text_encoder = Editor(base), weakref.ref(base._helpers["text_encoder"])
    expected = alone(adapter, prompt=prompt)
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
    with pytest.raises(ImagicError, match="with scheduler Euler"):
        next(editor.edit(fitted("lora"), [0.5], [0], CONFIG.model_copy(update={"ddim_eta": 0.5})))


# Several at once

FIVE = (0.0, 0.3, 0.5, 0.7, 1.0)
INVERTED = CONFIG.model_copy(update={"batch_size": 2, "start": "inverted"})


def test_interleaved_edits_do_not_mix(folder: Path, fitted: Fitted, alone: Fitted) -> None:
    """Three edits of five pictures in batches of two, taken by turns, are what each is alone; one left early disturbs nobody."""
    adapters = fitted("lora"), fitted("full"), fitted("lora", 1)
    expected = [alone(adapter, INVERTED, FIVE) for adapter in adapters]
    editor = Editor(opened(folder))
    left = editor.edit(adapters[1], FIVE, [5], INVERTED, "a dog")
    next(left)
    by_turns = zip_longest(*(editor.edit(adapter, FIVE, [5], INVERTED) for adapter in adapters))
    for k, edits in enumerate(by_turns):
        assert all(np.array_equal(array(edit.image), expected[which][k]) for which, edit in enumerate(edits))
        if k == 1:
            left.close()
    assert len({one.tobytes() for one in expected}) == 3


def test_an_edit_goes_on_after_close(folder: Path, fitted: Fitted, alone: Fitted) -> None:
    """Its adapter is loaded again for the next batch."""
    adapter, editor = fitted("lora"), Editor(opened(folder))
    before = weights(editor.base.denoiser)
    edits = editor.edit(adapter, FIVE, [5], INVERTED)
    first = [next(edits) for _ in range(3)]
    editor.close()
    assert same(weights(editor.base.denoiser), before)
    assert np.array_equal(np.stack([array(edit.image) for edit in (*first, *edits)]), alone(adapter, INVERTED, FIVE))


@pytest.mark.slow
def test_threads_share_an_editor(folder: Path, fitted: Fitted, narrow: Fitted, alone: Fitted) -> None:
    """Three threads, each with its adapters, get what they would get alone, whatever they put in and take out of it meanwhile."""
    adapters = fitted("lora"), fitted("full"), fitted("embedding"), fitted("lora", 1), narrow("threads", rank=2)
    expected = [alone(adapter, INVERTED, FIVE) for adapter in adapters]
    editor, before, often = Editor(opened(folder)), sys.getswitchinterval(), 3

    def work(which: int) -> bool:
        if which % 7 == 6:
            editor.close()
        which %= len(adapters)
        prompt = PROMPT if which == 0 else None  # encoded while others sample
        return np.array_equal(pictures(editor, adapters[which], INVERTED, FIVE, prompt=prompt), expected[which])

    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(3) as pool:
            assert all(pool.map(work, range(often * len(adapters))))
    finally:
        sys.setswitchinterval(before)


# What is kept in memory


def copied(adapter: Adapter, root: Path, name: str) -> Adapter:
    """The same adapter in a store of its own, in the place of one of that name."""
    shutil.rmtree(root / name, ignore_errors=True)
    shutil.copytree(adapter.folder, root / name)
    return Store(root).read(name)


def test_a_swap_does_not_touch_the_disk(folder: Path, fitted: Fitted, narrow: Fitted, tmp_path: Path) -> None:
    """Adapters that were loaded before load again, with the same pictures, when their files are gone; one has other layers."""
    real = fitted("lora"), fitted("lora", 1), narrow("memory", targets="attention")
    adapters, editor = [copied(one, tmp_path, str(k)) for k, one in enumerate(real)], Editor(opened(folder))
    before = [pictures(editor, adapter) for adapter in adapters]
    shutil.rmtree(tmp_path)
    for adapter, expected in (*zip(adapters, before, strict=True), *zip(adapters, before, strict=True)):
        assert np.array_equal(pictures(editor, adapter), expected)


def test_those_used_last_are_kept(folder: Path, fitted: Fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two places, the third adapter takes that of the one not used for longest; 8 is how many there are."""
    assert module.CACHED == 8
    monkeypatch.setattr(module, "CACHED", 2)
    a, b, c = (copied(fitted("lora", seed), tmp_path, name) for name, seed in (("a", 0), ("b", 1), ("c", 0)))
    editor = Editor(opened(folder))
    for adapter in (a, b, a, c):
        editor.load(adapter)
    shutil.rmtree(tmp_path)
    for adapter in (a, c, a):
        editor.load(adapter)
    with pytest.raises(ImagicError, match=r"source\.png|embeddings\.safetensors"):
        editor.load(b)


@pytest.mark.parametrize("mode", MODES)
def test_an_adapter_that_was_written_anew_is_read_anew(folder: Path, fitted: Fitted, alone: Fitted, tmp_path: Path, mode: Mode) -> None:
    """Read from its store again it gives the new pictures; the old record never stands for the new files."""
    old, base = copied(fitted(mode), tmp_path, "one"), opened(folder)
    editor, before = Editor(base), weights(base.denoiser)
    expected_old, expected_new = (alone(fitted(mode, seed)) for seed in (0, 1))
    assert np.array_equal(pictures(editor, old), expected_old)
    new = copied(fitted(mode, 1), tmp_path, "one")
    assert np.array_equal(pictures(editor, old), expected_old)  # it is in
    assert np.array_equal(pictures(editor, new), expected_new)
    if mode != "full":
        assert np.array_equal(pictures(editor, old), expected_old)  # it is in memory
    else:
        with pytest.raises(ImagicError, match="another adapter than when it was read"):
            pictures(editor, old)
        assert same(weights(base.denoiser), before)
        assert np.array_equal(pictures(editor, new), expected_new)
    with pytest.raises(ImagicError, match="another adapter than when it was read"):
        pictures(Editor(base), old)


def test_full_adapters_share_one_copy_of_the_base(folder: Path, fitted: Fitted) -> None:
    """Copied once, whatever is loaded between them, until the editor is closed."""
    editor = Editor(opened(folder))
    assert editor._base_weights is None
    before = weights(editor.base.denoiser)
    editor.load(fitted("full"))
    own = editor._base_weights
    assert own is not None
    for adapter in (fitted("full", 1), fitted("lora"), fitted("full")):
        editor.load(adapter)
        assert editor._base_weights is own
    assert same(own, before)
    editor.close()
    assert editor._base_weights is None


@pytest.mark.parametrize(("mode", "writes"), [("lora", "to"), ("full", "copy_")])
def test_a_swap_that_fails_half_way_leaves_the_base(
    folder: Path, fitted: Fitted, monkeypatch: pytest.MonkeyPatch, mode: Mode, writes: str
) -> None:
    """Bit-equal to before any adapter, and the editor can go on."""
    editor, adapter, write, count = Editor(opened(folder)), fitted(mode, 1), getattr(Tensor, writes), 0
    before, expected = weights(editor.base.denoiser), pictures(editor, adapter)
    editor.load(fitted("lora"))

    def failing(*args, **kwargs) -> Tensor:
        nonlocal count
        count += 1
        if count == 9:
            raise KeyboardInterrupt
        return write(*args, **kwargs)

    monkeypatch.setattr(Tensor, writes, failing)
    with pytest.raises(KeyboardInterrupt):
        editor.load(adapter)
    monkeypatch.undo()
    assert count >= 9
    assert same(weights(editor.base.denoiser), before)
    assert np.array_equal(pictures(editor, adapter), expected)


def test_an_adapter_that_is_refused_leaves_the_one_before(folder: Path, fitted: Fitted, tmp_path: Path) -> None:
    """Its output is the same, and closing still gives the base back."""
    editor, broken = Editor(opened(folder)), copied(fitted("lora", 1), tmp_path, "broken")
    (broken.folder / "pytorch_lora_weights.safetensors").write_bytes(b"")
    before = weights(editor.base.denoiser)
    editor.load(fitted("lora"))
    loaded = output(editor.base)
    with pytest.raises(ImagicError, match="not a whole safetensors file"):
        editor.load(broken)
    assert torch.equal(output(editor.base), loaded)
    editor.close()
    assert same(weights(editor.base.denoiser), before)


def counted(base: Base) -> tuple[int, int]:
    """Tensors alive, and modules of the denoiser."""
    gc.collect()
    return sum(issubclass(type(one), Tensor) for one in gc.get_objects()), sum(1 for _ in base.denoiser.modules())


def test_swaps_are_fast_and_memory_does_not_grow() -> None:
    """On the embedded base: 100 swaps of its two examples take at most 20 ms in the median, and leave no tensor, module or megabyte."""
    store, editor = Store(EXAMPLES), Editor(loaded("critters"))
    adapters, before = [store.read(name) for name in ("rex-jumps", "mia-wears-a-hat")], weights(editor.base.denoiser)
    for adapter in adapters:
        editor.load(adapter)
    found, memory, seconds = counted(editor.base), psutil.Process().memory_info().rss, []
    for k in range(100):
        start = time.perf_counter()
        editor.load(adapters[k % 2])
        seconds.append(time.perf_counter() - start)
    assert statistics.median(seconds) <= 0.02
    assert counted(editor.base) == found
    assert psutil.Process().memory_info().rss - memory < 16 * 2**20
    editor.close()
    assert same(weights(editor.base.denoiser), before)


def test_a_swap_needs_no_tokenizer(folder: Path, tmp_path: Path) -> None:
    """Random layers on a base of random weights are swapped and measured, and the base is as before."""
    run = tiny_config(folder)
    base = random_base(architecture(str(folder)), run, resolve_runtime(run.memory))
    before, adapters = weights(base.denoiser), [random_adapter(base, Store(tmp_path), f"r{seed}", run, seed) for seed in (0, 1)]
    read, swaps = measured(Editor(base), adapters, 5)
    assert len(swaps) == 5
    assert 0 < min(swaps) < read
    assert same(weights(base.denoiser), before)


@pytest.mark.slow
def test_memory_does_not_grow_when_layers_are_replaced(
    folder: Path, fitted: Fitted, narrow: Fitted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor with adapters that come from the disk each time, of other layers, or of all weights."""
    monkeypatch.setattr(module, "CACHED", 2)
    several = fitted("lora"), narrow("grow", targets="attention"), fitted("full"), fitted("embedding"), fitted("lora", 1), fitted("full", 1)
    editor, found = Editor(opened(folder)), []
    for _ in range(3):
        for adapter in several:
            editor.load(adapter)
        found.append(counted(editor.base))
    assert len(set(found)) == 1
