"""Methods of editing behind one interface: their images, their costs, and a base that stays bit-equal."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import MODES, PROMPT, TUNED, array, opened, same, slow_but, tiny_config, weights
from diffusers import AutoencoderKL
from PIL import Image
from tiny import save_tiny

import imagic_lora.methods.imagic as imagic
from imagic_lora.adapters.adapter import Adapter
from imagic_lora.adapters.contents import read_canvas, read_embeddings
from imagic_lora.adapters.store import Store
from imagic_lora.bases.base import Base
from imagic_lora.bench.bounds import Bounds
from imagic_lora.core.conditioning import Conditioning
from imagic_lora.core.config import EditConfig, Mode
from imagic_lora.core.errors import ImagicError
from imagic_lora.methods.generated import PromptOnly
from imagic_lora.methods.imagic import Imagic, unmonitored
from imagic_lora.methods.method import Context, Cost, EditRequest, EditResult, Method, Passes, metered
from imagic_lora.methods.sampled import SamplingConfig
from imagic_lora.methods.sdedit import SDEdit, SDEditConfig
from imagic_lora.photos.canvas import to_canvas
from imagic_lora.photos.reading import read_photo
from imagic_lora.sampling.editor import Editor
from imagic_lora.sampling.generate import generate
from imagic_lora.training.fit import fit, result

CONFIG = EditConfig(steps=5, guidance_scale=3.0)
SEED = 11


@pytest.fixture
def base(folder: Path) -> Base:
    return opened(folder)


@pytest.fixture(scope="module")
def wanted(photo_file: Path) -> EditRequest:
    """The photo is 50 x 37."""
    return EditRequest(read_photo(photo_file).image, PROMPT, seed=SEED)


def run(method: Method, base: Base, wanted: EditRequest) -> list[EditResult]:
    return list(method.edit(Context(base), wanted))


def counts(cost: Cost) -> tuple[int, int]:
    return cost.forward, cost.backward


def asked(base: Base, samples: int) -> None:
    """One pass of the denoiser."""
    base.predict(torch.zeros(samples, 4, 8, 8), torch.zeros(samples, dtype=torch.long), base.encode_prompt(PROMPT))


# the meter


def test_a_meter_counts_samples_forward_and_backward(base: Base) -> None:
    """Three samples at once are three passes; they count as backward only where gradients are on."""
    with metered(base) as meter:
        assert counts(meter.cost()) == (0, 0)
        with torch.no_grad():
            asked(base, 3)
        assert counts(meter.cost()) == (3, 0)
        with torch.inference_mode():
            asked(base, 1)
        assert counts(meter.cost()) == (4, 0)
        with torch.enable_grad():
            asked(base, 2)
        assert counts(meter.cost()) == (6, 2)
        assert meter.cost(9).adapter == 9


def test_a_meter_stops_at_its_end(base: Base) -> None:
    """Passes before and after are not counted, and nothing is left on the denoiser, after an error neither."""
    before = dict(base.denoiser._forward_hooks)
    asked(base, 1)
    with metered(base) as meter:
        asked(base, 2)
    asked(base, 4)
    assert counts(meter.cost()) == (2, 2)
    assert dict(base.denoiser._forward_hooks) == before
    with pytest.raises(KeyError), metered(base):
        raise KeyError
    assert dict(base.denoiser._forward_hooks) == before


def test_meters_may_be_nested(base: Base) -> None:
    """The outer one counts all, the inner one its own part, and each ends alone."""
    before = dict(base.denoiser._forward_hooks)
    with torch.no_grad(), metered(base) as outer:
        asked(base, 1)
        with metered(base) as inner:
            asked(base, 2)
        asked(base, 4)
    assert (counts(outer.cost()), counts(inner.cost())) == ((7, 0), (2, 0))
    assert dict(base.denoiser._forward_hooks) == before


def test_a_meter_measures_the_time(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds since it was made."""
    now = iter([100.0, 101.5, 104.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    with metered(base) as meter:
        assert [meter.cost().seconds, meter.cost().seconds] == [1.5, 4.0]


def test_costs_add_up() -> None:
    """Each part with its own kind."""
    assert Cost(1, 2, 3.5, 4) + Cost(10, 20, 30.0, 40) == Cost(11, 22, 33.5, 44)
    assert Cost() + Cost(1, 2, 3.0, 4) == Cost(1, 2, 3.0, 4)


# the bounds


def test_bounds_are_the_photo_and_the_true_edit_through_the_vae(folder: Path, base: Base, wanted: EditRequest) -> None:
    """The copy is the photo bit for bit; the oracle is what diffusers' own VAE gives back of the true edit; both are free."""
    truth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8))
    copy, oracle = Bounds().edit(Context(base), wanted, truth)
    assert ((copy.row, oracle.row), Bounds().rows) == (("copy", "oracle"), ("copy", "oracle"))
    assert np.array_equal(array(copy.image), array(wanted.photo))
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    with torch.no_grad():
        clean = torch.tensor(array(truth)).permute(2, 0, 1)[None] / 127.5 - 1
        back = vae.decode(vae.encode(clean).latent_dist.mode()).sample.clamp(-1, 1)
    expected = ((back[0].permute(1, 2, 0) + 1) * 127.5).numpy()
    assert np.abs(array(oracle.image) - expected).max() <= 1
    assert np.abs(array(oracle.image) - array(wanted.photo.resize((32, 32)))).max() > 1
    assert copy.cost == oracle.cost == Cost()


