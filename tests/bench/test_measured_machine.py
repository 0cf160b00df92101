"""doctor --measure: which runs fit a machine, what the process measures, the time budget, interruptions, and what the report tells."""

from __future__ import annotations

import getpass
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from common import Run, each
from tiny import save_tiny, save_tiny_sd3

import imagic_lora.cli.commands.doctor as doctor
import imagic_lora.cli.measuring as measuring
from imagic_lora.bases.loading.configs import architecture
from imagic_lora.bench.machine import process
from imagic_lora.bench.machine.runs import STAGES, MachineRun, runs_of
from imagic_lora.bench.machine.stages import measure
from imagic_lora.core.machine import Card
from imagic_lora.core.settings.merging import merged
from imagic_lora.memory.plan import Assumed, assume
from imagic_lora.memory.prediction import predict

GIB = 2**30
REPORT = Path("outputs/doctor/critters.json")
STAND_IN = """
import json, os, sys, time
job = json.loads(sys.argv[1])
def send(**message):
    print(json.dumps(message), flush=True)
def stage(name, **more):
    found = dict(stage=name, allocated=100 * 2**20, reserved=None, process=700 * 2**20, seconds=0.5, count=4, estimated=False)
    send(measured={**found, **more})
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replaces the process that measures by one with another body, which starts at once."""

    def replace(body: str) -> None:
        (tmp_path / "stand_in.py").write_text(STAND_IN + body)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setattr(process, "MODULE", "stand_in")

    return replace


ALL = "[stage(name) for name in ('encode', 'embed', 'tune', 'generate')]\n"


# the runs


def test_on_a_card_the_presets_that_the_plan_fits_are_measured() -> None:
    """Stable Diffusion 1.5 beside 5 GiB: LoRA with every preset that needs less, full with none; each with the plan of that card."""
    card = Card(0, "a card", 5 * GIB, True)
    found = runs_of("sd15", card, card.free)
    assert [(one.run.tune.mode, one.run.preset) for one in found] == [
        (m, p) for m in ("lora", "full") for p in ("24gb", "16gb", "12gb", "8gb")
    ]
    for one in found:
        assert one.plan is not None
        assert one.plan == predict(architecture("sd15"), one.run, Assumed("cuda", "bf16", "adam8bit"))
        assert (one.left_out is None) == (one.plan.peak_bytes - one.plan.context <= 5 * GIB), one
    assert {one.left_out is None for one in found} == {True, False}
    assert found[-1].left_out == "does not fit: 5.4 GiB predicted, 5.0 GiB free"


def test_on_a_cpu_equal_presets_are_measured_once() -> None:
    """The embedded base: preset 24gb has no lever, as preset cpu; generation is the worse of sampling and decoding."""
    found = runs_of("critters", None, 8 * GIB)
    assert {one.run.preset: one.left_out for one in found if one.left_out} == {"24gb": "the settings of preset cpu"}
    assert len([one for one in found if not one.left_out]) == 8
    plan = found[0].plan
    assert plan is not None
    assert found[0].predicted("generate") == max((plan.stages[name].total, plan.needs(name)) for name in ("sample", "decode"))


# the process


