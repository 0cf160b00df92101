"""The images of ``edit``: checked, generated and written; called by ``commands/edit.py``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..adapters.adapter import Adapter
from ..adapters.contents import read_canvas
from ..adapters.withheld import check_start, require_photo
from ..adapters.writing import check_outputs
from ..core.config import RunConfig
from ..memory.levers import EDIT_LEVERS
from ..memory.out_of_memory import explain_out_of_memory
from ..sampling.checks import check_edit
from ..sampling.editor import Editor
from ..sampling.keep import Keep
from ..sampling.metadata import image_metadata
from ..sampling.opening import open_editor
from ..sampling.outputs import SHEET, check_same_edits, image_name, mask_name, write_edits
from .console import progress
from .interrupts import Interrupts
from .searching import searched_eta


@dataclass(frozen=True)
class Edits:
    """The edits of an adapter with one or several target prompts, one output folder each.

    Args:
        adapter: the stored adapter.
        run: settings of stage 3 and memory levers.
        seeds: seeds of the starting noise.
        prompts: target prompt by output folder; None is that of the adapter.
        keep: how the edits are pasted into the photo; None for edits of the whole photo.
        save_mask: whether the masks are written too.
        metadata: whether the images say how they were made.
        overwrite: whether images that were made in another way are replaced.
        twin: whether the base that samples is the twin of the adapter's.
    """

    adapter: Adapter
    run: RunConfig
    seeds: Sequence[int]
    prompts: Mapping[Path, str | None]
    keep: Keep | None
    save_mask: bool
    metadata: bool
    overwrite: bool
    twin: bool = False

    @property
    def targets(self) -> dict[Path, str]:
        """The target prompt by output folder, that of the adapter included."""
        return {folder: self.adapter.record.prompt if prompt is None else prompt for folder, prompt in self.prompts.items()}

    @property
    def sheets(self) -> list[str]:
        """The sheet of every folder."""
        return [str(folder / SHEET) for folder in self.prompts]

    def write(self, etas: Sequence[float], base: str | None, force: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Generates the images of all prompts, etas and seeds, and writes those of each prompt into its folder.

        Args:
            etas: interpolation values, each in [0, 2]; none to search for one for every prompt.
            base: a base that replaces the one in the adapter's record.
            force: whether a base with other weights of the same shapes is allowed.

        Returns:
            ``file``, ``eta``, ``seed`` and, for several prompts, ``prompt`` of every image; and what
            :func:`~imagic_lora.cli.searching.searched_eta` returns of every prompt, nothing without a search.
        """
        for prompt in self.targets.values():
            check_edit(etas, self.seeds, self.run.edit, prompt)
        check_start(self.adapter, self.run.edit)
        if not etas:
            require_photo(self.adapter, "--eta auto compares images with the photo")
        chosen: dict[Path, Sequence[float]] = dict.fromkeys(self.prompts, etas)
        self._check_outputs(chosen)
        editor = open_editor(self.adapter, self.run, base, force, self.twin)
        searches, written = list[dict[str, Any]](), list[dict[str, Any]]()
        first, *others = self.prompts

        def saved() -> str:
            return f"the images written so far are in {first.parent if others else first}" if written else ""

        explained = explain_out_of_memory(editor.base.architecture, self.run, editor.base.runtime, "decode", saved, EDIT_LEVERS)
        with Interrupts(saved), explained:
            if not etas:
                searches = [
                    searched_eta(editor, self.adapter, self.seeds[0], self.run.edit, self._other(prompt)) | self._named(prompt)
                    for prompt in self.targets.values()
                ]
                chosen = {folder: [search["eta"]] for folder, search in zip(self.prompts, searches, strict=True)}
                self._check_outputs(chosen)
            for one in self._written(editor, chosen):
                written.append(one)  # at once: an interruption says whether there are images
        return written, searches

    def _named(self, prompt: str) -> dict[str, Any]:
        """The prompt, where several prompts need telling apart."""
        return {"prompt": prompt} if len(self.prompts) > 1 else {}

    def _written(self, editor: Editor, chosen: Mapping[Path, Sequence[float]]) -> Iterator[dict[str, Any]]:
        """Generates and writes the images of the etas of each folder, and yields each one as :meth:`write` returns it."""
        pasted = self.keep.metadata if self.keep else {}
        made = {
            folder: image_metadata(self.adapter, editor.base, self.run.edit, prompt) | pasted for folder, prompt in self.targets.items()
        }
        if not self.overwrite:
            for folder, common in made.items():
                check_same_edits([folder / name for name in self._names(chosen[folder])], common)
        generated = {folder: self.keep.etas(etas) if self.keep else etas for folder, etas in chosen.items()}
        region, counts = (
            self.keep.composite.region if self.keep else None,
            {f: len(etas) * len(self.seeds) for f, etas in generated.items()},
        )
        edits = (
            edit
            for folder, prompt in self.targets.items()
            for edit in editor.edit(self.adapter, generated[folder], self.seeds, self.run.edit, self._other(prompt))
        )
        shown, canvas = iter(progress(edits, sum(counts.values()), "images")), read_canvas(self.adapter)
        photo = canvas.photo() if canvas.known else None
        for folder, common in made.items():
            part = islice(shown, counts[folder])
            part = self.keep.pasted(part, chosen[folder]) if self.keep else part
            for one in write_edits(part, folder, common, photo, region, self.save_mask, self.metadata):
                yield one | self._named(common["prompt"])

    def _other(self, prompt: str) -> str | None:
        """The prompt if it replaces that of the adapter, whose embedding is stored; else None."""
        return None if prompt == self.adapter.record.prompt else prompt

    def _names(self, etas: Sequence[float]) -> list[str]:
        """The names of the images and masks of one prompt."""
        pairs, method = [(eta, seed) for eta in etas for seed in self.seeds], self.adapter.record.config.method
        names = [image_name(eta, seed, method) for eta, seed in pairs]
        return names + ([mask_name(eta, seed) for eta, seed in pairs] if self.save_mask else [])

    def _check_outputs(self, chosen: Mapping[Path, Sequence[float]]) -> None:
        """Raises ImagicError if a file of the etas of a folder cannot be written."""
        for folder, etas in chosen.items():
            check_outputs(folder, [*self._names(etas), SHEET])
