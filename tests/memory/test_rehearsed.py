"""Rehearsals of flows that are kept: when they are found again, when they are not, and the presets that are chosen by them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from common import each
from tiny import save_tiny, save_tiny_klein, save_tiny_sd3_clip

from imagic_lora.bases.architecture import Architecture
from imagic_lora.bases.loading.configs import architecture, recipe_for
from imagic_lora.bases.loading.published import PUBLISHED
from imagic_lora.core.config import Mode, Preset, RunConfig
from imagic_lora.core.settings.merging import merged
from imagic_lora.core.settings.presets import LARGE_PRESETS
from imagic_lora.core.settings.resolve import resolve
from imagic_lora.memory import presets, rehearsed
from imagic_lora.memory.limits import OutOfMemory
from imagic_lora.memory.plan import Assumed, Plan
from imagic_lora.memory.prediction import predict
from imagic_lora.memory.presets import choose_preset, choose_preset_for_edit
from imagic_lora.memory.symbolic.layers import NotPlanned
from imagic_lora.training.rehearsing.rehearsal import rehearse

GIB = 2**30
CARD = Assumed("cuda", "bf16", "adam8bit")
FLOWS = ("klein-base-4b", "sd35-medium", "sd3-medium", "klein-base-9b")
CARDS: tuple[Preset, ...] = ("8gb", "12gb", "16gb", "24gb")


def run_of(base: str, preset: Preset, mode: Mode = "lora", **changes: Any) -> RunConfig:
    """The settings of a run on a published base."""
    flags = merged({"base": base, "tune": {"mode": mode}}, changes)
    return resolve(flags, {}, recipe_for(PUBLISHED[base], base), preset, large=True)


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny flow."""
    return save_tiny_klein(tmp_path_factory.mktemp("klein") / "base")


@pytest.fixture
def empty(plans: Path) -> Path:
    """The cache of rehearsals, empty."""
    for path in plans.iterdir():
        path.unlink()
    return plans


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[RunConfig, str]]:
    """Chooses a preset for a published base on a card with so many GiB."""

    def chosen(base: str, gib: float, mode: Mode = "lora", rehearsal: Any = None, card: Assumed = CARD) -> tuple[RunConfig, str]:
        monkeypatch.setattr(presets, "card_and_free_memory", lambda *_: (card, int(gib * GIB)))
        built = PUBLISHED[base]
        flags = {"base": base, "tune": {"mode": mode}}
        return choose_preset(lambda: built, flags, {}, recipe_for(built, base), large=True, rehearse=rehearsal)

    return chosen


@each("base", FLOWS)
def test_the_presets_of_published_bases_are_part_of_the_package(base: str) -> None:
    """Every one, for LoRA: `make plan-table` rehearses them again after a change of presets, configs or recipes."""
    for preset in CARDS:
        assert predict(PUBLISHED[base], run_of(base, preset), CARD).peak_bytes > GIB
    fits = {preset: predict(PUBLISHED[base], run_of(base, preset), CARD).fits(preset) for preset in CARDS}
    assert all(fits.values()) == (base != "klein-base-9b")


@each(
    "base, gib, mode, expected",
    [
        ("klein-base-4b", 7.9, "lora", "8gb"),
        ("klein-base-4b", 11.9, "lora", "12gb"),
        ("klein-base-4b", 15.9, "lora", "16gb"),
        ("klein-base-4b", 23.9, "lora", "24gb"),
        ("sd35-medium", 7.9, "lora", "12gb"),
        ("sd35-medium", 7.0, "lora", "8gb"),
        ("klein-base-9b", 11.9, "lora", "8gb"),
        ("klein-base-4b", 15.9, "full", "12gb"),
    ],
)
def test_auto_takes_a_preset_of_a_flow(choose: Any, base: str, gib: float, mode: Mode, expected: str) -> None:
    """By the rehearsals of the package, with its levers: no torch runs."""
    run, why = choose(base, gib, mode)
    assert run.preset == expected, why
    assert "GiB predicted" in why
    levers = LARGE_PRESETS[run.preset][mode]["memory"]
    assert {name: getattr(run.memory, name) for name in levers} == levers


def test_full_tuning_of_klein_needs_less_than_16_gib() -> None:
    """At 1024 pixels, by Adafactor in the backward pass; what it saves is the states of Adam in 8 bits."""
    run = run_of("klein-base-4b", "12gb", "full")
    assert (run.memory.optimizer, run.memory.master_weights, run.memory.optimizer_in_backward) == ("adafactor", "bf16-stochastic", True)
    plan = predict(PUBLISHED["klein-base-4b"], run, Assumed("cuda", "bf16", "adafactor"))
    assert plan.stages["tune"].optimizer < 0.02 * plan.stages["tune"].weights
    assert plan.peak_bytes < 12 * GIB


def test_a_card_without_bf16_gets_no_stochastic_weights(choose: Any) -> None:
    """Those need arithmetic in bf16."""
    seen: list[RunConfig] = []

    def rehearsal(_: Architecture, run: RunConfig, assumed: Assumed) -> Plan:
        seen.append(run)
        return predict(PUBLISHED["klein-base-4b"], run_of("klein-base-4b", "8gb"), CARD)

    run, _ = choose("klein-base-4b", 100, "full", rehearsal, Assumed("cuda", "fp16", "adam8bit"))
    assert run.memory.master_weights == "fp32"
    assert {one.memory.master_weights for one in seen} == {"fp32"}


