"""fit_together(): adapters of several photos, whose fits share each forward and backward pass on one device."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field

from PIL import Image

from ..adapters.adapter import Adapter
from ..adapters.batched import BatchedLora, batched
from ..adapters.store import Store
from ..bases.base import Base
from ..core.config import RunConfig
from ..core.errors import ImagicError, Stopped
from ..core.noise import key
from ..core.runtime import Processes
from ..core.settings.reading import validated
from ..memory.limits import check_disk
from ..memory.out_of_memory import assumed_from, explain_out_of_memory
from ..memory.plan import sampled_at_once
from ..photos.reading import read_photo
from ..sampling.checks import check_prompt
from ..sampling.shared_calls import sampled_together
from .encode import encode_photo, encode_run
from .fit import open_checked
from .grouping import Item, canvas_of, check_group
from .member import Member
from .resuming.checkpoints import Checkpoints
from .resuming.stages import ResumableStages
from .resuming.unfinished import check_unfinished, checkpoint_to_resume
from .shared import in_step
from .stage import Progress, StepReport


@dataclass(frozen=True)
class PhotoReport:
    """What happened to a photo of a group: a finished step, its stored adapter, or the error that ended its fit."""

    name: str
    step: StepReport | None = None
    adapter: Adapter | None = None
    error: Exception | None = None


def fit_together(
    items: Sequence[Item], config: RunConfig, store: Store, *, base: Base | None = None, stop: Callable[[], bool] = lambda: False
) -> Generator[PhotoReport, None, dict[str, Adapter | Exception]]:
    """Fits several photos as :func:`~imagic_lora.training.fit.fit` does, with every pass through the denoiser shared.

    Every photo has an embedding, LoRA layers, an optimizer, a seed, checkpoints and an adapter of its own, the same as if it was fitted
    alone, up to rounding. An interrupted fit can be resumed in any group, or alone. A photo whose fit fails does not end the others.
    :func:`~imagic_lora.training.grouping.groups` finds photos that can be fitted together, and
    :func:`~imagic_lora.memory.presets.most_together` how many.

    Args:
        items: the photos; all have a canvas of one size.
        config: the settings of all fits but the seed; mode lora or embedding.
        store: where the adapters and the checkpoints are written.
        base: a loaded base, which is bit-equal to before afterwards; by default the base of ``config`` is opened and released again.
        stop: called after every step of every photo.

    Yields:
        A report after every step of each photo, and at the end of its fit.

    Returns:
        The adapter of each photo by name, or the error that ended its fit.

    Raises:
        Stopped: ``stop`` returned True; checkpoints of all unfinished fits are saved.
        OutOfMemory: a pass of all photos does not fit the memory; checkpoints are saved, and fewer photos need less.
        ImagicError: the settings or the base do not allow a group, or the canvases of the photos differ.
    """
    check_group(items, config)
    results: dict[str, Adapter | Exception] = {}
    with ExitStack() as stack:
        group = _Group(config, store, _Latched(stop), stack)
        for report in group.run(items, base):
            if outcome := report.adapter or report.error:
                results[report.name] = outcome
            yield report
    return results


@dataclass
class _Latched:
    """A request to stop, which stays: every photo asks for itself, and all of them stop."""

    stop: Callable[[], bool]
    requested: bool = False

    def __call__(self) -> bool:
        self.requested = self.requested or self.stop()
        return self.requested


@dataclass
class _Group:
    """The fits of a group. A photo leaves ``members`` when its fit has failed.

    Args:
        config: the settings of all.
        store: of all adapters.
        stop: asks whether the group stops.
        stack: holds the locks of the names.
    """

    config: RunConfig
    store: Store
    stop: _Latched
    stack: ExitStack
    members: dict[str, Member] = field(default_factory=dict)
    lora: BatchedLora | None = None
    places: dict[str, int] = field(default_factory=dict)

    def run(self, items: Sequence[Item], base: Base | None) -> Generator[PhotoReport, None, None]:
        """Runs the fits: check, open, encode, embed, tune, preview, store."""
        for item in items:
            try:
                self.members[item.name] = self._begun(item)
            except Exception as error:  # of this photo: the others go on
                yield PhotoReport(item.name, error=error)
        if not self.members:
            return
        base = self._opened(base)
        yield from self._each(lambda member: self._encode_photo(member, base))
        yield from self._each(lambda member: self._encode_prompt(member, base))
        if self.config.embed.space == "output":  # stage 1 needs the text encoders to encode vectors
            base.offload_encoders()
        yield from self._each(_discard_checkpoints)
        yield from self._in_step({name: member.embed() for name, member in self.members.items()}, base, "embed")
        base.offload_encoders()
        self.places = {name: place for place, name in enumerate(self.members)}
        with ExitStack() as stack:
            if "tune" in self.config.stages and self.members:
                seeds = [key(member.config.seed, "lora") for member in self.members.values()]
                self.lora = stack.enter_context(batched(base, self.config.tune, seeds))
                for member, layers in zip(self.members.values(), self.lora.sets, strict=True):
                    member.layers = layers
                yield from self._in_step({name: member.tune() for name, member in self.members.items()}, base, "tune")
            sheets = self._previews(base)
        self.lora = None
        yield from self._each(lambda member: PhotoReport(member.item.name, adapter=member.finish(_value(sheets[member.item.name]))))

    def _begun(self, item: Item) -> Member:
        """Checks and locks the name of a photo and reads the photo, before the base is opened."""
        check_prompt(item.prompt)
        seed = self.config.seed if item.seed is None else validated({"seed": item.seed}).seed
        config = self.config.model_copy(update={"seed": seed})
        saved = Checkpoints(self.store.checkpoints(item.name))
        with ExitStack() as own:
            store = own.enter_context(self.store.locked(item.name))
            check_unfinished(store, item.name, saved, item.overwrite, item.resume)
            checkpoint = checkpoint_to_resume(saved, item.name, Processes()) if item.resume else None
            photo = read_photo(item.photo)
            if item.region:
                item.region.check_inside(photo.image.size)
            lock = own.pop_all()
        self.stack.callback(lock.close)
        return Member(item, config, store, saved, checkpoint, photo, lock)

    def _opened(self, base: Base | None) -> Base:
        """Opens and checks the base, the canvases and the disk, for all photos at once.

        Raises:
            ImagicError: one of them does not allow the group.
        """
        members = list(self.members.values())
        base, self.config = open_checked(base, self.config, Processes(), len(members))
        if self.config.memory.optimizer_in_backward and len(members) > 1:
            got = "--optimizer-in-backward for photos that are fitted together"
            raise ImagicError(got, "an optimizer that runs after the backward pass of all", "use --no-optimizer-in-backward")
        sizes = {name: canvas_of(member.item, member.photo, self.config, base.architecture) for name, member in self.members.items()}
        if len(set(sizes.values())) > 1:
            got = f"canvases of different sizes: {', '.join(f'{name} {width}x{height}' for name, (width, height) in sizes.items())}"
            raise ImagicError(got, "photos whose canvases have one size", "fit them in groups of one size")
        existing, photos = sum(member.saved.size for member in members), sum(len(m.photo.data) for m in members if m.item.store_photo)
        check_disk(base.architecture, self.config, assumed_from(base.runtime), self.store.root, existing, photos, len(members))
        for member in members:
            member.config = self.config.model_copy(update={"seed": member.config.seed})
        return base

    def _encode_photo(self, member: Member, base: Base) -> None:
        member.encoded = encode_photo(member.config, base, member.photo, member.item.region)

    def _encode_prompt(self, member: Member, base: Base) -> None:
        assert member.encoded is not None
        item = member.item
        run = encode_run(member.config, base, member.photo, item.prompt, Processes(), item.region, item.store_photo, member.encoded)
        run.together = len(self.members)
        member.stages = ResumableStages(run, member.saved, self.stop)

    def _each(self, work: Callable[[Member], PhotoReport | None]) -> Iterator[PhotoReport]:
        """Does something with every photo, one after the other. A photo leaves the group if it fails."""
        for name, member in list(self.members.items()):
            try:
                report = work(member)
            except Stopped:
                raise
            except Exception as error:  # of this photo: the others go on
                report = self._failed(name, error)
            if report:
                yield report

    def _in_step(self, running: dict[str, Generator[Progress, None, None]], base: Base, stage: str) -> Generator[PhotoReport, None, None]:
        """Runs a stage of all photos."""
        with explain_out_of_memory(base.architecture, self.config, base.runtime, stage, photos=len(running)):
            for name, found in in_step(running, self._using):
                if isinstance(found, StepReport):
                    yield PhotoReport(name, step=found)
                else:
                    yield self._failed(name, found)

    @contextmanager
    def _using(self, names: Sequence[str]) -> Iterator[None]:
        """A context in which the parts of a batch pass through the layers of these photos."""
        with self.lora.using([self.places[name] for name in names]) if self.lora else nullcontext():
            yield

    def _previews(self, base: Base) -> dict[str, Image.Image | BaseException]:
        """Renders the previews of all photos together, in batches that are no larger than those of the training or of an edit.

        Raises:
            Stopped: the group stops; the checkpoints of the finished stages are saved.
        """
        training = self.config.stages[list(self.config.stages)[-1]]
        most = max(len(self.members) * training.batch_size, sampled_at_once(base.architecture, self.config))
        sheets = sampled_together(base, {name: member.preview for name, member in self.members.items()}, self._using, most)
        for sheet in sheets.values():
            if isinstance(sheet, Stopped):
                raise sheet
        return sheets

    def _failed(self, name: str, error: Exception) -> PhotoReport:
        """Takes a photo out of the group."""
        self.members.pop(name).lock.close()
        return PhotoReport(name, error=error)


def _value(found: Image.Image | BaseException) -> Image.Image:
    """Returns a preview, or raises what prevented it."""
    if isinstance(found, BaseException):
        raise found
    return found


def _discard_checkpoints(member: Member) -> None:
    """Removes the checkpoints of an earlier fit that is not resumed, once every check has passed."""
    if not member.item.resume:
        member.saved.clear()
