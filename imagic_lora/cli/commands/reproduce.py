"""The command ``reproduce``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from ...adapters.writing import check_outputs, writable
from ...core.config import PresetOrAuto
from ...core.errors import ImagicError
from ..console import err, plain, print_json, progress
from ..libraries import import_libraries
from ..options import DEFAULT_STORE, Flag, Json, StoreDir

if TYPE_CHECKING:
    from PIL.Image import Image

    from ...adapters.adapter import Adapter
    from ...sampling.keep import Keep
    from ...sampling.metadata import ImageMetadata


def reproduce(
    image: Path,
    *,
    keep: Path | None = None,
    photo: Path | None = None,
    base: str | None = None,
    preset: Annotated[PresetOrAuto, Parameter(name="--preset")] = "auto",
    force: Flag = False,
    store: StoreDir = DEFAULT_STORE,
    out_dir: Annotated[Path, Parameter(name="--out")] = Path("outputs/reproduced"),
    overwrite: Flag = False,
    as_json: Json = False,
) -> None:
    """Make an image of imagic-lora edit again, and compare the pixels.

    The image says how it was made: adapter, base, prompt, settings, device, versions. An adapter or a base with another hash is an error.
    The exit code is 2 if the pixels differ; the message then names what is not as it was.

        imagic-lora reproduce outputs/rex/eta0.7-seed0.png

    Parameters
    ----------
    image
        A PNG that imagic-lora edit wrote.
    keep
        The mask of an image that was made with edit --keep MASK.png: the same file.
    photo
        The photo's file, for an adapter that does not hold it: for an image of edit --keep, of a --region, or of a start from the photo.
    base
        Load the base from this name, folder, file or hub id. The weights must be those that made the image.
    preset
        Memory levers for a card of this size. auto: the fastest preset whose predicted peak fits 90% of the free memory.
    force
        Also use an adapter or a base that has changed. Different pixels are a warning then.
    out_dir
        Folder for the new image.
    overwrite
        Replace another image of the same name in that folder.
    """
    import_libraries()
    from ...adapters.contents import with_photo
    from ...adapters.store import Store
    from ...adapters.withheld import check_start
    from ...sampling.reproduce import Comparison, compare, find_adapter, read_image, read_pasting

    metadata, original = read_image(image)
    adapter = with_photo(find_adapter(Store(store), metadata, force), photo)
    check_start(adapter, metadata.edit)
    kept = read_pasting(adapter, metadata, keep, photo)
    path = out_dir / f"{image.stem}.png"
    if path.exists() and path.samefile(image):
        raise ImagicError(f"--out {out_dir} is the folder of the image itself", "another folder", "choose another --out")
    made, differs = _made_again(metadata, adapter, kept, base, preset, force, path, overwrite)
    found: Comparison = compare(original, made, metadata)
    identical = found.identical and not found.altered
    if as_json and (identical or force):
        print_json({"file": str(path), "identical": identical, "share": found.share, "largest": found.largest, "differs": differs})
    if identical:
        err.print(f"[green]Identical[/] pixels: {plain(path)}", highlight=False)
        return
    if found.identical:
        got = f"the pixels of {image} were changed after imagic-lora edit wrote it; {path} has the ones that were written"
    else:
        reason = "; ".join(differs) or "nothing that the metadata record has changed"
        got = f"{path} differs from {image} in {found.share:.1%} of the pixels, by at most {found.largest} of 255 ({reason})"
    if not force:
        raise ImagicError(got, "identical pixels", "run with the device, the number of threads and the versions of the image")
    err.print(f"[yellow]Warning:[/] {plain(got)}", highlight=False)


def _made_again(
    metadata: ImageMetadata,
    adapter: Adapter,
    keep: Keep | None,
    base: str | None,
    preset: PresetOrAuto,
    force: bool,
    path: Path,
    overwrite: bool,
) -> tuple[Image, list[str]]:
    """Generates the batch of an image and writes the image.

    Args:
        metadata: of the image.
        adapter: the adapter that made it.
        keep: how it was pasted into the photo; None if it was not.
        base: a base that replaces the one in the adapter's record.
        preset: memory levers for a card of this size.
        force: whether a base with another hash is allowed.
        path: file of the new image.
        overwrite: whether another image of that name is replaced.

    Returns:
        The image, and what is not as it was.
    """
    from ...core.machine import find_card
    from ...memory.levers import EDIT_LEVERS
    from ...memory.out_of_memory import explain_out_of_memory
    from ...photos.png import write_png
    from ...sampling.metadata import a1111_parameters, image_metadata, of_image
    from ...sampling.opening import edit_settings, made_by_twin, open_editor
    from ...sampling.outputs import check_same_edits
    from ...sampling.reproduce import batches, finish, generate_again, what_differs

    then = metadata.runtime
    memory: dict[str, Any] = then.model_dump(exclude={"threads"})
    if then.device == "cuda" and find_card() is None:
        memory |= {"device": "cpu", "dtype": "auto", "attention": "sdpa"}
    check_outputs(path.parent, [path.name])
    twin = base is None and made_by_twin(adapter, metadata)
    base = metadata.base if twin else base
    sizes = [len(batch) for batch in batches(metadata)]
    run = edit_settings(adapter, {"edit": {"batch_size": max(sizes)}, "memory": memory, "preset": preset}, base)
    editor = open_editor(adapter, run, base, force or metadata.forced is not None, twin)
    if editor.base.fingerprint != metadata.base_fingerprint and not force:
        got = (
            f"base {editor.base.name} has other weights than {metadata.base}, which made the image (hash {metadata.base_fingerprint[:12]})"
        )
        raise ImagicError(got, "the same weights", "name the base that made it with --base, or use --force to see what this one makes")
    common = image_metadata(adapter, editor.base, metadata.edit, metadata.prompt) | (keep.metadata if keep else {})
    if not overwrite:
        check_same_edits([path], common)
    with explain_out_of_memory(editor.base.architecture, run, editor.base.runtime, "decode", levers=EDIT_LEVERS):
        edit = finish(progress(generate_again(editor, adapter, metadata), sum(sizes), "images"), metadata, keep)
    values = of_image(common, edit)
    with writable(path.parent):
        write_png(edit.image, path, values, a1111_parameters(type(metadata).model_validate(values), edit.image.size))
    return edit.image, what_differs(metadata, common)
