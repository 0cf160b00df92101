"""What a single file declares about itself: in tensors, in its metadata, and in files of the same name beside it. No torch import.

ComfyUI writes ``modelspec.predict_key`` and the tensors ``v_pred`` and ``ztsnr``. Kohya's scripts write ``modelspec.prediction_type`` and
``modelspec.architecture``, Stability's files ``modelspec.resolution``. SwarmUI reads these keys from a JSON file beside the checkpoint too.
A1111 and Forge read the YAML config of the original code.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ....core.errors import ImagicError
from ..known import bases_file
from ..vetting import read_json
from .detection import Header
from .yaml_config import yaml_settings

_PREDICTIONS = {
    "epsilon": ("epsilon", "eps"),
    "v_prediction": ("v", "v_prediction", "v-prediction", "vpred", "v_pred", "v-pred", "velocity", "v-zsnr"),
    "sample": ("sample", "x0"),
}
_PREDICTION_KEYS = ("modelspec.prediction_type", "modelspec.predict_key", "prediction_type")
_SWITCHES = {"ss_v_parameterization": ("prediction_type", "v_prediction"), "ss_zero_terminal_snr": ("zero_snr", True)}
_ARCHITECTURES = {  # only those that say more than the tensors show
    "stable-diffusion-v2-512": (("prediction_type", "epsilon"), ("resolution", 512)),
    "stable-diffusion-v2-768-v": (("prediction_type", "v_prediction"), ("resolution", 768)),
    "stable-diffusion-xl-turbo-v1": (("published", "sdxl-turbo"),),
}
_BESIDE = (".json", ".swarm.json")
_SIDES = range(64, 4097)


class Statement(NamedTuple):
    """One thing that a file declares about itself.

    Args:
        source: where it is declared, for messages.
        setting: ``prediction_type``, ``zero_snr``, ``resolution``, ``published`` (key of the published configs), ``inpaints``, or a key of
            the scheduler's config or ``scaling_factor`` of the VAE's.
        value: its value in diffusers' terms.
    """

    source: str
    setting: str
    value: Any


def statements(path: Path, tensors: Header, metadata: Mapping[str, str]) -> Iterator[Statement]:
    """Yields everything that a checkpoint declares about itself.

    Args:
        path: the file.
        tensors, metadata: its header.

    Raises:
        ImagicError: a value is not known; the YAML config describes another model.
    """
    if marker := next((name for name in tensors if name.lower() in ("v", "v_pred", "vpred")), None):
        yield Statement(f"its tensor {marker}", "prediction_type", "v_prediction")
    if "ztsnr" in tensors:
        yield Statement("its tensor ztsnr", "zero_snr", True)
    yield from _of_metadata(path, "its metadata", metadata)
    for suffix in _BESIDE:
        beside = path.with_suffix(suffix)
        yield from _of_metadata(beside, beside.name, _strings(beside))
    beside = path.with_suffix(".yaml")
    if beside.is_file():
        for setting, value in yaml_settings(beside).items():
            yield Statement(beside.name, setting, value)


def agreed(path: Path, declared: Iterable[Statement], overridden: Iterable[str]) -> dict[str, Any]:
    """The value of every setting that a file states.

    Args:
        path: the file, for messages.
        declared: its statements.
        overridden: settings that the user's list of bases states, which are left out.

    Raises:
        ImagicError: two statements contradict each other.
    """
    found: dict[str, Statement] = {}
    for statement in declared:
        if statement.setting in overridden:
            continue
        earlier = found.setdefault(statement.setting, statement)
        if earlier.value != statement.value:
            both = " and ".join(f"{one.value} by {one.source}" for one in (earlier, statement))
            remedy = f"correct what is wrong, or add the file to {bases_file()} with its prediction or resolution, which override all else"
            raise ImagicError(f"{path} contradicts itself: {statement.setting} is {both}", "one value", remedy)
    return {setting: statement.value for setting, statement in found.items()}


def _of_metadata(path: Path, source: str, metadata: Mapping[str, str]) -> Iterator[Statement]:
    """Yields what metadata say, under the names of every program that writes some."""
    for key in _PREDICTION_KEYS:
        if value := metadata.get(key, ""):
            yield Statement(f"{key} in {source}", "prediction_type", _prediction(path, key, value))
            if "zsnr" in value.lower():
                yield Statement(f"{key} in {source}", "zero_snr", True)
    for key, (setting, value) in _SWITCHES.items():
        if metadata.get(key, "").lower() in ("true", "1"):
            yield Statement(f"{key} in {source}", setting, value)
    size = metadata.get("modelspec.resolution", "")
    for setting, value in _ARCHITECTURES.get(metadata.get("modelspec.architecture", "").lower().strip(), ()):
        if setting != "resolution" or not size:  # a model that was trained on has the architecture of another size
            yield Statement(f"modelspec.architecture in {source}", setting, value)
    if size:
        yield Statement(f"modelspec.resolution in {source}", "resolution", _side(path, size))


def _prediction(path: Path, key: str, value: str) -> str:
    declared = value.lower().strip()
    if found := next((kind for kind, words in _PREDICTIONS.items() if declared in words), None):
        return found
    remedy = f"choose another base, or add this one to {bases_file()} with its prediction if the file is wrong"
    raise ImagicError(f"{path} says {key} = {reprlib.repr(value)}", f"one of {', '.join(_PREDICTIONS)}", remedy)


def _side(path: Path, size: str) -> int:
    """Side of the square with about as many pixels as a size like ``896x1152``, a multiple of 64."""
    match = re.fullmatch(r"\s*(\d{2,4})\s*(?:[x*]\s*(\d{2,4})\s*)?", size.lower())
    side = round(math.sqrt(int(match[1]) * int(match[2] or match[1])) / 64) * 64 if match else 0
    if side not in _SIDES:
        remedy = f"add the file to {bases_file()} with its resolution"
        raise ImagicError(f"{path} says modelspec.resolution = {reprlib.repr(size)}", "a size in pixels like 1024x1024", remedy)
    return side


def _strings(path: Path) -> dict[str, str]:
    """The texts of a JSON object beside a checkpoint; none if it is something else, such as the workflow that made it."""
    try:
        return {name: value for name, value in read_json(path).items() if isinstance(value, str)} if path.is_file() else {}
    except ImagicError:
        return {}
