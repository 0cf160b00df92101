"""Sweeps: what the scores measure, what the rules choose, and the images before tuning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from common import KINDS, array, each, opened, same, weights
from PIL import Image

from imagic_lora.adapters.adapter import Adapter
from imagic_lora.adapters.contents import applied, read_canvas, read_embeddings
from imagic_lora.core.conditioning import Conditioning, interpolate
from imagic_lora.core.config import EditConfig
from imagic_lora.core.errors import NotFinite
from imagic_lora.core.noise import noise_at
from imagic_lora.photos.canvas import to_canvas, to_image
from imagic_lora.sampling.editor import Editor
from imagic_lora.sampling.generate import generate
from imagic_lora.sampling.sweeps.scores import PROBES, alignment, denoising_errors, fidelity, ssim
from imagic_lora.sampling.sweeps.suggest import COARSE, RULES, SEARCHED, Curves, balance, band, jump, onset, plateau, product, search
from imagic_lora.sampling.sweeps.sweep import Picture, Scores, find_eta, sampled, scored

CONFIG = EditConfig(steps=2, guidance_scale=3.0, batch_size=3)
Fitted = Callable[..., Adapter]


@pytest.mark.parametrize("kind", KINDS)
def test_alignment_compares_the_errors_of_the_clean_latents(folders: dict[str, Any], kind: str) -> None:
    """The mean log ratio of the errors of x_0 in float64: the same for either kind of prediction."""
    base = opened(folders[kind])
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    target, optimised = base.encode_prompt("a cat"), base.encode_prompt("a dog on a mat")
    signal = base.training_scheduler.alphas_cumprod.double().sqrt()
    noise = noise_at(0, "scores", 0, range(PROBES), (4, 8, 8))
    ratios = torch.empty(3, PROBES, dtype=torch.float64)
    for k in range(PROBES):
        t = int((k + 0.5) / PROBES * 1000)
        a, b = signal[t], (1 - signal[t] ** 2).sqrt()
        for n, clean in enumerate(latents.double()):
            noised, errors = a * clean + b * noise[k], []
            for conditioning in (optimised, target):
                with torch.no_grad():
                    predicted = base.predict(noised.float()[None], torch.tensor([t]), conditioning)[0].double()
                estimate = (noised - b * predicted) / a if kind == "epsilon" else a * noised - b * predicted
                errors.append((estimate - clean).square().mean())
            ratios[n, k] = (errors[0] / errors[1]).log()
    found = alignment(base, latents, target, optimised, batch_size=7)
    assert found == pytest.approx(ratios.mean(1).tolist(), rel=2e-3, abs=1e-6)
    assert max(map(abs, found)) > 1e-4


def test_errors_do_not_depend_on_the_batch_and_the_order(folder: Any) -> None:
    """Each image is scored at the same timesteps and noise, alone or among others."""
    base = opened(folder)
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    prompts = [base.encode_prompt("a cat"), base.encode_prompt("a dog")]
    whole = denoising_errors(base, latents, prompts, 100)
    assert whole.shape == (2, 3, PROBES)
    alone = torch.cat([denoising_errors(base, latents[k : k + 1], prompts, 1) for k in (2, 1, 0)], 1).flip(1)
    assert torch.allclose(whole, alone, rtol=1e-4)


def test_fidelity_and_ssim_of_known_images() -> None:
    """Closed forms: equal images, unrelated ones, a shift by two standard deviations; an image and its negative."""
    reference, other = torch.randn(2, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    assert fidelity(reference, reference) == 1
    assert fidelity(other, reference) == pytest.approx(0, abs=0.05)
    assert fidelity(reference + 2 * reference.std(), reference) == pytest.approx(1 - 2**2 / 2, rel=1e-4)
    ramp = Image.radial_gradient("L").resize((32, 24)).convert("RGB")
    assert ssim(ramp, ramp) == pytest.approx(1, abs=1e-6)
    assert ssim(ramp, Image.fromarray(255 - np.asarray(ramp))) < 0


def points(etas: Sequence[float], aligned: Sequence[float], kept: Sequence[float]) -> list[Any]:
    """Scores made by hand."""
    return [SimpleNamespace(eta=eta, alignment=a, fidelity=f) for eta, a, f in zip(etas, aligned, kept, strict=True)]


SUDDEN = points([0, 0.2, 0.4, 0.6, 0.8, 1.0], [-2, -2, -1.8, 0.1, 0.2, 3], [1, 0.99, 0.95, 0.5, 0.49, 0.2])


def test_curves_are_means_over_seeds() -> None:
    """Two seeds in any order. Alignment is a share of the way to 0, or to its highest value if it begins at 0 or above."""
    seeds = points([0.5, 0, 1, 1, 0, 0.5], [-2, -4, 1, 3, -2, -1], [0.5, 1, -1, 0.2, 1, 0.25])
    curves = Curves.of(seeds)
    assert curves.etas == (0, 0.5, 1)
    assert curves.alignment == (0, 0.5, 1)  # means -3, -1.5, 2
    assert curves.fidelity == (1, 0.375, 0)  # means 1, 0.375, -0.4
    assert Curves.of(points([0, 1, 2], [1, 2, 5], [1, 1, 1])).alignment == (0, 0.25, 1)
    assert Curves.of(points([0, 1], [2, 2], [1, 1])).alignment == (0, 0)
    assert Curves.of(points([0, 1], [-2, -3], [1, 1])).alignment == (0, 0)


@each(
    "rule, expected",
    {
        "product": (product, 0.6),  # 1 * 0.5 against 0.1 * 0.95 and 1 * 0.49
        "balance": (balance, 0.6),
        "onset": (onset, 0.6),
        "plateau": (plateau, 0.6),
        "jump": (jump, 0.6),
    },
)
def test_every_rule_finds_a_sudden_edit(rule: Callable[[Curves], float], expected: float) -> None:
    """The edit appears between 0.4 and 0.6, and the photo is lost between 0.8 and 1."""
    assert rule(Curves.of(SUDDEN)) == expected
    assert RULES[rule.__name__] is rule


def test_the_rules_differ_where_the_curves_are_smooth() -> None:
    """Values by hand: each rule at the eta that its definition gives."""
    curves = Curves((0, 0.25, 0.5, 0.75, 1), (0, 0.45, 0.55, 0.9, 1), (1, 0.95, 0.9, 0.6, 0))
    assert [rule(curves) for rule in (product, balance, onset, plateau, jump)] == [0.75, 0.75, 0.5, 0.75, 1]
    flat = Curves((0, 0.4, 0.5, 0.6, 0.7), (0, 0.5, 1, 1, 1), (1, 0.9, 0.48, 0.5, 0.49))
    assert (product(flat), balance(flat)) == (0.5, 0.4)  # the smallest eta of those that hardly differ
    nothing, all_lost = Curves((0, 1, 2), (0, 0, 0), (1, 1, 1)), Curves((0, 1, 2), (0, 1, 1), (1, 0, 0))
    assert [rule(curves) for curves in (nothing, all_lost) for rule in (product, balance)] == [2, 2, 1, 1]
    uneven = Curves((0, 0.1, 1), (0, 0.2, 0.4), (1, 0.8, 0))
    assert (jump(uneven), onset(uneven)) == (0.1, 1)  # by the slope, not by the fall; the last eta if none is good


def test_the_band_is_where_both_curves_are_good() -> None:
    """Its ends are where the interpolated curves cross one half; there may be none."""
    curves = Curves((0, 1), (0, 1), (1, 0.25))
    assert band(curves) == pytest.approx((0.5, 2 / 3), abs=2e-3)
    assert band(Curves((0, 0.5, 1), (0, 0.2, 1), (1, 0.2, 0))) is None
    assert band(Curves((0, 0.5, 1), (0, 1, 1), (1, 1, 1))) == pytest.approx((0.25, 1), abs=2e-3)


def test_a_search_looks_beside_the_best_of_a_coarse_grid() -> None:
    """The edit appears at 0.7, which the coarse grid lacks."""
    asked: list[list[float]] = []

    def scores_at(etas: Sequence[float]) -> Iterable[Any]:
        asked.append(list(etas))
        return points(etas, [min(0.0, max(-1.0, 10 * eta - 7)) for eta in etas], [min(1.0, 1.7 - eta) for eta in etas])

    steps, seen = search(scores_at, product), 0
    while True:
        try:
            next(steps)
            seen += 1
        except StopIteration as done:
            found = done.value
            break
    assert asked == [list(COARSE), [0.7, 0.9]]
    assert seen == SEARCHED
    assert found == 0.7


def sweep(editor: Editor, adapter: Adapter, etas: Sequence[float], seeds: Sequence[int], **more: Any) -> list[Picture]:
    return list(sampled(editor, adapter, etas, seeds, CONFIG, **more))


def test_before_tuning_is_the_base_with_the_embeddings_alone(folder: Any, fitted: Fitted) -> None:
    """As on a base that no adapter was ever loaded into; edits before and after it are those of the adapter."""
    adapter, editor = fitted("lora"), Editor(opened(folder))
    untouched = weights(editor.base.denoiser)
    first = sweep(editor, adapter, [0.6], [5])[0]
    plain = list(editor.edit(adapter, [0.6, 1.0], [5], CONFIG, tuned=False))
    assert same(weights(editor.base.denoiser), untouched)
    fresh, stored = opened(folder), read_embeddings(adapter)
    mixed = [interpolate(stored["target"], stored["optimised"], eta) for eta in (0.6, 1.0)]
    expected = list(generate(fresh, mixed, [5, 5], CONFIG, read_canvas(adapter), stored["null"], mixed))
    assert [array(edit.image).tolist() for edit in plain] == [array(image).tolist() for image in expected]
    again = sweep(editor, adapter, [0.6], [5])[0]
    assert first.image.tobytes() == again.image.tobytes()
    small = to_image(to_canvas(plain[0].image, 32, editor.base.size_multiple).pixels[0])
    assert first.image.tobytes() != small.tobytes()


def test_images_are_scored_with_their_adapter(folder: Any, fitted: Fitted) -> None:
    """The reconstruction of each seed is its own reference; alignment is that of a fresh base with the adapter, whatever adapter the
    editor was used with before; another target prompt changes it."""
    adapter, editor = fitted("lora"), Editor(opened(folder))
    pictures = sweep(editor, adapter, [0.0, 1.0], [0, 3])
    editor.load(fitted("full"))
    found = list(scored(editor, adapter, pictures, pictures, CONFIG))
    assert [(score.eta, score.seed, score.tuned) for score in found] == [(0, 0, True), (0, 3, True), (1, 0, True), (1, 3, True)]
    assert [(score.fidelity, score.ssim) for score in found[:2]] == [(1, pytest.approx(1, abs=1e-4))] * 2
    assert all(score.fidelity < 0.9999 and score.ssim < 0.999 for score in found[2:])
    stored, fresh = read_embeddings(adapter), opened(folder)
    latents = torch.stack([picture.latents for picture in pictures])
    with applied(adapter, fresh):
        expected = alignment(fresh, latents, stored["target"], stored["optimised"], 4)
    assert alignment(opened(folder), latents, stored["target"], stored["optimised"], 4) != pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert [score.alignment for score in found] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    photo = to_image(read_canvas(adapter).pixels[0])
    assert [score.ssim_photo for score in found] == pytest.approx([ssim(picture.image, photo) for picture in pictures])
    other = next(scored(editor, adapter, pictures[:1], pictures, CONFIG, "a whale"))
    assert other.alignment != pytest.approx(found[0].alignment, rel=1e-3)
    assert found[0].flat() == {name: value for name, value in vars(found[0]).items() if name != "others"}


def test_a_score_that_is_not_finite_is_an_error(folder: Any, fitted: Fitted) -> None:
    """NaN is no JSON, and no rule could choose."""
    adapter, editor = fitted("embedding"), Editor(opened(folder))
    (picture,) = sweep(editor, adapter, [0.0], [0])
    broken = Picture(0.0, 0, True, picture.image, picture.latents * float("nan"))
    with pytest.raises(NotFinite, match="eta 0 and seed 0"):
        list(scored(editor, adapter, [broken], [broken], CONFIG))


def test_a_search_for_eta_gives_the_eta_of_a_sweep_over_the_same_images(folder: Any, fitted: Fitted) -> None:
    """The same images, scores and rule, and the reconstruction is sampled once."""
    adapter, editor = fitted("lora"), Editor(opened(folder))
    steps, seen = find_eta(editor, adapter, 4, CONFIG), list[Scores]()
    while True:
        try:
            seen.append(next(steps))
        except StopIteration as done:
            found = done.value
            break
    etas = sorted(score.eta for score in seen)
    assert set(COARSE) < set(etas)
    assert len(etas) == len(set(etas)) <= SEARCHED
    pictures = sweep(editor, adapter, etas, [4])
    assert found == RULES["onset"](Curves.of(scored(editor, adapter, pictures, pictures, CONFIG)))


def test_an_editor_gives_its_conditionings(folder: Any, fitted: Fitted) -> None:
    """Those of the file, and of another target prompt."""
    adapter, editor = fitted("lora"), Editor(opened(folder))
    stored, other = read_embeddings(adapter), editor.base.encode_prompt("a whale")

    def tokens(found: dict[str, Conditioning]) -> dict[str, list[float]]:
        return {name: value.tokens.flatten().tolist() for name, value in found.items()}

    assert tokens(editor.conditionings(adapter)) == tokens(stored)
    assert tokens(editor.conditionings(adapter, "a whale")) == tokens({**stored, "target": other})