@pytest.mark.slow
def test_a_rehearsal_is_found_again(klein: Path, empty: Path) -> None:
    """By a run of the same sizes with other rates; not by one with other sizes or levers; a damaged file is no rehearsal."""
    base = architecture(str(klein))
    run = resolve({"base": str(klein), "resolution": 64}, {}, {}, "12gb", large=True)
    with pytest.raises(NotPlanned, match="a transformer"):
        predict(base, run, CARD)
    plan = rehearse(base, run, CARD)
    assert predict(base, run, CARD) == plan
    assert len(list(empty.iterdir())) == 2  # of the fit and of an edit

    def changed(**changes: Any) -> RunConfig:
        return resolve(merged({"base": "another", "resolution": 64}, changes), {}, {}, "12gb", large=True)

    for same in ({"tune": {"steps": 7, "learning_rate": 0.1}}, {"seed": 3}, {"memory": {"idle": "offload"}}, {"edit": {"steps": 3}}):
        assert predict(base, changed(**same), CARD) == plan
    others = ({"resolution": 128}, {"tune": {"rank": 4}}, {"memory": {"quantize": "nf4"}}, {"embed": {"batch_size": 2}})
    for other in (*others, {"memory": {"gradient_checkpointing": False}}, {"tune": {"mode": "embedding"}}):
        with pytest.raises(NotPlanned):
            predict(base, changed(**other), CARD)
    with pytest.raises(NotPlanned):
        predict(base, run, replace(CARD, dtype="fp32"))
    for path in empty.iterdir():
        path.write_text('{"stages": 3')
    with pytest.raises(NotPlanned):
        predict(base, run, CARD)


@pytest.mark.slow
def test_an_edit_is_planned_by_the_rehearsal_of_its_fit(klein: Path, empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the fit was trained with; its levers are those of this machine."""
    base = architecture(str(klein))
    run = resolve({"base": str(klein), "tune": {"batch_size": 2}, "embed": {"tokens": "words"}}, {}, {}, "16gb", large=True)
    rehearse(base, run, CARD)
    plan = predict(base, run, CARD)
    monkeypatch.setattr(presets, "card_and_free_memory", lambda *_: (CARD, 64 * GIB))
    chosen = choose_preset_for_edit(lambda: base, run, {"preset": "auto"})
    assert chosen.preset == "8gb"  # the first candidate, preset 24gb, was not rehearsed
    asked = resolve({"edit": {"batch_size": 4}}, {}, {}, "16gb")
    found = predict(base, asked, CARD, edit=True)
    assert {name: found.stages[name] for name in found.stages} == {name: plan.stages[name] for name in ("encode", "sample", "decode")}


@pytest.mark.slow  # a minute on two cores: five rehearsals
def test_what_was_not_rehearsed_is_rehearsed_or_gets_the_lowest_peak(klein: Path, empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The former in a fit; then the error of a small card names a lever that is known to help, or none."""
    base, asked = architecture(str(klein)), []
    monkeypatch.setattr(presets, "card_and_free_memory", lambda *_: (CARD, 64 * GIB))
    flags = {"base": str(klein)}
    run, why = choose_preset(lambda: base, flags, {}, {}, large=True)
    assert (run.preset, run.memory.quantize) == ("8gb", "nf4")
    assert "cannot be predicted" in why

    def rehearsal(*arguments: Any) -> Plan:
        asked.append(arguments)
        return rehearse(*arguments)

    run, why = choose_preset(lambda: base, flags, {}, {}, large=True, rehearse=rehearsal)
    assert (run.preset, len(asked)) == ("24gb", 1)
    choose_preset(lambda: base, flags, {}, {}, large=True, rehearse=rehearsal)
    assert len(asked) == 1
    monkeypatch.setattr(presets, "card_and_free_memory", lambda *_: (CARD, 1000))
    with pytest.raises(OutOfMemory, match=r"stage \w+ needs .* \(predicted\)"):
        choose_preset(lambda: base, flags, {}, {}, large=True, rehearse=rehearsal)


def test_a_flow_with_clip_alone_has_the_levers_of_small_bases(tmp_path: Path) -> None:
    """A preset would ask for 4-bit text encoders, which such a base refuses."""
    folder = save_tiny_sd3_clip(tmp_path / "clip", save_tiny(tmp_path / "others"))
    (tmp_path / "bases.yaml").write_text(f"flow: {{source: {folder}, parts: {tmp_path / 'others'}}}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IMAGIC_LORA_BASES", str(tmp_path / "bases.yaml"))
        assert not architecture("flow").has_large_encoder
    assert PUBLISHED["klein-base-4b"].has_large_encoder
    assert not PUBLISHED["sdxl"].has_large_encoder


@pytest.mark.slow
def test_an_unwritable_cache_is_none(klein: Path, empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rehearsal does not fail for it."""
    monkeypatch.setattr(rehearsed, "_folder", lambda: empty / "file" / "folder")
    (empty / "file").write_text("")
    run = resolve({"base": str(klein)}, {}, {}, "12gb", large=True)
    assert rehearse(architecture(str(klein)), run, CARD).peak_bytes
