"""The command line: ``imagic-lora COMMAND``."""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, CycloptsError, Parameter
from pydantic import ValidationError
from rich.markup import escape
from rich.table import Table

from .config import PRESETS, DeviceConfig, EditConfig, MemoryConfig, RunConfig, merged, read_yaml, refusal, resolve
from .console import counted, err, out, print_json, quiet_libraries, quiet_loading, refused, say_what_is_active, shown
from .errors import ImagicError

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

    from PIL.Image import Image

    from .editor import Edit
    from .stages.stage import StepReport
    from .store import Adapter

app = App(
    name="imagic-lora",
    help="Edit one real photo with one sentence (Imagic, arXiv 2210.09276).\n\n"
    "fit learns a photo, edit makes pictures from what it learned. Try: imagic-lora demo",
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,
)

Json = Annotated[bool, Parameter(name="--json", negative=(), help="Print one JSON object on stdout; everything for people goes to stderr.")]
StoreDir = Annotated[Path, Parameter(name="--store", help="The folder of adapters.")]
DEFAULT_STORE = Path("adapters")


@app.command
def fit(
    image: Path,
    prompt: str,
    *,
    settings: Annotated[RunConfig | None, Parameter(name="*")] = None,
    preset: str | None = None,
    config: Path | None = None,
    name: str | None = None,
    store: StoreDir = DEFAULT_STORE,
    overwrite: Annotated[bool, Parameter(negative=())] = False,
    as_json: Json = False,
) -> None:
    """Learn a photo: optimise the text embedding on it, tune the denoiser on it, store the adapter.

    The defaults shown are the built-in ones; the preset of a base may have others, and the run prints what is active.

    Parameters
    ----------
    image
        The photo: JPEG, PNG, WebP, TIFF, BMP or GIF.
    prompt
        What the edited photo shows, as one sentence: "a dog jumping".
    preset
        Settings that suit a kind of base (sd, critters); the base's own where not given.
    config
        YAML file of settings, laid over the preset; flags are laid over both.
    name
        Name of the adapter; made from the photo's file name where not given.
    overwrite
        Replace an adapter of the same name.
    """
    from .bases.registry import preset_of
    from .store import Store

    quiet_loading()
    run = settings_of(settings, config, preset, preset_of)
    adapter = _fit(image, prompt, run, Store(store), name or _slug(image.stem), overwrite)
    if adapter is None:
        return
    if as_json:
        print_json({"name": adapter.record.name, "folder": str(adapter.folder), "bytes": adapter.size, **_facts(adapter)})
    else:
        folder = escape(str(adapter.folder))
        err.print(f"[green]Stored[/] {folder} ({adapter.size / 1e6:.2f} MB). Look at {folder}/preview.png, then:")
        err.print(f"  imagic-lora edit {adapter.record.name} --eta 0.3:1:0.1", highlight=False)


def settings_of(settings: RunConfig | None, config: Path | None, preset: str | None, preset_of: Any) -> RunConfig:
    """The settings of a run from flags, file and preset; a preset that is not named is the base's own."""
    flags = settings.model_dump(exclude_unset=True) if settings else {}
    file = read_yaml(config) if config else {}
    base = merged(file, flags).get("base", RunConfig().base)
    chosen = preset or preset_of(str(base))
    if chosen not in PRESETS:
        raise ImagicError(f"preset {chosen!r}", f"one of {', '.join(PRESETS)}", "choose another --preset")
    return resolve(flags, file, PRESETS[chosen])


