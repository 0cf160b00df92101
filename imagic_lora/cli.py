"""The command line: ``imagic-lora COMMAND``."""

from __future__ import annotations

import os
import re
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, CycloptsError, Parameter
from pydantic import ValidationError
from rich.table import Table

from .benching import bench
from .config import DeviceConfig, EditConfig, PresetOrAuto, RunConfig, checked, merged, read_yaml, recipe_of, refusal
from .console import (
    counted,
    err,
    interrupted,
    out,
    plain,
    print_json,
    quiet_libraries,
    quiet_loading,
    refused,
    say_plan,
    say_what_is_active,
    shown,
)
from .converting import compress, export
from .durable import FULL, writable
from .errors import ImagicError, ImagicWarning, Stopped
from .listing import bases, facts, list_adapters, remove, show, verify
from .options import DEFAULT_STORE, Json, StoreDir, around, parse_etas, parse_seeds

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

    from PIL.Image import Image

    from .adapter import Adapter
    from .bases.published import Architecture
    from .editor import Edit
    from .stages.stage import StepReport
    from .store import Store

app = App(
    name="imagic-lora",
    help="Edit one real photo with one sentence (Imagic, arXiv 2210.09276).\n\n"
    "fit learns a photo, edit makes pictures from what it learned. Try: imagic-lora demo",
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,
)
app.command(list_adapters, name="list")
app.command(show)
app.command(verify)
app.command(remove, name="rm")
app.command(compress)
app.command(export)
app.command(bases)
app.command(bench)


@app.command
def fit(
    image: Path,
    prompt: str,
    *,
    settings: Annotated[RunConfig | None, Parameter(name="*")] = None,
    config: Path | None = None,
    name: str | None = None,
    store: StoreDir = DEFAULT_STORE,
    resume: Annotated[bool, Parameter(negative=())] = False,
    overwrite: Annotated[bool, Parameter(negative=())] = False,
    as_json: Json = False,
) -> None:
    """Learn a photo: optimise the text embedding on it, tune the denoiser on it, store the adapter.

    The defaults shown are the built-in ones; a base and a preset may have others, and the run prints what is active.

    Parameters
    ----------
    image
        The photo: JPEG, PNG, WebP, AVIF, TIFF, BMP or GIF; HEIC with the extra heic.
    prompt
        What the edited photo shows, as one sentence: "a dog jumping".
    config
        YAML file of settings, laid over the preset; flags are laid over both.
    name
        Name of the adapter; made from the photo's file name where not given.
    resume
        Go on from where the same command was interrupted (Ctrl-C, a kill, a power cut): the same photo, sentence, base and settings.
    overwrite
        Replace an adapter of the same name, and begin an interrupted fit anew.
    """
    from .store import Store

    quiet_loading()
    run, why, built = settings_of(settings, config)
    adapter = _fit(image, prompt, run, why, built, Store(store), name or _slug(image.stem), overwrite, resume)
    if adapter is None:
        return
    if as_json:
        print_json({"name": adapter.name, "folder": str(adapter.folder), "bytes": adapter.size, **facts(adapter)})
    else:
        folder = plain(adapter.folder)
        err.print(f"[green]Stored[/] {folder} ({adapter.size / 1e6:.2f} MB). Look at {folder}/preview.png, then:")
        err.print(f"  imagic-lora edit {adapter.name} --eta {around(run.eta)}", highlight=False)


def settings_of(settings: RunConfig | None, config: Path | None) -> tuple[RunConfig, str, Architecture]:
    """The settings of a run from flags and file over the recipe of its base and the preset, why it is that preset, and what the base is."""
    from .bases.registry import architecture_of
    from .fits import choose

    flags = settings.model_dump(exclude_unset=True) if settings else {}
    file = read_yaml(config) if config else {}
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        flags = merged({"memory": {"device": "cpu"}}, flags)
    given = checked(merged(file, flags))
    started = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    built = architecture_of(given.base, given.revision)
    recipe = recipe_of(given.base, built.few_steps, built.embeds_guidance)
    return *choose(lambda: built, flags, file, recipe, processes=started), built


def _fit(
    image: Path, prompt: str, run: RunConfig, why: str, built: Architecture, store: Store, name: str, overwrite: bool, resume: bool
) -> Adapter | None:
    from .fits import adapter_bytes
    from .imagic import fit as fit_steps
    from .imagic import result
    from .interrupts import Interrupts
    from .runtime import resolve_runtime

    processes = _processes(run)
    with Interrupts() as interrupts:
        steps = fit_steps(image, prompt, run, store, name, overwrite=overwrite, resume=resume, stop=interrupts.stop, processes=processes)

        def announced() -> Generator[StepReport, None, Adapter | None]:
            try:
                first = next(steps)  # by then everything that can be refused has been
            except StopIteration as done:  # resumed after the last step
                return done.value
            interrupts.gentle = True
            if processes.main:
                say_what_is_active(resolve_runtime(run.memory), run, why, processes.count, adapter_bytes(built, run))
            yield first
            return (yield from steps)

        try:
            return shown(announced(), run) if processes.main else result(announced())
        except KeyboardInterrupt:
            if name in store.unfinished():
                raise Stopped("what was saved before is as it was") from None
            raise


