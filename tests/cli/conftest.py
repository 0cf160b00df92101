"""Commands, run as the shell runs them."""

from __future__ import annotations

from pathlib import Path

import pytest
from common import Run

import imagic_lora.cli.app as cli
import imagic_lora.cli.console as console


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in an empty folder: its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console.err, "width", 200)

    def command(*tokens: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main([str(token) for token in tokens])
        out, err = capsys.readouterr()
        return code, out, " ".join(err.split())

    return command
