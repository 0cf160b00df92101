"""The commands ``compare`` and ``methods``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import yaml
from cyclopts import Parameter
from rich.table import Table

from ...adapters.writing import check_outputs, exists
from ...core.config import DEVICE_GROUP, DeviceConfig, PresetOrAuto
from ...core.errors import ImagicError
from ...core.settings import merged
from ..console import err, out, plain, print_columns, print_interrupted, print_json
from ..libraries import import_libraries
from ..options import Flag, Json, Whole, slug

if TYPE_CHECKING:
    from torch import Tensor

    from ...bases.base import Base
    from ...core.config import RunConfig
    from ...methods.comparison.candidates import Candidate
    from ...methods.comparison.running import Outcome
    from ...methods.method import EditRequest, Method, Need
    from ...sampling.sweeps.metrics import Metric

AUTO = "auto"
"""The value of ``--source`` that asks for a caption by a model."""


def compare(
    image: Path,
    prompt: str,
    *,
    source: str | None = None,
    mask: Path | None = None,
    methods: str = "all",
    settings: Annotated[list[str] | None, Parameter(name="--set", negative=())] = None,
    budget: float | None = None,
    seed: Whole = 0,
    base: str | None = None,
    preset: Annotated[PresetOrAuto, Parameter(name="--preset")] = "auto",
    device: Annotated[DeviceConfig | None, Parameter(name="*", group=DEVICE_GROUP)] = None,
    clip: str | None = None,
    dino: str | None = None,
    captioner: str | None = None,
    offline: Flag = False,
    out_dir: Annotated[Path | None, Parameter(name="--out")] = None,
    overwrite: Flag = False,
    as_json: Json = False,
) -> None:
    """Edit one photo by several methods, and compare the edits on one page.

    Shows the passes and the predicted peak memory of each method, then runs them, the cheapest first. Writes sheet.png, index.html (a page
    that needs no network), results.json and the images.

        imagic-lora compare dog.jpg "a dog jumping" --source "a dog sitting" --methods fast
        imagic-lora compare dog.jpg "a dog jumping" --methods sdedit --set strength=0.6
        imagic-lora methods sdedit                   # the settings of a method

    Parameters
    ----------
    image
        The photo, as for fit.
    prompt
        Target prompt: describes the edited image.
    source
        Source prompt: describes the photo as it is. Many methods need one. auto: a caption by the model of --captioner.
    mask
        What may change: an image of the size of the photo; white may change, black may not. Two methods need it, and no other uses it.
    methods
        Names separated by commas (imagic-lora methods lists them), all: every method that edits the photo, or fast: those that train
        nothing for the photo and take few passes.
    settings
        A setting of the one method of --methods, as NAME=VALUE; repeat the flag for more. For Imagic the names are those of a YAML file for
        fit, such as tune.steps=100.
    budget
        Seconds that the methods may take together. A method that is predicted to take longer than what is left is left out.
    seed
        Seed of every random number.
    base
        Base model, as for fit.
    preset
        Memory levers for a card of this size. auto: the fastest preset whose predicted peak fits 90% of the free memory.
    clip
        Also score by this CLIP model, a folder or a hub id: similarity to the target prompt.
    dino
        Also score by this DINOv2 model, a folder or a hub id: similarity to the photo.
    captioner
        Model of --source auto, a folder or a hub id. Default: Salesforce/blip-image-captioning-base.
    offline
        Take the models of --captioner, --clip and --dino from the cache of the hub only. HF_HUB_OFFLINE=1 does so for the base too.
    out_dir
        Folder for the files. Default: outputs/compare/PHOTO.
    overwrite
        Replace an earlier comparison in that folder.
    """
    if budget is not None and not 0 < budget < float("inf"):
        raise ImagicError(f"--budget {budget:g}", "a number of seconds above 0", "choose another --budget, or leave it out")
    folder = out_dir or Path("outputs/compare") / slug(image.stem, "photo")
    _check_folder(folder, overwrite)
    given = _parsed(settings or [])
    import_libraries()
    from ...methods.comparison.candidates import check_needs, chosen
    from ...methods.comparison.captions import CAPTIONER, captioned
    from ...methods.method import EditRequest
    from ...photos.reading import read_mask, read_photo
    from ...sampling.checks import check_prompt, check_seed

    names, named = chosen(methods)
    if given and (len(names) != 1 or not named):
        raise ImagicError(f"--set with --methods {methods}", "one method, whose setting it is", "name that method alone in --methods")
    for text in (prompt, source):
        if text is not None:
            check_prompt(text)
    check_seed(seed)
    caption_by = (captioner or CAPTIONER) if source == AUTO else None
    if captioner is not None and caption_by is None:
        raise ImagicError("--captioner without --source auto", "both, or neither", "add --source auto, or leave out --captioner")
    if offline and not (caption_by or clip or dino):
        raise ImagicError("--offline without --source auto, --clip and --dino", "a model to take from the cache", "leave out --offline")
    needs: list[Need] = [*(["source_prompt"] if source is not None else []), *(["mask"] if mask is not None else [])]
    if named:
        check_needs(names, needs)
    photo = read_photo(image)
    area = read_mask(mask, photo.image.size) if mask is not None else None
    levers = {"memory": device.model_dump(exclude_unset=True) if device else {}, "preset": preset} | ({"base": base} if base else {})
    setup = _configured(names, needs, given, levers)
    if caption_by:
        source = captioned(photo.image, caption_by, offline)
        err.print(f"Source prompt: {plain(source)}", highlight=False)
    request = EditRequest(photo.image, prompt, source, area.image if area else None, seed=seed)
    metrics = _metrics(request, clip, dino, offline)
    opened, candidates = _opened(setup, request, named)
    _print_predictions(candidates)
    if not any(one.method for one in candidates):
        got = "no method can run: " + "; ".join(f"{one.name}: {one.left_out}" for one in candidates)
        raise ImagicError(got, "at least one method that can run", "choose other --methods, or give what they need")
    outcomes, interrupted = _run(opened, request, candidates, metrics, budget)
    hashes = {"photo_sha256": photo.sha256, "mask_sha256": area.sha256 if area else None}
    summary = _write(folder, opened, request, {"photo": image.name, **hashes, "captioner": caption_by}, outcomes)
    if interrupted:
        print_interrupted(f"the methods that were done are in {folder}", None, ["--json"] if as_json else [])
        sys.exit(130)
    if as_json:
        print_json(summary | {"folder": str(folder)})
    else:
        _report(folder, outcomes)


def methods(name: str | None = None, *, as_json: Json = False) -> None:
    """List the methods of imagic-lora compare, or the settings of one of them.

        imagic-lora methods null-text

    Parameters
    ----------
    name
        Name of a method: its settings, with their defaults and meaning.
    """
    import_libraries()
    from ...methods.catalogue import IMAGIC, SAMPLING
    from ...methods.comparison.candidates import GROUPS, NAMES, chosen

    if name is None:
        rows = [{"name": one, "needs": sorted(_needs(one)), "fast": one in GROUPS["fast"], "about": _about(one)} for one in NAMES]
        if as_json:
            print_json({"methods": rows})
            return
        cells = [
            [row["name"], " and ".join(row["needs"]).replace("_", " ") or "-", "yes" if row["fast"] else "-", row["about"]] for row in rows
        ]
        print_columns([["name", "needs", "fast", "what it is"], *cells])
        return
    chosen(name)
    if name not in NAMES:
        raise ImagicError(f"method {name}", f"one of {', '.join(NAMES)}", "correct the name")
    if name in IMAGIC:
        if as_json:
            print_json({"name": name, "about": _about(name), "settings": "docs/reference/settings.md"})
            return
        out.print(
            f"{_about(name)}\nIts settings are those of imagic-lora fit --help, by their YAML names: --set tune.steps=100", highlight=False
        )
        return
    fields = SAMPLING[name].config_class.model_fields
    defaults = SAMPLING[name].config_class().model_dump(mode="json")
    found = [{"name": field, "default": defaults[field], "about": fields[field].description} for field in fields]
    if as_json:
        print_json({"name": name, "about": _about(name), "needs": sorted(_needs(name)), "settings": found})
        return
    table = Table("--set", "default", "meaning", title=plain(_about(name)), title_justify="left", box=None, padding=(0, 2, 0, 0))
    for setting in found:
        about = " ".join(str(setting["about"] or "").split())
        table.add_row(setting["name"], plain(json.dumps(setting["default"])), plain(about))
    out.print(table)


def _needs(name: str) -> frozenset[Need]:
    from ...methods.catalogue import SAMPLING

    return SAMPLING[name].requires if name in SAMPLING else frozenset()


def _about(name: str) -> str:
    """The first sentence of a method's description."""
    from ...methods.catalogue import IMAGIC, SAMPLING

    if name in IMAGIC:
        return f"Imagic (arXiv 2210.09276) in mode {IMAGIC[name]}: a fit, then an edit at the default eta"
    text = " ".join((SAMPLING[name].__doc__ or "").split("\n\n")[0].split())
    return text.rstrip(".")


