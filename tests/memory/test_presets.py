"""Whether a run fits: the preset that does, the lever that is named, and what is left when memory runs out on the way."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from common import MODES, PROMPT, each, opened, output, same, tiny_config, weights
from PIL import Image

import imagic_lora.cli.app as cli
import imagic_lora.cli.console as console
import imagic_lora.memory.levers as levers
import imagic_lora.memory.limits as limits
import imagic_lora.memory.prediction as prediction
import imagic_lora.memory.presets as fits
import imagic_lora.sampling.editor as editor
import imagic_lora.training.fit as imagic
from imagic_lora.adapters.adapter import Adapter
from imagic_lora.adapters.record import PREVIEW, STEPS
from imagic_lora.adapters.store import Store
from imagic_lora.bases.architecture import Architecture
from imagic_lora.bases.loading.configs import architecture, recipe_for
from imagic_lora.bases.loading.published import PUBLISHED
from imagic_lora.core.config import EditConfig, Mode, Preset, RunConfig
from imagic_lora.core.errors import ImagicError, ImagicWarning
from imagic_lora.core.settings.reading import validated
from imagic_lora.core.settings.recipes import recipe_of
from imagic_lora.core.settings.resolve import resolve
from imagic_lora.memory.levers import next_lever
from imagic_lora.memory.limits import OutOfMemory, check_memory, is_out_of_memory, out_of_memory_error
from imagic_lora.memory.out_of_memory import explain_out_of_memory
from imagic_lora.memory.plan import Assumed, Plan
from imagic_lora.memory.prediction import predict
from imagic_lora.memory.presets import EDIT_STAGES, choose_preset, choose_preset_for_edit, largest_batch, most_together
from imagic_lora.training.fit import fit, result
from imagic_lora.training.stage import Stage, StepReport

CARD = Assumed("cuda", "bf16", "adam8bit")
SD15 = PUBLISHED["sd15"]
PRESETS: list[Preset] = ["24gb", "16gb", "12gb", "8gb"]
GIB = 2**30
Chosen = Callable[..., tuple[RunConfig, str]]


@cache
def predicted(run: RunConfig, assumed: Assumed, photos: int = 1) -> Plan:
    """The plan of sd15, computed once."""
    return predict(SD15, run, assumed, photos)


@pytest.fixture(autouse=True)
def plan_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans of sd15 are cached: these tests need the same ones many times."""

    def cached(base: Architecture, run: RunConfig, assumed: Assumed, photos: int = 1, edit: bool = False) -> Plan:
        return predicted(run, assumed, photos) if base is SD15 else predict(base, run, assumed, photos, edit)

    for module in (fits, levers, limits):
        monkeypatch.setattr(module, "predict", cached)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Chosen:
    """Chooses settings for sd15 on a card with so many bytes free."""

    def on(free: float, card: Assumed | None = CARD, **flags: Any) -> tuple[RunConfig, str]:
        monkeypatch.setattr(fits, "card_and_free_memory", lambda *_: (card, int(free)))
        return choose_preset(lambda: SD15, flags, {}, recipe_of("sd15"))

    return on


def planned(preset: Preset, **flags: Any) -> Plan:
    """The plan of a preset on that card."""
    return predicted(resolve(flags, {}, recipe_of("sd15"), preset), CARD)


def need(preset: Preset, **flags: Any) -> int:
    """What a preset asks of the card, whose context is there by then."""
    found = planned(preset, **flags)
    return found.peak_bytes - found.context


FULL: dict[str, Any] = {"tune": {"mode": "full"}}
LARGE: dict[str, Any] = {"resolution": 1024}
BATCHES: dict[str, Any] = {"tune": {"batch_size": 4}, "embed": {"batch_size": 4}}


@each("flags", [{}, FULL, LARGE | BATCHES])
def test_auto_is_the_fastest_preset_that_fits(chosen: Chosen, flags: dict[str, Any]) -> None:
    """At each step of the free memory: 90 percent of it is enough for the chosen preset, and not for any faster one."""
    needs = {preset: need(preset, **flags) for preset in PRESETS}
    assert len(set(needs.values())) > 1
    for size in set(needs.values()):
        for free in (size / 0.9 + 1, size / 0.9 - 1):
            fitting = [preset for preset in PRESETS if needs[preset] <= 0.9 * int(free)]
            if not fitting:
                with pytest.raises(OutOfMemory):
                    chosen(free, **flags)
                continue
            run, why = chosen(free, **flags)
            assert run.preset == fitting[0]
            assert run == resolve(flags, {}, recipe_of("sd15"), fitting[0])
            assert f"{needs[fitting[0]] / GIB:.1f} GiB predicted" in why


