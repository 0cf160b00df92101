"""The card of a machine: by the driver where PyTorch is not loaded, by PyTorch where it is, and what ``auto`` means on it.

Drivers are stand-ins: a script named ``nvidia-smi`` on PATH, a folder in place of sysfs, a package ``torch`` with only a version file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from common import each

import imagic_lora.core.machine as machine
from imagic_lora.core.choices import choose_runtime
from imagic_lora.core.device_config import MemoryConfig
from imagic_lora.core.errors import ImagicError
from imagic_lora.core.machine import Card, find_card

MIB = 2**20
UUIDS = ["GPU-5a1c0000", "GPU-5a2d0000", "GPU-7e000000"]
TWO = f"0, {UUIDS[0]}, NVIDIA GeForce RTX 2080 Ti, 10000, 7.5\n1, {UUIDS[2]}, NVIDIA GeForce RTX 4090, 24000, 8.9\n"
TURING, ADA = Card(0, "NVIDIA GeForce RTX 2080 Ti", 10000 * MIB, False), Card(1, "NVIDIA GeForce RTX 4090", 24000 * MIB, True)
VARIABLES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
BUILDS = {"cuda": ("'12.8'", "None"), "hip": ("None", "'6.4.43482'"), "cpu": ("None", "None")}

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the stand-ins are shell scripts")
Driver = Callable[..., None]


@pytest.fixture(autouse=True)
def no_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    """No card is hidden, wherever the tests run."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Installs an ``nvidia-smi`` that prints an answer to the query for cards, and exits with a code."""

    def install(answer: str = "", code: int = 0, script: str | None = None) -> None:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "answer").write_text(answer)
        (folder / "asked").unlink(missing_ok=True)
        text = script or f'printf "%s\\n" "$@" > {folder}/asked\ncat {folder}/answer\nexit {code}'
        program = folder / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    return install


def save_torch(folder: Path, build: str) -> Path:
    """Writes a package ``torch`` with the version file of a build; importing it fails. Returns the folder to search."""
    cuda, hip = BUILDS[build]
    package = folder / "site" / "torch"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text("raise ImportError('imported')\n")
    lines = [
        "from typing import Optional",
        "__all__ = ['__version__', 'cuda', 'hip']",
        f"cuda: Optional[str] = {cuda}",
        f"hip: Optional[str] = {hip}",
    ]
    (package / "version.py").write_text("\n".join(lines) + "\n")
    return package.parent


def without_torch(code: str, path: Path | None = None, **environment: str) -> Any:
    """The JSON that a fresh interpreter prints, which searches a folder first and never loads PyTorch."""
    program = (
        f"import json, sys; from imagic_lora.core.machine import find_card, bitsandbytes_error; {code}; assert 'torch' not in sys.modules"
    )
    search = [str(path)] if path else []
    variables = {name: value for name, value in os.environ.items() if name not in VARIABLES} | environment
    variables["PYTHONPATH"] = os.pathsep.join([*search, str(Path(__file__).parents[2])])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=variables, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


FOUND = "found = find_card({}); print(json.dumps(found and [found.index, found.name, found.free, found.native_bf16]))"


def fields(card: Card | None) -> list[Any] | None:
    """A card as the programs of :func:`without_torch` print it."""
    return card and [card.index, card.name, card.free, card.native_bf16]


SELECTIONS = [
    (None, [0, 1, 2]),
    ("", []),
    ("-1", []),
    ("0", [0]),
    ("2,0", [2, 0]),
    (" 1 , 2 ", [1, 2]),
    ("1,7,0", [1]),
    ("7,0", []),
    ("1,-1,0", [1]),
    ("0,,1", [0]),
    ("1,0,1", []),
    (UUIDS[2], [2]),
    ("GPU-7", [2]),
    ("GPU-7,GPU-5a1", [2, 0]),
    ("GPU-5a", []),
    ("GPU-7,GPU-5", [2]),
    ("GPU-9,GPU-7", []),
    ("GPU-7,GPU-7e", []),
]


@each("selection, expected", SELECTIONS)
def test_the_selection_of_cards_is_pytorchs(monkeypatch: pytest.MonkeyPatch, selection: str | None, expected: list[int]) -> None:
    """Order, indices, starts of UUIDs, and the end at the first invalid entry; PyTorch's own parser of the variable agrees."""
    if selection is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", selection)
    cards = [(str(k), uuid) for k, uuid in enumerate(UUIDS)]
    assert machine._visible_positions(cards, "CUDA_VISIBLE_DEVICES") == expected
    monkeypatch.setattr(torch.version, "hip", None)
    parsed: list[Any] = torch.cuda._parse_visible_devices()
    if parsed and isinstance(parsed[0], str):
        assert torch.cuda._transform_uuid_to_ordinals(parsed, UUIDS) == expected
    else:
        count = next((k for k, index in enumerate(parsed) if index >= len(UUIDS)), len(parsed))  # as torch.cuda.device_count
        assert parsed[:count] == expected


