"""Settings that the method of a fit does not read; giving one is an error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from cyclopts import Parameter
from pydantic import BaseModel

from ..config import FitMethod, RunConfig

_OWNERS = {"dreambooth": "dreambooth", "inversion": "textual-inversion"}  # the method that a group of settings belongs to
_NO_ETA = ("eta", "edit.source_eta", "edit.padding_eta")
_OF_A_NEW_WORD = ("steps", "learning_rate", "batch_size", "timesteps")  # the settings of stage 1 that textual inversion reads


def unread(run: RunConfig, given: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yields settings that the method of a run does not read: the flag, the flag that excludes it, and the valid combination.

    Args:
        run: the merged settings.
        given: those that were given, as nested mappings.
    """
    method = f"--method {run.method}"
    for path, flag in paths(given):
        expected = read_instead(run.method, path)
        if expected is not None:
            yield flag, method, expected
    if run.method == "dreambooth" and run.tune.mode == "embedding":
        yield "--mode", f"{method}, which trains the denoiser", "--mode lora or --mode full"
    if run.method == "dreambooth" and run.monitoring.early_stop in ("embed", "both"):
        yield "--early-stop", method, "--early-stop tune: this method has no stage 1"


def read_instead(method: FitMethod, path: str) -> str | None:
    """Returns what a method reads instead of a setting, as an error says it; None if it reads the setting.

    Args:
        method: of the fit.
        path: of the setting, such as ``tune.rank``.
    """
    group, _, name = path.rpartition(".")
    if group in _OWNERS:
        return None if method == _OWNERS[group] else f"this setting only with --method {_OWNERS[group]}"
    if method == "imagic":
        return None
    if path in _NO_ETA:
        return "no eta: the images of this method are not interpolated"
    if group == "embed" and method == "dreambooth":
        return "no settings of stage 1, which this method does not have"
    if group == "embed" and name not in _OF_A_NEW_WORD:
        return f"of the settings of stage 1 only {', '.join(_OF_A_NEW_WORD)}"
    if group == "tune" and method == "textual-inversion":
        return "no settings of stage 2, which this method does not have"
    return None


def paths(given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Path and flag of every setting that is given."""
    for name, value in given.items():
        if not isinstance(value, Mapping):
            yield name, f"--{name.replace('_', '-')}"
            continue
        model = cast(type[BaseModel], RunConfig.model_fields[name].annotation)
        yield from ((f"{name}.{own}", flag_of(model, name, own)) for own in value)


def flag_of(model: type[BaseModel], group: str, name: str) -> str:
    """The flag of a setting of a group: its own, such as ``--rank``, or ``--tune.steps``."""
    parameters = [entry for entry in model.model_fields[name].metadata if isinstance(entry, Parameter)]
    own = [flag for parameter in parameters for flag in parameter.name or ()]
    return own[0] if own else f"--{group}.{name.replace('_', '-')}"