@each("flags", [{"tune": {"mode": "embedding"}}, {"tune": {"mode": "embedding"}, "embed": {"batch_size": 8}}])
def test_auto_does_not_weigh_a_stage_that_does_not_run(chosen: Chosen, flags: dict[str, Any]) -> None:
    """A card whose memory is just enough for the other stages is enough for mode embedding; a byte less is not."""
    for preset in PRESETS:
        assert "tune" not in planned(preset, **flags).stages
    size = need("24gb", **flags)
    assert chosen(size / 0.9 + 1, **flags)[0].preset == "24gb"
    assert chosen(size / 0.9 - 1, **flags)[0].preset != "24gb"


@each(
    "flags, free, preset",
    [
        ({}, 22, "24gb"),
        ({}, 3.5, "16gb"),
        ({}, 2.65, "12gb"),
        (FULL, 22, "24gb"),
        (FULL, 10.5, "24gb"),
        (FULL, 7.5, "12gb"),
        (LARGE, 22, "24gb"),
        (LARGE, 3.55, "8gb"),
    ],
)
def test_auto_on_cards_of_these_sizes(chosen: Chosen, flags: dict[str, Any], free: float, preset: str) -> None:
    """GiB that are free, and what is taken."""
    assert chosen(free * GIB, **flags)[0].preset == preset


def test_every_preset_is_taken_by_some_card(chosen: Chosen) -> None:
    """For LoRA on pictures of 1024 pixels squared each has a size of card of its own."""
    taken = [chosen(size / 0.9 + 1, **LARGE)[0].preset for size in (need(preset, **LARGE) for preset in PRESETS)]
    assert taken == PRESETS


def test_auto_counts_the_pictures_too(chosen: Chosen) -> None:
    """Training would fit, but not the decoding of four at once; of one it does."""
    found = planned("24gb")
    trained = max(found.needs("embed"), found.needs("tune"))
    assert trained < found.needs("decode") == found.peak_bytes
    free = (found.needs("decode") - found.context) / 0.9 - GIB / 10
    assert 0.9 * free > trained - found.context
    assert chosen(free)[0].preset == "16gb"
    assert chosen(free, edit={"batch_size": 1})[0].preset == "24gb"


def test_no_card_is_a_preset_of_its_own(chosen: Chosen) -> None:
    """Whatever the memory; and a CPU that was asked for."""
    assert [chosen(1, None)[0].preset, chosen(1, None)[0].memory.device, chosen(1, None)[1]] == ["cpu", "cpu", "no CUDA device found"]
    assert chosen(1, None, memory={"device": "cpu"})[1] == "asked for a CPU"
    assert fits.card_and_free_memory("cpu")[0] is None


def test_a_preset_that_was_asked_for_is_not_weighed(chosen: Chosen) -> None:
    """However little is free."""
    run, why = chosen(1, preset="24gb")
    assert (run.preset, run.memory, why) == ("24gb", resolve({}, {}, {}, "24gb").memory, "asked for")


@each("mode", MODES)
def test_too_little_memory_is_an_error_that_says_what_to_do(chosen: Chosen, mode: Mode) -> None:
    """The stage of the tightest preset, what it needs, what is free, and the next lever."""
    flags = {"tune": {"mode": mode}}
    with pytest.raises(OutOfMemory) as caught:
        chosen(1.25 * GIB, **flags)
    worst, lever = planned("8gb", **flags).worst, "--master-weights bf16-stochastic" if mode == "full" else "--quantize int8"
    assert worst == ("tune" if mode == "full" else "decode")
    assert f"stage {worst} needs {need('8gb', **flags) / GIB:.1f} GiB (predicted), and 1.2 GiB is available on the card" in caught.value.got
    assert caught.value.got.endswith("; --preset auto uses at most 90% of it")
    assert caught.value.remedy.startswith(f"{lever} saves about ")
    assert isinstance(caught.value, ImagicError)


