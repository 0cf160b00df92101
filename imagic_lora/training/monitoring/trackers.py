"""Logs the steps of a fit to TensorBoard, through the trackers of accelerate."""

from __future__ import annotations

import json
from collections.abc import Generator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from PIL import Image

from ...adapters.writing import check_outputs
from ...core.config import RunConfig
from ...core.errors import ImagicError, Stopped
from ..stage import StepReport

if TYPE_CHECKING:
    from accelerate.tracking import TensorBoardTracker

Value = TypeVar("Value")
_BUFFERED = 10  # steps between two reads of the losses, each of which synchronises with the device


def check_tensorboard(folder: Path) -> None:
    """Checks before a fit starts that it can be logged.

    Args:
        folder: the folder of the log files.

    Raises:
        ImagicError: TensorBoard is not installed, or the folder cannot be written to.
    """
    if find_spec("tensorboard") is None:
        raise ImagicError(
            "--tracker tensorboard without the package tensorboard", "TensorBoard", "install it: pip install 'imagic-lora[tensorboard]'"
        )
    check_outputs(folder, [])


def tracked(steps: Generator[StepReport, None, Value], config: RunConfig, name: str, folder: Path) -> Generator[StepReport, None, Value]:
    """Passes the reports of a fit on, and logs loss, relative loss and previews of every stage. Only the main process may call this.

    Args:
        steps: the running fit.
        config: its settings, which are logged as text.
        name: name of the run; a resumed fit continues the curves of its name.
        folder: the folder of the log files; those of this run are in ``folder/name``.
    """
    from accelerate.tracking import TensorBoardTracker

    tracker = TensorBoardTracker(name, folder)
    tracker.start()
    buffered: list[StepReport] = []
    try:
        tracker.log({"settings": _as_code(config)}, step=0)
        while True:
            try:
                report = next(steps)
            except StopIteration as done:
                _write(tracker, buffered)
                return done.value
            if report.loss is not None:
                buffered.append(report)
            if len(buffered) == _BUFFERED or report.preview:
                _write(tracker, buffered)
            yield report
    except (GeneratorExit, Stopped):
        _write(tracker, buffered)
        raise
    finally:
        steps.close()
        tracker.finish()


def _write(tracker: TensorBoardTracker, buffered: list[StepReport]) -> None:
    """Logs reports and removes them from the buffer."""
    losses = torch.stack([report.loss for report in buffered if report.loss is not None]).tolist() if buffered else []
    for report, loss in zip(buffered, losses, strict=True):
        relative = {} if report.relative_loss is None else {f"{report.stage}/relative_loss": report.relative_loss}
        tracker.log({f"{report.stage}/loss": loss, **relative}, step=report.step)
        if report.preview:
            pixels = np.asarray(Image.open(report.preview).convert("RGB"))
            tracker.log_images({f"{report.stage}/previews": pixels[None]}, step=report.step, dataformats="NHWC")
    buffered.clear()


def _as_code(config: RunConfig) -> str:
    """The settings as an indented block, which TensorBoard shows as they are."""
    return "\n".join(f"    {line}" for line in json.dumps(config.model_dump(mode="json"), indent=2).splitlines())