@pytest.mark.slow
def test_the_command_measures_the_embedded_base(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One run in its process: tensors within a twentieth of the plan, every speed, and nothing of this machine's names."""

    def first_two(*given: Any) -> list[MachineRun]:
        lora, equal, *_ = runs_of(*given)
        run = type(lora.run).model_validate(merged(lora.run.model_dump(), {"edit": {"batch_size": 1, "steps": 4}}))
        return [MachineRun(run, predict(architecture("critters"), run, assume(run, "cpu"))), equal]

    monkeypatch.setattr(measuring, "runs_of", first_two)
    code, out, err = run("doctor", "--measure", "--base", "critters", "--minutes", 20, "--json")
    assert code == 0, err
    found = json.loads(out)
    lora, equal = found["runs"]
    assert (lora["mode"], lora["preset"], lora["precision"], lora["not_measured"]) == ("lora", "cpu", "fp32", None)
    assert (equal["preset"], equal["stages"], equal["not_measured"]) == ("24gb", {}, "the settings of preset cpu")
    assert list(lora["stages"]) == list(STAGES)
    for stage in lora["stages"].values():
        assert stage["allocated"] == pytest.approx(stage["predicted"]["tensors"], rel=0.05)
        assert stage["allocated"] < stage["process"] < 2 * stage["predicted"]["process"]
        assert stage["reserved"] is None
    speeds = [lora["stages"][name].get("steps_per_second") for name in STAGES]
    assert speeds[0] is speeds[3] is None
    assert min(speeds[1], speeds[2], lora["stages"]["generate"]["images_per_second"]) > 0
    written = [(tmp_path / "outputs/doctor" / f"critters.{suffix}").read_text() for suffix in ("json", "md")]
    assert json.loads(written[0])["runs"] == found["runs"]
    assert written[1].count("\n| lora | cpu | ") == 4
    for secret in (str(Path.home()), str(tmp_path), sys.prefix, socket.gethostname(), "/"):
        assert secret not in written[0].replace("/s", "")
    assert getpass.getuser() not in written[0].lower().replace("processor", "")
    assert "4 of 4, about 0 s left" in err


@pytest.mark.parametrize("save", [save_tiny, pytest.param(save_tiny_sd3, marks=pytest.mark.slow)])
def test_random_weights_measure_the_same_stages(save: Any, tmp_path: Path) -> None:
    """Without a vocabulary, in a base with guidance and in a flow."""
    folder = save(tmp_path / "base")
    run = runs_of(str(folder), None, 8 * GIB)[0].run
    run = type(run).model_validate(merged(run.model_dump(), {"edit": {"steps": 2, "batch_size": 1}}))
    found = list(measure(run, True, 0.0, 0))
    assert [one.stage for one in found] == list(STAGES)
    assert [one.count for one in found] == [0, 1, 1, 1]
    assert [one.estimated for one in found] == [False, False, False, False]
    assert all(one.process > one.allocated > 0 for one in found)


# the command


def measured_so_far() -> str:
    """The report of critters in this folder; empty before there is one."""
    return REPORT.read_text() if REPORT.exists() else ""


def test_what_needs_more_time_is_left_out(stand_in: Any, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that hangs is ended when the time is up; its stages stay, and the report says what is missing."""
    stand_in("stage('encode', seconds=None, count=0)\nstage('embed')\ntime.sleep(60)\n")
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + (1e6 if '"embed": {' in measured_so_far().split('"stages"', 1)[-1] else 0))
    for module in (process, measuring):
        monkeypatch.setattr(module, "time", clock)
    code, out, err = run("doctor", "--measure", "--base", "critters", "--minutes", 5, "--json")
    assert code == 0, err
    first, _, *others = json.loads(out)["runs"]
    assert (list(first["stages"]), first["not_measured"]) == (["encode", "embed"], "the time was up")
    assert all(one["stages"] == {} for one in others)
    assert {one["not_measured"] for one in others} == {"the time was up", "the settings of preset cpu"}
    assert not [child for child in psutil.Process().children() if "stand_in" in " ".join(child.cmdline())]


def test_ctrl_c_keeps_what_was_measured(stand_in: Any, run: Run) -> None:
    """Exit code 130, the report with one stage, and no process left."""
    stand_in("stage('encode')\ntime.sleep(60)\n")
    ended = threading.Event()

    def interrupt() -> None:
        while '"allocated"' not in measured_so_far() and not ended.wait(0.05):
            pass
        if not ended.is_set():
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    code, _, err = run("doctor", "--measure", "--base", "critters", "--minutes", 5)
    ended.set()
    thread.join()
    assert (code, "1 measured stages are in outputs/doctor/critters.json" in err) == (130, True), err
    found = json.loads(REPORT.read_text())
    assert list(found["runs"][0]["stages"]) == ["encode"]
    assert found["runs"][0]["not_measured"] == found["runs"][2]["not_measured"] == "interrupted"
    assert not [child for child in psutil.Process().children() if "stand_in" in " ".join(child.cmdline())]


def test_a_run_that_fails_does_not_end_the_others(stand_in: Any, run: Run) -> None:
    """Out of memory after a stage, and a crash whose traceback is shown but not part of the report."""
    stand_in(
        "if job['run']['preset'] == 'cpu':\n    stage('encode')\n    send(out_of_memory=True)\n"
        "elif job['run']['preset'] == '16gb':\n    open('/nowhere/of/mine')\nelse:\n    " + ALL
    )
    code, out, err = run("doctor", "--measure", "--base", "critters", "--minutes", 20, "--json")
    found = {(one["mode"], one["preset"]): one for one in json.loads(out)["runs"]}
    assert code == 0
    assert (list(found["lora", "cpu"]["stages"]), found["lora", "cpu"]["not_measured"]) == (["encode"], "out of memory")
    assert (found["full", "16gb"]["stages"], found["full", "16gb"]["not_measured"]) == ({}, "failed")
    assert (len(found["full", "8gb"]["stages"]), found["full", "8gb"]["not_measured"]) == (4, None)
    assert "FileNotFoundError" in err
    assert "nowhere" not in out + Path("outputs/doctor/critters.md").read_text()


def test_without_its_weights_a_base_is_not_measured(stand_in: Any, run: Run) -> None:
    """The cache alone is asked with --offline; the remedy names random weights, which need neither."""
    stand_in(
        "assert os.environ.get('HF_HUB_OFFLINE') == '1' or 'locate' not in job\n"
        "send(error=['base x cannot be downloaded', 'a reachable hub id', 'check the name']) if 'locate' in job else " + ALL
    )
    code, _, err = run("doctor", "--measure", "--base", "sd15", "--offline")
    assert code == 2
    assert "a base in the cache of the hub, or a folder" in err
    assert "leave out --offline to download it; or use --random-weights" in err
    assert not list(Path("outputs/doctor").iterdir())
    code, out, err = run("doctor", "--measure", "--base", "sd15", "--random-weights", "--minutes", 20, "--json")
    assert (code, json.loads(out)["random_weights"]) == (0, True), err
    assert "with random weights" in Path("outputs/doctor/sd15.md").read_text()


@each(
    "flags, message",
    [
        (["--base", "critters"], "--base without --measure"),
        (["--offline"], "--offline without --measure"),
        (["--measure", "--minutes", "0"], "--minutes 0"),
        (["--measure", "--minutes", "nan"], "--minutes nan"),
        (["--measure", "--base", "nobody"], "no architecture is known for 'nobody'"),
        (["--measure", "--base", "critters", "--random-weights"], "--random-weights with base critters"),
        (["--measure", "--base", "critters", "--out", "/dev/null/x"], "/dev/null/x cannot be written to"),
    ],
)
def test_flags_that_cannot_be_are_rejected(flags: list[str], message: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_card", lambda: None)
    code, out, err = run("doctor", *flags)
    assert (code, out, message in err) == (2, "", True), err