def _processes(run: RunConfig) -> Any:
    from .runtime import Processes, resolve_runtime

    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started == 1:
        return Processes()
    from accelerate import PartialState

    processes = Processes(PartialState(cpu=resolve_runtime(run.memory).device.type == "cpu"))
    if processes.count != started:
        raise ImagicError(
            f"{started} processes that cannot talk to each other", "one device for each", "start fewer with accelerate launch"
        )
    return processes


@app.command
def edit(
    name: str,
    *,
    eta: str | None = None,
    seed: str = "0",
    prompt: str | None = None,
    settings: Annotated[
        EditConfig | None, Parameter(name="*", group="Sampling (the adapter's own settings where not given)", show_default=False)
    ] = None,
    device: Annotated[DeviceConfig | None, Parameter(name="*", group="Device and memory")] = None,
    preset: Annotated[PresetOrAuto, Parameter(name="--preset")] = "auto",
    base: str | None = None,
    force: Annotated[bool, Parameter(negative=())] = False,
    store: StoreDir = DEFAULT_STORE,
    out_dir: Annotated[Path | None, Parameter(name="--out")] = None,
    as_json: Json = False,
) -> None:
    """Make pictures from a stored adapter.

    Parameters
    ----------
    name
        The adapter, see: imagic-lora list
    eta
        How far from the photo (0) to the text (1): one value, several (0.5,0.7), or a range with its end (0.3:1:0.1). The adapter's own
        default where not given.
    seed
        Seed of the starting noise: one, several (0,3), or a range without its end (0:4).
    prompt
        Another target text than the one the adapter was fitted for.
    preset
        Memory levers for a size of card; auto takes the fastest that fits 90% of the free memory.
    base
        Load the base from here instead of where the adapter says; it must be the same weights, as a folder, a single file or in fp16.
    force
        Use the adapter on other weights of the same shapes as well; the pictures' metadata say so.
    out_dir
        Folder for the pictures; outputs/NAME where not given.
    """
    from .bases.registry import architecture_of, open_base
    from .editor import Editor, refuse_edit
    from .fits import EDIT_LEVERS, choose_for_edit, explained
    from .runtime import resolve_runtime
    from .store import Store

    quiet_loading()
    adapter = Store(store).read(name)
    record = adapter.record
    flags = settings.model_dump(exclude_unset=True) if settings else {}
    levers = device.model_dump(exclude_unset=True) if device else {}
    source = (base, None) if base else (record.base.name, record.base.revision)
    run = choose_for_edit(lambda: architecture_of(*source), record.config, {"edit": flags, "memory": levers, "preset": preset})
    config = run.edit
    etas, seeds = parse_etas(eta) if eta else [record.config.eta], parse_seeds(seed)
    text = record.prompt if prompt is None else prompt
    refuse_edit(etas, seeds, config, text)
    folder = out_dir or Path("outputs") / adapter.name
    with writable(folder):
        pass
    editor = Editor(open_base(source[0], resolve_runtime(run.memory), source[1]), force)
    edits = counted(editor.edit(adapter, etas, seeds, config, prompt), len(etas) * len(seeds), "pictures")
    foreign = editor.base.fingerprint != record.base.fingerprint
    if foreign and force:
        warnings.warn(
            f"{adapter.name} was made for base {record.base.name}, and is used on {editor.base.name}", ImagicWarning, stacklevel=1
        )
    how = {"adapter": adapter.name, "base": editor.base.name, "prompt": text, "edit": config.model_dump()}
    how |= {"forced": record.base.name} if foreign else {}
    so_far = f"the pictures made so far are in {folder}"
    with explained(editor.base.architecture, run, editor.base.runtime, "decode", lambda: so_far, EDIT_LEVERS):
        written = _write_edits(edits, folder, how, adapter.canvas().photo())
    if as_json:
        print_json({"adapter": adapter.name, "pictures": written, "sheet": str(folder / "sheet.png")})
    else:
        plural = "" if len(written) == 1 else "s"
        err.print(f"[green]Wrote[/] {len(written)} picture{plural} and {plain(folder / 'sheet.png')}")


