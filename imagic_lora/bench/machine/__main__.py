"""The process that locates a base, or measures one run: ``python -m imagic_lora.bench.machine JOB`` prints one JSON object a line.

Each run has a process of its own: the memory of a process does not shrink to what it was.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ...core.config import RunConfig
from ...core.environment import prepare_environment, quick_imports, wait_passively_on_busy_machine
from ...core.errors import ImagicError
from ...memory.limits import OutOfMemory, is_out_of_memory


def main() -> None:
    """Does the job of the command line. Errors that the user can correct, and a lack of memory, are lines too."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no result

    def send(**message: Any) -> None:
        print(json.dumps(message, allow_nan=False), file=out, flush=True)

    try:
        _work(json.loads(sys.argv[1]), send)
    except OutOfMemory:
        send(out_of_memory=True)
    except ImagicError as error:
        send(error=[error.got, error.expected, error.remedy])
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        send(out_of_memory=True)


def _work(job: Mapping[str, Any], send: Any) -> None:
    """Sends the folder of a base that is to be located, or device and figures of a run that is to be measured."""
    prepare_environment()
    wait_passively_on_busy_machine()
    with quick_imports(bitsandbytes=True):
        if "locate" in job:
            from ...bases.loading.registry import locate

            send(path=str(locate(job["locate"])))
            return
        import torch

        from ...bases.loading.progress import hide_progress_bars
        from .stages import measure
    hide_progress_bars()
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        send(card={"name": properties.name, "bytes": properties.total_memory, "cuda": torch.version.cuda})
        if job["cap"]:
            torch.cuda.set_per_process_memory_fraction(min(1.0, job["cap"] / properties.total_memory))
    send(threads=torch.get_num_threads())
    for measured in measure(RunConfig.model_validate(job["run"]), job["random"], job["seconds"], job["free"]):
        send(measured=asdict(measured))


if __name__ == "__main__":
    main()