# without a fit


def alone(base: Base, wanted: EditRequest, config: EditConfig, seed: int = SEED) -> np.ndarray:
    """What generate() returns for the target prompt by itself."""
    canvas, text = to_canvas(wanted.photo, 32, 8), base.encode_prompt(wanted.target_prompt)
    (image,) = generate(base, [text], [seed], config, canvas, base.null(), [text])
    return array(image)


def sdedit(*strengths: float, scale: float = 3.0) -> SDEdit:
    """With a row for each strength."""
    return SDEdit({f"s{strength:g}": SDEditConfig(steps=5, guidance_scale=scale, strength=strength) for strength in strengths})


def prompt_only(scale: float = 3.0) -> PromptOnly:
    return PromptOnly({"one": SamplingConfig(steps=5, guidance_scale=scale)})


def test_prompt_only_is_the_target_prompt_from_noise(folder: Path, base: Base, wanted: EditRequest) -> None:
    """Two evaluations a step with guidance and one without, none backward."""
    for guidance, evaluations in ((3.0, 10), (1.0, 5)):
        (made,) = run(prompt_only(guidance), base, wanted)
        expected = alone(opened(folder), wanted, CONFIG.model_copy(update={"guidance_scale": guidance, "start": "noise"}))
        assert np.array_equal(array(made.image), expected)
        assert (made.row, counts(made.cost), made.cost.adapter) == ("one", (evaluations, 0), 0)
        assert prompt_only(guidance).passes(base) == {"one": Passes(evaluations)}
        assert made.cost.seconds > 0


def test_prompt_only_depends_on_the_seed_and_not_on_the_photo(base: Base, wanted: EditRequest) -> None:
    """Another seed is another picture; another photo of the same size is not."""
    first, other, blind = (
        run(prompt_only(), base, one)[0]
        for one in (wanted, replace(wanted, seed=SEED + 1), replace(wanted, photo=Image.new("RGB", wanted.photo.size)))
    )
    assert not np.array_equal(array(first.image), array(other.image))
    assert np.array_equal(array(first.image), array(blind.image))


def test_sdedit_starts_from_the_photo_by_each_strength(folder: Path, base: Base, wanted: EditRequest) -> None:
    """A row for each: the picture of generate() from the image, at strength times steps, twice with guidance."""
    method = sdedit(0.4, 0.65, 1.0)
    made = run(method, base, wanted)
    assert method.rows == tuple(one.row for one in made) == ("s0.4", "s0.65", "s1")
    for one, strength, steps in zip(made, (0.4, 0.65, 1.0), (2, 3, 5), strict=True):
        config = CONFIG.model_copy(update={"start": "image", "strength": strength})
        assert np.array_equal(array(one.image), alone(opened(folder), wanted, config))
        assert (counts(one.cost), one.cost.adapter) == ((2 * steps, 0), 0)
        assert method.passes(base)[one.row] == Passes(2 * steps)
        assert one.image.size == wanted.photo.size
    assert not np.array_equal(array(made[0].image), array(made[2].image))


