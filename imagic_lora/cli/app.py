"""The command line: ``imagic-lora COMMAND``."""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence

from cyclopts import App, CycloptsError
from pydantic import ValidationError

from ..adapters.atomic import DISK_FULL
from ..core.environment import prepare_environment
from ..core.errors import ImagicError, Stopped
from ..core.settings import settings_error
from .commands.bases import bases
from .commands.bench import bench
from .commands.convert import compress, export
from .commands.demo import demo
from .commands.doctor import doctor
from .commands.edit import edit
from .commands.fit import fit
from .commands.plan import plan
from .commands.store import list_adapters, remove, show, verify
from .console import print_error, print_interrupted, print_warnings

COMMANDS: dict[str, Callable[..., None] | App] = {
    "fit": fit,
    "edit": edit,
    "list": list_adapters,
    "show": show,
    "verify": verify,
    "rm": remove,
    "compress": compress,
    "export": export,
    "plan": plan,
    "bases": bases,
    "bench": bench,
    "demo": demo,
    "doctor": doctor,
}

app = App(
    name="imagic-lora",
    help="Edit one real photo with one sentence (Imagic, arXiv 2210.09276).\n\n"
    "fit learns a photo, edit makes pictures from what it learned. Try: imagic-lora demo",
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,
)
for _name, _command in COMMANDS.items():
    app.command(_command, name=_name)


def script() -> None:
    """The console script."""
    sys.exit(main())


def main(tokens: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 done, 2 the user can mend it, 130 interrupted; anything else raises."""
    tokens = sys.argv[1:] if tokens is None else list(tokens)
    with warnings.catch_warnings():
        prepare_environment()
        print_warnings()
        try:
            app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
        except CycloptsError as error:
            if isinstance(error.__cause__, ValidationError):
                return print_error(settings_error(error.__cause__), tokens)
            return print_error(ImagicError(str(error), "a command as --help describes it", "see imagic-lora --help"), tokens)
        except ImagicError as error:
            return print_error(error, tokens)
        except BrokenPipeError:  # whoever read our output has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except (KeyboardInterrupt, Stopped) as error:
            if os.environ.get("RANK", "0") != "0":
                return 130
            if isinstance(error, KeyboardInterrupt):
                return print_interrupted("nothing was stored", None, tokens)
            return print_interrupted(
                str(error), shlex.join(["imagic-lora", *tokens, *(["--resume"] if "--resume" not in tokens else [])]), tokens
            )
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            got = f"the disk is full{f' ({error.filename})' if error.filename else ''}"
            return print_error(ImagicError(got, "room for what is to be written", "free some space"), tokens)
        except (MemoryError, RuntimeError) as error:
            from ..memory.limits import is_out_of_memory

            if not is_out_of_memory(error):
                raise
            remedy = "use --preset 8gb, or a smaller picture"
            return print_error(ImagicError("out of memory", "more free memory", remedy), tokens)
    return 0