def _check_folder(folder: Path, overwrite: bool) -> None:
    """Raises ImagicError if the folder cannot be written, or exists and is not an earlier comparison that may be replaced."""
    if exists(folder):
        if not (folder / "results.json").is_file() and (not folder.is_dir() or any(folder.iterdir())):
            raise ImagicError(f"{folder} exists and is no comparison", "an unused name, or an empty folder", "choose another --out")
        if not overwrite and (folder / "results.json").is_file():
            raise ImagicError(f"{folder} holds an earlier comparison", "an unused name", "choose another --out, or use --overwrite")
    check_outputs(folder.parent, ())


def _parsed(settings: Sequence[str]) -> dict[str, Any]:
    """Parses ``NAME=VALUE`` settings to nested mappings; a value is YAML, and dots in a name nest.

    Raises:
        ImagicError: one has another form, or a name is given twice.
    """
    found: dict[str, Any] = {}
    seen: set[str] = set()
    for setting in settings:
        name, equals, text = setting.partition("=")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ImagicError(f"--set {setting}", "NAME=VALUE with a value in YAML", "use quotes, as in --set 'add=[a hat]'") from error
        if not equals or not name.strip() or value is None or name in seen:
            expected = "NAME=VALUE, each name once"
            raise ImagicError(f"--set {setting}", expected, "use for example --set strength=0.6")
        seen.add(name)
        for part in reversed(name.strip().split(".")):
            value = {part: value}
        found = merged(found, value)
    return found


