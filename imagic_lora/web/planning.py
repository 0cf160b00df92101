"""The memory plan of a fit, by ``imagic-lora plan`` in a process of its own: the server has no torch, which some bases need."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..bases.loading.configs import architecture, recipe_for
from ..core.config import RunConfig
from ..core.errors import ImagicError
from ..core.settings.reading import validated
from ..core.settings.resolve import resolve

_SECONDS = 120
_FRESH = 60.0  # seconds for which a plan is given again: to a page that is reloaded, and to other pages
_slots = asyncio.Semaphore(2)
_plans: dict[str, tuple[float, asyncio.Task[dict[str, Any]]]] = {}


async def planned(settings: dict[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """Returns the JSON of ``imagic-lora plan``, not older than a minute.

    Args:
        settings: the settings of the fit that are given, nested.
        environment: variables with which it sees the card that it plans for; may be empty.

    Raises:
        ImagicError: the error that the command prints.
    """
    now, name = time.monotonic(), json.dumps([settings, dict(environment)], sort_keys=True)
    for old in [one for one, (made, _) in _plans.items() if now - made > _FRESH]:
        del _plans[old]
    if name not in _plans:
        _plans[name] = now, asyncio.create_task(_by_command(settings, environment))
    try:
        return await asyncio.shield(_plans[name][1])  # a page that is closed does not end it for others
    except Exception:  # an error is not kept, whatever it is
        _plans.pop(name, None)
        raise


async def _by_command(settings: dict[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """Runs ``imagic-lora plan``."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "settings.yaml"
        file.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
        command = (sys.executable, "-m", "imagic_lora", "plan", "--json", "--config", str(file))
        async with _slots:
            pipe = asyncio.subprocess.PIPE
            process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe, env=os.environ | environment
            )
            try:
                output, errors = await asyncio.wait_for(process.communicate(), _SECONDS)
            except TimeoutError:
                process.kill()
                raise ImagicError(f"no plan after {_SECONDS} s", "a plan", "start the fit, which checks the memory itself") from None
    try:
        answer = json.loads(output)
    except ValueError as error:
        last = (errors.decode("utf-8", "replace").strip().splitlines() or ["no output"])[-1][:300]
        raise ImagicError(f"imagic-lora plan failed: {last}", "a plan", "run it in a terminal") from error
    if "error" in answer:
        problem = answer["error"]
        raise ImagicError(*(str(problem[name]).replace(str(file), "the settings") for name in ("got", "expected", "remedy")))
    return answer


def defaults(settings: dict[str, Any]) -> RunConfig:
    """Returns the settings of a fit with the defaults of its base and mode, without the memory levers that a preset chooses.

    Raises:
        ImagicError: a setting is invalid, or the base does not exist.
    """
    given = validated(settings)
    return resolve(settings, {}, recipe_for(architecture(given.base), given.base, given.revision))
