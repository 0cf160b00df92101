"""The benchmarks of the field: ``bench tedbench``, ``bench pie`` and ``bench score``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group, Parameter

from ...core.config import PresetOrAuto
from ...core.config_group import Config
from ...core.device_config import DEVICE_GROUP, DeviceConfig
from ...core.errors import ImagicError
from ...core.text import slug
from ..libraries import import_libraries
from ..options import Flag, Json, Whole

LEAST_SIZE = 64
"""Smallest side that pictures are scaled to: AlexNet and the window of SSIM need it."""
_GROUP = Group("Scores", sort_key=3)


class ScoreFlags(Config):
    """What is measured, and by which models."""

    metrics: str = "all"
    """What to measure, separated by commas: pixels (PSNR, SSIM, MSE), clip-b32, clip-l14, lpips-alex, lpips-vgg, lpips-squeeze, dino (the
    structure distance), or all. Only pixels needs no model."""
    model: Annotated[list[str] | None, Parameter(negative=())] = None
    """Where a model comes from, as NAME=SOURCE with a name of --metrics; repeat the flag for more. SOURCE is a folder or a hub id; for
    LPIPS a file with the weights of torchvision's network. Default: what its authors published, from the cache or downloaded."""
    offline: Annotated[bool, Parameter(negative=())] = False
    """Take the models of the scores, and the captioner, from caches only. HF_HUB_OFFLINE=1 does so for the base too."""


Scores = Annotated[ScoreFlags | None, Parameter(name="*", group=_GROUP)]
Device = Annotated[DeviceConfig | None, Parameter(name="*", group=DEVICE_GROUP)]
Settings = Annotated[list[str] | None, Parameter(name="--set", negative=())]
Out = Annotated[Path | None, Parameter(name="--out")]


def tedbench(
    folder: Path,
    *,
    base: str,
    methods: str = "imagic-lora",
    settings: Settings = None,
    captions: str | None = None,
    captioner: str | None = None,
    cases: Whole | None = None,
    seed: Whole = 0,
    size: Annotated[Whole, Parameter(group=_GROUP)] = 512,
    workers: Whole = 1,
    preset: PresetOrAuto = "auto",
    scores: Scores = None,
    device: Device = None,
    out_dir: Out = None,
    as_json: Json = False,
) -> None:
    """Run TEdBench (Imagic, arXiv 2210.09276): edit its 100 photos and prompts by some methods, and score the edits.

    Writes the edits, summary.json, scores.csv, sheet.png and index.html. What an earlier run has done is not done again: after an
    interruption, start the same command again. A case that fails is counted and shown, and does not end the run.

        imagic-lora bench tedbench tedbench/ --base sd15 --methods imagic-lora,sdedit
        imagic-lora bench tedbench tedbench/ --base sd15 --methods edit-friendly --captions captions.json --cases 10

    Parameters
    ----------
    folder
        The folder tedbench/ as published, with input_list.json and originals/.
    base
        Base model, as for fit.
    methods
        Names separated by commas (imagic-lora methods lists them), all, or fast, as for compare.
    settings
        A setting of the one method of --methods, as NAME=VALUE, as for compare; repeat the flag for more.
    captions
        Source prompts, which TEdBench does not have and many methods need: a JSON file of captions by the names in originals/, or auto: by
        the model of --captioner.
    captioner
        Model of --captions auto, a folder or a hub id. Default: Salesforce/blip-image-captioning-large.
    cases
        Number of cases, spread evenly over the list. Default: all.
    seed
        Seed of every edit. One for all: nothing is selected by case.
    size
        Pictures are scored as their centre squares at this size in pixels, both the photo and the edit.
    workers
        Number of processes, each with its own base. They share the CPU cores.
    preset
        Memory levers for a card of this size. auto: the fastest preset whose predicted peak fits 90% of the free memory.
    out_dir
        Folder for all files. Default: outputs/bench/tedbench-BASE.
    """
    if captioner is not None and captions != "auto":
        raise ImagicError("--captioner without --captions auto", "both, or neither", "add --captions auto, or leave out --captioner")
    import_libraries()
    from ...bench.field.tedbench import captioned_cases, read_tedbench
    from ..benching import Run, edited, listed_captions, spread

    scores = scores or ScoreFlags()
    _check_offline(scores, captions == "auto")
    _check(cases=(cases, 1), seed=(seed, 0), size=(size, LEAST_SIZE), workers=(workers, 1))
    out = out_dir or Path("outputs/bench") / f"tedbench-{slug(Path(base).name, 'base')}"
    found = spread(read_tedbench(folder), cases)
    run = Run("TEdBench", folder, out, base, methods, settings or [], seed, workers, preset, device, scores, size)
    source = None
    if captions is not None:
        written, source = listed_captions(found, captions, captioner, run)
        found = captioned_cases(found, written)
    edited(run, found, captions is not None, False, {"captions": source}, as_json)


