"""The command ``compare``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from cyclopts import Parameter

from ...adapters.writing import check_outputs, exists
from ...core.config import PresetOrAuto
from ...core.device_config import DEVICE_GROUP, DeviceConfig
from ...core.errors import ImagicError
from ...core.settings.merging import merged
from ...core.text import slug
from ..console import err, plain, print_json
from ..libraries import import_libraries
from ..options import Flag, Json, Whole

if TYPE_CHECKING:
    from ...methods.method import Need


def compare(
    image: Path,
    prompt: str,
    *,
    source: str | None = None,
    mask: Path | None = None,
    subject: str | None = None,
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
        What may change: an image of the size of the photo; white may change, black may not. Three methods need it, and no other uses it.
    subject
        A noun that names the subject of the photo, such as dog. dreambooth and textual-inversion need it, which learn the subject and make
        a new image of it; no other method uses it. Their word takes its place in the target prompt.
    methods
        Names separated by commas (imagic-lora methods lists them), all: every method that edits the photo, or fast: those that train
        nothing for the photo and take few passes.
    settings
        A setting of the one method of --methods, as NAME=VALUE; repeat the flag for more. For methods with a fit (Imagic, dreambooth,
        textual-inversion) the names are those of a YAML file for fit, such as tune.steps=100.
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
        Model of --source auto, a folder or a hub id. Default: Salesforce/blip-image-captioning-large.
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
    given = parsed_settings(settings or [])
    import_libraries()
    from ...methods.method import EditRequest
    from ...photos.reading import read_mask, read_photo
    from ..comparing.models import AUTO, Models
    from ..comparing.running import check_made, run, write
    from ..comparing.setup import configured, opened, optional_fields

    models = Models(captioner, clip, dino, offline)
    have = optional_fields(source is not None, mask is not None, subject is not None)
    names, named = chosen_methods(methods, given, have)
    _check_prompts(prompt, source, seed)
    _check_subject(subject, names)
    models.check(source)
    photo = read_photo(image)
    area = read_mask(mask, photo.image.size) if mask is not None else None
    levers: dict[str, Any] = {"memory": device.model_dump(exclude_unset=True) if device else {}, "preset": preset}
    if base is not None:
        levers["base"] = base
    setup = configured(names, named, have, given, levers, area.image if area else None)
    source, caption_by = models.caption(photo.image) if source == AUTO else (source, None)
    request = EditRequest(photo.image, prompt, source, area.image if area else None, subject, seed)
    metrics = models.metrics(request)
    loaded, candidates = opened(setup, request, named)
    outcomes, stopped = run(loaded, request, candidates, metrics, budget)
    done = sum(outcome.result is not None for outcome in outcomes)
    if stopped and not done:
        raise stopped
    check_made(outcomes, budget)
    hashes = {"photo_sha256": photo.sha256, "mask_sha256": area.sha256 if area else None}
    summary = write(folder, loaded, request, {"photo": image.name, **hashes, "captioner": caption_by}, outcomes)
    if isinstance(stopped, KeyboardInterrupt):
        raise KeyboardInterrupt(f"the methods that were done are in {folder} ({done} of {len(outcomes)})")
    if not as_json or stopped:
        message = f"{done} method{'s' * (done != 1)}, {len(outcomes) - done} left out. Look at index.html or sheet.png."
        err.print(f"[green]Wrote[/] {plain(folder)}: {message}", highlight=False)
    if stopped:
        raise stopped
    if as_json:
        print_json(summary | {"folder": str(folder)})


def chosen_methods(methods: str, given: dict[str, Any], have: Sequence[Need]) -> tuple[list[str], bool]:
    """Returns the names of the methods, and whether they were named one by one.

    Args:
        methods: the value of ``--methods``.
        given: the settings of ``--set``.
        have: the optional fields that a request has.

    Raises:
        ImagicError: a name is unknown, ``--set`` has not one method, or a method that was named lacks what it needs.
    """
    from ...methods.comparison.candidates import check_needs, chosen

    names, named = chosen(methods)
    if given and (len(names) != 1 or not named):
        raise ImagicError(f"--set with --methods {methods}", "one method, whose setting it is", "name that method alone in --methods")
    if named:
        check_needs(names, have)
    return names, named


def _check_prompts(prompt: str, source: str | None, seed: int) -> None:
    from ...sampling.checks import check_prompt, check_seed

    for text in (prompt, source):
        if text is not None:
            check_prompt(text)
    check_seed(seed)


def _check_subject(subject: str | None, names: Sequence[str]) -> None:
    """Raises ImagicError for a subject that is no noun, or that no method uses."""
    from ...methods.catalogue import SUBJECT
    from ...methods.subject import check_subject

    if subject is None:
        return
    check_subject(subject)
    if not set(SUBJECT) & set(names):
        expected = f"a method that learns the subject: {' or '.join(SUBJECT)}"
        raise ImagicError(f"--subject {subject} without such a method", expected, "add it to --methods, or leave out --subject")


def _check_folder(folder: Path, overwrite: bool) -> None:
    """Raises ImagicError if the folder cannot be written, or exists and is not an earlier comparison that may be replaced."""
    if exists(folder):
        if not (folder / "results.json").is_file() and (not folder.is_dir() or any(folder.iterdir())):
            raise ImagicError(f"{folder} exists and is no comparison", "an unused name, or an empty folder", "choose another --out")
        if not overwrite and (folder / "results.json").is_file():
            raise ImagicError(f"{folder} holds an earlier comparison", "an unused name", "choose another --out, or use --overwrite")
    check_outputs(folder.parent, ())


def parsed_settings(settings: Sequence[str]) -> dict[str, Any]:
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
