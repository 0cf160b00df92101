"""Imagic itself, in either mode and at any settings."""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path

from ..adapters.adapter import Adapter
from ..adapters.contents import read_canvas, read_embeddings
from ..adapters.store import Store
from ..core.conditioning import interpolate, source_conditionings
from ..core.config import RunConfig
from ..photos.png import write_png
from ..sampling.editor import Editor
from ..sampling.generate import generate
from ..training.fit import fit
from ..training.stage import StepReport
from .method import Context, Cost, CostMeter, EditRequest, EditResult, Method, metered

ETAS = (-0.4, -0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3)
"""What the best is chosen of: differences from the eta of the settings."""


class Imagic(Method):
    """A fit, its edit at one eta and one seed, and the best of eight etas by a score that knows neither judge nor truth.

    Args:
        name: of the method, and of the row at one eta and one seed; ``NAME-best`` is the other.
        config: of the run; the seed is the task's.
        embedding: whether ``embedding-only`` is reported as well: the same embedding on the untuned base.
    """

    def __init__(self, name: str, config: RunConfig, embedding: bool = False) -> None:
        self.name, self.config, self.embedding = name, config, embedding
        self.rows = (name, f"{name}-best", *(("embedding-only",) if embedding else ()))
        self.settings = config.model_dump(mode="json")

    def pictures(self, context: Context, request: EditRequest) -> Iterator[EditResult]:
        base, config = context.base, self.config.model_copy(update={"seed": request.seed})
        with tempfile.TemporaryDirectory() as folder, closing(Editor(base)) as editor:
            photo = Path(folder) / "photo.png"
            write_png(request.photo, photo, {})
            with metered(base) as meter:
                adapter, costs = _run_fit(fit(photo, request.text, config, Store(Path(folder)), "case", base=base), meter)
            trained = costs["tune"] + Cost(adapter=adapter.size)
            with metered(base) as meter:
                (edit,) = editor.edit(adapter, [config.eta], [request.seed], config.edit)
                yield EditResult(self.name, edit.image, trained + meter.cost())
            with metered(base) as meter:
                etas = [min(max(config.eta + more, 0.0), 2.0) for more in ETAS]
                images = [one.image for one in editor.edit(adapter, etas, [request.seed], config.edit)]
                chosen = images[context.best(images, request.text, request.photo)]
                yield EditResult(f"{self.name}-best", chosen, trained + meter.cost())
            if self.embedding:
                editor.close()
                with metered(base) as meter:
                    stored = read_embeddings(adapter)
                    ends = stored["target"], stored["optimised"]
                    mix, of_photo = interpolate(*ends, config.eta), source_conditionings(*ends, [config.eta], config.edit.source_eta)
                    (image,) = generate(base, [mix], [request.seed], config.edit, read_canvas(adapter), stored.get("null"), of_photo)
                    yield EditResult("embedding-only", image, costs["embed"] + meter.cost())


def _run_fit(steps: Generator[StepReport, None, Adapter | None], meter: CostMeter) -> tuple[Adapter, dict[str, Cost]]:
    """Runs a fit to its end: the adapter, and what there was to pay by the end of each stage. The preview is not counted."""
    costs: dict[str, Cost] = {}
    while True:
        try:
            report = next(steps)
        except StopIteration as done:
            adapter = done.value
            break
        costs[report.stage] = meter.cost()
    assert adapter is not None
    return adapter, costs