class _Setup(NamedTuple):
    """The settings of a comparison before its base is loaded.

    Args:
        run: base and memory levers.
        free: bytes that are free on the device.
        methods: the methods by name, and why others are left out.
    """

    run: RunConfig
    free: int
    methods: dict[str, Method | str]


def _configured(names: Sequence[str], needs: Sequence[Need], given: Mapping[str, Any], levers: Mapping[str, Any]) -> _Setup:
    """Resolves the settings of the base and of every method, without loading the base."""
    from ...bases.loading.known import known_base
    from ...bases.loading.registry import architecture_of
    from ...core.runtime import free_memory, resolve_runtime
    from ...core.settings import recipe_of, validated
    from ...memory.levers import EDIT_LEVERS
    from ...memory.limits import OutOfMemory
    from ...memory.presets import EDIT_STAGES, choose_preset
    from ...methods.catalogue import IMAGIC
    from ...methods.comparison.candidates import imagic_method, missing_need, sampling_method
    from ...methods.method import NEEDS

    plain_run = validated(levers)
    architecture = architecture_of(plain_run.base, plain_run.revision)
    built_in = known_base(plain_run.base, plain_run.revision).built_in
    recipe = recipe_of(built_in, architecture.few_steps, architecture.embeds_guidance)
    run: RunConfig | None = None
    found: dict[str, Method | str] = {}
    for name in names:
        need = missing_need(name, needs)
        if need is not None:
            found[name] = f"needs {NEEDS[need][0]}"
        elif name in IMAGIC:
            try:
                config, _ = choose_preset(lambda: architecture, merged(levers, {"tune": {"mode": IMAGIC[name]}}), {}, recipe)
            except OutOfMemory as error:
                found[name] = error.got
                continue
            run = run or config
            found[name] = imagic_method(name, config, given)
        else:
            found[name] = sampling_method(name, given, built_in == "critters", architecture.few_steps)
    if run is None:
        run, _ = choose_preset(lambda: architecture, merged(levers, {"tune": {"mode": "embedding"}}), {}, recipe, EDIT_STAGES, EDIT_LEVERS)
    return _Setup(run, free_memory(resolve_runtime(run.memory).device), found)


