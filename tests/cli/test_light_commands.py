"""The commands that only look answer at once: they import neither torch nor diffusers. The public names are imported when they are used."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import imagic_lora.cli.commands.doctor as doctor
import imagic_lora.cli.commands.fit as fit
from imagic_lora.cli.app import main
from imagic_lora.core.config import RunConfig
from imagic_lora.core.launch import Launch
from imagic_lora.core.machine import Card

ROOT = Path(__file__).parents[2]


def python(code: str) -> str:
    """The output of a fresh Python."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_commands_that_only_look_import_no_torch(tmp_path: Path) -> None:
    """Each of them in one process; to list two hundred adapters takes less than a second of a core."""
    for index in range(200):
        shutil.copytree(ROOT / "adapters" / "rex-jumps", tmp_path / f"rex-{index:03d}")
    found = python(f"""
import sys, time
from imagic_lora.cli.app import main
store = ["--store", {str(tmp_path)!r}]
start = time.process_time()
assert main(["list", *store]) == 0
assert time.process_time() - start < 1, time.process_time() - start
of_store = (["show", "rex-007", *store], ["verify", *store], ["rm", "rex-007", *store])
for command in (*of_store, ["bases"], ["plan", "--base", "sd15"], ["doctor"], ["--help"]):
    assert main(command) == 0, command
loaded = [name for name in ("torch", "diffusers", "transformers", "peft", "accelerate") if name in sys.modules]
assert not loaded, loaded
""")
    assert "rex-199" in found
    assert not (tmp_path / "rex-007").exists()


@pytest.mark.parametrize(("tokens", "stream", "code"), [(("bases",), "stdout", 0), (("show", "nobody"), "stderr", 2)])
def test_a_reader_that_has_gone_changes_no_exit_code(tokens: tuple[str, ...], stream: str, code: int) -> None:
    """A pipe to a program that has read enough, such as head; of what is said too."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as closed:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {stream: closed}
        done = subprocess.run([sys.executable, "-m", "imagic_lora", *tokens], cwd=ROOT, check=False, **streams)
    assert done.returncode == code
    assert b"Traceback" not in (done.stdout or b"") + (done.stderr or b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_an_output_that_is_full_is_an_error(flags: tuple[str, ...]) -> None:
    """Also where the output is so short that it is written when the command ends."""
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "imagic_lora", "list", *flags]
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines()[0]) == (2, "Error: the disk is full")


def test_a_terminal_without_unicode_shows_escapes() -> None:
    """Instead of a traceback for the first character that it lacks."""
    command = [sys.executable, "-m", "imagic_lora", "bases"]
    variables = os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "40"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, check=True)
    assert b"\\u2026" in done.stdout  # an ellipsis


@pytest.mark.slow
def test_public_names_are_imported_when_they_are_used() -> None:
    """Importing the package imports nothing heavy; every name it promises is there; any other is an AttributeError."""
    python("import sys, imagic_lora; imagic_lora.Store; imagic_lora.RunConfig; imagic_lora.plan; assert 'torch' not in sys.modules")
    python("import imagic_lora as lib; assert all(getattr(lib, name) for name in lib.__all__); assert dir(lib) == sorted(lib.__all__)")
    with pytest.raises(subprocess.CalledProcessError):
        python("from imagic_lora import Studio")


@pytest.mark.slow
@pytest.mark.parametrize("needed", [True, False])
def test_bitsandbytes_is_imported_only_where_it_is_used(needed: bool) -> None:
    """Hidden from the imports of the libraries, PEFT's later one too, and there for our own; garbage is collected again."""
    found = python(f"""
import gc, sys
from imagic_lora.cli.libraries import import_libraries
import_libraries(bitsandbytes={needed})
from peft.import_utils import is_bnb_available
print("bitsandbytes" in sys.modules, is_bnb_available())
import bitsandbytes.optim
assert gc.isenabled() and gc.get_freeze_count() > 100_000
""")
    assert found.split()[-2:] == [str(needed)] * 2


def test_doctor_prints_memory_in_gib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes become GiB, of the host and of a card."""
    monkeypatch.setattr(doctor, "free_host_memory", lambda: 3 * 2**30)
    monkeypatch.setattr(doctor, "find_card", lambda: Card(0, "Test Card 9", 5 * 2**30, True))
    assert main(["doctor", "--json"]) == 0
    system = json.loads(capsys.readouterr().out)["system"]
    assert (system["free memory"], system["free memory on the card"]) == ("3.0 GiB", "5.0 GiB")


def test_a_deleted_folder_stops_only_what_needs_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The libraries cannot be imported in a current folder that is gone, so a fit and a demo are refused."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["list", "--store", str(ROOT / "adapters")]) == main(["doctor"]) == main(["plan"]) == 0
    assert main(["demo"]) == main(["fit", "photo.png", "a dog"]) == 2
    assert "the current folder has been deleted" in capsys.readouterr().err


def test_without_a_folder_for_temporary_files_nothing_is_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """PyTorch asks for one when it is imported."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", list)
    assert main(["demo"]) == 2
    assert "set TMPDIR" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("memory", "needed"), [({}, False), ({"dtype": "fp32"}, False), ({"quantize": "nf4"}, True), ({"optimizer": "adam8bit"}, True)]
)
def test_fit_imports_bitsandbytes_where_the_settings_name_it(monkeypatch: pytest.MonkeyPatch, memory: dict, needed: bool) -> None:
    """A fit that quantizes or has 8-bit states needs it, and hides it from no library."""
    asked = []
    monkeypatch.setattr(fit, "import_libraries", lambda bitsandbytes: asked.append(bitsandbytes))
    fit.configured(RunConfig.model_validate({"base": "critters", "memory": {"device": "cpu", **memory}}), None, Launch())
    assert asked == [needed]
