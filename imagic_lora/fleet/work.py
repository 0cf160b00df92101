"""The work of a batch: a group of photos is fitted and edited, and every failure stays with its photo."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.adapter import Adapter
from ..adapters.modes import MODES
from ..adapters.store import Store
from ..adapters.writing import exists
from ..core.config import RunConfig
from ..core.errors import DiskFull, ImagicError, ImagicWarning, Stopped
from .outcome import Outcome, Update, explained, scores_of, stored
from .table import Entry

if TYPE_CHECKING:
    from ..bases.base import Base
    from ..training.stage import StepReport


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
            group: entries whose fits share a base; several are fitted together, as :func:`~imagic_lora.fleet.batch.grouped` says.

        Raises:
            Stopped: ``stop`` returned True; a checkpoint is saved.
            DiskFull: whatever else is fitted fails, too.
            ImagicError: the base cannot be loaded.
        """
        base = self._opened(group[0])
        if len(group) > 1:
            group = yield from self._together(group, base)
        for entry in group:
            start = time.perf_counter()
            try:
                outcome = yield from self._one(entry, base)
            except Exception as error:  # of this photo: the next ones go on
                outcome = self._failed(entry, error)
            yield replace(outcome, seconds=outcome.seconds or time.perf_counter() - start)

    def _failed(self, entry: Entry, error: Exception) -> Outcome:
        """The outcome of a photo that failed. An error that ends the whole work is raised: an interruption, which C code can replace by
        another exception, and a full disk.
        """
        if isinstance(error, Stopped | DiskFull) or self.stop():
            raise error
        return Outcome(entry, error=explained(error))

    def _together(self, group: Sequence[Entry], base: Base) -> Generator[Update | Outcome, None, list[Entry]]:
        """Fits and edits photos together; returns those that are left to be done one by one: those that are stored, and with ``overwrite``
        those with checkpoints; and where the group as a whole cannot be fitted, such as for want of memory, all that have no outcome.
        """
        from ..training.resuming.checkpoints import Checkpoints
        from ..training.together import fit_together

        store, start = Store(self.work.store), time.perf_counter()
        alone, left = list[Entry](), dict[str, Entry]()
        resumed: dict[str, bool] = {}
        for entry in group:
            resumed[entry.name] = Checkpoints(store.checkpoints(entry.name)).any()
            single = exists(store.root / entry.name) or (self.work.overwrite and resumed[entry.name])
            alone.append(entry) if single else left.update({entry.name: entry})
        if len(left) < 2:
            return list(group)
        items = [entry.item(resumed[name], self.work.overwrite) for name, entry in left.items()]
        try:
            with closing(fit_together(items, group[0].config, store, base=base, stop=self.stop)) as reports:
                for report in reports:
                    if report.step:
                        yield Update(report.name, report.step.stage, report.step.step, report.step.steps)
                        continue
                    entry = left.pop(report.name)
                    if report.adapter:
                        outcome = yield from self._edited(entry, report.adapter, base)
                    else:
                        assert report.error is not None
                        outcome = self._failed(entry, report.error)
                    yield replace(outcome, seconds=(time.perf_counter() - start) / len(group))
        except ImagicError as error:
            if isinstance(error, DiskFull) or self.stop():
                raise
            message = f"{len(left)} photos are fitted one by one instead of together: {error.got}"
            warnings.warn(message, ImagicWarning, stacklevel=2)
        return [*alone, *left.values()]

    def _edited(self, entry: Entry, adapter: Adapter, base: Base) -> Generator[Update, None, Outcome]:
        """Makes the edits of an adapter that are asked for; its outcome without the time. If an edit fails, the adapter remains."""
        scores, images = scores_of(adapter), list[dict[str, Any]]()
        if self.work.seeds:
            yield Update(entry.name, "edit")
            try:
                images, scores["ssim"] = self._edits(entry, adapter, base)
            except Exception as error:  # of this photo: the next ones go on
                return replace(self._failed(entry, error), adapter=adapter.folder)
        return Outcome(entry, adapter.folder, scores=scores, images=images)

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
        outcome = yield from self._edited(entry, adapter, base)
        return replace(outcome, seconds=time.perf_counter() - start if fitted else sum(adapter.record.seconds.values()))

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
        names = [image_name(eta, seed, adapter.record.config.method) for eta in etas for seed in self.work.seeds]
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


def collected(worker: Worker, group: Sequence[Entry], report: Callable[[Update], None]) -> tuple[list[Outcome], ImagicError | None]:
    """Runs a group in a process of its own and returns what another process needs.

    Args:
        worker: does the work.
        group: entries whose fits share a base.
        report: called with the progress.

    Returns:
        The outcomes with their warnings, fewer if the work was stopped; and the error that ends the whole batch, if any.
    """
    outcomes: list[Outcome] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ImagicWarning)
        try:
            for item in worker.run(group):
                if isinstance(item, Update):
                    report(item)
                    continue
                texts = [str(one.message) for one in caught if issubclass(one.category, ImagicWarning)]
                caught.clear()
                outcomes.append(replace(item, warnings=texts))
        except Stopped:
            pass
        except ImagicError as error:
            return outcomes, error
    return outcomes, None