def test_without_a_lever_the_picture_has_to_shrink(chosen: Chosen) -> None:
    """When all are active."""
    with pytest.raises(OutOfMemory, match="lower --resolution"):
        chosen(1 * GIB, memory={"quantize": "nf4"})


def test_without_a_lever_an_edit_needs_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command ``edit`` has no ``--resolution``: the adapter determines it."""
    monkeypatch.setattr(fits, "card_and_free_memory", lambda *_: (CARD, 2**20))
    with pytest.raises(OutOfMemory) as planned_error:
        choose_preset_for_edit(lambda: SD15, resolve({}, {}, {}), {"preset": "auto"})
    odd = replace(SD15, denoiser=SD15.denoiser | {"down_block_types": ["Odd"] * 4})  # cannot be planned
    unplanned_error = out_of_memory_error(odd, resolve({}, {}, {}), CARD, "decode", 1, levers=levers.EDIT_LEVERS)
    assert "(predicted)" not in unplanned_error.got
    for error in (planned_error.value, unplanned_error):
        assert error.remedy.endswith("close other programs that use the device, or use one with more memory")
        assert "--resolution" not in error.remedy


def test_the_memory_limit_is_exact(folder: Path) -> None:
    """One byte less than the worst stage needs is an error that names the stage; allowances are not required."""
    base, run = architecture(str(folder)), tiny_config(folder, "full")
    assumed = Assumed("cpu", "fp32", "adam")
    stages = predict(base, run, assumed).stages
    worst = max(stages, key=lambda name: stages[name].total)
    check_memory(base, run, stages[worst].total, assumed)
    with pytest.raises(OutOfMemory, match=f"stage {worst} needs .* on this machine"):
        check_memory(base, run, stages[worst].total - 1, assumed)


Flags = dict[str, str | None]


@pytest.fixture
def asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Flags], tuple[dict[str, Any], RunConfig, Assumed]]:
    """What ``plan`` prints with these flags, and the settings that it planned."""
    seen: list[tuple[RunConfig, Assumed]] = []

    def watched(base: Any, run: RunConfig, assumed: Assumed) -> Plan:
        seen.append((run, assumed))
        return predict(base, run, assumed)

    def command(flags: Flags) -> tuple[dict[str, Any], RunConfig, Assumed]:
        monkeypatch.setattr(prediction, "predict", watched)
        assert cli.main(["plan", "--json", *(token for pair in flags.items() for token in pair if token is not None)]) == 0
        return json.loads(capsys.readouterr().out), *seen[-1]

    return command


def with_lever(flags: Flags, lever: str) -> Flags:
    """The flags of a command with those of a lever in their place."""
    tokens = lever.split()
    values = {one: next_one for one, next_one in zip(tokens, [*tokens[1:], "--"], strict=True) if one.startswith("--")}
    new = flags | {flag: None if value.startswith("--") else value for flag, value in values.items()}
    if lever == "--mode lora":
        new.pop("--master-weights", None)
    return new


@pytest.mark.parametrize(
    ("start", "last"),
    [
        ({"--mode": "lora", "--resolution": "768"}, "--quantize nf4"),
        pytest.param(
            {"--mode": "full", "--optimizer": "adam", "--embed.batch-size": "2", "--tune.batch-size": "2"},
            "--edit.batch-size 1",
            marks=pytest.mark.slow,
        ),
        pytest.param({"--mode": "full", "--dtype": "fp16"}, "--quantize nf4", marks=pytest.mark.slow),
        pytest.param({"--mode": "embedding", "--embed.batch-size": "8"}, "--quantize nf4", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_lever_saves_what_it_promises(
    asked: Callable[[Flags], tuple[dict[str, Any], RunConfig, Assumed]], start: Flags, last: str
) -> None:
    """The flag that is named, put on the command line, lowers the stage by just that; one after the other, until none is left."""
    flags: Flags = {"--base": "sd15", "--preset": "24gb"} | start
    used: list[str] = []
    found, run, assumed = asked(flags)
    while lever := next_lever(SD15, run, assumed, stage := found["worst_stage"]):
        flag, saved = lever
        assert flag not in used
        assert "lora" not in flag or run.tune.mode == "full"
        used.append(flag)
        flags = with_lever(flags, flag)
        before = found["stages"][stage]["peak_bytes"]
        found, run, assumed = asked(flags)
        assert before - found["stages"][stage]["peak_bytes"] == saved > before / 50
    assert used[-1] == last
    assert len(used) >= 4


@each("mode, stage", [(mode, stage) for mode in MODES for stage in ("encode", "embed", "tune", "sample", "decode")
                                      if (mode, stage) != ("embedding", "tune")])  # fmt: skip
def test_no_lever_of_the_other_mode_is_named(mode: Mode, stage: str) -> None:
    """Master weights are for full, 4 bits for a frozen denoiser; LoRA is the last way out of full; mode embedding has no batch to tune."""
    run = resolve({"tune": {"mode": mode}, "preset": "8gb", "edit": {"batch_size": 1}}, {}, recipe_of("sd15"))
    found: list[str] = []
    while lever := next_lever(SD15, run, CARD, stage):
        assert lever[0] not in found
        found.append(lever[0])
        change = dict(levers.FIT_LEVERS)[lever[0]]
        run = levers.with_lever(run, change)
        if lever[0] == "--mode lora":
            break
    frozen = {"--master-weights bf16-stochastic", "--mode lora"}
    wrong = {"lora": frozen, "full": {"--quantize nf4"}, "embedding": frozen | {"--embed.batch-size 1 --tune.batch-size 1"}}[mode]
    assert not wrong & set(found)


@each("assumed", [Assumed("cuda", "fp16", "adam8bit"), Assumed("cpu", "fp32", "adam")])
def test_no_lever_is_named_that_the_device_cannot_use(assumed: Assumed) -> None:
    """Without bf16 arithmetic there are no bf16 master weights."""
    run = resolve({"tune": {"mode": "full"}, "preset": "8gb"}, {}, recipe_of("sd15"))
    for optimizer in ("adam8bit", "adam"):
        lever = next_lever(SD15, run.model_copy(update={"memory": run.memory.model_copy(update={"optimizer": optimizer})}), assumed, "tune")
        assert lever is not None
        assert lever[0] != "--master-weights bf16-stochastic"


OWN = {"steps": 30, "guidance_scale": 3.0, "ddim_eta": 0.5, "start": "image", "strength": 0.6, "source_eta": 0.2}


@each(
    "free, given, batch",
    [
        (22, {}, 4),
        (4, {}, 2),
        (3.69, {}, 1),
        (4, {"edit": {"batch_size": 3, "steps": 7}}, 3),
        (22, {"preset": "8gb"}, 1),
        (None, {}, 6),
        (22, {"memory": {"device": "cpu", "vae_tiling": True}}, 6),
    ],
)
def test_an_edit_keeps_the_adapters_own_sampling(
    monkeypatch: pytest.MonkeyPatch, free: float | None, given: dict[str, Any], batch: int
) -> None:
    """But for the batch size, which is the machine's where it has a card; flags stand above both."""
    made = validated({"edit": OWN | {"batch_size": 6}, "resolution": 1024, "seed": 9})
    on_cpu = free is None or given.get("memory", {}).get("device") == "cpu"
    monkeypatch.setattr(fits, "card_and_free_memory", lambda *_: (None if on_cpu else CARD, int((free or 1) * GIB)))
    asked = {"edit": {}, "memory": {}, "preset": "auto"} | given
    run = choose_preset_for_edit(lambda: SD15, made, asked)
    assert run.edit.model_dump() == EditConfig().model_dump() | OWN | {"batch_size": batch} | given.get("edit", {})
    assert run.resolution == 1024
    assert (run.memory.device == "cpu") == on_cpu
    assert run.memory.vae_tiling == given.get("memory", {}).get("vae_tiling", run.preset == "8gb")


