"""How a comparison ends early: a budget, methods that fail, an interruption, an unexpected error."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from common import Run, each, read_comparison

import imagic_lora.methods.comparison.running as running
from imagic_lora.core.errors import ImagicError
from imagic_lora.methods.comparison.running import Scorer
from imagic_lora.methods.sdedit import SDEdit

THREE = "sdedit,magicmix,ddim-inversion"


def flags(folder: Path) -> list[str]:
    return ["--base", str(folder), "--device", "cpu"]


@each("methods", ["sdedit", "fast"])
def test_a_budget_that_fits_no_method_is_an_error(run: Run, folder: Path, photo_file: Path, methods: str) -> None:
    """One message with the reasons, and an earlier comparison is left as it was."""
    Path("made").mkdir(exist_ok=True)
    Path("made/results.json").write_text("{}")
    tail = ("--methods", methods, "--budget", "0.00001", "--out", "made", "--overwrite")
    code, _, err = run("compare", photo_file, "a red dog", *flags(folder), *tail)
    assert code == 2
    assert re.search(r"no method made an edit: .*sdedit: would take about .* s, and 1e-05 s of --budget are left", err)
    assert "raise --budget" in err
    assert Path("made/results.json").read_text() == "{}"
    assert len(list(Path("made").iterdir())) == 1


def test_a_budget_leaves_out_what_does_not_fit_it(run: Run, folder: Path, photo_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the measured time of a pass, then that of the methods so far: the cheaper method fits, the other does not fit the rest."""
    monkeypatch.setattr(Scorer, "seconds_per_pass", lambda _: 100.0)
    clock = iter(range(0, 10**6, 8000))  # a method takes 8000 seconds
    monkeypatch.setattr(running, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    tail = ("--methods", "sdedit,ddim-inversion", "--source", "a cat", "--budget", "9000", "--out", "made")
    code, _, err = run("compare", photo_file, "a red dog", *flags(folder), *tail)
    assert code == 0, err
    found = read_comparison("made")
    cheap, dear = (found[name]["predicted"]["passes"]["forward"] for name in ("sdedit", "ddim-inversion"))
    assert cheap < 90 < dear
    assert "cost" in found["sdedit"]
    assert re.match(r"would take about .* s, and 1,000 s of --budget are left", found["ddim-inversion"]["left_out"])
    assert "of --budget are left" in Path("made/index.html").read_text(encoding="utf-8")


def ending(monkeypatch: pytest.MonkeyPatch, method: type, end: Callable[[], object]) -> None:
    """Lets a method end in the middle of its passes."""
    sample = method.sample

    def broken(self: Any, encoded: Any, config: Any) -> Any:
        sample(self, encoded, config)
        end()

    monkeypatch.setattr(method, "sample", broken)


def throws(error: BaseException) -> Callable[[], None]:
    def end() -> None:
        raise error

    return end


@each("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError(), ImagicError("a NaN", "none", "-")])
def test_a_method_that_fails_is_left_out_with_the_reason(
    run: Run, folder: Path, photo_file: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The others go on; the reason is in the results and on the page."""
    ending(monkeypatch, SDEdit, throws(error))
    made = type(error).__name__
    code, _, err = run("compare", photo_file, "a red dog", *flags(folder), "--source", "a cat", "--methods", THREE, "--out", made)
    assert code == 0, err
    found = read_comparison(made)
    reason = "failed: a NaN" if isinstance(error, ImagicError) else "ran out of memory"
    assert found["sdedit"]["left_out"] == reason
    assert f"<b>sdedit</b>: {reason}" in Path(made, "index.html").read_text(encoding="utf-8")
    assert f"sdedit is left out: {reason}" in err
    assert {name for name in found if Path(made, f"{name}.png").is_file()} == {"magicmix", "ddim-inversion"}


@pytest.mark.filterwarnings("default:the scores")
def test_scores_that_run_out_of_memory_are_missing_and_the_edit_is_kept(
    run: Run, folder: Path, photo_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A warning says so."""
    monkeypatch.setattr(Scorer, "score", lambda *_: throws(MemoryError())())
    code, _, err = run("compare", photo_file, "a red dog", *flags(folder), "--methods", "sdedit", "--out", "made")
    assert code == 0, err
    assert "the scores of sdedit ran out of memory" in err
    assert read_comparison("made")["sdedit"]["scores"] == {}
    assert Path("made/sdedit.png").is_file()


@each("number", [signal.SIGINT, signal.SIGTERM])
def test_after_an_interruption_what_is_done_is_written(
    run: Run, folder: Path, photo_file: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """MagicMix, the cheapest, is done; the others are left out as interrupted; a method that could not run keeps its own reason."""
    handler = signal.getsignal(number)
    ending(monkeypatch, SDEdit, lambda: signal.raise_signal(number))
    tail = ("--source", "a cat", "--methods", "fast", "--out", f"made-{number}", "--json")
    code, out, err = run("compare", photo_file, "a red dog", *flags(folder), *tail)
    assert code == 130, err
    assert f"are in made-{number} (1 of" in json.loads(out)["interrupted"]
    found = read_comparison(f"made-{number}")
    assert [name for name, method in found.items() if method["left_out"] is None] == ["magicmix"]
    assert found["sdedit"]["left_out"] == found["ddim-inversion"]["left_out"] == "interrupted"
    assert found["blended-latent"]["left_out"].startswith("needs a mask")
    assert Path(f"made-{number}/magicmix.png").is_file()
    assert signal.getsignal(number) == handler


def test_an_interruption_before_any_edit_writes_nothing(run: Run, folder: Path, photo_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier comparison is left as it was."""
    Path("made").mkdir()
    Path("made/results.json").write_text("{}")
    ending(monkeypatch, SDEdit, lambda: signal.raise_signal(signal.SIGINT))
    tail = ("--methods", "sdedit", "--out", "made", "--overwrite")
    code, _, err = run("compare", photo_file, "a red dog", *flags(folder), *tail)
    assert code == 130
    assert "nothing was stored" in err
    assert Path("made/results.json").read_text() == "{}"


def test_an_unexpected_error_does_not_lose_what_is_done(run: Run, folder: Path, photo_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is raised with its traceback after the files are written."""
    ending(monkeypatch, SDEdit, throws(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        run("compare", photo_file, "a red dog", *flags(folder), "--source", "a cat", "--methods", THREE, "--out", "made")
    found = read_comparison("made")
    assert found["magicmix"]["left_out"] is None
    assert found["sdedit"]["left_out"] == "the comparison ended with ZeroDivisionError"
