"""The settings of a comparison, its base, and the predicted passes and memory of every method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image
from rich.table import Table

from ...bases.base import Base
from ...bases.loading.configs import recipe_for
from ...bases.loading.known import EMBEDDED, known_base
from ...bases.loading.registry import architecture_of, load_base
from ...core.config import RunConfig
from ...core.errors import ImagicError
from ...core.runtime import free_memory, resolve_runtime
from ...core.settings.merging import merged
from ...core.settings.reading import validated
from ...memory.levers import EDIT_LEVERS
from ...memory.limits import OutOfMemory
from ...memory.presets import EDIT_STAGES, choose_preset
from ...methods.catalogue import IMAGIC
from ...methods.comparison.candidates import (
    FITS,
    Candidate,
    candidate,
    check_method_base,
    fitted_method,
    missing_need,
    sampling_method,
)
from ...methods.masks import check_area
from ...methods.method import NEEDS, EditRequest, Method, Need
from ..console import err, plain


def optional_fields(source: bool, mask: bool, subject: bool = False) -> list[Need]:
    """Returns the optional fields that a request has."""
    given: dict[Need, bool] = {"source_prompt": source, "mask": mask, "subject": subject}
    return [need for need, has in given.items() if has]


class Setup(NamedTuple):
    """The settings of a comparison before its base is loaded.

    Args:
        run: base and memory levers.
        free: bytes that are free on the device.
        methods: the methods by name, and why others are left out.
    """

    run: RunConfig
    free: int
    methods: dict[str, Method | str]


def configured(
    names: Sequence[str],
    named: bool,
    have: Sequence[Need],
    given: Mapping[str, Any],
    levers: Mapping[str, Any],
    mask: Image.Image | None = None,
) -> Setup:
    """Resolves the settings of the base and of every method, without loading the base.

    Args:
        names: names of the methods.
        named: whether the methods were asked for by name, so that each must be able to run.
        have: the optional fields that requests will have.
        given: settings of the one method, as nested mappings.
        levers: base, preset and memory levers that were given.
        mask: the mask of the request, if there is one for all of them.

    Raises:
        ImagicError: a setting is unknown or out of range, the base cannot be read, the area of the mask is too small, or a method that was
            asked for by name cannot work on the base.
    """
    plain_run = validated(levers)
    architecture = architecture_of(plain_run.base, plain_run.revision)
    embedded = known_base(plain_run.base, plain_run.revision).built_in in EMBEDDED
    recipe = recipe_for(architecture, plain_run.base, plain_run.revision)
    if mask is not None:
        check_area(architecture, mask)
    run: RunConfig | None = None
    found: dict[str, Method | str] = {}
    large = architecture.has_large_encoder
    for name in names:
        try:
            check_method_base(name, architecture, plain_run.base)
        except ImagicError as error:
            if named:
                raise
            found[name] = f"needs {error.expected}"
            continue
        need = missing_need(name, have)
        if need is not None:
            found[name] = f"needs {NEEDS[need][0]}"
        elif name in FITS:
            kind = {"tune": {"mode": IMAGIC[name]}} if name in IMAGIC else {"method": name}
            try:
                config, _ = choose_preset(lambda: architecture, merged(levers, kind), {}, recipe, large=large)
            except OutOfMemory as error:
                found[name] = error.got
                continue
            run = run or config
            found[name] = fitted_method(name, config, given)
        else:
            found[name] = sampling_method(name, given, embedded, architecture.few_steps)
    if run is None:
        given_levers = merged(levers, {"tune": {"mode": "embedding"}})
        run, _ = choose_preset(lambda: architecture, given_levers, {}, recipe, EDIT_STAGES, EDIT_LEVERS, large=large)
    return Setup(run, free_memory(resolve_runtime(run.memory).device), found)


def opened(setup: Setup, request: EditRequest, named: bool) -> tuple[Base, list[Candidate]]:
    """Loads the base, and predicts passes and memory of every method.

    Args:
        setup: the settings.
        request: the request.
        named: whether the methods were asked for by name, so that each must be able to run.

    Raises:
        ImagicError: a method that was asked for by name cannot edit the photo, or no method can.
    """
    base = load_base(setup.run.base, resolve_runtime(setup.run.memory), setup.run.revision)
    candidates = []
    for name, method in setup.methods.items():
        if isinstance(method, str):
            candidates.append(Candidate(name, {}, left_out=method))
        else:
            candidates.append(candidate(method, base, request, setup.free, named))
    _print_predictions(candidates)
    if not any(one.method for one in candidates):
        got = "no method can run: " + "; ".join(f"{one.name}: {one.left_out}" for one in candidates)
        raise ImagicError(got, "at least one method that can run", "choose other --methods, or give what they need")
    return base, candidates


def _print_predictions(candidates: Sequence[Candidate]) -> None:
    """Prints the passes and the peak memory of every method that runs, and why others are left out."""
    columns = ("method", "passes, forward", "backward", "peak GiB", "")
    table = Table(*columns, title="Predicted", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for one in candidates:
        passes = ["-", "-"]
        if one.passes:
            most = "<= " if one.passes.at_most else ""
            passes = [f"{most}{count:,}" if count else "-" for count in (one.passes.forward, one.passes.backward)]
        peak = f"{one.peak / 2**30:.1f}" if one.peak else "-"
        note = f"left out: {one.left_out}" if one.left_out else ""
        if one.once and not one.left_out:
            note = f"and {one.once:,} once, for class pictures that later fits use too"
        table.add_row(one.name, *passes, peak, plain(note))
    err.print(table)
