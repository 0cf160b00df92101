"""The work of a batch: a group of photos is fitted and edited, and every failure stays with its photo."""

from __future__ import annotations

import gc
import hashlib
import json
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.adapter import Adapter
from ..adapters.modes import MODES
from ..adapters.store import Store
from ..core.config import RunConfig
from ..core.errors import DiskFull, ImagicError, ImagicWarning, Stopped
from ..core.settings import differences
from .table import Entry

if TYPE_CHECKING:
    from ..bases.base import Base
    from ..training.stage import StepReport

_LEVERS = {"device", "idle", "vae_tiling", "vae_slicing", "gradient_checkpointing", "optimizer_in_backward", "autocast_cache"}
_NO_RESULT: dict[str, Any] = {"preset": True, "checkpoint": True, "memory": _LEVERS, "edit": {"batch_size"}}
"""Settings that an adapter does not depend on but for its last digits: another machine, or other free memory, may choose others."""
_MAX_TRACEBACK = 20_000  # characters


@dataclass(frozen=True)
class Update:
    """The progress of a photo: ``stage`` is ``load``, ``embed``, ``tune`` or ``edit``; no step is done yet where ``step`` is 0."""

    name: str
    stage: str
    step: int = 0
    steps: int = 0


@dataclass(frozen=True)
class Outcome:
    """What came of a photo.

    Args:
        entry: the line of the list.
        adapter: folder of the adapter; None if there is none.
        seconds: time that the photo took, in this run; of an adapter of an earlier run, that of its training.
        scores: last relative loss of every stage; ``ssim`` of the edits to the photo, by their file names.
        images: ``file``, ``eta`` and ``seed`` of every edit.
        error: got, expected and remedy, or the traceback of an unexpected one; None if all succeeded.
        warnings: the warnings of a fit in another process.
    """

    entry: Entry
    adapter: Path | None = None
    seconds: float = 0.0
    scores: dict[str, Any] = field(default_factory=dict)
    images: list[dict[str, Any]] = field(default_factory=list)
    error: dict[str, str] | None = None
    warnings: list[str] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """Returns the line of ``results.jsonl``."""
        entry = self.entry
        line = {"name": entry.name, "photo": str(entry.photo), "prompt": entry.prompt, "state": "failed" if self.error else "done"}
        found = {"adapter": None if self.adapter is None else str(self.adapter), "seconds": round(self.seconds, 3), "scores": self.scores}
        return {**line, **found, "images": self.images, "error": self.error, "asked": digest(entry)}


@dataclass(frozen=True)
class Work:
    """What is done with every photo.

    Args:
        store: folder of the adapters, an absolute path: another process has another working folder.
        out: folder of the results, the same.
        etas, seeds: the edits of every adapter; none without seeds.
        overwrite: whether adapters and edits that were made in another way are replaced.
    """

    store: Path
    out: Path
    etas: tuple[float, ...] = ()
    seeds: tuple[int, ...] = ()
    overwrite: bool = False

    def images(self, entry: Entry) -> Path:
        """Returns the folder of the edits of a photo."""
        return self.out / "images" / entry.name


def base_key(config: RunConfig) -> tuple[Any, ...]:
    """Returns what the loaded base of a fit depends on: fits with equal keys share one."""
    return config.base, config.revision, config.memory, MODES[config.tune.mode].in_base


def _asked(entry: Entry) -> dict[str, Any]:
    """Everything that the adapter of a line depends on but the content of the photo."""
    region = None if entry.region is None else list(entry.region)
    return {"prompt": entry.prompt, "region": region, "settings": _settings(entry.config)}


def _settings(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude=_NO_RESULT)


def digest(entry: Entry) -> str:
    """Returns a digest of what a line asks for, by which a later run knows whether it has changed: of the photo its size and time."""
    try:
        status = entry.photo.stat()
        photo = [status.st_size, status.st_mtime_ns]
    except OSError:
        photo = []
    return hashlib.sha256(json.dumps([str(entry.photo), photo, _asked(entry)], sort_keys=True).encode()).hexdigest()[:16]


