"""Ctrl-C and SIGTERM while a command runs: 130, what is saved, and no traceback, whatever becomes of the exception."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread

import pytest
import torch
from common import Run
from PIL import Image
from tiny import save_tiny

import imagic_lora.cli.app as cli
import imagic_lora.sampling.editor as editor
import imagic_lora.training.fit as imagic
from imagic_lora.bench.critters import Bench
from imagic_lora.cli.interrupts import Interrupts
from imagic_lora.core.errors import Stopped

SHORT = ("--embed.steps", "1", "--tune.steps", "1", "--edit.steps", "1", "--rank", "2", "--convergence-every", "0")


class _Interrupted:
    """A sequence that code in C reads, and a signal arrives then."""

    def __init__(self, number: signal.Signals) -> None:
        self.number = number

    def __len__(self) -> int:
        return 1

    def __getitem__(self, _: int) -> int:
        signal.raise_signal(self.number)
        return 0


def inside_torch(number: signal.Signals = signal.SIGINT) -> None:
    """A signal that arrives inside torch, which raises ValueError instead of KeyboardInterrupt."""
    torch.tensor(_Interrupted(number))


def pictures(count: int, end: Callable[[], object]) -> Callable[..., Iterator[Image.Image]]:
    """Stands in for generate(): so many images, then ``end``."""

    def generated(*_: object) -> Iterator[Image.Image]:
        for _ in range(count):
            yield Image.new("RGB", (40, 32))
        end()

    return generated


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A photo, a base, and a store with the adapter ``rex``."""
    folder = tmp_path_factory.mktemp("made")
    found = {"photo": folder / "photo.png", "base": save_tiny(folder / "base"), "store": folder / "store"}
    Image.radial_gradient("L").resize((40, 32)).convert("RGB").save(found["photo"])
    fit = ["fit", str(found["photo"]), "a dog", "--base", str(found["base"]), *SHORT, "--store", str(found["store"]), "--name", "rex"]
    assert cli.main(fit) == 0
    return found


def test_torch_replaces_the_exception_of_a_signal() -> None:
    """The reason for all this; should torch leave it alone one day, these tests show nothing."""
    with pytest.raises(ValueError, match="could not determine the shape"):
        inside_torch_by_default()


def inside_torch_by_default() -> None:
    """As :func:`inside_torch`, with Python's own handler."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        inside_torch()
    finally:
        signal.signal(signal.SIGINT, handler)


def test_a_fit_that_is_interrupted_inside_torch_exits_130(run: Run, made: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """While the base is loaded: nothing was stored; of a fit that resumes, the checkpoint is unchanged."""
    command = ("fit", made["photo"], "a dog", "--base", made["base"], *SHORT, "--store", "S", "--name", "one")
    with monkeypatch.context() as patch:
        patch.setattr(imagic, "open_base", lambda *_: inside_torch())
        code, _, err = run(*command)
        assert (code, err) == (130, "Interrupted: nothing was stored")
    with monkeypatch.context() as patch:
        patch.setattr(imagic, "tune_stage", lambda *_: (_ for _ in ()).throw(RuntimeError("a crash after stage embed")))
        with pytest.raises(RuntimeError, match="a crash"):
            run(*command)
    monkeypatch.setattr(imagic, "open_base", lambda *_: inside_torch())
    code, _, err = run(*command, "--resume")
    assert code == 130
    assert err.startswith("Interrupted: the previous checkpoint is unchanged Resume with: imagic-lora fit")


@pytest.mark.parametrize(
    ("count", "number", "said"),
    [(0, signal.SIGINT, "nothing was stored"), (2, signal.SIGTERM, "the images written so far are in outputs/rex")],
)
def test_an_edit_that_is_interrupted_inside_torch_says_whether_there_are_images(
    count: int, number: signal.Signals, said: str, run: Run, made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the images are there."""
    monkeypatch.setattr(editor, "generate", pictures(count, lambda: inside_torch(number)))
    code, _, err = run("edit", "rex", "--store", made["store"], "--seed", "0:4", "--batch-size", "1")
    assert (code, err) == (130, f"Interrupted: {said}")
    assert len(list(Path().glob("outputs/rex/*.png"))) == count


def test_a_sweep_that_is_interrupted_inside_torch_says_whether_there_are_images(
    run: Run, made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the images are there."""
    monkeypatch.setattr(editor, "generate", pictures(1, inside_torch))
    code, _, err = run("sweep", "rex", "--store", made["store"], "--eta", "0,0.5,1", "--batch-size", "1")
    assert (code, err) == (130, "Interrupted: the images written so far are in outputs/rex/sweep/images")
    assert len(list(Path().glob("outputs/rex/sweep/images/*.png"))) == 1


def test_a_benchmark_that_is_interrupted_says_how_to_go_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps every result."""
    monkeypatch.setattr(Bench, "results", lambda *_: pictures(1, inside_torch)())
    code, _, err = run("bench", "critters", "--cases", 2, "--methods", "sdedit", "--out", "B")
    assert (code, err) == (130, "Interrupted: the results so far are in B; the same command continues")


def test_an_exception_without_a_signal_stays_what_it_is() -> None:
    """And Stopped is one that says what is saved; the handlers are put back."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ValueError, match="plain"), Interrupts():
        raise ValueError("plain")

    def stop() -> None:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise Stopped

    with pytest.raises(Stopped), Interrupts():
        stop()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_second_signal_counts_unless_the_first_is_being_handled() -> None:
    """Code in C can lose the first one; what the first one ends is not interrupted again."""
    with Interrupts():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            signal.raise_signal(signal.SIGINT)


def test_what_is_saved_is_said_by_the_innermost_context() -> None:
    """It knows most."""
    with pytest.raises(KeyboardInterrupt, match="two images"), Interrupts(lambda: "nothing"), Interrupts(lambda: "two images"):
        inside_torch()


def test_a_command_runs_in_another_thread(run: Run) -> None:
    """Python sends signals to the main thread alone, and lets no other set their handlers."""
    codes: list[int] = []
    thread = Thread(target=lambda: codes.append(run("bases")[0]))
    thread.start()
    thread.join()
    assert codes == [0]