def test_an_edit_does_not_weigh_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that is too small to train with the fastest preset samples single images with it; one too small for that is rejected."""
    made, given = resolve({}, {}, {}, "24gb"), {"preset": "auto", "edit": {"batch_size": 1}}
    found = planned("24gb", edit={"batch_size": 1})
    most = max(found.needs(stage) for stage in ("encode", "sample", "decode"))
    assert most < found.needs("tune")
    free = (most - found.context) / 0.9 + 1
    monkeypatch.setattr(fits, "card_and_free_memory", lambda *_: (CARD, int(free)))
    assert choose_preset_for_edit(lambda: SD15, made, given).preset == "24gb"
    monkeypatch.setattr(fits, "card_and_free_memory", lambda *_: (CARD, GIB))
    with pytest.raises(OutOfMemory, match=r"stage (encode|sample|decode) needs"):
        choose_preset_for_edit(lambda: SD15, made, given)


def test_an_edit_without_weights_is_planned_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that is just enough for the base itself takes an adapter of mode embedding, and not one with LoRA layers."""
    modes: list[Mode] = ["lora", "embedding"]
    runs = {mode: resolve({"tune": {"mode": mode}, "edit": {"batch_size": 1}}, {}, {}, "24gb") for mode in modes}
    most = max(predicted(runs["embedding"], CARD).needs(stage) for stage in ("encode", "sample", "decode"))
    free = (most - predicted(runs["embedding"], CARD).context) / 0.9 + 1
    monkeypatch.setattr(fits, "card_and_free_memory", lambda *_: (CARD, int(free)))
    given = {"preset": "auto", "edit": {"batch_size": 1}}
    assert [choose_preset_for_edit(lambda: SD15, runs[mode], given).preset == "24gb" for mode in modes] == [False, True]


