"""The benchmark commands."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from ...core.errors import ImagicError
from ...core.text import json_text
from ..console import cells_table, err, out, plain, print_json, progress
from ..interrupts import Interrupts
from ..libraries import import_libraries
from ..options import Json, Whole
from .field import pie, score, tedbench

bench = App(name="bench", help="Benchmark editing methods: on images whose true edit is known, and on the benchmarks of the field.")
for _command in (tedbench, pie, score):
    bench.command(_command)


@bench.command
def critters(
    *,
    cases: Whole = 60,
    seed: Whole = 11,
    methods: str | None = None,
    base: str = "critters",
    workers: Whole = 1,
    out_dir: Annotated[Path | None, Parameter(name="--out")] = None,
    as_json: Json = False,
) -> None:
    """Run CritterBench: edit rendered images whose true edit is known, and score the results.

    The scores come from a separate network that no method uses. The run writes summary.json and index.html. Results that are already in the
    folder are reused: after an interruption, start the same command again.

        imagic-lora bench critters --methods imagic-lora,sdedit --cases 8
        imagic-lora bench critters --base critters-dit --methods imagic-lora,flowedit,sdedit

    Parameters
    ----------
    cases
        Number of edits. Half of them change the pose.
    seed
        Seed of the cases. The published results use seed 11; the defaults were chosen on other seeds.
    methods
        Methods to run, separated by commas. Default: all of bounds, prompt-only, sdedit, imagic-lora, imagic-full, embedding-only,
        reference, reference-retuned, and on a U-Net ddim-inversion, ddib, negative-prompt, proximal, null-text, edit-friendly, renoise,
        magicmix, magicmix-text, prompt-to-prompt, prompt-to-prompt-text, direct-inversion, diffedit, diffedit-mask, blended-latent,
        ledits++, dreambooth, textual-inversion; on a flow flowedit, rf-inversion.
        Imagic has a row for each start besides the default of the base: -noise, -image, and on a flow -flow (edit --start flow).
        The rows of diffedit-mask and blended-latent end in -given: they get a mask of what the true edit changes.
    base
        critters, critters-dit (the embedded flow transformer), another base of 64 pixels from your list, or the folder of another training
        in diffusers' format. Settings are the recipe of critters for a U-Net, of critters-dit for a flow. CLIP and the judge are always
        those of the package.
    workers
        Number of processes. They share the CPU cores.
    out_dir
        Folder for images and results. Default: outputs/bench/BASE-SEED; for a folder as --base critters-SEED, its name and a hash of its
        path.
    """
    import_libraries()
    from ...bench.catalogue import chosen, kind_of
    from ...bench.critters import Bench
    from ...bench.page import tables, write_page
    from ...bench.summary import summarise

    for name, value, least in (("--cases", cases, 1), ("--seed", seed, 0), ("--workers", workers, 1)):
        if value < least:
            raise ImagicError(f"{name} {value}", f"an integer from {least}", f"choose another value for {name}")

    listed = chosen(methods, kind_of(base))
    run = Bench(seed, cases, listed, out_dir or Path("outputs/bench") / _folder(base, seed), base)
    with Interrupts(lambda: f"the results so far are in {run.out}; the same command continues"):
        results = list(progress(run.results(workers), cases * len(run.methods), "cases x methods"))
    summary = summarise(run, results)
    page = write_page(run, results, summary)
    (run.out / "summary.json").write_text(json_text(summary), encoding="utf-8")
    if as_json:
        print_json(summary | {"page": str(page)})
        return
    for title, cells in tables(summary).items():
        out.print(cells_table(title, cells))
    if summary["failed"]:
        err.print(f"[yellow]{summary['failed']} failed[/]; the tracebacks are in {plain(page)}")
    err.print(f"[green]Wrote[/] {plain(page)}")


def _folder(base: str, seed: int) -> str:
    """Name of the folder of a run: the name of the base, or for a base without one the name of its folder and a hash of its path."""
    from ...bases.loading.known import known_base

    known = known_base(base)
    if known.entry:
        return f"{known.name}-{seed}"
    path = Path(base).resolve()
    return f"critters-{seed}-{path.name}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"  # two bases may have folders of one name