def _metrics(request: EditRequest, clip: str | None, dino: str | None, offline: bool) -> list[Metric]:
    """Loads the other models that score the edits."""
    from ...sampling.sweeps.metrics import clip_metric, dino_metric

    found = []
    if clip is not None:
        found.append(clip_metric(clip, offline, request.photo, request.target_prompt, request.source_prompt))
    if dino is not None:
        found.append(dino_metric(dino, offline, request.photo))
    return found


def _opened(setup: _Setup, request: EditRequest, named: bool) -> tuple[Base, list[Candidate]]:
    """Loads the base, and predicts passes and memory of every method."""
    from ...bases.loading.registry import load_base
    from ...core.runtime import resolve_runtime
    from ...methods.comparison.candidates import Candidate, candidate

    base = load_base(setup.run.base, resolve_runtime(setup.run.memory), setup.run.revision)
    candidates = []
    for name, method in setup.methods.items():
        if isinstance(method, str):
            candidates.append(Candidate(name, {}, left_out=method))
        else:
            candidates.append(candidate(method, base, request, setup.free, named))
    return base, candidates


def _print_predictions(candidates: Sequence[Candidate]) -> None:
    """Prints the passes and the peak memory of every method that runs, and why others are left out."""
    table = Table(
        "method", "passes, forward", "backward", "peak GiB", "", title="Predicted", title_justify="left", box=None, padding=(0, 2, 0, 0)
    )
    for one in candidates:
        most = "<= " if one.passes and one.passes.at_most else ""
        passes = (
            [f"{most}{one.passes.forward:,}", f"{most}{one.passes.backward:,}" if one.passes.backward else "-"]
            if one.passes
            else ["-", "-"]
        )
        peak = f"{one.peak / 2**30:.1f}" if one.peak else "-"
        table.add_row(one.name, *passes, peak, plain(f"left out: {one.left_out}") if one.left_out else "")
    err.print(table)


def _run(
    base: Base, request: EditRequest, candidates: Sequence[Candidate], metrics: Sequence[Metric], budget: float | None
) -> tuple[list[Outcome], bool]:
    """Runs the methods with a bar over their passes. After Ctrl-C the remaining ones are left out.

    Returns:
        The outcomes, and whether the run was interrupted.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from ...methods.comparison.running import Outcome, Scorer, cheapest_first, compared, work

    outcomes: list[Outcome] = []
    scorer = Scorer(base, request, metrics)
    runs = cheapest_first(candidates)
    total = sum(work(one.passes) for one in runs if one.method and one.passes)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=err, disable=not err.is_terminal) as bar:
        task = bar.add_task("methods", total=total)

        def count(module: object, inputs: Sequence[Tensor], output: object) -> None:
            bar.advance(task, len(inputs[0]))

        hook = base.denoiser.register_forward_hook(count)
        try:
            done = 0
            for outcome in compared(base, request, candidates, scorer, budget):
                outcomes.append(outcome)
                one = outcome.candidate
                done += work(one.passes) if one.method and one.passes else 0
                bar.update(task, completed=done)
                if outcome.result:
                    cost = outcome.result.cost
                    err.print(f"{one.name}: {cost.seconds:.1f} s, {cost.forward + cost.backward:,} passes", highlight=False)
                elif one.method:
                    err.print(f"{one.name} is left out: {plain(outcome.left_out)}", highlight=False)
        except KeyboardInterrupt:
            outcomes += [Outcome(one, left_out="interrupted") for one in runs[len(outcomes) :]]
            return outcomes, True
        finally:
            hook.remove()
    return outcomes, False


def _write(folder: Path, base: Base, request: EditRequest, about: Mapping[str, Any], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Writes all files at once.

    Returns:
        The content of ``results.json``.
    """
    from ...adapters.atomic import atomic_folder
    from ...methods.comparison.report import files, results

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


def _report(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """Prints where the files are."""
    done = sum(outcome.result is not None for outcome in outcomes)
    left = len(outcomes) - done
    err.print(f"[green]Wrote[/] {plain(folder)}: {done} methods, {left} left out. Look at index.html or sheet.png.", highlight=False)