def test_the_largest_batch_fits_the_free_memory() -> None:
    """Doubled as long as the plan fits 90 percent, up to the number of images and to 16; never less than what was asked for."""
    run = resolve({"base": "sd15"}, {}, recipe_of("sd15"), "12gb")  # a batch size of 2

    def needs(size: int) -> int:
        plan = predict(SD15, run.model_copy(update={"edit": run.edit.model_copy(update={"batch_size": size})}), CARD)
        return max(plan.needs(stage) for stage in EDIT_STAGES) - plan.context

    assert needs(2) < needs(4) < needs(8)
    for size in (2, 4, 8):
        free = int(needs(size) / 0.9) + 1
        assert largest_batch(SD15, run, CARD, free, 100) == size
        assert largest_batch(SD15, run, CARD, free - 2 * 2**20, 100) == max(2, size // 2)
    assert [largest_batch(SD15, run, CARD, 2**40, images) for images in (1, 2, 3, 5, 100)] == [2, 2, 4, 8, 16]


def test_what_a_rehearsal_of_one_photo_says_of_several() -> None:
    """On a U-Net, where a plan counts several photos, it is no less. So photos of a transformer that was rehearsed are fitted together."""
    run = resolve({"base": "sd15"}, {}, recipe_of("sd15"), "12gb")
    one = predicted(run, CARD)
    added = predicted(run, CARD, 2).stages["tune"].weights - one.stages["tune"].weights
    for photos in (2, 8):
        for name, peak in predicted(run, CARD, photos).stages.items():
            if name not in ("encode", "sample", "decode"):
                more = 0 if name == "embed" else (photos - 1) * added
                assert 0.999 <= one.stages[name].times(photos, more).total / peak.total <= 1.05, name
    klein = PUBLISHED["klein-base-4b"]
    flow = resolve({"base": "klein-base-4b"}, {}, recipe_for(klein, "klein-base-4b"), "12gb", large=True)
    several = most_together(klein, flow, CARD, 24 * GIB, 64)
    fitting = predict(klein, flow, CARD, several)
    assert 1 < several < 64
    assert fitting.peak_bytes - fitting.context <= 0.9 * 24 * GIB


def test_as_many_photos_are_fitted_together_as_the_free_memory_allows() -> None:
    """The most whose plan fits 90 percent; one where that does not fit either, in mode full, and on a base that is not planned."""
    run = resolve({"base": "sd15"}, {}, recipe_of("sd15"), "12gb")

    def needs(photos: int) -> int:
        plan = predicted(run, CARD, photos)
        return plan.peak_bytes - plan.context

    assert needs(2) < needs(3) < needs(4) < needs(9)
    for photos in (2, 3, 9):
        free = int(needs(photos) / 0.9) + 1
        assert [most_together(SD15, run, CARD, free - less, 40) for less in (0, 2 * 2**20)] == [photos, photos - 1]
    assert [most_together(SD15, run, CARD, 2**50, photos) for photos in (1, 5, 1000)] == [1, 5, 64]
    assert most_together(SD15, run, CARD, 0, 5) == 1
    assert most_together(SD15, resolve({"tune": {"mode": "full"}}, {}, recipe_of("sd15"), "24gb"), CARD, 2**50, 5) == 1
    assert most_together(PUBLISHED["sd3-medium"], run, CARD, 2**50, 5) == 1


def test_what_running_out_of_memory_looks_like() -> None:
    """A card's own error, the real one of PyTorch's allocator on this machine, and Python's; nothing else."""
    with pytest.raises(RuntimeError) as real:
        torch.empty(1 << 50, dtype=torch.uint8)
    for error in (torch.OutOfMemoryError("CUDA out of memory."), real.value, MemoryError()):
        assert is_out_of_memory(error)
    for error in (RuntimeError("a bug"), ValueError("can't allocate memory"), KeyboardInterrupt()):
        assert not is_out_of_memory(error)


def test_what_was_kept_is_saved_only_when_memory_runs_out(folder: Path) -> None:
    """The statement about it is in the error; any other error passes unchanged."""
    base, run, saved = opened(folder), tiny_config(folder), []

    def kept() -> str:
        saved.append(1)
        return "it is kept"

    with explain_out_of_memory(base.architecture, run, base.runtime, "tune", kept):
        pass
    with pytest.raises(ZeroDivisionError), explain_out_of_memory(base.architecture, run, base.runtime, "tune", kept):
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match=r"^a bug$"), explain_out_of_memory(base.architecture, run, base.runtime, "tune", kept):
        raise RuntimeError("a bug")
    assert saved == []
    with (
        pytest.raises(OutOfMemory, match=r"stage tune.*; it is kept"),
        explain_out_of_memory(base.architecture, run, base.runtime, "tune", kept),
    ):
        raise MemoryError
    assert saved == [1]
    assert "; " not in out_of_memory_error(base.architecture, run, Assumed("cpu", "fp32", "adam"), "tune", 1).got


CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
HOST = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")
Starve = Callable[..., Any]


@pytest.fixture
def starve(monkeypatch: pytest.MonkeyPatch) -> Starve:
    """Makes one step of a stage fail, inside a ``with``."""

    def failing(stage: str, error: BaseException, at: int = 0) -> Any:
        real = Stage.step

        def step(self: Stage, k: int) -> StepReport:
            if (self.name, k) == (stage, at):
                raise error
            return real(self, k)

        context = pytest.MonkeyPatch.context()
        patch = context.__enter__()
        patch.setattr(Stage, "step", step)
        return _Undone(context)

    return failing


class _Undone:
    """Leaves a patch at the end of a ``with``."""

    def __init__(self, context: Any) -> None:
        self.context = context

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        self.context.__exit__(None, None, None)


def bytes_of(adapter: Adapter) -> dict[str, bytes]:
    """Everything of an adapter that its training decided."""
    return {str(path.relative_to(adapter.folder)): path.read_bytes() for path in adapter.folder.rglob("*") if path.suffix == ".safetensors"}


def finished(steps: Iterator[StepReport]) -> list[tuple[str, int]]:
    return [(report.stage, report.step) for report in steps]


MORE = {"gradient_checkpointing": True, "optimizer_in_backward": True, "idle": "release", "vae_slicing": True}


