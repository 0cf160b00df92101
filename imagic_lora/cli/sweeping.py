"""What ``sweep`` does, called by ``commands/sweep.py``: its checks, the images with their scores, and the files."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.adapter import Adapter
from ..adapters.contents import read_canvas
from ..adapters.writing import check_outputs, writable
from ..bases.loading.registry import architecture_of
from ..core.config import RunConfig
from ..core.errors import ImagicError
from ..core.runtime import free_memory, resolve_runtime
from ..core.text import exact, json_text
from ..memory.levers import EDIT_LEVERS
from ..memory.out_of_memory import assumed_from, explain_out_of_memory
from ..memory.presets import largest_batch
from ..photos.png import write_png
from ..sampling.checks import check_edit
from ..sampling.editor import Edit
from ..sampling.keep import Keep
from ..sampling.metadata import image_metadata
from ..sampling.opening import open_editor, source_of
from ..sampling.outputs import image_name, write_edit
from ..sampling.sweeps.drawing import draw_plot, draw_sheet
from ..sampling.sweeps.suggest import GOOD, RULE, RULES, Curves, band
from ..sampling.sweeps.sweep import Picture, Scores, as_pictures, sampled, scored
from .console import err, plain, progress
from .interrupts import Interrupts

if TYPE_CHECKING:
    from ..sampling.sweeps.metrics import Metric

SHEET, PLOT, TABLE, SCORES, IMAGES = "sheet.png", "plot.png", "scores.csv", "scores.json", "images"


def seed_count(run: RunConfig, seeds: int | None) -> int:
    """The number of seeds of a sweep.

    Args:
        run: settings of stage 3.
        seeds: the number that was asked for; None for 4, or 1 where the seed has no effect.

    Raises:
        ImagicError: the number is below 1.
    """
    count = (1 if run.edit.start == "inverted" and not run.edit.ddim_eta else 4) if seeds is None else seeds
    if count < 1:
        raise ImagicError(f"--seeds {count}", "an integer from 1", "choose another value for --seeds")
    return count


def check_storable(adapter: Adapter, run: RunConfig, prompt: str | None, force: bool) -> None:
    """Raises ImagicError if the sweep is made with other settings than those of a plain edit, whose default the eta would become."""
    stored = adapter.record.config.edit
    same = run.edit.model_copy(update={"batch_size": stored.batch_size}) == stored
    for differs, what in ((prompt is not None, "--prompt"), (not same, "other sampling settings than the adapter's"), (force, "--force")):
        if differs:
            remedy = f"leave out --store-eta, or leave out {what if what.startswith('--') else 'the sampling flags'}"
            raise ImagicError(f"--store-eta with {what}", "the settings of a plain edit, whose default eta it becomes", remedy)


def load_metrics(
    adapter: Adapter, prompt: str, clip: str | None, dino: str | None, source_prompt: str | None, offline: bool
) -> list[Metric]:
    """Loads the other models that were asked for; before any image is generated."""
    if source_prompt is not None and clip is None:
        raise ImagicError("--source-prompt without --clip", "a CLIP model that compares the prompts", "add --clip, or leave it out")
    if offline and clip is None and dino is None:
        raise ImagicError("--offline without --clip and --dino", "a model to take from the cache", "add --clip or --dino, or leave it out")
    if clip is None and dino is None:
        return []
    from ..sampling.sweeps.metrics import clip_metric, dino_metric

    photo = read_canvas(adapter).photo()
    found = [] if clip is None else [clip_metric(clip, offline, photo, prompt, source_prompt)]
    return found if dino is None else [*found, dino_metric(dino, offline, photo)]


def with_metrics(adapter: Adapter, pictures: Sequence[Picture], scores: Sequence[Scores], metrics: Sequence[Metric]) -> list[Scores]:
    """Adds the scores by other models."""
    if not metrics:
        return list(scores)
    from ..sampling.sweeps.metrics import measured

    box = read_canvas(adapter).box
    pairs = progress(zip(pictures, scores, strict=True), len(pictures), "metrics")
    return [replace(score, others=measured(metrics, picture.image.crop(box))) for picture, score in pairs]


def with_largest_batch(adapter: Adapter, run: RunConfig, base: str | None, images: int) -> RunConfig:
    """Returns the settings with the largest batch of images that the free memory allows."""
    runtime = resolve_runtime(run.memory)
    size = largest_batch(architecture_of(*source_of(adapter, base)), run, assumed_from(runtime), free_memory(runtime.device), images)
    return run.model_copy(update={"edit": run.edit.model_copy(update={"batch_size": size})})


def run_sweep(
    adapter: Adapter,
    base: str | None,
    run: RunConfig,
    etas: Sequence[float],
    seeds: Sequence[int],
    prompt: str | None,
    before_tuning: bool,
    force: bool,
    keep: Keep | None,
    folder: Path,
) -> tuple[list[Picture], list[Scores]]:
    """Generates, writes and scores all images.

    Args:
        adapter: the stored adapter.
        base: a base that replaces the one in the adapter's record.
        run: settings of stage 3 and memory levers.
        etas: ascending, with 0.
        seeds: seeds of the starting noise.
        prompt: target prompt; None is that of the adapter.
        before_tuning: whether images of the untuned base are added, for the first seed.
        force: whether other weights of the same shapes are allowed.
        keep: how the images of an adapter of a region are pasted into its photo.
        folder: output folder.
    """
    config, target = run.edit, adapter.record.prompt if prompt is None else prompt
    check_edit(etas, seeds, config, target)
    check_outputs(folder, [SHEET, PLOT, TABLE, SCORES])
    check_outputs(folder / IMAGES, [image_name(eta, seed) for eta in etas for seed in seeds])
    editor = open_editor(adapter, run, base, force)
    common = image_metadata(adapter, editor.base, config, target) | (keep.metadata if keep else {})
    edits = editor.edit(adapter, etas, seeds, config, prompt)
    images = as_pictures(editor, adapter, _written(edits, keep, folder / IMAGES, common))
    if before_tuning:
        images = chain(images, sampled(editor, adapter, etas, seeds[:1], config, prompt, tuned=False))
    pictures: list[Picture] = []

    def saved() -> str:
        return f"the images written so far are in {folder / IMAGES}" if pictures else ""

    explained = explain_out_of_memory(editor.base.architecture, run, editor.base.runtime, "decode", saved, EDIT_LEVERS)
    with Interrupts(saved), explained:
        for picture in progress(images, len(etas) * (len(seeds) + before_tuning), "images"):
            pictures.append(picture)  # at once: an interruption says whether there are images
        return pictures, list(progress(scored(editor, adapter, pictures, pictures, config, prompt), len(pictures), "scores"))


def _written(edits: Iterable[Edit], keep: Keep | None, folder: Path, metadata: dict[str, Any]) -> Iterator[Edit]:
    """Writes each image at full size, as ``edit`` does, and yields the edit.

    All files of an earlier sweep are deleted when the first new image is there: a sweep that fails before that leaves them, and one that
    is interrupted leaves no scores of images that are gone.
    """
    for k, edit in enumerate(edits):
        if k == 0:
            with writable(folder):
                for path in (*folder.glob("eta*-seed*.png"), *(folder.parent / name for name in (SHEET, PLOT, TABLE, SCORES))):
                    path.unlink(missing_ok=True)
        for finished in keep.pasted([edit], [edit.eta]) if keep else [edit]:
            write_edit(finished, folder, metadata)
        yield edit


def write(
    adapter: Adapter, run: RunConfig, prompt: str, pictures: Sequence[Picture], scores: Sequence[Scores], folder: Path
) -> dict[str, Any]:
    """Writes the sheet, the plot and the scores.

    Returns:
        The content of ``scores.json``, with the paths of the files.
    """
    curves = Curves.of(score for score in scores if score.tuned)
    suggested, good = RULES[RULE](curves), band(curves)
    rows = [score.flat() | {"file": f"{IMAGES}/{image_name(score.eta, score.seed)}" if score.tuned else ""} for score in scores]
    summary = {
        "adapter": adapter.name,
        "prompt": prompt,
        "suggested": suggested,
        "rule": RULE,
        "band": list(good) if good else None,
        "appears": max(curves.alignment) >= GOOD,
        "edit": run.edit.model_dump(),
        "scores": rows,
    }
    with writable(folder):
        named = {"adapter": adapter.name, "prompt": prompt}
        write_png(draw_sheet(read_canvas(adapter), prompt, pictures, suggested), folder / SHEET, named)
        write_png(draw_plot(prompt, scores, suggested, good), folder / PLOT, named)
        with (folder / TABLE).open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
        (folder / SCORES).write_text(json_text(summary), encoding="utf-8")
    return summary | {"sheet": str(folder / SHEET), "plot": str(folder / PLOT), "table": str(folder / TABLE)}


def report(summary: dict[str, Any], stored: bool) -> None:
    """Prints where the files are, the suggestion and how to use it."""
    both = summary["band"]
    if not summary["appears"]:
        good = "the last eta: no image shows the edit well; sweep larger ones, or look at the sheet"
    elif not both:
        good = "no eta has both scores good"
    else:
        good = f"alignment and fidelity are both good from {both[0]:.2f} to {both[1]:.2f}"
        if not both[0] - 0.005 <= summary["suggested"] <= both[1] + 0.005:
            good += ", between the etas of this sweep: look there too"
    err.print(f"[green]Wrote[/] {plain(summary['sheet'])}, {plain(summary['plot'])}, the scores and the images", highlight=False)
    err.print(f"Suggested eta: [bold]{exact(summary['suggested'])}[/] ({good})", highlight=False)
    if stored:
        err.print(f"Stored: it is now the default of imagic-lora edit {plain(summary['adapter'])}", highlight=False)
    else:
        err.print("Look at the sheet, then run:")
        err.print(f"  imagic-lora edit {plain(summary['adapter'])} --eta {exact(summary['suggested'])}", highlight=False)