def _changes(entry: Entry, adapter: Adapter, same_photo: bool) -> list[str]:
    """What differs between what a line asks for and an adapter, one phrase each; nothing if it is that of the line."""
    record = adapter.record
    region = None if record.source.region is None else list(record.source.region)
    made = {"prompt": record.prompt, "region": region, "settings": _settings(record.config)}
    found = differences(made, _asked(entry))
    if not found and not same_photo and record.source.sha256 != hashlib.sha256(entry.photo.read_bytes()).hexdigest():
        found = ["the photo was another file"]
    return found


def stored(entry: Entry, store: Store, same_photo: bool = False) -> Adapter | None:
    """Returns the adapter of a line if it is in the store; None if there is none.

    Args:
        entry: the line.
        store: the store.
        same_photo: whether the photo is known to be the one that was fitted; otherwise it is read and hashed.

    Raises:
        ImagicError: the adapter of that name is another one, or its record cannot be read.
        OSError: the photo cannot be read.
    """
    if not (store.root / entry.name).exists():
        return None
    adapter = store.read(entry.name, verify=False)
    if found := _changes(entry, adapter, same_photo):
        got = f"{adapter.folder} is another adapter: {'; '.join(found[:5])}"
        raise ImagicError(got, "an unused name, or the adapter that the list asks for", "choose another name, or use --overwrite")
    return adapter


def scores_of(adapter: Adapter) -> dict[str, Any]:
    """Returns the scores that the record of an adapter holds: the last relative loss of every stage."""
    return {"relative_loss": {name: one.relative_loss for name, one in adapter.record.stages.items() if one.relative_loss is not None}}


