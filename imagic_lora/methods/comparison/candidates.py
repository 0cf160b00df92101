"""The methods of a comparison: those that can run, with predicted passes and memory, and those that are left out, with the reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from ...bases.architecture import Architecture
from ...bases.base import Base
from ...core.config import RunConfig
from ...core.errors import ImagicError
from ...core.settings.clashes import clashes
from ...core.settings.merging import merged
from ...core.settings.reading import validated
from ...core.settings.unread import unread
from ...core.validation import first_problem
from ...memory.limits import gib
from ...memory.out_of_memory import assumed_from
from ...memory.plan import Plan
from ...memory.prediction import predict
from ...memory.symbolic.layers import NotPlanned
from ..catalogue import IMAGIC, SAMPLING, SUBJECT, default_config
from ..generated import GeneratingMethod
from ..imagic import Imagic
from ..method import NEEDS, EditRequest, Method, Need, Passes
from ..sampled import SamplingMethod
from ..subject import SubjectMethod

NAMES = (*IMAGIC, *SUBJECT, *SAMPLING)
"""Methods that a comparison can run. Full fine-tuning is left to the command ``fit``: it needs the base in another precision."""
FITS = (*IMAGIC, *SUBJECT)
"""Methods with a fit, whose settings are those of a run."""
TRAINS = (*FITS, "null-text", "prompt-to-prompt")
"""Methods that train something for each photo."""
_DETERMINED = (("tune", "mode"), ("dreambooth", "class_prompt"), ("inversion", "initial_word"), ("inversion", "word"))
_WITHOUT_PHOTO = ("prompt-only", "magicmix-text", "prompt-to-prompt-text")  # they make or edit an image of their own
GROUPS: Mapping[str, tuple[str, ...]] = {
    "all": tuple(name for name in NAMES if name not in _WITHOUT_PHOTO),
    "fast": tuple(name for name in NAMES if name not in (*_WITHOUT_PHOTO, *TRAINS, "ddib")),
}
"""Methods by the name of a group: all that edit the photo; those that train nothing and take at most 260 passes."""


@dataclass(frozen=True)
class Candidate:
    """A method of a comparison, before it runs.

    Args:
        name: name of the method.
        settings: its settings as JSON values.
        method: the method; None if it is left out.
        passes: predicted passes; None if they cannot be predicted.
        once: predicted forward passes for what is made once and kept, such as class pictures; the cost does not count them.
        peak: predicted peak memory in bytes, with allowances; None if it cannot be predicted.
        left_out: why it does not run; None if it runs.
    """

    name: str
    settings: Mapping[str, Any]
    method: Method | None = None
    passes: Passes | None = None
    peak: int | None = None
    left_out: str | None = None
    once: int = 0


def chosen(names: str) -> tuple[list[str], bool]:
    """Returns the methods of a list or a group, in the order of the catalogue, and whether they are named one by one.

    Args:
        names: ``all``, ``fast``, or names of methods, separated by commas.

    Raises:
        ImagicError: a name is not in the catalogue.
    """
    if names in GROUPS:
        return list(GROUPS[names]), False
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in NAMES:
            expected = f"{', '.join(GROUPS)}, or one or more of {', '.join(NAMES)}, separated by commas"
            raise ImagicError(f"--methods {names} has {name!r}", expected, "correct the list of methods; imagic-lora methods explains each")
    return [name for name in NAMES if name in wanted], True


def missing_need(name: str, given: Iterable[Need]) -> Need | None:
    """Returns what a method needs and does not have, such as ``mask``; None if it has everything.

    Args:
        name: name of the method.
        given: the optional fields that the request has.
    """
    return next(iter(sorted(class_of(name).requires - set(given))), None)


def class_of(name: str) -> type[Method]:
    """Returns the class of a method by its name, one of :data:`NAMES`."""
    return Imagic if name in IMAGIC else SubjectMethod if name in SUBJECT else SAMPLING[name]


def check_method_base(name: str, architecture: Architecture, base: str) -> None:
    """Raises ImagicError if a method cannot work on a base.

    Args:
        name: name of the method.
        architecture: configs of the base.
        base: name of the base, for the message.
    """
    class_of(name).check_base(name, architecture, base)


def check_needs(names: Iterable[str], given: Iterable[Need]) -> None:
    """Raises ImagicError if one of the methods needs a field that the request does not have.

    Args:
        names: names of the methods.
        given: the optional fields that the request has.
    """
    given = list(given)
    for name in names:
        need = missing_need(name, given)
        if need is not None:
            raise ImagicError(f"method {name} without a {need.replace('_', ' ')}", *NEEDS[need])


def sampling_method(name: str, settings: Mapping[str, Any], embedded: bool, few_steps: int | None = None) -> SamplingMethod[Any]:
    """Returns a method that only samples, with some settings.

    Args:
        name: name of the method.
        settings: settings that differ from the defaults, as nested mappings.
        embedded: whether the base is the embedded one, which has a guidance scale of its own.
        few_steps: number of sampling steps of a distilled base; methods that only generate then take as many, without guidance.

    Raises:
        ImagicError: an unknown setting, or a value out of range.
    """
    method = SAMPLING[name]
    defaults = default_config(method, embedded).model_dump(exclude_unset=True)
    if few_steps is not None and issubclass(method, GeneratingMethod):
        defaults |= {"steps": few_steps, "guidance_scale": 1.0}
    try:
        return method({name: method.config_class.model_validate(merged(defaults, settings))})
    except ValidationError as error:
        problem = first_problem(error)
        known = f"one of {', '.join(method.config_class.model_fields)}" if problem.kind == "extra_forbidden" else problem.expected
        raise ImagicError(f"--set of method {name}: {problem.got}", known, f"see imagic-lora methods {name}") from error


def fitted_method(name: str, config: RunConfig, settings: Mapping[str, Any]) -> Imagic | SubjectMethod:
    """Returns a method of :data:`FITS` with the settings of a run.

    Args:
        name: name of the method.
        config: settings of a run of its method and mode.
        settings: settings that override them, as nested mappings.

    Raises:
        ImagicError: an unknown setting, a value out of range, or a setting that the method does not read, that another one excludes, or
            that the loaded base or the subject determines.
    """
    run = validated(merged(config.model_dump(), settings))
    fixed = {"base", "revision", "memory", "preset", "seed", "checkpoint", "method"} & set(settings)
    fixed |= {f"{group}.{one}" for group, one in _DETERMINED if one in settings.get(group, {})}
    if fixed:
        got = f"--set {min(fixed)} of method {name}"
        raise ImagicError(got, "settings of the fit and of the edit", "use the flag of imagic-lora compare, or another method")
    for flag, _, expected in unread(run, settings):
        raise ImagicError(f"--set {flag.removeprefix('--')} of method {name}", expected, "leave it out, or choose another method")
    for flag, other, expected in clashes(run, settings):
        got = f"--set of method {name}: {flag} together with {other}"
        raise ImagicError(got, expected, "leave it out, or choose another method")
    return Imagic(name, run) if name in IMAGIC else SubjectMethod(run)


def candidate(method: Method, base: Base, request: EditRequest, free: int, named: bool) -> Candidate:
    """Checks a method, and predicts its passes and its memory.

    Args:
        method: the method, with one row.
        base: the loaded base.
        request: the request.
        free: bytes that were free on the device before the base was loaded.
        named: whether the method was asked for by its name, so that it must be able to run.

    Raises:
        ImagicError: the method was asked for by its name, and cannot edit the photo on this base.
    """
    settings: Mapping[str, Any] = method.settings
    try:
        method.check(base, request)
        passes, once = method.passes(base)[method.rows[0]], method.once(base, request)
    except ImagicError as error:
        if named:
            raise
        return Candidate(method.name, settings, left_out=error.got)
    peak, need = predicted_peak(method, base)
    if need is not None and need > free:
        reason = f"needs {gib(need)} (predicted), and {gib(free)} is free"
        return Candidate(method.name, settings, None, passes, peak, reason, once)
    return Candidate(method.name, settings, method, passes, peak, once=once)


def predicted_peak(method: Method, base: Base) -> tuple[int | None, int | None]:
    """Predicts the peak memory of a method: in total, and without what is in use before anything is loaded; in bytes.

    The peak of a method with a fit is that of the fit and the edit. A method that only samples encodes, samples and decodes; attention maps
    come on top, and gradients to an embedding take as much as in stage 1 of Imagic.

    Args:
        method: the method, with one row.
        base: the loaded base.

    Returns:
        ``(None, None)`` if the memory of the base cannot be predicted.
    """
    assumed = assumed_from(base.runtime)

    def plan(run: RunConfig) -> Plan:
        return predict(base.architecture, run, assumed)

    try:
        if isinstance(method, Imagic | SubjectMethod):
            made = plan(method.config.model_copy(update={"memory": base.runtime.memory}))
            return made.peak_bytes, made.peak_bytes - made.context
        assert isinstance(method, SamplingMethod)
        load = method.load_with(base, method.configs[method.rows[0]])
        embedding = {"tune": {"mode": "embedding"}, "embed": {"batch_size": 1}, "memory": base.runtime.memory.model_dump()}
        one = plan(validated(merged(embedding, {"edit": {"batch_size": 1, "guidance_scale": 0.0}})))
        several = plan(validated(merged(embedding, {"edit": {"batch_size": load.samples, "guidance_scale": 0.0}})))
    except NotPlanned:
        return None, None
    needs = [one.needs("encode"), one.needs("decode"), several.needs("sample") + load.maps]
    peak = max([*needs, one.needs("embed")] if load.gradients else needs)
    return peak, peak - one.context
