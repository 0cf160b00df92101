"""Imagic (arXiv 2210.09276) as a method, in either mode and with any settings."""

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
"""Offsets to the eta of the settings. The row ``NAME-best`` is chosen from the edits at these etas."""


class Imagic(Method):
    """Fits the photo and yields the edit at one eta, then the best of the edits at eight etas.

    The best edit is chosen by :attr:`Context.best`, which uses neither the judge of the benchmark nor the true edit.

    Args:
        name: name of the method and of its row at the eta of the settings. The row of the best edit is ``NAME-best``.
        config: settings of the run. The seed of the request replaces their seed.
        embedding: whether to yield a row ``embedding-only`` as well: the same interpolated embedding on the untuned base.
    """

    def __init__(self, name: str, config: RunConfig, embedding: bool = False) -> None:
        self.name, self.config, self.embedding = name, config, embedding
        self.rows = (name, f"{name}-best", *(("embedding-only",) if embedding else ()))
        self.settings = config.model_dump(mode="json")

    def edit(self, context: Context, request: EditRequest) -> Iterator[EditResult]:
        base, config = context.base, self.config.model_copy(update={"seed": request.seed})
        with tempfile.TemporaryDirectory() as folder, closing(Editor(base)) as editor:
            photo = Path(folder) / "photo.png"
            write_png(request.photo, photo, {})
            with metered(base) as meter:
                adapter, costs = _run_fit(fit(photo, request.target_prompt, config, Store(Path(folder)), "case", base=base), meter)
            trained = costs["tune"] + Cost(adapter=adapter.size)
            with metered(base) as meter:
                (single,) = editor.edit(adapter, [config.eta], [request.seed], config.edit)
                yield EditResult(self.name, single.image, trained + meter.cost())
            with metered(base) as meter:
                etas = [min(max(config.eta + offset, 0.0), 2.0) for offset in ETAS]
                images = [result.image for result in editor.edit(adapter, etas, [request.seed], config.edit)]
                best = images[context.best(images, request.target_prompt, request.photo)]
                yield EditResult(f"{self.name}-best", best, trained + meter.cost())
            if self.embedding:
                editor.close()
                with metered(base) as meter:
                    stored = read_embeddings(adapter)
                    embeddings = stored["target"], stored["optimised"]
                    mixed = interpolate(*embeddings, config.eta)
                    source = source_conditionings(*embeddings, [config.eta], config.edit.source_eta)
                    (image,) = generate(base, [mixed], [request.seed], config.edit, read_canvas(adapter), stored.get("null"), source)
                    yield EditResult("embedding-only", image, costs["embed"] + meter.cost())


def _run_fit(steps: Generator[StepReport, None, Adapter | None], meter: CostMeter) -> tuple[Adapter, dict[str, Cost]]:
    """Runs a fit to its end.

    Args:
        steps: the running fit.
        meter: a meter on the denoiser of its base.

    Returns:
        The adapter, and the cost from the start of the fit to the end of each stage, by the name of the stage. The cost of the preview is
        not included.
    """
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