@pytest.mark.parametrize(
    ("mode", "error", "at", "levers"),
    [("lora", CUDA, 0, {}), ("full", HOST, 2, MORE), pytest.param("lora", MemoryError(), 3, MORE, marks=pytest.mark.slow)],
    ids=["card", "host, more levers", "python, more levers"],
)
def test_the_embedding_outlasts_a_lack_of_memory(
    folder: Path,
    photo_file: Path,
    fitted: Callable[..., Adapter],
    tmp_path: Path,
    starve: Starve,
    mode: Mode,
    error: BaseException,
    at: int,
    levers: dict[str, Any],
) -> None:
    """With --resume the fit goes on from it, to the bits of a fit that nothing disturbed, and nothing is left over."""
    store, config = Store(tmp_path), tiny_config(folder, mode)
    message = r"stage tune needs .*; 3 of 3 steps of stage embed are saved; run the same command with --resume to continue\. "
    with starve("tune", error, at), pytest.raises(OutOfMemory, match=message) as caught:
        finished(fit(photo_file, PROMPT, config, store, "one"))
    assert caught.value.__cause__ is error
    assert [path.name for path in tmp_path.iterdir()] == [".one.checkpoints"]
    assert store.names() == []
    reports = finished(fit(photo_file, PROMPT, tiny_config(folder, mode, memory=levers), store, "one", resume=True))
    assert reports == [("tune", k) for k in (1, 2, 3, 4)]
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    found, undisturbed = store.read("one"), fitted(mode)
    assert bytes_of(found) == bytes_of(undisturbed)
    assert len(bytes_of(found)) == 2
    assert (found.folder / STEPS).read_text() == (undisturbed.folder / STEPS).read_text()
    assert found.record.losses == undisturbed.record.losses


def test_the_last_checkpoint_outlasts_a_lack_of_memory(
    folder: Path, photo_file: Path, fitted: Callable[..., Adapter], tmp_path: Path, starve: Starve
) -> None:
    """Where stage tune was saved as well, it is not begun again."""
    store, config = Store(tmp_path), tiny_config(folder, checkpoint={"steps": 2})
    with starve("tune", CUDA, 3), pytest.raises(OutOfMemory, match="; 2 of 4 steps of stage tune are saved"):
        finished(fit(photo_file, PROMPT, config, store, "one"))
    assert finished(fit(photo_file, PROMPT, config, store, "one", resume=True)) == [("tune", 3), ("tune", 4)]
    assert bytes_of(store.read("one")) == bytes_of(fitted("lora"))


def test_a_given_base_is_given_back(folder: Path, photo_file: Path, tmp_path: Path, starve: Starve) -> None:
    """Bit-equal to before, though the fit failed in the middle of its tuning."""
    base = opened(folder, "full")
    before, picture = weights(base.denoiser), output(base)
    with starve("tune", CUDA, 2), pytest.raises(OutOfMemory):
        finished(fit(photo_file, PROMPT, tiny_config(folder, "full"), Store(tmp_path), "one", base=base))
    assert same(weights(base.denoiser), before)
    assert torch.equal(output(base), picture)


def test_before_anything_is_saved_nothing_is_promised(folder: Path, photo_file: Path, tmp_path: Path, starve: Starve) -> None:
    """And nothing is left."""
    with starve("embed", CUDA, 2), pytest.raises(OutOfMemory, match="stage embed") as caught:
        finished(fit(photo_file, PROMPT, tiny_config(folder), Store(tmp_path), "one"))
    assert "saved" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("stage", "left"), [("embed", []), ("tune", [".one.checkpoints"])])
def test_other_errors_pass_unchanged(folder: Path, photo_file: Path, tmp_path: Path, starve: Starve, stage: str, left: list[str]) -> None:
    """With their own words; what was saved before is there."""
    error = RuntimeError("a bug")
    with starve(stage, error), pytest.raises(RuntimeError) as caught:
        finished(fit(photo_file, PROMPT, tiny_config(folder), Store(tmp_path), "one"))
    assert caught.value is error
    assert [path.name for path in tmp_path.iterdir()] == left


def failing(error: BaseException, after: int = 0) -> Callable[..., Iterator[Image.Image]]:
    """Stands in for generate(): so many pictures, then an error."""

    def generated(*_: object) -> Iterator[Image.Image]:
        for _ in range(after):
            yield Image.new("RGB", (50, 37))
        raise error

    return generated


@pytest.mark.parametrize(("mode", "error"), [("lora", CUDA), ("full", HOST)], ids=["card", "host"])
def test_an_adapter_is_stored_without_its_preview(
    folder: Path,
    photo_file: Path,
    fitted: Callable[..., Adapter],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: Mode,
    error: BaseException,
) -> None:
    """Its files verify and are those of an undisturbed fit; the sheet shows the photo alone, and a warning says why."""
    monkeypatch.setattr("imagic_lora.training.run.generate", failing(error, after=1))
    with pytest.warns(ImagicWarning, match="stored without a preview: stage decode needs"):
        made = result(fit(photo_file, PROMPT, tiny_config(folder, mode), Store(tmp_path), "one"))
    assert made is not None
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    found = Store(tmp_path).read("one")
    assert bytes_of(found) == bytes_of(fitted(mode))
    with Image.open(found.folder / PREVIEW) as preview, Image.open(fitted(mode).folder / PREVIEW) as full:
        assert preview.width < full.width / 2