def test_the_driver_lists_cards(driver: Driver, tmp_path: Path) -> None:
    """Name, free bytes, and bf16 from compute capability 8.0 on; of the five columns that were asked for."""
    driver(TWO)
    assert machine._nvidia_cards() == [TURING, ADA]
    asked = (tmp_path / "bin" / "asked").read_text().split()
    assert asked == ["--query-gpu=index,uuid,name,memory.free,compute_cap", "--format=csv,noheader,nounits"]


@each("capability, native", [("6.1", False), ("7.5", False), ("8.0", True), ("8.6", True), ("9.0", True), ("12.0", True)])
def test_bf16_is_native_from_compute_capability_8(driver: Driver, capability: str, native: bool) -> None:
    """Compared as a number, so that 12.0 is above 8.0."""
    driver(f"0, GPU-1, A card, 8000, {capability}\n")
    assert [card.native_bf16 for card in machine._nvidia_cards()] == [native]


@each("selection", ["1,0", f"{UUIDS[2]},{UUIDS[0]}"])
def test_cards_are_numbered_as_they_are_selected(driver: Driver, monkeypatch: pytest.MonkeyPatch, selection: str) -> None:
    """The first of the selection is PyTorch's device 0."""
    driver(TWO)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", selection)
    found = machine._nvidia_cards()
    assert [(card.index, card.name) for card in found] == [(0, ADA.name), (1, TURING.name)]


@each(
    "answer",
    [
        "",
        "\n\n",
        "No devices were found\n",
        "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n",
        "0, GPU-1, A card, [N/A], 8.9\n",
        "0, GPU-1, A card, 8000, [Not Supported]\n",
        "0, GPU-1, A card, 8000\n",
        "0, GPU-1, A card, 8000, 8.9, 1\n",
        "x" * 200_000 + "\n",
    ],
)
def test_an_answer_that_cannot_be_read_is_no_card(driver: Driver, answer: str) -> None:
    """Whatever the driver prints, no exception leaves the query."""
    driver(answer)
    assert machine._nvidia_cards() == []


def test_empty_lines_between_cards_are_skipped(driver: Driver) -> None:
    """They are no cards, and no error."""
    driver(TWO.replace("\n", "\n\n"))
    assert machine._nvidia_cards() == [TURING, ADA]


def test_an_answer_that_is_not_text_is_no_card(driver: Driver) -> None:
    """Bytes that are not UTF-8."""
    driver(script="printf '\\377\\376\\n'")
    assert machine._nvidia_cards() == []


