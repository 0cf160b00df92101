"""What ``bench tedbench``, ``bench pie`` and ``bench score`` do, called by ``commands/field.py``: cases, methods, the run, the scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..adapters.durable import write_text
from ..adapters.writing import check_outputs
from ..bench.evaluator.evaluator import Settings
from ..bench.evaluator.sources import parse_sources
from ..bench.field.cases import Case, Picture, read_json
from ..bench.field.listed import read_pictures
from ..bench.field.pie import CLASSES, pie_outputs, read_pie
from ..bench.field.report import PAGE, SCORES, SHEET, SUMMARY, last_line, tables, write_files
from ..bench.field.run import FieldBench, close, keep
from ..bench.field.scoring import Scored, loaded, scored
from ..bench.field.summary import summarise
from ..bench.field.tedbench import read_tedbench, tedbench_outputs
from ..bench.runner import Result
from ..core.config import PresetOrAuto
from ..core.device_config import DeviceConfig, MemoryConfig
from ..core.errors import ImagicError
from ..core.runtime import resolve_runtime
from ..core.text import json_text
from ..methods.comparison.candidates import missing_need
from ..methods.comparison.captions import CAPTIONER, load_captioner
from ..methods.method import NEEDS, Cost, EditRequest, Method
from ..photos.reading import read_photo
from ..sampling.checks import check_seed
from .commands.compare import chosen_methods, parsed_settings
from .commands.field import ScoreFlags
from .comparing.setup import configured, opened, optional_fields
from .console import cells_table, err, out, plain, print_json, progress
from .interrupts import Interrupts

CAPTIONS = "captions.json"
_ACROSS = 3  # methods side by side in the terminal
_FILES = (SUMMARY, SCORES, SHEET, PAGE)


@dataclass(frozen=True)
class Run:
    """The arguments of a run of methods on a benchmark; those of the commands."""

    benchmark: str
    folder: Path
    out: Path
    base: str
    methods: str
    settings: Sequence[str]
    seed: int
    workers: int
    preset: PresetOrAuto
    device: DeviceConfig | None
    scores: ScoreFlags
    size: int
    as_published: bool = False


def spread(cases: Sequence[Case], count: int | None) -> list[Case]:
    """Returns a number of cases, spread evenly over all; None for all."""
    if count is None or count >= len(cases):
        return list(cases)
    return [cases[k * len(cases) // count] for k in range(count)]


def of_classes(cases: Sequence[Case], classes: str | None) -> list[Case]:
    """Returns the cases of some classes of PIE-Bench; those with a wrong entry have no class, and are kept only without ``--classes``.

    Raises:
        ImagicError: there is no such class, or no case of it.
    """
    if classes is None:
        return list(cases)
    wanted = [name.strip() for name in classes.split(",")]
    for name in wanted:
        if name not in CLASSES:
            expected = "numbers separated by commas, of " + ", ".join(f"{number} {kind}" for number, kind in CLASSES.items())
            raise ImagicError(f"--classes {classes}", expected, "correct the list of classes")
    found = [case for case in cases if case.group in [CLASSES[name] for name in wanted]]
    if not found:
        raise ImagicError(f"--classes {classes}, of which the benchmark has no case", "a class with cases", "choose other classes")
    return found


def listed_captions(cases: Sequence[Case], captions: str, captioner: str | None, run: Run) -> tuple[dict[str, str], str]:
    """Returns the captions of photos by the names of their files, and where they come from.

    Args:
        cases: the cases.
        captions: a JSON file, or ``auto``. Captions by a model are kept in ``captions.json`` of the output folder.
        captioner: folder or hub id of the captioner.
        run: the run.

    Raises:
        ImagicError: the file cannot be read or lacks a photo; the captioner cannot be loaded.
    """
    photos = {case.photo.name: case.photo for case in cases if case.problem is None}
    if captions != "auto":
        found = _checked_captions(read_json(Path(captions), dict), Path(captions))
        missing = [name for name in photos if name not in found]
        if missing:
            got = f"{captions} has no caption of {', '.join(missing[:5])}{' and others' if len(missing) > 5 else ''}"
            raise ImagicError(got, "a caption of every photo in originals/", "add them")
        return found, f"from the file {Path(captions).name}"
    model = captioner or CAPTIONER
    check_outputs(run.out, (CAPTIONS,))
    path, stored = run.out / CAPTIONS, dict[str, Any]()
    if path.is_file():
        stored = read_json(path, dict)
    found = _checked_captions(stored.get("captions"), path) if stored.get("model") == model else {}
    missing = {name: photo for name, photo in photos.items() if name not in found}
    caption = load_captioner(model, run.scores.offline) if missing else None
    with Interrupts(lambda: "the same command continues"):
        for name, photo in progress(missing.items(), len(missing), "captions"):
            try:
                image = read_photo(photo).image
            except ImagicError:
                continue  # the case fails with this message
            assert caption is not None
            found[name] = caption(image)
            write_text(path, json_text({"model": model, "captions": found}))
    return found, f"by {model}"


def _checked_captions(captions: Any, path: Path) -> dict[str, str]:
    if not isinstance(captions, dict) or not all(isinstance(text, str) and text.strip() for text in captions.values()):
        raise ImagicError(f"{path} holds no captions", "a JSON object of captions by the names of photos", "correct the file")
    return dict(captions)


def edited(run: Run, cases: Sequence[Case], source: bool, mask: bool, about: Mapping[str, Any], as_json: bool) -> None:
    """Runs methods on cases, scores the edits, and writes and prints the results.

    Args:
        run: the arguments.
        cases: the cases.
        source: whether they have source prompts.
        mask: whether they have masks.
        about: what else belongs into the summary.
        as_json: whether the summary is printed as JSON.

    Raises:
        ImagicError: an argument is wrong, a model is missing, or no method can run.
    """
    check_seed(run.seed)
    given = parsed_settings(run.settings)
    levers = {"memory": run.device.model_dump(exclude_unset=True) if run.device else {}, "preset": run.preset, "base": run.base}
    names, named = chosen_methods(run.methods, given, list(NEEDS))
    have = optional_fields(source, mask)
    for name in names if named else ():
        if (need := missing_need(name, have)) is not None:
            remedy = "give --captions, or choose another method" if need == "source_prompt" else "choose another method"
            raise ImagicError(f"method {name} on {run.benchmark}, which has no {need.replace('_', ' ')}", NEEDS[need][0], remedy)
    setup = configured(names, named, have, given, levers)
    device = str(resolve_runtime(setup.run.memory).device)
    settings = Settings(parse_sources(run.scores.metrics, run.scores.model or [], run.scores.offline), run.size, run.as_published, device)
    check_outputs(run.out, _FILES)
    weights = dict(loaded(settings).weights)  # what is missing is said before the work
    loaded.cache_clear()
    bench, left_out, machine = _bench(run, cases, setup, named, source, mask)
    with Interrupts(lambda: f"the results so far are in {run.out}; the same command continues"):
        results = list(progress(bench.results(run.workers), len(bench.cases) * len(bench.methods), "cases x methods"))
        close()
        given_masks = [row for method in bench.methods if isinstance(method, Method) and "mask" in method.requires for row in method.rows]
        about = {"benchmark": run.benchmark, "folder": str(run.folder), **machine, "seed": run.seed, "cases": len(cases), **about}
        about = {**about, "left_out": left_out, "mask_given": given_masks}
        _finish(bench.pictures(results), settings, weights, run.out, run.workers, about, _costs(results), as_json)


def _bench(
    run: Run, cases: Sequence[Case], setup: Any, named: bool, source: bool, mask: bool
) -> tuple[FieldBench, dict[str, str], dict[str, Any]]:
    """The run, the methods that are left out with the reason, and what the summary says of the base."""
    blank = Image.new("RGB", (512, 512), "gray")
    white = Image.new("L", blank.size, 255) if mask else None
    base, candidates = opened(setup, EditRequest(blank, "a photo", "a photo" if source else None, white, seed=run.seed), named)
    if run.workers == 1:
        keep(setup.run, base)
    methods = [one.method for one in candidates if one.method]
    left_out = {one.name: one.left_out for one in candidates if one.method is None and one.left_out}
    precision = str(base.runtime.dtype).removeprefix("torch.")
    machine: dict[str, Any] = {
        "base": base.name,
        "base_fingerprint": base.fingerprint,
        "dtype": precision,
        "device": base.runtime.reasons["device"],
    }
    machine["methods"] = {method.name: method.settings for method in methods}
    bench = FieldBench(cases, methods, run.out, setup.run, f"{base.fingerprint} {precision}", run.seed)
    return bench, left_out, machine


def _costs(results: Sequence[Result[Cost]]) -> dict[str, list[Cost]]:
    """The costs by row."""
    found: dict[str, list[Cost]] = {}
    for result in results:
        for row, cost in result.rows.items():
            found.setdefault(row, []).append(cost)
    return found


def scored_only(
    folder: Path,
    tedbench: Path | None,
    pie: Path | None,
    out_dir: Path,
    flags: ScoreFlags,
    size: int,
    as_published: bool,
    workers: int,
    device: Any,
    as_json: bool,
) -> None:
    """Scores pictures that exist; arguments as those of the command.

    Raises:
        ImagicError: an argument is wrong, a model is missing, or the folder has none of the layouts.
    """
    if tedbench is not None:
        name, pictures = "TEdBench", tedbench_outputs(read_tedbench(tedbench), folder)
    elif pie is not None:
        name, pictures = "PIE-Bench", pie_outputs(read_pie(pie), folder)
    else:
        name, pictures = "Pictures", read_pictures(folder)
    if not any(picture.path for picture in pictures):
        raise ImagicError(f"{folder} has no picture: {pictures[0].problem}", "pictures, named as published", "check the folder")
    resolved = str(resolve_runtime(MemoryConfig(device=device)).device)
    settings = Settings(parse_sources(flags.metrics, flags.model or [], flags.offline), size, as_published, resolved)
    check_outputs(out_dir, _FILES)
    weights = dict(loaded(settings).weights)
    with Interrupts(lambda: f"the scores so far are in {out_dir}; the same command continues"):
        _finish(pictures, settings, weights, out_dir, workers, {"benchmark": name, "folder": str(folder)}, {}, as_json)


def _finish(
    pictures: Sequence[Picture],
    settings: Settings,
    weights: Mapping[str, str],
    folder: Path,
    workers: int,
    about: Mapping[str, Any],
    costs: Mapping[str, Sequence[Cost]],
    as_json: bool,
) -> None:
    """Scores pictures, and writes and prints the results."""
    found: list[Scored] = list(progress(scored(pictures, settings, weights, folder, workers), len(pictures), "scores"))
    found.sort(key=lambda one: one.place)
    summary = summarise(about, settings, weights, found, costs)
    page = write_files(folder, summary, settings, found)
    if summary["failed"] == summary["pictures"]:
        why = last_line(summary["errors"][0]["error"])
        raise ImagicError(f"every picture failed, the first by: {why}", "pictures that can be scored", f"see {page}")
    if as_json:
        print_json(summary | {"page": str(page)})
        return
    for title, cells in tables(summary, settings, _ACROSS).items():
        out.print(cells_table(title, cells))
    if summary["failed"]:
        err.print(f"[yellow]{summary['failed']} of {summary['pictures']} pictures failed[/] and are in no mean; the page says why")
    err.print(f"[green]Wrote[/] {plain(page)}, {SHEET}, {SUMMARY} and {SCORES}", highlight=False)
