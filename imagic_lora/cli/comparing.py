"""What ``compare`` does, called by ``commands/compare.py``: settings, models, predictions, the run with its progress, the files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from ..adapters.atomic import atomic_folder
from ..bases.base import Base
from ..bases.loading.configs import recipe_for
from ..bases.loading.known import EMBEDDED, known_base
from ..bases.loading.registry import architecture_of, load_base
from ..core.config import RunConfig
from ..core.errors import ImagicError
from ..core.runtime import free_memory, resolve_runtime
from ..core.settings.merging import merged
from ..core.settings.reading import validated
from ..memory.levers import EDIT_LEVERS
from ..memory.limits import OutOfMemory
from ..memory.presets import EDIT_STAGES, choose_preset
from ..methods.catalogue import IMAGIC
from ..methods.comparison.candidates import (
    FITS,
    Candidate,
    candidate,
    check_method_base,
    fitted_method,
    missing_need,
    sampling_method,
)
from ..methods.comparison.captions import CAPTIONER, captioned
from ..methods.comparison.report import files, results
from ..methods.comparison.running import Outcome, Scorer, cheapest_first, compared, whole_work
from ..methods.masks import check_area
from ..methods.method import NEEDS, EditRequest, Method, Need
from ..sampling.sweeps.metrics import Metric, clip_metric, dino_metric
from .console import err, plain
from .interrupts import Interrupts
from .listening import listener

AUTO = "auto"
"""The value of ``--source`` that asks for a caption by a model."""


@dataclass(frozen=True)
class Models:
    """The models besides the base that a comparison loads.

    Args:
        captioner: folder or hub id of ``--captioner``.
        clip: folder or hub id of ``--clip``.
        dino: folder or hub id of ``--dino``.
        offline: whether they are taken from the cache of the hub only.
    """

    captioner: str | None
    clip: str | None
    dino: str | None
    offline: bool

    def check(self, source: str | None) -> None:
        """Raises ImagicError if a flag has no effect.

        Args:
            source: the value of ``--source``.
        """
        if self.captioner is not None and source != AUTO:
            raise ImagicError("--captioner without --source auto", "both, or neither", "add --source auto, or leave out --captioner")
        if self.offline and not (source == AUTO or self.clip or self.dino):
            got = "--offline without --source auto, --clip and --dino"
            raise ImagicError(got, "a model to take from the cache", "leave out --offline")

    def caption(self, photo: Image.Image) -> tuple[str, str]:
        """Returns a caption of the photo, which it prints, and the captioner.

        Raises:
            ImagicError: as :func:`captioned`.
        """
        model = self.captioner or CAPTIONER
        caption = captioned(photo, model, self.offline)
        err.print(f"Source prompt: {plain(caption)}", highlight=False)
        return caption, model

    def metrics(self, request: EditRequest) -> list[Metric]:
        """Loads the models that score the edits.

        Raises:
            ImagicError: one cannot be loaded.
        """
        found = []
        if self.clip is not None:
            found.append(clip_metric(self.clip, self.offline, request.photo, request.target_prompt, request.source_prompt))
        if self.dino is not None:
            found.append(dino_metric(self.dino, self.offline, request.photo))
        return found


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


class Ran(NamedTuple):
    """What came of a comparison.

    Args:
        outcomes: one for each candidate.
        stopped: the exception that ended it; None if every method had its turn. KeyboardInterrupt after Ctrl-C or SIGTERM.
    """

    outcomes: list[Outcome]
    stopped: BaseException | None


def run(base: Base, request: EditRequest, candidates: Sequence[Candidate], metrics: Sequence[Metric], budget: float | None) -> Ran:
    """Runs the methods with a bar over their passes. After an interruption or an unexpected error the remaining ones are left out.

    Args:
        base: the base.
        request: the request.
        candidates: the methods.
        metrics: scores by other models.
        budget: as for :func:`compared`.
    """
    outcomes: list[Outcome] = []
    interrupts = Interrupts()
    try:
        with interrupts:
            _run_all(base, request, candidates, metrics, budget, outcomes)
    except BaseException as error:  # the caller writes what is done, and raises it again
        # torch replaces the exception of a signal in places
        stopped = KeyboardInterrupt() if interrupts.requested else error
        why = "interrupted" if isinstance(stopped, KeyboardInterrupt) else f"the comparison ended with {type(error).__name__}"
        rest = cheapest_first(candidates)[len(outcomes) :]
        return Ran(outcomes + [Outcome(one, left_out=one.left_out or why) for one in rest], stopped)
    return Ran(outcomes, None)


def _run_all(
    base: Base,
    request: EditRequest,
    candidates: Sequence[Candidate],
    metrics: Sequence[Metric],
    budget: float | None,
    outcomes: list[Outcome],
) -> None:
    """Appends the outcome of each method to a list, in the order in which they run, and shows the progress."""
    scorer = Scorer(base, request, metrics)
    total = sum(whole_work(one) for one in candidates)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=err, disable=not err.is_terminal) as bar:
        task = bar.add_task("methods", total=total)

        def count(module: object, inputs: Sequence[Tensor], output: object) -> None:
            bar.advance(task, len(inputs[0]))
            listener().progress("methods", min(bar.tasks[0].completed, total), total)

        hook = base.denoiser.register_forward_hook(count)
        try:
            done = 0
            for outcome in compared(base, request, candidates, scorer, budget):
                outcomes.append(outcome)
                one = outcome.candidate
                done += whole_work(one)
                bar.update(task, completed=done)
                if outcome.result:
                    cost = outcome.result.cost
                    err.print(f"{one.name}: {cost.seconds:.1f} s, {cost.forward + cost.backward:,} passes", highlight=False)
                elif one.method:
                    err.print(f"{one.name} is left out: {plain(outcome.left_out)}", highlight=False)
        finally:
            hook.remove()


def check_made(outcomes: Sequence[Outcome], budget: float | None) -> None:
    """Raises ImagicError if no method has made an edit.

    Args:
        outcomes: one for each candidate.
        budget: the value of ``--budget``.
    """
    if not any(outcome.result for outcome in outcomes):
        got = "no method made an edit: " + "; ".join(f"{outcome.candidate.name}: {outcome.left_out}" for outcome in outcomes)
        remedy = "choose other --methods" if budget is None else "raise --budget, or choose other --methods"
        raise ImagicError(got, "at least one edit", f"{remedy}; nothing is written")


def write(folder: Path, base: Base, request: EditRequest, about: Mapping[str, Any], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Writes all files at once.

    Args:
        folder: where to.
        base: the base.
        request: the request.
        about: what else the comparison depends on, for ``results.json``.
        outcomes: one for each candidate.

    Returns:
        The content of ``results.json``.
    """
    machine = {
        "base": base.name,
        "base_fingerprint": base.fingerprint,
        "device": base.runtime.reasons["device"],
        "dtype": str(base.runtime.dtype),
    }
    summary = results(request, {**about, **machine}, outcomes)
    with atomic_folder(folder) as writer:
        for name, content in files(request, summary, outcomes):
            writer.write(name, [content])
    return summary