@dataclass
class Worker:
    """Fits and edits photos one after another. The base of the last one stays loaded.

    Args:
        work: what is done with every photo.
        stop: called after every step; True ends the work.
    """

    work: Work
    stop: Callable[[], bool] = lambda: False
    _key: tuple[Any, ...] | None = None
    _base: Base | None = None

    def run(self, group: Sequence[Entry]) -> Iterator[Update | Outcome]:
        """Fits the photos of a group, and yields an outcome for each.

        Args:
            group: entries whose fits share a base.

        Raises:
            Stopped: ``stop`` returned True; a checkpoint is saved.
            DiskFull: whatever else is fitted fails, too.
            ImagicError: the base cannot be loaded.
        """
        base = self._opened(group[0])
        for entry in group:
            start = time.perf_counter()
            try:
                outcome = yield from self._one(entry, base)
            except (Stopped, DiskFull):
                raise
            except Exception as error:  # of this photo: the next ones go on
                if self.stop():
                    raise  # an interruption, which C code can replace by another exception
                outcome = Outcome(entry, error=explained(error))
            yield replace(outcome, seconds=outcome.seconds or time.perf_counter() - start)

    def _opened(self, entry: Entry) -> Base:
        """The base of an entry: the one that is loaded, or a new one in its place."""
        import torch

        from ..training.fit import open_base

        if self._base is None or self._key != base_key(entry.config):
            if self._base is not None:
                self._base = None
                gc.collect()
                torch.cuda.empty_cache()
            self._base, self._key = open_base(entry.config), base_key(entry.config)
        return self._base

    def _one(self, entry: Entry, base: Base) -> Generator[Update, None, Outcome]:
        """Fits a photo, or goes on with its interrupted fit, and edits it. What is done is not done again."""
        store, start = Store(self.work.store), time.perf_counter()
        yield Update(entry.name, "load")
        adapter = self._found(entry, store)
        fitted = adapter is None
        if adapter is None:
            adapter = yield from self._fitted(entry, base, store)
        scores, images = scores_of(adapter), list[dict[str, Any]]()
        if self.work.seeds:
            yield Update(entry.name, "edit")
            images, scores["ssim"] = self._edits(entry, adapter, base)
        seconds = time.perf_counter() - start if fitted else sum(adapter.record.seconds.values())
        return Outcome(entry, adapter.folder, seconds, scores, images)

    def _found(self, entry: Entry, store: Store) -> Adapter | None:
        """The adapter of an entry if it is stored; the checkpoints that a killed process left beside it are removed."""
        from ..training.resuming.checkpoints import Checkpoints

        try:
            adapter = stored(entry, store)
        except ImagicError:
            if self.work.overwrite:
                return None
            raise
        if adapter is not None:
            with store.locked(entry.name):
                Checkpoints(store.checkpoints(entry.name)).clear()
        return adapter

    def _fitted(self, entry: Entry, base: Base, store: Store) -> Generator[Update, None, Adapter]:
        """Fits a photo, from its checkpoint if there is one; with ``overwrite``, one of another fit is discarded."""
        from ..training.fit import fit
        from ..training.resuming.checkpoints import Checkpoints

        resume = Checkpoints(store.checkpoints(entry.name)).any()
        for resumed in (True, False) if resume and self.work.overwrite else (resume,):
            steps: Generator[StepReport, None, Any] = fit(
                entry.photo, entry.prompt, entry.config, store, entry.name, base=base, region=entry.region,
                resume=resumed, overwrite=self.work.overwrite, stop=self.stop,
            )  # fmt: skip
            begun = False
            with closing(steps):
                try:
                    while True:
                        report = next(steps)
                        begun = True
                        yield Update(entry.name, report.stage, report.step, report.steps)
                except StopIteration as done:
                    return done.value
                except ImagicError:
                    if begun or not (resumed and self.work.overwrite):
                        raise
        raise AssertionError("the last fit raises or returns")

    def _edits(self, entry: Entry, adapter: Adapter, base: Base) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """Generates and writes the edits of an adapter; their SSIM to the photo by file name."""
        from ..adapters.contents import read_canvas
        from ..memory.levers import EDIT_LEVERS
        from ..memory.out_of_memory import explain_out_of_memory
        from ..sampling.editor import Editor
        from ..sampling.keep import read_keep
        from ..sampling.metadata import image_metadata
        from ..sampling.outputs import check_same_edits, image_name, write_edits
        from ..sampling.sweeps.scores import ssim

        config, etas, folder = entry.config.edit, self.work.etas or (adapter.record.eta,), self.work.images(entry)
        photo, keep = read_canvas(adapter).photo(), read_keep(adapter, None, None)  # edits of a region are pasted into the photo
        common = image_metadata(adapter, base, config, entry.prompt) | (keep.metadata if keep else {})
        names = [image_name(eta, seed) for eta in etas for seed in self.work.seeds]
        if not self.work.overwrite:
            check_same_edits([folder / name for name in names], common)
        explained_memory = explain_out_of_memory(base.architecture, entry.config, base.runtime, "decode", levers=EDIT_LEVERS)
        with closing(Editor(base)) as editor, explained_memory:
            generated = editor.edit(adapter, keep.etas(etas) if keep else etas, self.work.seeds, config)
            edits = list(keep.pasted(generated, etas) if keep else generated)
        region = keep.composite.region if keep else None
        written = list(write_edits(edits, folder, common, photo, region))
        shown = [edit.image.crop(region.box) if region else edit.image for edit in edits]
        return written, {Path(one["file"]).name: round(ssim(image, photo), 4) for one, image in zip(written, shown, strict=True)}


def explained(error: Exception) -> dict[str, str]:
    """Returns an error as JSON values: what was got, what was expected, what to do; of an unexpected one also its traceback."""
    if isinstance(error, ImagicError):
        return {"got": error.got, "expected": error.expected, "remedy": error.remedy}
    text = "".join(traceback.format_exception(error))[-_MAX_TRACEBACK:]
    got = f"an unexpected error ({type(error).__name__}: {error})"[:2000]
    return {"got": got, "expected": "no error", "remedy": "see traceback in results.jsonl", "traceback": text}


def collected(worker: Worker, group: Sequence[Entry], told: Callable[[Update], None]) -> tuple[list[Outcome], ImagicError | None]:
    """Runs a group in a process of its own and returns what another process needs.

    Args:
        worker: does the work.
        group: entries whose fits share a base.
        told: called with the progress.

    Returns:
        The outcomes with their warnings, fewer if the work was stopped; and the error that ends the whole batch, if any.
    """
    outcomes: list[Outcome] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ImagicWarning)
        try:
            for item in worker.run(group):
                if isinstance(item, Update):
                    told(item)
                    continue
                texts = [str(one.message) for one in caught if issubclass(one.category, ImagicWarning)]
                caught.clear()
                outcomes.append(replace(item, warnings=texts))
        except Stopped:
            pass
        except ImagicError as error:
            return outcomes, error
    return outcomes, None
