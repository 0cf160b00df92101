"""The table of a batch: every line of the list checked, with its settings, before anything starts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.store import check_name, folded
from ..bases.architecture import check_fit_method
from ..core.config import RunConfig
from ..core.errors import ImagicError
from ..core.settings.merging import merged
from ..core.settings.reading import validated
from ..core.text import check_utf8, exact, slug
from ..photos.region import Region, parse_region
from ..sampling.checks import check_edit, check_sampling
from ..training.configure import configure_run
from ..training.inputs import check_inputs
from .columns import sorted_columns
from .lists import Problems, Row, read_list

if TYPE_CHECKING:
    from ..training.grouping import Item

_FREE = ("seed", "eta")  # settings that no check and no preset depends on


@dataclass(frozen=True)
class Entry:
    """A line of the list: one photo, one prompt, one adapter.

    Args:
        place: where it is in the list, for messages.
        name: name of the adapter.
        photo: path of the photo.
        prompt: the target prompt.
        region: the part of the photo to fit; None is all of it.
        config: the settings of its fit.
    """

    place: str
    name: str
    photo: Path
    prompt: str
    region: Region | None
    config: RunConfig

    def item(self, resume: bool = False, overwrite: bool = False) -> Item:
        """Returns what a fit of several photos needs of it; arguments as those of :class:`~imagic_lora.training.grouping.Item`."""
        from ..training.grouping import Item

        return Item(self.photo, self.prompt, self.name, self.config.seed, self.region, resume=resume, overwrite=overwrite)


@dataclass
class Table:
    """Makes the entries of a list.

    Args:
        path: the list; the paths of photos are relative to its folder.
        flags, file: explicitly given settings of all lines, as nested mappings; a setting of a line overrides them.
        etas, seeds: the edits of every adapter; none without seeds.
    """

    path: Path
    flags: Mapping[str, Any]
    file: Mapping[str, Any]
    etas: Sequence[float] = ()
    seeds: Sequence[int] = ()
    problems: Problems = field(default_factory=Problems)
    _configs: dict[str, RunConfig | ImagicError] = field(default_factory=dict)

    def entries(self, prompt: str | None = None) -> list[Entry]:
        """Reads and checks the list.

        Args:
            prompt: target prompt of the lines without one.

        Raises:
            ListError: lines are wrong; it names all of them.
            ImagicError: as :func:`~imagic_lora.fleet.lists.read_list`.
        """
        rows = read_list(self.path, prompt, self.problems)
        entries = [entry for row in rows if (entry := self._entry(row))]
        self._check_names(entries)
        self.problems.raise_any(self.path)
        return entries

    def _entry(self, row: Row) -> Entry | None:
        """The entry of a line; None if it is wrong."""
        try:
            own, given = sorted_columns(row.values)
            for column in own:
                if not isinstance(own[column], str):
                    raise ImagicError(f"{column} = {own[column]!r}", "text, in quotes if it consists of digits", "")
            if missing := [column for column in ("photo", "prompt") if column not in own]:
                raise ImagicError(f"no {' and no '.join(missing)}", "a photo and a target prompt in every line (or --prompt)", "")
            photo = self._photo(own["photo"])
            name = check_name(own["name"]) if "name" in own else slug(photo.stem, "photo")
            region = parse_region(own["region"]) if "region" in own else None
            config = self._config(given)
            check_inputs(own["prompt"], config, region)
            self._check_edits(own["prompt"], config)
            return Entry(row.place, name, photo, own["prompt"], region, config)
        except ImagicError as error:
            self.problems.add(row.place, error.got, error.expected)
            return None

    def _check_edits(self, prompt: str, config: RunConfig) -> None:
        """Raises ImagicError if the adapter of a line could not make the edits: a fit takes longer than this check."""
        if not self.seeds:
            return
        check_edit(self.etas, self.seeds, config.edit, prompt)
        if self.etas and config.method != "imagic":
            got = f"--edit with eta={exact(self.etas[0])} and method {config.method}"
            raise ImagicError(got, "no eta, which this method does not have", "leave it out")

    def _photo(self, text: str) -> Path:
        check_utf8(text, "the photo")
        photo = (self.path if self.path.is_dir() else self.path.parent).absolute() / text
        try:
            if photo.is_file() and photo.stat().st_size:
                return photo
            got = "is empty" if photo.is_file() else "is a folder" if photo.is_dir() else "does not exist"
        except (OSError, ValueError) as error:
            got = f"cannot be read ({getattr(error, 'strerror', None) or error})"
        raise ImagicError(f"the photo {photo} {got}", "the path of a photo, relative to the folder of the list", "")

    def _config(self, given: Mapping[str, Any]) -> RunConfig:
        """The settings of a line. The preset is chosen once for equal settings: the seed and eta do not change it."""
        free = {name: given[name] for name in _FREE if name in given}
        rest = {name: value for name, value in given.items() if name not in free}
        key = json.dumps(rest, sort_keys=True, default=repr)
        if key not in self._configs:
            self._configs[key] = self._checked(rest)
        found = self._configs[key]
        if isinstance(found, ImagicError):
            raise found
        if "eta" in free and found.method != "imagic":
            raise ImagicError(f"eta = {free['eta']} with method {found.method}", "no eta, which this method does not have", "leave it out")
        return found.model_copy(update={name: getattr(validated(free), name) for name in free})

    def _checked(self, given: Mapping[str, Any]) -> RunConfig | ImagicError:
        try:
            configured = configure_run(merged(self.flags, given), self.file)
            run = configured.run
            check_fit_method(configured.architecture, run.base, run.method)
            check_sampling(run.edit)
        except ImagicError as error:
            return error
        return run

    def _check_names(self, entries: Sequence[Entry]) -> None:
        """Adds the names that occur twice to the problems."""
        first: dict[str, Entry] = {}
        for entry in entries:
            other = first.setdefault(folded(entry.name), entry)
            if other is not entry:
                got = f"the name {entry.name!r} is that of {other.place}"
                self.problems.add(entry.place, got, "a name of its own; without a column name it is made from the file name of the photo")
