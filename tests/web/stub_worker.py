"""A worker whose jobs only wait until a test lets them end: ``stub_worker.py STORE PLACE``. It runs no model."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from imagic_lora.web import running, worker


def stub(store: Path, **arguments: Any) -> None:
    """Writes when it began and ended, and what it sees of the cards; in between it waits for the file ``go-NAME`` in the store."""
    name, began = arguments.get("name") or arguments["adapter"], time.time()
    (store / ".web" / f"began-{name}").touch()
    while not (store / ".web" / f"go-{name}").exists():
        time.sleep(0.02)
    facts = {"place": sys.argv[2], "visible": os.environ.get("CUDA_VISIBLE_DEVICES"), "began": began, "ended": time.time()}
    print(json.dumps(facts))


if __name__ == "__main__":
    running.command = lambda kind: stub
    worker.main(sys.argv[1], sys.argv[2])
