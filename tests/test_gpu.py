"""What only a CUDA device can show: make test-gpu."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from bench_memory import STOCHASTIC, in_a_process, settings
from common import MODES, PROMPT, TUNED, Run, array, opened, tiny_config
from tiny import save_tiny, save_tiny_sdxl

from imagic_lora.adapters.store import Store
from imagic_lora.bases.loading.configs import architecture
from imagic_lora.core.config import Mode
from imagic_lora.core.device_config import MemoryConfig
from imagic_lora.core.noise import noise_at
from imagic_lora.core.runtime import Processes, resolve_runtime
from imagic_lora.memory.prediction import predict
from imagic_lora.sampling.editor import Editor
from imagic_lora.training.embed import embed_stage
from imagic_lora.training.fit import fit, open_base, result

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_the_defaults_on_cuda_save_memory() -> None:
    """8-bit Adam is what auto means on a card."""
    runtime = resolve_runtime(MemoryConfig())
    assert runtime.device.type == "cuda"
    assert runtime.optimizer == "adam8bit"


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base of either family."""
    return {"sd": save_tiny, "sdxl": save_tiny_sdxl}[request.param](tmp_path_factory.mktemp("family") / request.param)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("mode", MODES)
def test_a_fit_and_an_edit_are_finite_in_every_precision(mode: Mode, dtype: str, family: Path, photo_file: Path, tmp_path: Path) -> None:
    """No black picture: the edit varies, in fp32, fp16 and bf16, in every mode."""
    config = tiny_config(family, mode, memory={"device": "cuda", "dtype": dtype})
    base = open_base(config)
    adapter = result(fit(photo_file, PROMPT, config, Store(tmp_path), "x", base=base))
    assert adapter is not None
    for edit in Editor(base).edit(adapter, [0.0, 1.0], [0], config.edit):
        low, high = edit.image.convert("L").getextrema()
        assert low != high


@pytest.mark.parametrize("idle", ["keep", "offload", "release"])
def test_what_is_idle_makes_no_difference_but_in_memory(idle: str, family: Path, photo_file: Path, tmp_path: Path) -> None:
    """A fit and an edit with another prompt, which need text encoder and VAE again, give the picture they give when both are kept."""
    found = []
    for way in ("keep", idle):
        config = tiny_config(family, memory={"device": "cuda", "dtype": "fp32", "idle": way})
        base = open_base(config)
        adapter = result(fit(photo_file, PROMPT, config, Store(tmp_path), way, base=base, overwrite=True))
        assert adapter is not None
        found.append(array(next(Editor(base).edit(adapter, [0.7], [0], config.edit, "a dog")).image))
    assert np.abs(found[0] - found[1]).max() <= 1


def test_cuda_and_cpu_agree_on_the_first_loss(folder: Path) -> None:
    """The same noise and timesteps on both devices: losses equal to fp32 rounding."""
    losses = []
    for base in (opened(folder), open_base(tiny_config(folder, memory={"device": "cuda", "dtype": "fp32"}))):
        latents = noise_at(0, "photo", 0, [0], (4, 8, 8)).to(base.runtime.device)
        stage = embed_stage(base, latents, base.encode_prompt(PROMPT), tiny_config(folder).embed, 0, Processes())
        losses.append(stage.step(0).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_checkpointing_lowers_the_peak(folder: Path) -> None:
    """The peak of a step with gradient checkpointing is below the peak without."""
    peaks = []
    for switch in (True, False):
        base = open_base(tiny_config(folder, memory={"device": "cuda", "dtype": "fp32", "gradient_checkpointing": switch}))
        config = tiny_config(folder, embed={"batch_size": 64}).embed
        stage = embed_stage(base, torch.zeros(1, 4, 32, 32, device="cuda"), base.encode_prompt(PROMPT), config, 0, Processes())
        torch.cuda.reset_peak_memory_stats()
        stage.step(0)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[0] < peaks[1]


@pytest.mark.parametrize("preset", ["8gb", "24gb"])
@pytest.mark.parametrize("mode", TUNED)
def test_the_plan_is_within_a_tenth_of_what_the_card_allocates(mode: Mode, preset: str) -> None:
    """Stable Diffusion 1.5 at true size: the drawing, without its allowances, against PyTorch's own count of a real run."""
    run = settings("sd15", mode, preset)
    found = in_a_process(run)
    assert found["completed"]
    drawn = max(peak.total for peak in predict(architecture("sd15"), run).stages.values())
    assert drawn == pytest.approx(found["allocated"], rel=0.1)


@pytest.mark.parametrize(("mode", "stochastic", "cap"), [("lora", False, 3.5), ("full", False, 6.5), ("full", True, 4.5)])
def test_stable_diffusion_fits_the_card_it_is_promised_for(mode: Mode, stochastic: bool, cap: float) -> None:
    """With preset 8gb a run completes where PyTorch may take the promised size less the context."""
    run = settings("sd15", mode, "8gb", STOCHASTIC if stochastic else {})
    assert in_a_process(run, cap - 0.5)["completed"]


def test_doctor_measures_every_preset_of_the_card(tmp_path: Path, run: Run) -> None:
    """Stable Diffusion 1.5 with random weights: the tensors of a training stage are within a tenth of the plan, the process above them."""
    code, out, err = run("doctor", "--measure", "--base", "sd15", "--random-weights", "--minutes", 8, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["machine"]["card"]["name"] == torch.cuda.get_device_name()
    measured = [one for one in found["runs"] if one["stages"]]
    assert measured
    for one in measured:
        assert one["not_measured"] is None, one
        for name, stage in one["stages"].items():
            assert stage["allocated"] <= stage["reserved"] <= stage["process"]
            if name in ("embed", "tune"):
                assert stage["predicted"]["tensors"] == pytest.approx(stage["allocated"], rel=0.1), (one["mode"], one["preset"], name)
                assert stage["steps_per_second"] > 0
