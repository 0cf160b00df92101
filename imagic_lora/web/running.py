"""One job: calls the function of its command, as the command line does, and writes its progress as events."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ..adapters.durable import EventLog
from ..cli.interrupts import Interrupts
from ..cli.listening import listening
from ..core.config import EditConfig, RunConfig
from ..core.device_config import DeviceConfig
from ..core.errors import ImagicWarning, Stopped
from ..core.settings.reading import settings_error
from ..sampling.kept import KeptEditor
from .jobs import Job, Problem, Queue

if TYPE_CHECKING:
    from ..training.stage import StepReport

OUTPUT = "out"
_EDITS = ("edit", "sweep")
_EVERY = 0.25  # seconds between two events of progress
_GROUPS = {"fit": {"settings": RunConfig}, "edit": {"settings": EditConfig, "device": DeviceConfig}}
_GROUPS |= {"sweep": _GROUPS["edit"], "compare": {"device": DeviceConfig}}


class Progress:
    """The listener of a job, which writes events.

    Args:
        log: the events of the job.
        folder: the folder of the job, for copies of the previews.
    """

    def __init__(self, log: EventLog, folder: Path) -> None:
        self._log, self._folder = log, folder
        self._last, self._label = 0.0, ""
        self._started: dict[str, tuple[float, float]] = {}  # by label: when its first report came, and how much was done then

    def step(self, report: StepReport, run: RunConfig) -> None:
        """Writes a step, not more than some a second; one with a relative loss, a preview or the end of its stage always."""
        if report.stage not in run.stages:  # the class pictures of DreamBooth, which come before the training
            self.progress(f"{report.stage} pictures", report.step, report.steps)
            return
        now = time.monotonic()
        began, first = self._started.setdefault(report.stage, (now, report.step))
        notable = report.relative_loss is not None or report.preview or report.early_stop or report.step in (1, report.steps)
        if not notable and now - self._last < _EVERY:
            return
        self._last = now
        stages = {name: stage.steps for name, stage in run.stages.items()}
        names = list(stages)
        later = sum(stages[name] for name in names[names.index(report.stage) + 1 :])
        rate = (now - began) / (report.step - first) if report.step > first else None
        event: dict[str, Any] = {"kind": "step", "stage": report.stage, "step": report.step, "steps": report.steps}
        event |= {
            "loss": None if report.loss is None else report.loss.item(),
            "left": None if rate is None else rate * (report.steps - report.step + later),
        }
        event |= {"stages": stages, "early_stop": report.early_stop}
        if report.relative_loss is not None:
            event["relative"] = report.relative_loss
        if report.preview:
            name = f"preview-{report.step}.png"
            with contextlib.suppress(OSError):  # the fit is worth more than its preview
                shutil.copyfile(report.preview, self._folder / name)
                event["preview"] = name
        self._log.append(event)

    def progress(self, label: str, done: float, total: float) -> None:
        """Writes how much of a task is done, not more than some times a second."""
        now = time.monotonic()
        began, first = self._started.setdefault(label, (now, done))
        if label == self._label and done < total and now - self._last < _EVERY:
            return
        self._last, self._label = now, label
        left = (now - began) / (done - first) * (total - done) if done > first else None
        self._log.append({"kind": "progress", "label": label, "done": done, "total": total, "left": left})

    def warning(self, text: str) -> None:
        """Writes a warning for the user."""
        self._log.append({"kind": "warning", "text": text})


def run_job(queue: Queue, job: Job, kept: KeptEditor) -> bool:
    """Runs a job, and records how it ended.

    Args:
        queue: the queue.
        job: the job.
        kept: the editor of the last edit; an edit or a sweep uses it again, and every other job releases it first.

    Returns:
        Whether the process may run another job: after an interruption or an unexpected error it may not.
    """
    from ..cli.app import explained_error

    progress = Progress(queue.events(job.id), queue.folder(job.id))
    try:
        with Interrupts(), listening(progress), _warnings(progress):
            result = _result(queue, job, kept)
    except Stopped as error:
        queue.end(job.id, "stopped", message=str(error))
        return False
    except KeyboardInterrupt as error:
        queue.end(job.id, "stopped", message=str(error) or "nothing was stored")
        return False
    except Exception as error:  # the worker outlives a job: its error is stored with the job, and a traceback beside it
        problem = explained_error(error)
        if problem is not None:
            queue.end(job.id, "failed", problem=Problem.of(problem))
            return True
        (queue.folder(job.id) / "traceback.txt").write_text(traceback.format_exc(), encoding="utf-8")
        text = f"{type(error).__name__}: {error}"[:2000]
        queue.end(job.id, "crashed", message=f"an unexpected error: {text}. Its traceback is in {queue.folder(job.id)}/traceback.txt")
        return False
    queue.end(job.id, "done", result=result)
    return True


def _result(queue: Queue, job: Job, kept: KeptEditor) -> dict[str, Any]:
    """Calls the function of the command, and returns the JSON that it prints."""
    output = io.StringIO()
    if job.kind not in _EDITS:
        kept.release()
    with contextlib.redirect_stdout(output), kept.reused() if job.kind in _EDITS else contextlib.nullcontext():
        command(job.kind)(**_arguments(queue, job))
    return json.loads(output.getvalue())


def command(kind: str) -> Callable[..., None]:
    """Returns the function of a command."""
    from ..cli.commands import compare, convert, edit, fit, sweep

    commands: dict[str, Callable[..., None]] = {"fit": fit.fit, "edit": edit.edit, "sweep": sweep.sweep, "compare": compare.compare}
    return (commands | {"export": convert.export, "compress": convert.compress})[kind]


def _arguments(queue: Queue, job: Job) -> dict[str, Any]:
    """Returns what the function of the command is called with: settings as models, files as paths, and where the job writes to.

    Raises:
        ImagicError: a setting is invalid.
    """
    arguments = dict(job.arguments)
    try:
        for name, model in _GROUPS.get(job.kind, {}).items():
            if name in arguments:
                arguments[name] = model.model_validate(arguments[name])
    except ValidationError as error:
        raise settings_error(error) from error
    for name in ("image", "mask", "photo"):
        if arguments.get(name) is not None:
            arguments[name] = queue.root / arguments[name]
    if arguments.get("keep") not in (None, "auto"):
        arguments["keep"] = str(queue.root / arguments["keep"])
    output = queue.folder(job.id) / OUTPUT
    places = {"fit": {}, "compress": {}, "export": {"out": output}}.get(job.kind, {"out_dir": output})
    return arguments | places | ({} if job.kind == "compare" else {"store": queue.store}) | {"as_json": True}


@contextmanager
def _warnings(progress: Progress) -> Iterator[None]:
    """Writes every warning for the user as an event."""

    def show(message: Warning | str, category: type[Warning], *_: Any) -> None:
        if issubclass(category, ImagicWarning):
            progress.warning(str(message))

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