def test_a_driver_that_fails_is_no_card(driver: Driver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By its exit code, though it prints cards; or because the program cannot be run, or is not there."""
    driver(TWO, code=9)
    assert machine._nvidia_cards() == []
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/no/such/shell\n")
    assert machine._nvidia_cards() == []
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine._nvidia_cards() == []


def test_a_driver_that_hangs_is_given_up(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the timeout, though a child of the program still holds the pipe."""
    driver(script="sleep 20")
    monkeypatch.setattr(machine, "_DRIVER_TIMEOUT", 0.2)
    start = time.monotonic()
    assert machine._nvidia_cards() == []
    assert time.monotonic() - start < 10


@each("build, backend", [("cuda", "cuda"), ("hip", "hip"), ("cpu", None)])
def test_the_backend_is_read_from_the_version_file(tmp_path: Path, build: str, backend: str | None) -> None:
    """Without importing the package, which would fail."""
    code = "from imagic_lora.core.machine import _torch_backend; print(json.dumps(_torch_backend()))"
    assert without_torch(code, save_torch(tmp_path, build)) == backend


def test_the_backend_of_the_installed_pytorch_is_its_own() -> None:
    """The real version file, of whichever build the tests run on."""
    assert machine._torch_backend() == ("cuda" if torch.version.cuda else "hip" if torch.version.hip else None)


def test_without_pytorch_there_is_no_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where it is not installed, nor where its version file is missing."""
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None)
    assert machine._torch_backend() is None
    monkeypatch.undo()
    folder = save_torch(tmp_path, "cuda")
    (folder / "torch" / "version.py").unlink()
    code = "from imagic_lora.core.machine import _torch_backend; print(json.dumps(_torch_backend()))"
    assert without_torch(code, folder) is None


@each("index, card", [("", TURING), ("0", TURING), ("1", ADA)])
def test_without_pytorch_loaded_the_driver_is_asked(driver: Driver, tmp_path: Path, index: str, card: Card | None) -> None:
    """Device 0 by default."""
    driver(TWO)
    assert without_torch(FOUND.format(index), save_torch(tmp_path, "cuda")) == fields(card)


@each(
    "selection, expected",
    [(None, [(TURING, UUIDS[0]), (ADA, UUIDS[2])]), ("1", [(ADA, UUIDS[2])]), ("1,0", [(ADA, UUIDS[2]), (TURING, UUIDS[0])])],
)
def test_each_card_is_named_for_a_process_of_its_own(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, selection: str | None, expected: list[tuple[Card, str]]
) -> None:
    """By the UUID, which does not depend on the order in which CUDA numbers cards; hidden cards stay hidden."""
    driver(TWO)
    monkeypatch.setattr(machine, "_torch_backend", lambda: "cuda")
    if selection is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", selection)
    cards = [(replace(card, index=k), {"CUDA_VISIBLE_DEVICES": uuid}) for k, (card, uuid) in enumerate(expected)]
    assert machine.visible_cards() == cards
    monkeypatch.setattr(machine, "_torch_backend", lambda: None)
    assert machine.visible_cards() == []


def test_a_process_without_a_card_of_its_own_is_refused(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two cards and three processes, instead of the CPU for the third; the number of its card comes from the launcher."""
    driver(TWO)
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(machine, "_torch_backend", lambda: "cuda")
    with pytest.raises(ImagicError, match="this process is number 2 on a machine with 2 CUDA devices"):
        find_card(2)


def test_hidden_cards_are_not_found(driver: Driver, tmp_path: Path) -> None:
    """All of them, or the first."""
    driver(TWO)
    path = save_torch(tmp_path, "cuda")
    assert without_torch(FOUND.format(""), path, CUDA_VISIBLE_DEVICES="") is None
    assert without_torch(FOUND.format(""), path, CUDA_VISIBLE_DEVICES="1") == fields(Card(0, ADA.name, ADA.free, True))


def test_a_cpu_build_has_no_card_whatever_the_driver_lists(driver: Driver, tmp_path: Path) -> None:
    """The driver is not even asked."""
    driver(TWO)
    assert without_torch(FOUND.format(""), save_torch(tmp_path, "cpu")) is None
    assert not (tmp_path / "bin" / "asked").exists()


def test_with_pytorch_loaded_pytorch_is_asked(driver: Driver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its current device by default, or the one that is named; the driver is not asked, and may not be there."""
    driver(TWO)
    capabilities = [(7, 5), (8, 0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Card {device}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000 + device, 5000))
    assert find_card() == Card(1, "Card 1", 1001, True)
    assert find_card(0) == Card(0, "Card 0", 1000, False)
    with pytest.raises(ImagicError, match="this process is number 2 on a machine with 2 CUDA devices"):
        find_card(2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_card() is None
    assert not (tmp_path / "bin" / "asked").exists()


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of sysfs: cards 0, 2 and 10 of amdgpu, one of another driver, and one whose numbers cannot be read."""
    sizes = {"card0": (8000, 500), "card2": (16000, 1000), "card10": (24000, 4000), "card3": None, "card4": ("x", 0)}
    for name, numbers in sizes.items():
        device = tmp_path / "drm" / name / "device"
        device.mkdir(parents=True)
        if numbers:
            (device / "mem_info_vram_total").write_text(f"{numbers[0]}\n")
            (device / "mem_info_vram_used").write_text(f"{numbers[1]}\n")
    (tmp_path / "drm" / "card0-HDMI-A-1").mkdir()
    (tmp_path / "drm" / "version").write_text("drm 1.1.0\n")
    monkeypatch.setattr(machine, "_AMD_DEVICES", tmp_path / "drm")
    return tmp_path / "drm"


def test_cards_of_amd_are_those_of_the_kernel(sysfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Free is total less used, in the order of their numbers; another driver's card and one that cannot be read are left out.

    A process of one card is given its number among those that the runtime sees, of which it may hide some.
    """
    assert machine._amd_cards() == [
        Card(0, "an AMD card", 7500, True),
        Card(1, "an AMD card", 15000, True),
        Card(2, "an AMD card", 20000, True),
    ]
    monkeypatch.setattr(machine, "_torch_backend", lambda: "hip")
    monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "1,2")
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "1,0")
    assert [(card.free, variables) for card, variables in machine.visible_cards()] == [
        (20000, {"HIP_VISIBLE_DEVICES": "1"}), (15000, {"HIP_VISIBLE_DEVICES": "0"})
    ]  # fmt: skip
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    (sysfs / "card0/device/mem_info_vram_used").unlink()
    assert [card.free for card in machine._amd_cards()] == [15000, 20000]


@each(
    "variables, expected",
    [
        ({"CUDA_VISIBLE_DEVICES": ""}, []),
        ({"CUDA_VISIBLE_DEVICES": "2,0"}, [20000, 7500]),
        ({"HIP_VISIBLE_DEVICES": "1"}, [15000]),
        ({"HIP_VISIBLE_DEVICES": "1", "CUDA_VISIBLE_DEVICES": "0"}, [15000]),
        ({"ROCR_VISIBLE_DEVICES": "2,1"}, [20000, 15000]),
        ({"ROCR_VISIBLE_DEVICES": "2,1", "HIP_VISIBLE_DEVICES": "1"}, [15000]),
    ],
)
def test_cards_of_amd_can_be_hidden(sysfs: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: list[int]) -> None:
    """By ROCm's variables, and numbered anew."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = machine._amd_cards()
    assert [card.free for card in found] == expected
    assert [card.index for card in found] == list(range(len(expected)))


def test_no_sysfs_is_no_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a machine that is not Linux."""
    monkeypatch.setattr(machine, "_AMD_DEVICES", tmp_path / "nowhere")
    assert machine._amd_cards() == []


def test_a_build_for_rocm_asks_the_kernel(sysfs: Path, driver: Driver, tmp_path: Path) -> None:
    """And not a driver of NVIDIA, though there is one."""
    driver(TWO)
    place = f"from pathlib import Path; import imagic_lora.core.machine as m; m._AMD_DEVICES = Path({str(sysfs)!r}); "
    assert without_torch(place + FOUND.format("1"), save_torch(tmp_path, "hip")) == [1, "an AMD card", 15000, True]
    assert not (tmp_path / "bin" / "asked").exists()


def test_bitsandbytes_without_pytorch_is_looked_up_alone(tmp_path: Path) -> None:
    """Installed is enough: it is not imported, since that would import PyTorch."""
    path = save_torch(tmp_path, "cuda")
    (path / "bitsandbytes.py").write_text("raise RuntimeError('imported')\n")
    assert without_torch("print(json.dumps(bitsandbytes_error() is None))", path) is True
    hidden = "import importlib.util as u; u.find_spec = lambda name: None; print(json.dumps(str(bitsandbytes_error())))"
    assert without_torch(hidden, path) == "it is not installed"


@each(
    "card, memory, expected",
    [
        (None, {}, ("cpu", "fp32", "no CUDA device found")),
        (None, {"device": "cpu"}, ("cpu", "fp32", "no CUDA device found")),
        (ADA, {}, ("cuda:1", "bf16", ADA.name)),
        (TURING, {}, ("cuda:0", "fp16", TURING.name)),
        (ADA, {"device": "cpu"}, ("cpu", "fp32", "asked for")),
        (TURING, {"dtype": "fp32"}, ("cuda:0", "fp32", TURING.name)),
    ],
)
def test_auto_follows_the_card(
    monkeypatch: pytest.MonkeyPatch, card: Card | None, memory: dict[str, Any], expected: tuple[str, str, str]
) -> None:
    """Device, precision, and the reason; 8-bit states on a card alone, and only with bitsandbytes."""
    error: list[Exception] = []
    monkeypatch.setattr("imagic_lora.core.choices.bitsandbytes_error", lambda: error[0] if error else None)
    chosen = choose_runtime(MemoryConfig.model_validate(memory), card)
    assert (chosen.device, chosen.dtype, chosen.reasons["device"]) == (*expected[:2], f"{expected[0]} ({expected[2]})")
    assert chosen.optimizer == ("adam" if chosen.device == "cpu" else "adam8bit")
    error.append(ImportError("broken"))
    assert choose_runtime(MemoryConfig.model_validate(memory), card).optimizer == "adam"


def test_a_card_that_was_asked_for_has_to_be_there() -> None:
    """The error names the flag that was given, and the way without a card."""
    with pytest.raises(ImagicError, match=r"--device cuda.*--device cpu"):
        choose_runtime(MemoryConfig(device="cuda"), None)


@each("command, group", [("doctor", "choices"), ("plan", None)])
def test_commands_that_only_look_use_the_drivers_card(driver: Driver, tmp_path: Path, command: str, group: str | None) -> None:
    """``doctor`` and ``plan`` with preset ``auto`` plan for the card of the driver, in its precision, without loading PyTorch."""
    driver(TWO)
    tokens = [command, "--json", *(["--base", "sd15", "--preset", "auto"] if command == "plan" else [])]
    code = f"from imagic_lora.cli.app import main; assert main({tokens}) in (0, 2)"
    found = without_torch(code, save_torch(tmp_path, "cuda"))
    if group:
        assert found[group]["device"] == f"cuda:0 ({TURING.name})"
        assert found[group]["precision"].startswith("float16")
    else:
        assert found["assumed"]["dtype"] == "fp16"
        assert found["preset"] == "24gb"
