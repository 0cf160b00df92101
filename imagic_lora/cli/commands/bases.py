"""The command ``bases``."""

from __future__ import annotations

import os
from pathlib import Path

from rich.table import Table

from ..console import err, out, plain, print_json
from ..options import Json


def bases(*, as_json: Json = False) -> None:
    """List the bases that have a name.

    --base takes one of these names, a folder, a single .safetensors file or a hub id. You can define names of your own in a YAML file. The
    path of that file is printed below the table; docs/guide/bases.md describes it.
    """
    from ...bases.loading.known import EMBEDDED, SHIPPED, VARIABLE, bases_file, named_bases

    known = named_bases()
    if as_json:
        print_json({"file": str(bases_file()), "bases": {name: base.model_dump(mode="json") for name, base in known.items()}})
        return
    table = Table("name", "pixels", "predicts", "steps", "licence", "source")
    for name, base in known.items():
        pixels, steps = (str(value) if value else "" for value in (base.resolution, base.few_steps))
        source = f"{base.source}{f' at {base.revision}' if base.revision else ''}"
        if name in EMBEDDED:
            source = "in this package" if Path(base.source).is_dir() else f"not in this copy; {EMBEDDED[name]} makes it"
        table.add_row(
            *map(plain, (name if name in SHIPPED else f"{name} (yours)", pixels, base.prediction or "", steps, base.licence or "", source))
        )
    out.print(table)
    variable = "" if os.environ.get(VARIABLE) else f", or in the file that {VARIABLE} names"
    err.print(f"Add your own in {plain(bases_file())}{variable}", highlight=False)