def _fit(image: Path, prompt: str, run: RunConfig, store: Any, name: str, overwrite: bool) -> Adapter | None:
    from .imagic import fit as fit_steps
    from .runtime import resolve_runtime

    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes") and run.memory.device == "auto":
        run = run.model_copy(update={"memory": run.memory.model_copy(update={"device": "cpu"})})
    processes = _processes(run)
    steps = fit_steps(image, prompt, run, store, name, overwrite=overwrite, processes=processes)
    if not processes.main:
        from .imagic import result

        return result(steps)

    def announced() -> Generator[StepReport, None, Adapter | None]:
        first = next(steps)  # by then everything that can be refused has been
        say_what_is_active(resolve_runtime(run.memory), run, processes.count)
        yield first
        return (yield from steps)

    return shown(announced(), run)


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
    device: Annotated[DeviceConfig | None, Parameter(name="*", group="Device")] = None,
    base: str | None = None,
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
    base
        Load the base from here instead of where the adapter says; it must be the same weights.
    out_dir
        Folder for the pictures; outputs/NAME where not given.
    """
    from .bases.registry import open_base
    from .editor import Editor, refuse_edit
    from .runtime import resolve_runtime
    from .store import Store

    quiet_loading()
    adapter = Store(store).read(name)
    record = adapter.record
    flags = settings.model_dump(exclude_unset=True) if settings else {}
    config = EditConfig.model_validate(merged(record.config.edit.model_dump(), flags))
    if "strength" in flags and config.start == "noise":
        raise ImagicError("--strength without --start image", "both or neither", "add --start image, or leave out --strength")
    etas, seeds = parse_etas(eta) if eta else [record.config.eta], parse_seeds(seed)
    text = record.prompt if prompt is None else prompt
    refuse_edit(etas, config, text)
    folder = out_dir or Path("outputs") / record.name
    folder.mkdir(parents=True, exist_ok=True)
    source = (base, None) if base else (record.base.name, record.base.revision)
    editor = Editor(open_base(source[0], resolve_runtime(_memory(device)), source[1]))
    edits = counted(editor.edit(adapter, etas, seeds, config, prompt), len(etas) * len(seeds))
    how = {"adapter": record.name, "base": record.base.name, "prompt": text, "edit": config.model_dump()}
    written = _write_edits(edits, folder, how, adapter.canvas().photo())
    if as_json:
        print_json({"adapter": record.name, "pictures": written, "sheet": str(folder / "sheet.png")})
    else:
        plural = "" if len(written) == 1 else "s"
        err.print(f"[green]Wrote[/] {len(written)} picture{plural} and {escape(str(folder / 'sheet.png'))}")


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
    write_png(sheet(list(rows.values()), how["prompt"]), folder / "sheet.png", {"adapter": how["adapter"]})
    return written


def _memory(device: DeviceConfig | None) -> MemoryConfig:
    return MemoryConfig(**(device.model_dump(exclude_unset=True) if device else {}))


def parse_etas(text: str) -> list[float]:
    """``0.7``, ``0.5,0.7`` or ``0.3:1:0.1``, whose end is included."""
    try:
        if ":" not in text:
            return [float(part) for part in text.split(",")]
        start, stop, step = (float(part) for part in text.split(":"))
        if step <= 0 or stop < start or (stop - start) / step > 1000:
            raise ValueError
        return [round(start + k * step, 6) for k in range(int((stop - start) / step + 1e-6) + 1)]
    except (ValueError, OverflowError) as error:
        raise ImagicError(f"--eta {text}", "a number, several with commas, or start:end:step", "for example --eta 0.3:1:0.1") from error


def parse_seeds(text: str) -> list[int]:
    """``0``, ``0,3`` or ``0:4``, whose end is not included."""
    try:
        if ":" in text:
            start, stop = (int(part) for part in text.split(":"))
            if stop - start > 10_000:
                raise ValueError
            seeds = list(range(start, stop))
        else:
            seeds = [int(part) for part in text.split(",")]
        if not seeds or min(seeds) < 0 or max(seeds) >= 2**63:
            raise ValueError
        return seeds
    except ValueError as error:
        expected = "a whole number from 0, several with commas, or start:end of at most 10000"
        raise ImagicError(f"--seed {text}", expected, "for example --seed 0:4") from error


@app.command(name="list")
def list_adapters(*, store: StoreDir = DEFAULT_STORE, as_json: Json = False) -> None:
    """The stored adapters."""
    from .store import Store

    shelf = Store(store)
    adapters: list[Adapter] = []
    for name in shelf.names():
        try:
            adapters.append(shelf.read(name, verify=False))
        except ImagicError as error:
            err.print(f"[yellow]Passed over:[/] {escape(error.got)}")
    if as_json:
        print_json({"adapters": [{"name": a.record.name, "bytes": a.size, **_facts(a)} for a in adapters]})
        return
    if not adapters:
        err.print(f"No adapters in {escape(str(store))} yet. Make one: imagic-lora fit PHOTO PROMPT")
        return
    table = Table("name", "base", "mode", "prompt", "MB", "made")
    for a in adapters:
        r = a.record
        table.add_row(*map(escape, (r.name, r.base.name, r.config.tune.mode, r.prompt, f"{a.size / 1e6:.2f}", r.created[:10])))
    out.print(table)


@app.command
def show(name: str, *, store: StoreDir = DEFAULT_STORE, as_json: Json = False) -> None:
    """How an adapter was made.

    Parameters
    ----------
    name
        The adapter, see: imagic-lora list
    """
    from .store import Store

    adapter = Store(store).read(name, verify=False)
    record = adapter.record
    if as_json:
        print_json({"folder": str(adapter.folder), "bytes": adapter.size, **record.model_dump(mode="json")})
        return
    table = Table(show_header=False, box=None, padding=(0, 2))
    for key, value in {"name": record.name, "folder": str(adapter.folder), "MB": f"{adapter.size / 1e6:.2f}", **_facts(adapter)}.items():
        table.add_row(f"[dim]{key}[/]", escape(json.dumps(value) if isinstance(value, dict) else str(value)))
    out.print(table)


def _facts(adapter: Adapter) -> dict[str, Any]:
    record = adapter.record
    return {
        "prompt": record.prompt,
        "base": record.base.name,
        "mode": record.config.tune.mode,
        "eta": record.config.eta,
        "seed": record.config.seed,
        "photo": f"{record.source.size[0]}x{record.source.size[1]}",
        "losses": {stage: list(ends) for stage, ends in record.losses.items()},
        "seconds": record.seconds,
        "peak_memory": record.peak_memory,
        "created": record.created,
        "files": list(record.files),
    }


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
        err.print(f"[green]Look at[/] {escape(str(page))}")


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
            table.add_row(f"[dim]{group}[/]", key, escape(str(value)))
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
        except KeyboardInterrupt:
            err.print("Interrupted; nothing was stored.")
            return 130
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported for every command
                raise
            remedy = "use --mode lora, a smaller --resolution, or --embed.batch-size and --tune.batch-size 1"
            return refused(ImagicError("out of memory on the card", "more free memory", remedy), tokens)
    return 0
