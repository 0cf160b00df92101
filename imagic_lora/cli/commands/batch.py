"""The command ``batch``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

from ...core.config import RunConfig
from ...core.errors import ImagicError, SomeFailed
from ...core.launch import read_launch
from ...core.settings.reading import read_settings
from ...core.text import slug
from ..console import err, plain, print_json
from ..libraries import import_libraries
from ..options import DEFAULT_STORE, Flag, Json, StoreDir, Whole, parse_etas, parse_seeds

if TYPE_CHECKING:
    from ...fleet.batch import Batch
    from ...fleet.on_ray import Cluster

_RAY = Group("Ray: several GPUs and machines", sort_key=8)


def batch(
    photos: Annotated[Path, Parameter(name="LIST")],
    *,
    prompt: str | None = None,
    edits: Annotated[str | None, Parameter(name="--edit")] = None,  # before the settings, whose group is --edit.*
    settings: Annotated[RunConfig | None, Parameter(name="*")] = None,
    config: Path | None = None,
    store: StoreDir = DEFAULT_STORE,
    out_dir: Annotated[Path | None, Parameter(name="--out")] = None,
    together: str = "1",
    ray: Annotated[str | None, Parameter(group=_RAY)] = None,
    workers: Annotated[Whole | None, Parameter(group=_RAY)] = None,
    gpus_per_worker: Annotated[float | None, Parameter(group=_RAY)] = None,
    max_in_flight: Annotated[Whole | None, Parameter(group=_RAY)] = None,
    overwrite: Flag = False,
    retry_failed: Flag = False,
    as_json: Json = False,
) -> None:
    """Train an adapter for every photo of a list.

    The whole list is checked before anything starts. The base is loaded once. A photo that fails does not end the run. The same command
    continues an interrupted run: what is done is not done again. The exit code is 3 if some photos failed.

        imagic-lora batch photos.csv --base sd15 --edit "eta=0.5:0.9:0.1 seed=0:2"

    Parameters
    ----------
    photos
        CSV, JSONL or YAML file with the columns photo and prompt, and any of name, region and the settings below (tune.rank or rank, seed,
        ...). Paths of photos are relative to its folder. Or a folder of photos, with --prompt.
    prompt
        Target prompt of all lines without one.
    config
        YAML file of settings for all lines. It overrides the preset, flags override the file, and the columns of a line override both.
    edits
        Also generate images from every adapter: eta=ETA and seed=SEED in the notation of imagic-lora edit, separated by a space. Without
        eta: that of the adapter; without seed: 0.
    out_dir
        Folder for results.jsonl, the contact sheet index.html, and the images. Default: outputs/batch/ and the name of LIST.
    together
        Most photos that are fitted together, in modes lora and embedding: photos with the same settings and canvases of one size share each
        pass of the denoiser. auto: as many as the memory plan allows. The adapters are those of fits one by one, up to rounding.
    ray
        Work on a cluster of Ray: its address, auto for the one of this machine, or local to start Ray on this machine. Every worker holds
        the base, and fits one photo or group at a time. All nodes must see the list's photos, --store and --out under the same paths.
    workers
        Number of workers. Default: one for each GPU, or the share of one that --gpus-per-worker gives; without GPUs one for each CPU core.
    gpus_per_worker
        GPUs of a worker; 0.5 puts two workers on each card. Default: 1, where there is a GPU.
    max_in_flight
        Number of photos that are worked on at the same time, to spare a shared disk. Default: one for each worker.
    overwrite
        Replace adapters and images of the same names that were made with other settings; discard checkpoints of other fits.
    retry_failed
        Also try the lines again that failed in an earlier run and have not changed since.
    """
    etas, seeds = _edits(edits)
    cluster, most = _cluster(ray, workers, gpus_per_worker, max_in_flight), _together(together, ray)
    if (launch := read_launch()).count > 1:
        got = f"batch in {launch.count} processes of a launcher"
        raise ImagicError(got, "one process", "start it without accelerate launch")
    flags = settings.model_dump(exclude_unset=True) if settings else {}
    file = read_settings(config) if config else {}
    import_libraries(bitsandbytes=True)  # a column may ask for it
    from ...fleet.batch import Batch, run_here
    from ...fleet.lists import ListError
    from ...fleet.on_ray import RayRun
    from ...fleet.table import Table
    from ...fleet.work import Work
    from ...sampling.checks import check_range
    from ..batching import print_problems, run

    check_range(etas, seeds)
    out = out_dir or Path("outputs") / "batch" / slug(photos.stem or photos.absolute().name, "list")
    try:
        entries = Table(photos, flags, file, etas, seeds).entries(prompt)
        work = Work(store.absolute(), out.absolute(), etas, seeds, overwrite)
        made = Batch(photos, entries, work)
        with made.locked():
            left = made.left(retry_failed)
            made.begin()
            run(made, left, RayRun(cluster, made.marker) if cluster else run_here, most)
    except ListError as error:
        print_problems(error)
        raise error if as_json else error.short from None
    _report(made, as_json)


def _edits(text: str | None) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """The etas and the seeds of ``--edit``; no etas for those of the adapters, and no seeds without the flag."""
    if text is None:
        return (), ()
    parts = dict[str, str]()
    for part in text.split():
        name, separator, value = part.partition("=")
        if name not in ("eta", "seed") or not separator or name in parts:
            expected = "eta=ETA and seed=SEED, each at most once, separated by a space"
            raise ImagicError(f"--edit {text!r}", expected, 'use for example --edit "eta=0.5:0.9:0.1 seed=0:2"')
        parts[name] = value
    return tuple(parse_etas(parts["eta"]) if "eta" in parts else ()), tuple(parse_seeds(parts.get("seed", "0")))


def _together(text: str, ray: str | None) -> int | None:
    """The number of ``--together``; None for auto."""
    if text == "auto":
        if ray is not None:
            got = "--together auto with --ray"
            raise ImagicError(got, "a number: the memory plan knows the card of this machine alone", "use for example --together 8")
        return None
    if not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise ImagicError(f"--together {text}", "a whole number from 1 to 1024, or auto", "change --together")
    return int(text)


def _cluster(address: str | None, workers: int | None, gpus: float | None, max_in_flight: int | None) -> Cluster | None:
    """Where the work is done; None for this process.

    Raises:
        ImagicError: a number is out of range, or given without ``--ray``.
    """
    from ...fleet.on_ray import Cluster

    flags = {"--workers": workers, "--gpus-per-worker": gpus, "--max-in-flight": max_in_flight}
    given = {name: value for name, value in flags.items() if value is not None}
    if address is None:
        if given:
            raise ImagicError(f"{next(iter(given))} without --ray", "both, or neither", "add --ray local, or the address of a cluster")
        return None
    for name, value in given.items():
        least = 0 if name == "--gpus-per-worker" else 1
        if not least <= value <= 100_000:
            raise ImagicError(f"{name} {value:g}", f"a number from {least}", f"choose another value for {name}")
    if gpus is not None and gpus > 1 and gpus != int(gpus):
        raise ImagicError(f"--gpus-per-worker {gpus:g}", "a whole number, or a fraction below 1", "choose another value")
    return Cluster(address, workers, 1.0 if gpus is None else gpus, max_in_flight)


def _report(made: Batch, as_json: bool) -> None:
    """Prints what came of a batch.

    Raises:
        SomeFailed: photos failed.
    """
    from ...fleet.batch import PAGE, RESULTS

    failed, out = made.failed, made.work.out
    done = len(made.rows) - len(failed)
    if as_json:
        rows: list[dict[str, Any]] = [{"name": row["name"], "error": row["error"]["got"]} for row in failed]
        print_json({"done": done, "failed": rows, "results": str(out / RESULTS), "page": str(out / PAGE)})
    colour = "yellow" if failed else "green"
    err.print(f"[{colour}]{done} done, {len(failed)} failed.[/] See {plain(out / PAGE)} and {plain(out / RESULTS)}", highlight=False)
    if failed:
        names = ", ".join(row["name"] for row in failed[:10]) + (", ..." if len(failed) > 10 else "")
        err.print(f"Failed: {plain(names)}. Try them again: the same command with --retry-failed", highlight=False)
        raise SomeFailed
