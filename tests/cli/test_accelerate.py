"""accelerate launch: one process, and two that equal one with twice the batch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import save_tiny

FIT = ("-m", "imagic_lora", "fit", "photo.png", "a dog jumping", "--base", "base", "--embed.steps", "3", "--tune.steps", "3",
       "--edit.steps", "2", "--rank", "2")  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    save_tiny(folder / "base")
    Image.radial_gradient("L").resize((32, 32)).convert("RGB").save(folder / "photo.png")
    return folder


def surroundings() -> dict[str, str]:
    return os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}


def launch(place: Path, launcher: tuple[str, ...], *arguments: str) -> str:
    command = [sys.executable, *launcher, *FIT, *arguments]
    done = subprocess.run(command, cwd=place, env=surroundings(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_two_processes_equal_one_with_twice_the_batch(place: Path) -> None:
    """Two really run, one writes, and embeddings and LoRA weights agree to fp32 tolerance; so does one process by the launcher."""
    launcher = ("-m", "accelerate.commands.launch")
    said = launch(place, (*launcher, "--multi_gpu", "--num_processes", "2"), "--name", "two")
    assert said.count("processes 2") == 1 or ("processes" in said and " 2" in said)
    assert said.count("Stored") == 1
    launch(place, (*launcher, "--cpu", "--num_processes", "1"), "--name", "one", "--embed.batch-size", "2", "--tune.batch-size", "2")
    for file in ("embeddings.safetensors", "pytorch_lora_weights.safetensors"):
        two, one = load_file(place / "adapters/two" / file), load_file(place / "adapters/one" / file)
        assert two.keys() == one.keys()
        for name in one:
            torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)


def test_without_the_launcher_it_is_the_same_run(place: Path) -> None:
    """python -m imagic_lora and accelerate launch on one process give the same bytes."""
    launch(place, (), "--name", "plain")
    launch(place, ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"), "--name", "launched")
    for file in ("embeddings.safetensors", "pytorch_lora_weights.safetensors"):
        assert (place / "adapters/plain" / file).read_bytes() == (place / "adapters/launched" / file).read_bytes()


def test_one_interrupted_process_stops_both_after_the_same_step(place: Path) -> None:
    """Ctrl-C in the process that does not write: both stop, it is saved, and two processes go on to the bits of an uninterrupted run."""
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")
    command, environment = [*launcher, *FIT, "--checkpoint.seconds", "9999"], surroundings()
    command[command.index("--embed.steps") + 1] = "150"
    with subprocess.Popen([*command, "--name", "halved"], cwd=place, env=environment, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        said = ""
        while "embed 15/150" not in said and run.poll() is None:
            said += run.stderr.readline()
        workers = [one for one in psutil.Process(run.pid).children(recursive=True) if "imagic_lora" in one.cmdline()]
        (second,) = [one for one in workers if one.environ().get("RANK") == "1"]
        second.send_signal(signal.SIGINT)
        said += run.stderr.read()
        assert run.wait(timeout=120) != 0
    assert said.count("--resume") >= 1, said
    (saved,) = (place / "adapters/.halved.checkpoints").iterdir()
    assert saved.name.startswith("embed-")
    for name, more in (("halved", ("--resume",)), ("whole", ())):
        done = subprocess.run(
            [*command, "--name", name, *more], cwd=place, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
    for file in ("embeddings.safetensors", "pytorch_lora_weights.safetensors"):
        assert (place / "adapters/halved" / file).read_bytes() == (place / "adapters/whole" / file).read_bytes()
