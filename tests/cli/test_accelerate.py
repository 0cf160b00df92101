"""accelerate launch: one process, and two that equal one with twice the batch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import accelerate
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import save_tiny

import imagic_lora.cli.app as cli
import imagic_lora.cli.commands.fit as fitting

FIT = ("fit", "photo.png", "a dog jumping", "--base", "base", "--device", "cpu", "--embed.steps", "100", "--tune.steps", "3",
       "--edit.steps", "2", "--rank", "2")  # fmt: skip
LAUNCH = (sys.executable, "-m", "accelerate.commands.launch")
TWO = (*LAUNCH, "--multi_gpu", "--num_processes", "2", "-m", "imagic_lora", *FIT, "--checkpoint.seconds", "9999")
ONE = (*LAUNCH, "--cpu", "--num_processes", "1", "-m", "imagic_lora")
TWICE_THE_BATCH = ("--embed.batch-size", "2", "--tune.batch-size", "2")
FILES = ("embeddings.safetensors", "pytorch_lora_weights.safetensors")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    save_tiny(folder / "base")
    Image.radial_gradient("L").resize((32, 32)).convert("RGB").save(folder / "photo.png")
    return folder


def surroundings() -> dict[str, str]:
    return os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}


def launch(place: Path, *command: str) -> str:
    """Runs a command to its end; what it printed."""
    done = subprocess.run(command, cwd=place, env=surroundings(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def two(place: Path) -> str:
    """The fit ``two`` by two processes; what they printed."""
    return launch(place, *TWO, "--name", "two")


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(two: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes really run and one writes.

    Embeddings and LoRA weights agree to fp32 tolerance with those of one launched process with twice the batch, which are the bytes of a
    run without the launcher.
    """
    assert two.count("processes 2") == 1 or ("processes" in two and " 2" in two)
    assert two.count("Stored") == 1
    launch(place, *ONE, *FIT, "--name", "one", *TWICE_THE_BATCH)
    for file in FILES:
        two, one = load_file(place / "adapters/two" / file), load_file(place / "adapters/one" / file)
        assert two.keys() == one.keys()
        for name in one:
            torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)
    monkeypatch.chdir(place)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the launched process
    try:
        assert cli.main([*FIT, "--name", "plain", *TWICE_THE_BATCH]) == 0
    finally:
        torch.set_num_threads(threads)
    for file in FILES:
        assert (place / "adapters/plain" / file).read_bytes() == (place / "adapters/one" / file).read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("two")
def test_an_interrupted_second_process_stops_both(place: Path) -> None:
    """When rank 1, which does not write, gets Ctrl-C, both stop after the same step and a checkpoint is saved.

    The resumed run comes to the bytes of the uninterrupted one.
    """
    interrupted(place, "halved")
    launch(place, *TWO, "--name", "halved", "--resume")
    for file in FILES:
        assert (place / "adapters/halved" / file).read_bytes() == (place / "adapters/two" / file).read_bytes()


def interrupted(place: Path, name: str) -> None:
    """Interrupts the second of two processes during stage embed."""
    with subprocess.Popen([*TWO, "--name", name], cwd=place, env=surroundings(), stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        said = ""
        while "embed 10/100" not in said and run.poll() is None:
            said += run.stderr.readline()
        workers = [one for one in psutil.Process(run.pid).children(recursive=True) if "imagic_lora" in one.cmdline()]
        (second,) = [one for one in workers if one.environ().get("RANK") == "1"]
        second.send_signal(signal.SIGINT)
        said += run.stderr.read()
        assert run.wait(timeout=120) != 0
    assert said.count("--resume") >= 1, said
    (saved,) = (place / f"adapters/.{name}.checkpoints").iterdir()
    assert saved.name.startswith("embed-")


WAITING = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_processes_that_cannot_connect_are_an_error(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as a port that is in use: exit code 2 with the first line of what torch.distributed says."""

    def unreachable(cpu: bool) -> None:
        raise torch.distributed.DistNetworkError("the port is in use\nat socket.cpp:1")

    monkeypatch.chdir(place)
    monkeypatch.setattr(accelerate, "PartialState", unreachable)
    for name, value in WAITING.items():
        monkeypatch.setenv(name, value)
    assert cli.main([*FIT, "--name", "alone"]) == 2
    assert "the 2 processes cannot connect (the port is in use)" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("variables", "said"), [(WAITING, ""), ({"RANK": "1"}, "Interrupted: nothing was stored\n")])
def test_only_the_main_process_of_a_launcher_reports_an_interruption(
    variables: dict[str, str], said: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A RANK without a launcher, which a shell may set for other purposes, silences nothing."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(place)
    monkeypatch.setattr(fitting, "configured", interrupt)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    try:
        code = cli.main([*FIT, "--name", "alone"])
    except SystemExit as stopped:
        code = stopped.code
    assert (code, capsys.readouterr().err) == (130, said)


def test_a_variable_that_a_library_rejects_is_an_error(place: Path) -> None:
    """huggingface_hub reads it when it is imported, and raises ValueError; the value is not printed, since it could be a token."""
    variables = surroundings() | {"HF_HUB_DOWNLOAD_TIMEOUT": "abc", "HF_TOKEN": "hf_secret"}
    command = (sys.executable, "-m", "imagic_lora", "export", "rex", "--format", "kohya")
    done = subprocess.run(command, cwd=place, env=variables, capture_output=True, text=True, check=False)
    said = " ".join(done.stderr.split())
    assert (done.returncode, "Traceback" in said, "hf_secret" in said) == (2, False, False)
    assert "HF_HUB_DOWNLOAD_TIMEOUT" in said