def test_passes_are_those_of_the_scheduler(folder: Path, tmp_path: Path, wanted: EditRequest) -> None:
    """PNDM calls the denoiser once more than it has steps."""
    base = opened(save_tiny(tmp_path / "pndm", scheduler="pndm"))
    for method in (prompt_only(), sdedit(0.65)):
        (made,) = run(method, base, wanted)
        assert method.passes(base)[made.row] == Passes(made.cost.forward)
    assert prompt_only().passes(base)["one"] != prompt_only().passes(opened(folder))["one"]


# Imagic


Fitting = Callable[[Mode], tuple[list[EditResult], Base]]
OTHER = 0.4, CONFIG.model_copy(update={"steps": 3, "start": "image"})
"""Another way to sample a fit."""


@pytest.fixture(scope="module")
def fitting(folder: Path, wanted: EditRequest) -> Fitting:
    """The rows of Imagic in a mode, and its base; each made once."""

    @cache
    def make(mode: Mode) -> tuple[list[EditResult], Base]:
        base = opened(folder, mode)
        return run(Imagic("ours", tiny_config(folder, mode), {"image": OTHER}), base, wanted), base

    return make


@pytest.fixture(scope="module")
def apart(folder: Path, photo_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Mode], Adapter]:
    """The same fit by the library at the seed of the task, on a base of its own."""
    store = Store(tmp_path_factory.mktemp("apart"))

    @cache
    def make(mode: Mode) -> Adapter:
        adapter = result(fit(photo_file, PROMPT, tiny_config(folder, mode, seed=SEED), store, mode, base=opened(folder, mode)))
        assert adapter is not None
        return adapter

    return make


@pytest.mark.parametrize("mode", slow_but(["lora"], MODES))
def test_imagic_is_a_fit_and_its_edits(
    fitting: Fitting, folder: Path, photo_file: Path, apart: Callable[[Mode], Adapter], mode: Mode
) -> None:
    """Bit for bit those of the library at the seed of the task, which is not that of the settings: with the settings of the run, then in
    every other way; pictures of the photo's size."""
    made, _ = fitting(mode)
    assert [one.row for one in made] == ["ours", "ours-image"]
    assert {one.image.size for one in made} == {(50, 37)}
    adapter, editor = apart(mode), Editor(opened(folder, mode))
    assert tiny_config(folder, mode).seed != SEED
    for one, (eta, sampling) in zip(made, ((0.7, tiny_config(folder, mode).edit), OTHER), strict=True):
        (expected,) = editor.edit(adapter, [eta], [SEED], sampling)
        assert np.array_equal(array(one.image), array(expected.image))


def test_rows_of_imagic_are_its_ways_to_sample(folder: Path) -> None:
    """Without others there is one."""
    assert Imagic("ours", tiny_config(folder), {"image": OTHER}).rows == ("ours", "ours-image")
    assert Imagic("ours", tiny_config(folder)).rows == ("ours",)


def test_imagic_can_start_from_inverted_noise(base: Base, folder: Path, wanted: EditRequest, fitting: Fitting) -> None:
    """The inversion is paid for: a pass a step more than from noise."""
    noise = fitting("lora")[0][0].cost
    method = Imagic("ours", tiny_config(folder, edit={"start": "inverted"}))
    rows = method.edit(Context(base), wanted)
    inverted = next(rows).cost
    assert method.passes(base) == {"ours": Passes(*counts(inverted))}
    rows.close()
    assert inverted.forward - noise.forward == tiny_config(folder).edit.steps


def test_imagic_without_stage_2_samples_from_the_untuned_base(fitting: Fitting, folder: Path, apart: Callable[[Mode], Adapter]) -> None:
    """The interpolated embedding, eta times that of the target prompt, on a base that was never fitted."""
    made, adapter = fitting("embedding")[0][0], apart("embedding")
    stored, base, config = read_embeddings(adapter), opened(folder), tiny_config(folder).edit
    mixed = Conditioning(0.7 * stored["target"].tokens + (1 - 0.7) * stored["optimised"].tokens)
    (expected,) = generate(base, [mixed], [SEED], config, read_canvas(adapter), stored["null"], [stored["optimised"]])
    assert np.array_equal(array(made.image), array(expected))
    assert not np.array_equal(array(made.image), array(fitting("lora")[0][0].image))