def _write_edits(edits: Iterable[Edit], folder: Path, how: dict[str, Any], photo: Image) -> list[dict[str, Any]]:
    """Writes every picture as it comes and the sheet at the end, a row for each seed; gives the files of the pictures."""
    from .images import sheet, write_png

    written: list[dict[str, Any]] = []
    rows: dict[int, list[tuple[str, Image]]] = {}
    for one in edits:
        path = folder / f"eta{one.eta:g}-seed{one.seed}.png"
        write_png(one.image, path, how | {"eta": one.eta, "seed": one.seed})
        written.append({"file": str(path), "eta": one.eta, "seed": one.seed})
        rows.setdefault(one.seed, [("photo", photo)]).append((f"eta {one.eta:g} seed {one.seed}", one.image))
    write_png(
        sheet(list(rows.values()), how["prompt"]),
        folder / "sheet.png",
        {name: how[name] for name in ("adapter", "base", "forced") if name in how},
    )
    return written


@app.command
def plan(
    *,
    settings: Annotated[RunConfig | None, Parameter(name="*")] = None,
    batch: Annotated[int | None, Parameter(name="--batch")] = None,
    config: Path | None = None,
    exact: Annotated[bool, Parameter(name="--exact", negative=())] = False,
    as_json: Json = False,
) -> None:
    """Predict the peak memory of a fit, and where it goes; needs neither a GPU nor weights.

    Takes every setting of fit, but neither photo, sentence nor name; those that do not touch memory change nothing here.

    Parameters
    ----------
    batch
        Sets --embed.batch-size and --tune.batch-size at once, where they are not given.
    config
        YAML file of settings, as for fit.
    exact
        Run the real code on tensors without values instead of drawing the models in sizes; some ten seconds.
    """
    from .bases.published import architecture
    from .fits import choose, on_this_machine, planned
    from .plan import predict

    flags = settings.model_dump(exclude_unset=True) if settings else {}
    if batch is not None:
        flags = merged({"embed": {"batch_size": batch}, "tune": {"batch_size": batch}}, flags)
    file = read_yaml(config) if config else {}
    base = checked(merged(file, flags)).base
    built = architecture(base)
    run, why = choose(lambda: built, flags, file, recipe_of(base, built.few_steps, built.embeds_guidance))
    card = None if why == "asked for" else on_this_machine(run.memory.device)[0]
    assumed = planned(run, card)
    if exact:
        from .rehearsal import rehearse

        quiet_loading()
        found = rehearse(built, run, assumed)
    else:
        found = predict(built, run, assumed)
    if as_json:
        print_json({"base": base, "mode": run.tune.mode, "preset": run.preset, "fits": found.fits(run.preset), **found.to_json()})
    else:
        say_plan(found, run, why)


@app.command
def demo(*, out: Path = Path("outputs/demo"), as_json: Json = False) -> None:
    """Fit and edit one shipped picture on the embedded base, and show it beside the true edit.

    Parameters
    ----------
    out
        Folder for the sheet, the pictures and the adapter.
    """
    from .demo import run_demo

    quiet_loading()
    page = run_demo(out, shown)
    if as_json:
        print_json({"sheet": str(page)})
    else:
        err.print(f"[green]Look at[/] {plain(page)}")


@app.command
def doctor(*, as_json: Json = False) -> None:
    """Device, libraries, free memory, and what is missing."""
    from .doctor import examine

    facts = examine()
    if as_json:
        print_json(facts)
        return
    table = Table(show_header=False, box=None, padding=(0, 2))
    for group, values in facts.items():
        for key, value in values.items():
            table.add_row(f"[dim]{group}[/]", key, plain(value))
    out.print(table)


def _slug(stem: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:100] or "photo"


def script() -> None:
    """The console script."""
    sys.exit(main())


def main(tokens: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 done, 2 the user can mend it, 130 interrupted; anything else raises."""
    tokens = sys.argv[1:] if tokens is None else list(tokens)
    with warnings.catch_warnings():
        quiet_libraries()
        try:
            app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
        except CycloptsError as error:
            if isinstance(error.__cause__, ValidationError):
                return refused(refusal(error.__cause__), tokens)
            return refused(ImagicError(str(error), "a command as --help describes it", "see imagic-lora --help"), tokens)
        except ImagicError as error:
            return refused(error, tokens)
        except BrokenPipeError:  # whoever read our output has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except (KeyboardInterrupt, Stopped) as error:
            if os.environ.get("RANK", "0") != "0":
                return 130
            if isinstance(error, KeyboardInterrupt):
                return interrupted("nothing was stored", None, tokens)
            return interrupted(
                str(error), shlex.join(["imagic-lora", *tokens, *(["--resume"] if "--resume" not in tokens else [])]), tokens
            )
        except OSError as error:
            if error.errno not in FULL:
                raise
            got = f"the disk is full{f' ({error.filename})' if error.filename else ''}"
            return refused(ImagicError(got, "room for what is to be written", "free some space"), tokens)
        except (MemoryError, RuntimeError) as error:
            from .fits import is_out_of_memory

            if not is_out_of_memory(error):
                raise
            remedy = "use --preset 8gb, or a smaller picture"
            return refused(ImagicError("out of memory", "more free memory", remedy), tokens)
    return 0
