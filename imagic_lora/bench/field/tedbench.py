"""TEdBench (arXiv 2210.09276): 100 edits of 40 files, and the layouts of the outputs that were published for it.

    input_list.json    a list of {"img_name": ..., "target_text": ...}
    originals/         the photos; img_name names one
    imagic/            outputs: img_name-target_text.png, without the full stop at the end, spaces as underscores

It has no captions, no masks and no seeds. The outputs of Forgedit are named ``N_SETTINGS_target_text_guidance_scale=..._img_name.png``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ...core.errors import ImagicError, unreadable
from .cases import Case, Picture, entry_text, inside, read_json

LIST, ORIGINALS = "input_list.json", "originals"
_FORGEDIT = "_guidance_scale="


def read_tedbench(folder: Path) -> list[Case]:
    """Reads the cases of TEdBench; a wrong entry becomes a case with a problem.

    Args:
        folder: the folder that was published.

    Raises:
        ImagicError: the folder has another layout.
    """
    if not (folder / ORIGINALS).is_dir():
        expected = f"{LIST} and {ORIGINALS}/, as in the folder tedbench/ that was published"
        raise ImagicError(f"{folder} has no folder {ORIGINALS}", expected, "name that folder")
    cases = []
    for index, entry in enumerate(read_json(folder / LIST, list)):
        name, problem, prompt, photo = f"entry {index}", None, "", folder
        try:
            if not isinstance(entry, dict):
                raise ImagicError(f"a {type(entry).__name__}", "", "")
            photo = inside(folder / ORIGINALS, name := entry_text(entry, "img_name"))
            prompt = entry_text(entry, "target_text")
            name = output_stem(name, prompt)
        except ImagicError as error:
            problem = error.got
        cases.append(Case(index, name, photo, prompt, problem=problem))
    return _distinct(cases)


def _distinct(cases: list[Case]) -> list[Case]:
    """An edit that is listed twice is a problem of the second one: both would have one output."""
    seen: set[str] = set()
    found = []
    for case in cases:
        again = case.name in seen and case.problem is None
        seen.add(case.name)
        found.append(replace(case, problem="it is listed twice") if again else case)
    return found


def output_stem(img_name: str, target_text: str) -> str:
    """Returns the name of an output without its ending."""
    return f"{img_name}-{target_text.rstrip('.')}".replace(" ", "_")


def captioned_cases(cases: list[Case], captions: Mapping[str, str]) -> list[Case]:
    """Returns cases with the captions of their photos, by the names of the files."""
    return [replace(case, source_prompt=captions.get(case.photo.name)) for case in cases]


def tedbench_outputs(cases: list[Case], folder: Path) -> list[Picture]:
    """Finds the output of every case, named as those of Imagic or those of Forgedit.

    Args:
        cases: the cases.
        folder: the outputs.

    Raises:
        ImagicError: the folder cannot be read.
    """
    try:
        files = {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
    except OSError as error:
        raise unreadable(folder, error) from error
    return [_output(case, files, folder) for case in cases]


def _output(case: Case, files: Mapping[str, Path], folder: Path) -> Picture:
    row = folder.resolve().name
    stems = (case.name, f"{case.photo.name}-{case.prompt.rstrip('.')}")  # one was first published with spaces
    named = [f"{stem}{ending}" for stem in stems for ending in (".png", ".jpg", ".jpeg", ".webp")]
    found = [files[name] for name in named if name in files][:1]
    if not found:
        text, photo = f"_{case.prompt}{_FORGEDIT}", f"_{_plain(case.photo.name)}.png"
        found = [path for name, path in files.items() if text in name and _plain(name).endswith(photo)]
    if len(found) == 1:
        return Picture(case, row, found[0])
    listed = f"{len(found)} outputs in {folder}: {', '.join(path.name for path in found[:3])}"
    return Picture(case, row, None, problem=listed if found else f"no output in {folder}; expected {named[0]}")


def _plain(name: str) -> str:
    """A name with one character for a dash and an underscore: Forgedit's outputs have one for the other."""
    return name.replace("-", "_")
