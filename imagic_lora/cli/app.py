"""The command line: ``imagic-lora COMMAND``."""

from __future__ import annotations

import errno
import io
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence

from cyclopts import App, CycloptsError, Group
from pydantic import ValidationError

from ..adapters.writing import DISK_FULL
from ..core.environment import prepare_environment
from ..core.errors import ImagicError, SomeFailed, Stopped
from ..core.settings.reading import settings_error
from .commands.bases import bases
from .commands.batch import batch
from .commands.bench import bench
from .commands.compare import compare
from .commands.convert import compress, export
from .commands.demo import demo
from .commands.doctor import doctor
from .commands.edit import edit
from .commands.fit import fit
from .commands.hub import pull, push
from .commands.importing import import_adapter
from .commands.methods import methods
from .commands.plan import plan
from .commands.reproduce import reproduce
from .commands.store import list_adapters, remove, rename, show, verify
from .commands.study import study
from .commands.sweep import sweep
from .commands.web import web
from .console import print_error, print_interrupted, print_warnings
from .interrupts import Interrupts

COMMANDS: dict[str, Callable[..., None] | App] = {
    "fit": fit,
    "batch": batch,
    "edit": edit,
    "sweep": sweep,
    "compare": compare,
    "methods": methods,
    "reproduce": reproduce,
    "list": list_adapters,
    "show": show,
    "verify": verify,
    "rename": rename,
    "import": import_adapter,
    "push": push,
    "pull": pull,
    "rm": remove,
    "compress": compress,
    "export": export,
    "plan": plan,
    "bases": bases,
    "bench": bench,
    "study": study,
    "demo": demo,
    "doctor": doctor,
    "web": web,
}

_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)

app = App(
    name="imagic-lora",
    help="Edit one photo with one prompt (Imagic, arXiv 2210.09276).\n\n"
    "fit trains a small adapter on the photo. edit generates images from that adapter.\n\n"
    "    imagic-lora demo                      # needs no photo and no GPU\n"
    '    imagic-lora fit dog.jpg "a dog jumping" --name rex\n'
    "    imagic-lora edit rex --eta 0.4:1:0.1  # writes outputs/rex/sheet.png\n\n"
    "imagic-lora COMMAND --help explains a command.",
    group_parameters=Group("Parameters", sort_key=0),
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,
)
for _name, _command in COMMANDS.items():
    app.command(_command, name=_name)


def script() -> None:
    """Runs the command of ``sys.argv`` and exits. It is the entry point of the script ``imagic-lora``."""
    sys.exit(main())


def main(tokens: Sequence[str] | None = None) -> int:
    """Runs one command.

    Every other exception is raised, so that Python prints its traceback and exits with code 1.

    Args:
        tokens: the command line without the name of the program; None is ``sys.argv``.

    Returns:
        The exit code: 0 done, 2 an error that the user can correct, 3 some of many failed (``batch``), 130
        interrupted.
    """
    tokens = sys.argv[1:] if tokens is None else list(tokens)
    with warnings.catch_warnings():
        if isinstance(sys.stdout, io.TextIOWrapper):  # stderr does so by default: what a terminal of another encoding lacks is escaped
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            with Interrupts():
                prepare_environment()
                print_warnings()
                app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
                if sys.stdout:
                    sys.stdout.flush()  # an error at the exit of Python would have neither a message nor an exit code of its own
        except SomeFailed:
            return 3
        except BrokenPipeError:  # the reader of the output, such as head, has closed the pipe
            _discard_output()
            return 0
        except KeyboardInterrupt as error:
            return print_interrupted(str(error) or "nothing was stored", None, tokens)
        except Stopped as error:
            resumed = [*tokens, *(["--resume"] if "--resume" not in tokens else [])]
            return print_interrupted(str(error), shlex.join(["imagic-lora", *resumed]), tokens)
        except Exception as error:  # most are raised again, with their traceback
            explained = explained_error(error)
            if explained is None:
                raise
            code = print_error(explained, tokens)
            if isinstance(error, OSError) and not error.filename:
                _discard_output()  # it may be what is full
            return code
    return 0


def explained_error(error: Exception) -> ImagicError | None:
    """Returns an exception as an error that the user can correct; None if it is not one."""
    match error:
        case ImagicError():
            return error
        case CycloptsError(__cause__=ValidationError() as cause):
            return settings_error(cause)
        case CycloptsError():
            return ImagicError(str(error), "a command and options that --help lists", "see imagic-lora --help")
        case OSError(errno=number, filename=path) if number in DISK_FULL:
            got = f"the disk is full{f' ({path})' if path else ''}"
            return ImagicError(got, "enough free disk space", "delete files that are no longer needed")
        case OSError(errno=number, filename=path) if number in _DENIED and path:
            got = f"{path} cannot be accessed ({error.strerror})"
            return ImagicError(got, "a path that this user may read and write", "check its permissions, or run the command as its owner")
        case MemoryError() | RuntimeError():
            from ..memory.limits import is_out_of_memory

            if is_out_of_memory(error):
                remedy = "use --preset 8gb, or fit the photo at a lower --resolution"
                return ImagicError("out of memory", "more free memory", remedy)
    return None


def _discard_output() -> None:
    """Lets stdout lead nowhere if it cannot be written to, so that Python does not fail to write the rest of it at its exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
