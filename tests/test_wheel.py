"""The wheel in an empty environment, away from the checkout: minutes, and it needs a package index. ``make test-slow``."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROMPT = "a dog jumping"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a virtual environment that holds the wheel and what it depends on, at the tested versions."""
    work = tmp_path_factory.mktemp("wheel")
    run = {"check": True, "cwd": work, "env": {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}}
    subprocess.run([sys.executable, "-m", "build", "--outdir", work / "dist", ROOT], **run)
    (wheel,) = (work / "dist").glob("*.whl")
    (_,) = (work / "dist").glob("*.tar.gz")
    assert "imagic_lora/py.typed" in zipfile.ZipFile(wheel).namelist()
    subprocess.run([sys.executable, "-m", "venv", work / "venv"], **run)
    pip = [work / "venv" / "bin" / "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt"]
    torch = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    subprocess.run([*pip, torch], **run)
    subprocess.run([*pip, wheel], **run)
    return work / "venv" / "bin"


def test_every_command_of_a_newcomer_works(bin_folder: Path, tmp_path: Path) -> None:
    """demo, fit, edit, list and bench, in a folder that is not the checkout, from the installed package."""

    def imagic(*arguments: str | Path) -> str:
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [bin_folder / "imagic-lora", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True, text=True).stdout

    code = f"import imagic_lora; assert not imagic_lora.__file__.startswith({str(ROOT / 'imagic_lora')!r})"
    subprocess.run([bin_folder / "python", "-c", code], cwd=tmp_path, check=True)
    imagic("demo")
    assert (tmp_path / "outputs/demo/sheet.png").is_file()
    imagic("fit", tmp_path / "outputs/demo/photo.png", PROMPT, "--base", "critters", "--name", "rex")
    imagic("edit", "rex", "--eta", "0.5,0.7")
    assert (tmp_path / "outputs/rex/eta0.7-seed0.png").is_file()
    assert "rex" in imagic("list")
    summary = imagic("bench", "critters", "--cases", "1", "--methods", "bounds,imagic-lora", "--json")
    assert '"failed": 0' in summary
    assert (tmp_path / "outputs/bench/critters-11/index.html").is_file()
