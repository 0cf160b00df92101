"""Imagic (arXiv 2210.09276) as a method, in any mode and with any settings."""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from pathlib import Path

from ..adapters.adapter import Adapter
from ..adapters.store import Store
from ..bases.base import Base
from ..core.config import EditConfig, RunConfig
from ..photos.png import write_png
from ..sampling.editor import Editor
from ..training.fit import fit
from ..training.monitoring.convergence import PAIRS
from ..training.stage import StepReport
from .generated import generation_passes
from .method import Context, Cost, CostMeter, EditRequest, EditResult, Method, Passes, metered


class Imagic(Method):
    """Fits the photo, and yields one edit for each way to sample it.

    Args:
        name: name of the method, and of its row with the sampling settings of the run.
        config: settings of the run. The seed of the request replaces their seed.
        others: other ways to sample the same fit: eta and settings of stage 3. Their rows are ``NAME-OTHER``.
    """

    supports = frozenset({"unet", "transformer"})

    def __init__(self, name: str, config: RunConfig, others: Mapping[str, tuple[float, EditConfig]] | None = None) -> None:
        self.name, self.config = name, config
        self.ways = {name: (config.eta, config.edit)} | {f"{name}-{other}": way for other, way in (others or {}).items()}
        self.rows = tuple(self.ways)
        sampled = {row: {"eta": eta, "edit": edit.model_dump(mode="json")} for row, (eta, edit) in self.ways.items()}
        others_alone = {"method", "dreambooth", "inversion"}  # that no run of Imagic reads
        self.settings = {"run": config.model_dump(mode="json", exclude=others_alone), "rows": sampled}

    def edit(self, context: Context, request: EditRequest) -> Iterator[EditResult]:
        self.check(context.base, request)
        base, config = context.base, unmonitored(self.config).model_copy(update={"seed": request.seed})
        with tempfile.TemporaryDirectory() as folder, closing(Editor(base)) as editor:
            photo = Path(folder) / "photo.png"
            write_png(request.photo, photo, {})
            with metered(base) as meter:
                adapter, cost = run_fit(fit(photo, request.target_prompt, config, Store(Path(folder)), "case", base=base), meter)
            trained = cost + Cost(adapter=adapter.size)
            for row, (eta, sampling) in self.ways.items():
                with metered(base) as meter:
                    (result,) = editor.edit(adapter, [eta], [request.seed], sampling)
                    yield EditResult(row, result.image, trained + meter.cost())

    def passes(self, base: Base) -> dict[str, Passes]:
        trained = sum(stage.steps * stage.batch_size for stage in self.config.stages.values())
        every = unmonitored(self.config).monitoring.convergence_every  # above 0 only with early stopping
        evaluations = 1 + sum(stage.steps // every + 1 for stage in self.config.stages.values()) if every else 0
        forward = trained + PAIRS * evaluations
        sampled = {row: generation_passes(base, sampling).forward for row, (_, sampling) in self.ways.items()}
        return {row: Passes(forward + passes, trained, at_most=every > 0) for row, passes in sampled.items()}


def unmonitored(config: RunConfig) -> RunConfig:
    """Returns the settings without evaluations that only inform: what a method costs does not include them. Early stopping needs them.

    Args:
        config: settings of a run.
    """
    every = 0 if config.monitoring.early_stop == "off" else config.monitoring.convergence_every
    monitoring = config.monitoring.model_copy(update={"convergence_every": every, "preview_every": 0})
    return config.model_copy(update={"monitoring": monitoring})


def run_fit(steps: Generator[StepReport, None, Adapter | None], meter: CostMeter) -> tuple[Adapter, Cost]:
    """Runs a fit to its end.

    Args:
        steps: the running fit.
        meter: a meter on the denoiser of its base.

    Returns:
        The adapter, and the cost of its training. The cost of the preview is not included, nor that of class pictures, which come first.
    """
    cost = before = Cost()
    while True:
        try:
            report = next(steps)
        except StopIteration as done:
            adapter = done.value
            break
        cost = meter.cost()
        before = cost if report.loss is None else before
    assert adapter is not None
    return adapter, cost - before