@pytest.mark.parametrize("mode", MODES)
def test_imagic_pays_for_training_and_sampling_and_not_for_the_preview(fitting: Fitting, folder: Path, mode: Mode) -> None:
    """Steps times batch, forward and backward, in each stage that runs; then two a step and picture with guidance; all take time."""
    trained = 3 * 2 + (0 if mode == "embedding" else 4 * 2)
    (one, other), base = fitting(mode)
    assert counts(one.cost) == (trained + 2 * 2, trained)
    assert counts(other.cost) == (trained + 2 * 2, trained)
    predicted = Imagic("ours", tiny_config(folder, mode), {"image": OTHER}).passes(base)
    assert predicted == {made.row: Passes(*counts(made.cost)) for made in (one, other)}
    assert one.cost.seconds > 0


@pytest.mark.parametrize("mode", MODES)
def test_imagic_leaves_the_base_bit_equal(fitting: Fitting, folder: Path, mode: Mode) -> None:
    """Weights, names and hooks are those of a base that was just opened."""
    _, base = fitting(mode)
    assert same(weights(base.denoiser), weights(opened(folder, mode).denoiser))
    assert not base.denoiser._forward_hooks
    assert base.denoiser.training == opened(folder, mode).denoiser.training


@pytest.mark.parametrize("mode", MODES)
def test_imagic_reports_the_bytes_that_are_kept(folder: Path, wanted: EditRequest, monkeypatch: pytest.MonkeyPatch, mode: Mode) -> None:
    """Those of weights and embeddings in the adapter's folder, while it is there; nothing of it is left afterwards."""
    stores: list[Path] = []

    def spied(photo: Path, text: str, config: Any, store: Store, name: str, **more: Any) -> Any:
        stores.append(store.root)
        return fit(photo, text, config, store, name, **more)

    monkeypatch.setattr(imagic, "fit", spied)
    rows = Imagic("ours", tiny_config(folder, mode), {"image": OTHER}).edit(Context(opened(folder, mode)), wanted)
    one = next(rows)
    (store,) = stores
    kept = sum(path.stat().st_size for path in store.rglob("*.safetensors"))
    assert kept <= one.cost.adapter <= kept + (5000 if mode == "full" else 0)  # full keeps the shape of the network as well
    (other,) = rows
    assert other.cost.adapter == one.cost.adapter
    assert not store.exists()


@pytest.mark.parametrize("mode", TUNED)
def test_a_method_that_is_stopped_leaves_the_base_bit_equal(folder: Path, wanted: EditRequest, mode: Mode) -> None:
    """After its first picture was taken, and after sampling has failed."""
    base = opened(folder, mode)
    before = weights(base.denoiser)
    rows: Any = Imagic("ours", tiny_config(folder, mode)).edit(Context(base), wanted)
    next(rows)
    rows.close()
    del rows
    assert same(weights(base.denoiser), before)
    broken = 0.7, CONFIG.model_copy(update={"start": "image", "strength": 0.01})  # leaves no step
    with pytest.raises(ImagicError):
        run(Imagic("ours", tiny_config(folder, mode), {"broken": broken}), base, wanted)
    assert same(weights(base.denoiser), before)
    assert not base.denoiser._forward_hooks


def test_settings_of_imagic_are_its_run(folder: Path) -> None:
    """As JSON, all of them: one that changes is seen."""
    config = tiny_config(folder)
    settings = Imagic("ours", config).settings
    assert json.loads(json.dumps(settings)) == settings
    assert type(config).model_validate(settings["run"]) == config
    assert Imagic("ours", config, {"image": OTHER}).settings != settings
    assert Imagic("ours", tiny_config(folder, eta=0.8)).settings != settings


def test_what_only_informs_does_not_count_as_a_cost(folder: Path) -> None:
    """Evaluations and previews are off, unless early stopping needs the evaluations; nothing else changes."""
    config = tiny_config(folder, monitoring={"convergence_every": 2, "preview_every": 2})
    silent = unmonitored(config)
    assert (silent.monitoring.convergence_every, silent.monitoring.preview_every) == (0, 0)
    assert silent.model_copy(update={"monitoring": config.monitoring}) == config
    early = tiny_config(folder, monitoring={"convergence_every": 2, "preview_every": 2, "early_stop": "tune", "patience": 1})
    assert unmonitored(early).monitoring == early.monitoring.model_copy(update={"preview_every": 0})