def pie(
    folder: Path,
    *,
    base: str,
    methods: str = "imagic-lora",
    settings: Settings = None,
    classes: str | None = None,
    cases: Whole | None = None,
    seed: Whole = 1234,
    workers: Whole = 1,
    preset: PresetOrAuto = "auto",
    as_published: Annotated[Flag, Parameter(group=_GROUP)] = False,
    scores: Scores = None,
    device: Device = None,
    out_dir: Out = None,
    as_json: Json = False,
) -> None:
    """Run PIE-Bench (PnP Inversion, arXiv 2310.01506): 700 edits in ten classes with masks, by some methods, and score the edits.

    Writes and resumes as bench tedbench does. Prompts lose their brackets. By default a mask is what it says, the means over a region are
    those of its pixels, DINO sees values of 0 to 1, and the edits are PNG files without loss.

        imagic-lora bench pie PIE-Bench/ --base sd14 --methods direct-inversion,edit-friendly --cases 70
        imagic-lora bench pie PIE-Bench/ --base sd14 --methods direct-inversion --as-published

    Parameters
    ----------
    folder
        The folder that its authors send, with mapping_file.json and annotation_images/.
    base
        Base model, as for fit. The published rows are those of SD 1.4, with 50 steps and guidance scale 7.5.
    methods
        Names separated by commas (imagic-lora methods lists them), all, or fast, as for compare. Methods that need a mask get the one of
        the benchmark, and the page says so.
    settings
        A setting of the one method of --methods, as NAME=VALUE, as for compare; repeat the flag for more.
    classes
        Classes to run, numbers from 0 to 9 separated by commas. Default: all.
    cases
        Number of cases, spread evenly over the list. Default: all.
    seed
        Seed of every edit.
    workers
        Number of processes, each with its own base. They share the CPU cores.
    preset
        Memory levers for a card of this size. auto: the fastest preset whose predicted peak fits 90% of the free memory.
    as_published
        Score as the published code does, to put figures beside published ones: the border of every mask counts as mask; means over a region
        divide by all pixels, so that a large mask gives better figures; DINO gets values of 0 to 255 normalised as if they were 0 to 1,
        scaled without antialiasing; cosines of CLIP below 0 are 0; edits pass through JPEG of quality 75.
    out_dir
        Folder for all files. Default: outputs/bench/pie-BASE.
    """
    import_libraries()
    from ...bench.field.pie import read_pie
    from ..benching import Run, edited, of_classes, spread

    scores = scores or ScoreFlags()
    _check_offline(scores)
    _check(cases=(cases, 1), seed=(seed, 0), workers=(workers, 1))
    out = out_dir or Path("outputs/bench") / f"pie-{slug(Path(base).name, 'base')}"
    found = spread(of_classes(read_pie(folder), classes), cases)
    run = Run("PIE-Bench", folder, out, base, methods, settings or [], seed, workers, preset, device, scores, 512, as_published)
    edited(run, found, True, True, {}, as_json)


def score(
    folder: Path,
    *,
    tedbench: Path | None = None,
    pie: Path | None = None,
    size: Annotated[Whole, Parameter(group=_GROUP)] = 512,
    as_published: Annotated[Flag, Parameter(group=_GROUP)] = False,
    workers: Whole = 1,
    scores: Scores = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], Parameter(group=DEVICE_GROUP)] = "auto",
    out_dir: Out = None,
    as_json: Json = False,
) -> None:
    """Score pictures that anybody made, with the evaluator of bench tedbench and bench pie.

    Score published outputs first, and compare the figures with the published ones: that shows whether two evaluators agree.

        imagic-lora bench score my-pictures/                                        # with a list, pictures.csv
        imagic-lora bench score tedbench/imagic --tedbench tedbench/                # the published outputs of Imagic
        imagic-lora bench score output/ddim+p2p --pie PIE-Bench/ --as-published

    Parameters
    ----------
    folder
        A folder with a list, pictures.csv or pictures.jsonl, or such a list: one line a picture with the columns source, edited, prompt,
        and where there is one source_prompt, mask, method, class. With --tedbench or --pie: a folder of outputs, named as published.
    tedbench
        The folder of TEdBench whose photos these outputs edit; outputs are named as those of Imagic or of Forgedit.
    pie
        The folder of PIE-Bench whose photos these outputs edit; outputs have the paths of the photos, and may be strips of panels.
    size
        Pictures are scored as their centre squares at this size in pixels.
    as_published
        Score as the published code of PIE-Bench does; see bench pie.
    workers
        Number of processes. They share the CPU cores.
    device
        Where the models of the scores run.
    out_dir
        Folder for all files. Default: outputs/bench/score-FOLDER.
    """
    if tedbench is not None and pie is not None:
        raise ImagicError("--tedbench and --pie", "one of them: the benchmark of these outputs", "leave one out")
    if pie is not None and size != 512:
        raise ImagicError(f"--size {size} with --pie", "512, the size of its photos and masks", "leave out --size")
    import_libraries()
    from ..benching import scored_only

    scores = scores or ScoreFlags()
    _check_offline(scores)
    _check(size=(size, LEAST_SIZE), workers=(workers, 1))
    out = out_dir or Path("outputs/bench") / f"score-{slug(folder.resolve().name, 'pictures')}"
    scored_only(folder, tedbench, pie, out, scores, size, as_published, workers, device, as_json)


def _check_offline(scores: ScoreFlags, captioned: bool = False) -> None:
    """Raises ImagicError if ``--offline`` has no effect."""
    if scores.offline and scores.metrics.strip() == "pixels" and not captioned:
        raise ImagicError("--offline with --metrics pixels", "a model to take from the cache", "leave out --offline")


def _check(**numbers: tuple[int | None, int]) -> None:
    """Raises ImagicError for a number below its least value."""
    for name, (value, least) in numbers.items():
        if value is not None and value < least:
            raise ImagicError(f"--{name} {value}", f"an integer from {least}", f"choose another value for --{name}")