def test_other_errors_of_a_preview_pass_unchanged(folder: Path, photo_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is stored."""
    monkeypatch.setattr("imagic_lora.training.run.generate", failing(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match=r"^a bug$"):
        result(fit(photo_file, PROMPT, tiny_config(folder), Store(tmp_path), "one"))
    assert Store(tmp_path).names() == []


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in an empty folder: its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console.err, "width", 400)

    def run(*tokens: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with warnings.catch_warnings():
            warnings.simplefilter("default", ImagicWarning)
            code = cli.main([str(token) for token in tokens])
        out, err = capsys.readouterr()
        return code, out, " ".join(err.split())

    return run


SHORT = ("--device", "cpu", "--embed.steps", "2", "--tune.steps", "2", "--edit.steps", "2", "--rank", "2", "--name", "one")
SHORT += ("--convergence-every", "0")


def test_a_fit_without_memory_on_the_command_line(
    command: Callable[..., tuple[int, str, str]], folder: Path, photo_file: Path, starve: Starve
) -> None:
    """Exit code 2 and no traceback; the same command goes on with --resume, and says so without."""
    tokens = ["fit", photo_file, PROMPT, "--base", folder, *SHORT]
    with starve("tune", HOST):
        code, _, err = command(*tokens)
    assert code == 2
    assert "stage tune needs" in err
    assert "2 of 2 steps of stage embed are saved; run the same command with --resume to continue" in err
    assert "Traceback" not in err
    code, _, err = command(*tokens)
    assert code == 2
    assert "an unfinished fit of one" in err
    with starve("tune", HOST):
        code, out, _ = command(*tokens, "--resume", "--json")
    assert code == 2
    assert set(json.loads(out)["error"]) == {"got", "expected", "remedy"}
    code, _, err = command(*tokens, "--resume", "--gradient-checkpointing")
    assert code == 0, err
    assert "tune 2/2" in err
    assert "embed 2/2" not in err
    assert [path.name for path in Path("adapters").iterdir()] == ["one"]


@pytest.mark.parametrize("error", [CUDA, HOST], ids=["card", "host"])
def test_an_edit_without_memory_on_the_command_line(
    command: Callable[..., tuple[int, str, str]],
    fitted: Callable[..., Adapter],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    error: BaseException,
) -> None:
    """Exit code 2 and no traceback; the images written so far are kept, and the error names their folder."""
    adapter, place = fitted("lora"), tmp_path / "pictures"
    monkeypatch.setattr(editor, "generate", failing(error, after=2))
    flags = ("--store", adapter.folder.parent, "--out", place, "--seed", "0:4", "--batch-size", "2", "--device", "cpu")
    code, _, err = command("edit", adapter.folder.name, *flags)
    assert code == 2
    assert f"the images written so far are in {place}" in err
    assert "Traceback" not in err
    assert sorted(path.name for path in place.iterdir()) == ["eta0.7-seed0.png", "eta0.7-seed1.png"]


def test_a_fit_that_cannot_fit_is_rejected_before_anything_is_loaded(
    command: Callable[..., tuple[int, str, str]], folder: Path, photo_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a card that is too small for every preset, and on a machine without enough memory."""
    monkeypatch.setattr(imagic, "load_base", lambda *_, **__: pytest.fail("opened"))
    tokens = ["fit", photo_file, PROMPT, "--base", folder]
    with monkeypatch.context() as patch:
        patch.setattr(fits, "card_and_free_memory", lambda *_: (CARD, 1000))
        code, _, err = command(*tokens)
    assert code == 2
    assert "is available on the card" in err
    monkeypatch.setattr(imagic, "free_memory", lambda device: 1000)
    code, _, err = command(*tokens, "--device", "cpu")
    assert code == 2
    assert "0.0 MiB is available on this machine" in err
    assert "Traceback" not in err
