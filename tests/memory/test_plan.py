"""The analytic plan and the command that prints it: what adds up, what matters, what is promised, and that it needs no torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from common import MODES, PROMPT, each, tiny_config
from safetensors.torch import load_file

import imagic_lora.cli.app as cli
from imagic_lora.adapters.adapter import Adapter
from imagic_lora.adapters.store import Store
from imagic_lora.bases.loading.configs import architecture
from imagic_lora.bases.loading.published import PUBLISHED
from imagic_lora.core.config import Mode, RunConfig
from imagic_lora.core.settings.merging import merged
from imagic_lora.core.settings.recipes import recipe_of
from imagic_lora.core.settings.resolve import resolve
from imagic_lora.memory.plan import Assumed, Peak, Plan, assume
from imagic_lora.memory.prediction import predict
from imagic_lora.training.fit import fit

PARTS = ("weights", "gradients", "optimizer", "activations", "fragmentation", "context")
STAGES = ["encode", "embed", "tune", "sample", "decode"]
UNTUNED = ["encode", "embed", "sample", "decode"]
GIB = 2**30
Planned = Callable[..., dict[str, Any]]


def run_of(base: str, mode: str, preset: str, **changes: Any) -> RunConfig:
    """The settings that the command line would come to."""
    return resolve(merged({"base": base, "preset": preset, "tune": {"mode": mode}}, changes), {}, recipe_of(base))


def plan_of(mode: str = "lora", preset: str = "24gb", base: str = "sd15", **changes: Any) -> Plan:
    return predict(architecture(base), run_of(base, mode, preset, **changes))


@pytest.fixture
def planned(capsys: pytest.CaptureFixture[str]) -> Planned:
    """What ``plan --json`` prints with these flags."""

    def command(*tokens: object) -> dict[str, Any]:
        assert cli.main(["plan", *map(str, tokens), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return command


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True).stdout


def test_a_plan_needs_no_torch_and_no_time() -> None:
    """Under two seconds of a core, imports and all."""
    code = "import sys, time; from imagic_lora.cli.app import main; main(['plan', '--base', 'sd15', '--preset', '8gb', '--json'])"
    found = json.loads(python(f"{code}; assert 'torch' not in sys.modules; assert time.process_time() < 2, time.process_time()"))
    assert found["peak_bytes"] == plan_of("lora", "8gb").peak_bytes


@pytest.mark.parametrize("command", ["", "fit"])
def test_help_needs_no_torch(command: str) -> None:
    """Nor does it take its time."""
    code = f"import sys; from imagic_lora.cli.app import main; assert main({[*command.split(), '--help']}) == 0"
    code += "; assert 'torch' not in sys.modules"
    assert "Usage" in python(code)


@each("mode", MODES)
@each("preset", ["8gb", "cpu"])
@each("base", ["sd15", "sd21", "critters"])
def test_the_parts_add_up(planned: Planned, base: str, preset: str, mode: Mode) -> None:
    """Those of every stage to its peak, and the highest is that of the run."""
    found = planned("--base", base, "--preset", preset, "--mode", mode)
    assert list(found["stages"]) == (UNTUNED if mode == "embedding" else STAGES)
    for stage in found["stages"].values():
        assert all(stage[part] >= 0 for part in PARTS)
        assert sum(stage[part] for part in PARTS) == stage["peak_bytes"]
    peaks = {name: stage["peak_bytes"] for name, stage in found["stages"].items()}
    assert found["peak_bytes"] == peaks[found["worst_stage"]] == max(peaks.values())
    assert (found["base"], found["mode"], found["preset"]) == (base, mode, preset)
    assert found["stages"]["embed"]["gradients"] == 0
    assert mode == "embedding" or found["stages"]["tune"]["optimizer"] > 0


def test_allowances_are_the_stated_ones() -> None:
    """A twentieth of all that comes and goes, and half a gigabyte of context."""
    peak = Peak(weights=1000, gradients=100, optimizer=40, activations=60)
    plan = Plan(Assumed("cuda", "bf16", "adam"), {"tune": peak}, context=7, host=0, adapter=0, checkpoint=0)
    assert (peak.total, peak.fragmentation, plan.needs("tune"), plan.peak_bytes) == (1200, 10, 1217, 1217)
    assert plan_of().context == 500 * 2**20


def test_people_get_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    """With every stage, the peak, and what it is."""
    assert cli.main(["plan", "--base", "sd15", "--preset", "8gb"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert all(stage in out for stage in STAGES)
    assert f"Peak {plan_of('lora', '8gb').peak_bytes / GIB:.2f} GiB in stage decode" in out
    assert "Predicted, not measured" in out


@pytest.mark.slow
def test_a_folder_is_planned_like_a_name(planned: Planned, folder: Path) -> None:
    """By its configs alone; the exact plan agrees on what does not depend on the method."""
    found, exact = planned("--base", folder), planned("--base", folder, "--exact")
    assert found["base"] == str(folder)
    assert found["stages"] != exact["stages"]
    for size in ("adapter_bytes", "checkpoint_bytes"):
        assert found[size] == exact[size]


@each("base", ["/nowhere", "runwayml/some-model", "sd16"])
def test_a_base_of_unknown_sizes_is_rejected(capsys: pytest.CaptureFixture[str], base: str) -> None:
    """Without a traceback, and without asking a network."""
    assert cli.main(["plan", "--base", base, "--json"]) == 2
    out, err = capsys.readouterr()
    assert base in json.loads(out)["error"]["got"]
    assert "sd21" in json.loads(out)["error"]["expected"]
    assert "Traceback" not in err


@each("content", [None, "{", "[]", "{}"])
def test_a_folder_without_sizes_is_rejected(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, content: str | None) -> None:
    """A config that is missing, broken or says too little."""
    shutil.copy(folder / "model_index.json", tmp_path)
    for part, file in {"unet": "config", "vae": "config", "text_encoder": "config", "scheduler": "scheduler_config"}.items():
        (tmp_path / part).mkdir()
        (tmp_path / part / f"{file}.json").write_text((folder / part / f"{file}.json").read_text())
    assert cli.main(["plan", "--base", str(tmp_path)]) == 0
    config = tmp_path / "unet/config.json"
    config.unlink()
    if content is not None:
        config.write_text(content)
    assert cli.main(["plan", "--base", str(tmp_path)]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_batch_sets_both_batches(planned: Planned) -> None:
    """Those of the two training stages, and nothing else."""
    base = ("--base", "sd15", "--preset", "24gb")
    one, four, asked = planned(*base), planned(*base, "--batch", 4), planned(*base, "--embed.batch-size", 4, "--tune.batch-size", 4)
    assert four == asked
    changed = [stage for stage in STAGES if four["stages"][stage] != one["stages"][stage]]
    assert changed == ["embed", "tune"]
    assert all(four["stages"][stage]["activations"] > 3 * one["stages"][stage]["activations"] for stage in changed)


def test_batch_sets_the_one_batch_of_mode_embedding(planned: Planned) -> None:
    """There, and where the mode is in a file, it does not clash with a stage that does not run."""
    base = ("--base", "sd15", "--preset", "24gb", "--mode", "embedding")
    assert planned(*base, "--batch", 4) == planned(*base, "--embed.batch-size", 4) != planned(*base)


def test_mode_embedding_is_planned_like_lora_without_its_layers() -> None:
    """Both stages that the modes share are equal; sampling takes just the LoRA weights less."""
    lora, embedding = plan_of("lora", "8gb"), plan_of("embedding", "8gb")
    assert list(embedding.stages) == UNTUNED
    assert [embedding.stages[name] for name in ("encode", "embed")] == [lora.stages[name] for name in ("encode", "embed")]
    stored = 3 * 77 * 768 * 4
    assert lora.stages["decode"].weights - embedding.stages["decode"].weights == lora.adapter - stored
    assert embedding.adapter == stored


def test_flags_and_files_matter(planned: Planned, tmp_path: Path) -> None:
    """A lower resolution, the other mode, and settings from a file, below the flags."""
    base = ("--base", "sd15", "--preset", "12gb")
    file = tmp_path / "settings.yaml"
    file.write_text(json.dumps({"tune": {"mode": "full"}, "resolution": 256}))
    peaks = {
        name: planned(*base, *flags)["peak_bytes"]
        for name, flags in {
            "plain": (),
            "small": ("--resolution", 256),
            "full": ("--mode", "full"),
            "small full": ("--mode", "full", "--resolution", 256),
            "file": ("--config", file),
            "file and flag": ("--config", file, "--mode", "lora"),
        }.items()
    }
    assert peaks["small"] < peaks["plain"] < peaks["small full"] < peaks["full"]
    assert peaks["file"] == peaks["small full"]
    assert peaks["file and flag"] == peaks["small"]


def test_what_auto_is_taken_for() -> None:
    """A card with bf16, unless a device, a precision or an optimiser was asked for."""
    found = [assume(RunConfig.model_validate({"memory": memory})) for memory in ({}, {"device": "cpu"}, {"dtype": "fp16"})]
    assert found == [Assumed("cuda", "bf16", "adam8bit"), Assumed("cpu", "fp32", "adam"), Assumed("cuda", "fp16", "adam8bit")]
    run = RunConfig.model_validate({"memory": {"optimizer": "adam", "dtype": "bf16"}})
    assert assume(run, "cpu") == Assumed("cpu", "bf16", "adam")


LEVERS: list[tuple[str, str, dict[str, Any]]] = [  # mode, the stage that it lowers, and the lever
    ("lora", "embed", {"memory": {"gradient_checkpointing": True}}),
    ("lora", "tune", {"memory": {"gradient_checkpointing": True}}),
    ("full", "tune", {"memory": {"gradient_checkpointing": True}}),
    ("full", "tune", {"memory": {"optimizer_in_backward": True}}),
    ("full", "tune", {"memory": {"optimizer": "adam8bit"}}),
    ("full", "tune", {"memory": {"master_weights": "bf16-stochastic"}}),
    ("full", "embed", {"memory": {"master_weights": "bf16-stochastic"}}),
    ("lora", "encode", {"memory": {"quantize": "nf4"}}),
    ("lora", "tune", {"memory": {"quantize": "nf4"}}),
    ("lora", "embed", {"memory": {"idle": "release"}}),
    ("lora", "tune", {"memory": {"idle": "release"}}),
    ("lora", "decode", {"memory": {"vae_slicing": True}}),
    ("lora", "decode", {"edit": {"batch_size": 1}}),
    ("lora", "sample", {"edit": {"batch_size": 1}}),
    ("lora", "sample", {"edit": {"guidance_scale": 1.0}}),
    ("embedding", "embed", {"memory": {"quantize": "nf4"}}),
]


@each("mode, stage, lever", LEVERS)
def test_every_lever_lowers_its_stage(mode: Mode, stage: str, lever: dict[str, Any]) -> None:
    """And raises none."""
    plain = {"memory": {"idle": "keep", "gradient_checkpointing": False, "optimizer": "adam"}}
    before = plan_of(mode, "cpu", **merged(plain, {"memory": {"device": "cuda"}}))
    after = plan_of(mode, "cpu", **merged(plain, {"memory": {"device": "cuda"}}, lever))
    assert after.stages[stage].total < before.stages[stage].total
    assert all(after.stages[name].total <= before.stages[name].total for name in before.stages)


@each("stage", ["encode", "decode"])
def test_tiles_bound_what_a_large_picture_takes(stage: str) -> None:
    """Of four times the area the VAE holds no more than of one that is a single tile."""
    tiled = {"memory": {"vae_tiling": True}}
    small, large = (plan_of("lora", "12gb", resolution=side, **tiled).stages[stage] for side in (512, 1024))
    assert large.activations < 1.1 * small.activations
    assert large.activations < plan_of("lora", "12gb", resolution=1024).stages[stage].activations / 2


def test_cached_casts_are_counted() -> None:
    """Through a checkpointed pass nearly all of a second copy in half precision, of which without the cache a block at a time is there."""
    plain, cached = (plan_of("full", "8gb", memory={"autocast_cache": on}).stages["tune"].total for on in (False, True))
    assert 0.8 < (cached - plain) / (2 * 859_520_964) < 1


PROMISES: list[tuple[str, str, dict[str, Any], float]] = [
    ("lora", "8gb", {}, 3.5),
    ("full", "12gb", {}, 6.5),
    ("full", "8gb", {}, 6.5),
    ("full", "8gb", {"memory": {"master_weights": "bf16-stochastic"}}, 4.5),
]


@each("mode, preset, changes, most", PROMISES)
def test_promised_peaks_of_sd15(mode: Mode, preset: str, changes: dict[str, Any], most: float) -> None:
    """At 512 pixels and batch 1, in GiB, allowances and all."""
    run = run_of("sd15", mode, preset, **changes)
    assert (run.resolution, run.embed.batch_size, run.tune.batch_size) == (None, 1, 1)
    assert predict(PUBLISHED["sd15"], run).peak_bytes <= most * GIB


@each("card, size", [("8gb", 8), ("12gb", 12), ("16gb", 16), ("24gb", 24)])
@each("base", ["sd15", "sd21"])
@each("mode", MODES)
def test_a_preset_fits_the_card_it_is_named_for(mode: Mode, base: str, card: str, size: int) -> None:
    """Nine tenths of it."""
    assert plan_of(mode, card, base).peak_bytes <= 0.9 * size * 1e9


@each("mode", MODES)
def test_presets_take_less_from_one_to_the_next(mode: Mode) -> None:
    """No stage of a smaller preset takes more than that of a larger one."""
    plans = [plan_of(mode, preset) for preset in ("24gb", "16gb", "12gb", "8gb")]
    for stage in STAGES:
        sizes = [plan.needs(stage) for plan in plans if stage in plan.stages]
        assert sizes == sorted(sizes, reverse=True)


@each("mode", MODES)
def test_the_adapter_has_the_planned_size(fitted: Callable[..., Adapter], folder: Path, mode: Mode) -> None:
    """Every tensor that a fit stored: weights, and three embeddings."""
    stored = [value for file in fitted(mode).folder.rglob("*.safetensors") for value in load_file(file).values()]
    plan = predict(architecture(str(folder)), tiny_config(folder, mode))
    assert plan.adapter == sum(value.numel() * value.element_size() for value in stored)


@each("memory, share", [({"optimizer": "adam"}, 3), ({"optimizer": "adam8bit"}, 1.508), ({"optimizer": "adafactor"}, 1.001)])
def test_a_checkpoint_is_weights_and_states(memory: dict[str, str], share: float) -> None:
    """Of a full fine-tuning: 4 bytes a weight, and 8 or little over 2 of Adam's states."""
    size = plan_of("full", "8gb", memory=memory).checkpoint - 3 * 77 * 768 * 4
    assert size == pytest.approx(share * 4 * 859_520_964, rel=0.001)


@each("optimizer", ["adam", "adam8bit"])
def test_the_checkpoint_of_an_embedding_has_room(folder: Path, photo_file: Path, tmp_path: Path, optimizer: str) -> None:
    """What is planned is at least what a stopped fit saves, and at most twice the three embeddings more."""
    config = tiny_config(folder, "embedding", memory={"optimizer": optimizer})
    run = fit(photo_file, PROMPT, config, Store(tmp_path), "one")
    next(run)
    run.close()
    (saved,) = tmp_path.rglob("state.safetensors")
    tensors = sum(value.nbytes for value in load_file(saved).values())
    planned = predict(architecture(str(folder)), config, Assumed("cpu", "fp32", optimizer)).checkpoint
    assert tensors <= planned <= tensors + 3 * 16 * 16 * 4


def test_host_memory_of_a_cpu_is_its_peak() -> None:
    """Where there is no card, everything is there."""
    plan = plan_of("full", "cpu")
    assert plan.host == plan.context + max(peak.total for peak in plan.stages.values())
