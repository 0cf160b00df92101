"""The command line: ``imagic-lora COMMAND``."""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter
from pydantic import ValidationError
from rich.table import Table

from ..adapters.atomic import FULL
from ..core.config import RunConfig, checked, merged, read_yaml, recipe_of, refusal
from ..core.errors import ImagicError, Stopped
from .commands.bench import bench
from .commands.convert import compress, export
from .commands.edit import edit
from .commands.fit import fit
from .commands.store import bases, list_adapters, remove, show, verify
from .console import err, interrupted, out, plain, print_json, quiet_libraries, quiet_loading, refused, say_plan, shown
from .options import Flag, Json

app = App(
    name="imagic-lora",
    help="Edit one real photo with one sentence (Imagic, arXiv 2210.09276).\n\n"
    "fit learns a photo, edit makes pictures from what it learned. Try: imagic-lora demo",
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,
)
app.command(fit)
app.command(edit)
app.command(list_adapters, name="list")
app.command(show)
app.command(verify)
app.command(remove, name="rm")
app.command(compress)
app.command(export)
app.command(bases)
app.command(bench)


@app.command
def plan(
    *,
    settings: Annotated[RunConfig | None, Parameter(name="*")] = None,
    batch: Annotated[int | None, Parameter(name="--batch")] = None,
    config: Path | None = None,
    exact: Flag = False,
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
    from ..bases.loading.published import architecture
    from ..memory.plan import predict
    from ..memory.presets import choose, on_this_machine, planned

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
        from ..training.rehearsal import rehearse

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
            from ..memory.presets import is_out_of_memory

            if not is_out_of_memory(error):
                raise
            remedy = "use --preset 8gb, or a smaller picture"
            return refused(ImagicError("out of memory", "more free memory", remedy), tokens)
    return 0
