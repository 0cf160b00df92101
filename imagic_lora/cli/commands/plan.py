"""The command that predicts memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ...core.config import RunConfig
from ...core.settings import merged, read_yaml, recipe_of, validated
from ..console import print_json, print_plan
from ..options import Flag, Json


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
    from ...bases.loading.configs import architecture
    from ...memory.plan import predict
    from ...memory.presets import assumed_for, card_and_free_memory, choose_preset

    flags = settings.model_dump(exclude_unset=True) if settings else {}
    if batch is not None:
        flags = merged({"embed": {"batch_size": batch}, "tune": {"batch_size": batch}}, flags)
    file = read_yaml(config) if config else {}
    base = validated(merged(file, flags)).base
    built = architecture(base)
    run, why = choose_preset(lambda: built, flags, file, recipe_of(base, built.few_steps, built.embeds_guidance))
    card = None if why == "asked for" else card_and_free_memory(run.memory.device)[0]
    assumed = assumed_for(run, card)
    if exact:
        from ...bases.loading.progress import hide_progress_bars
        from ...training.rehearsal import rehearse

        hide_progress_bars()
        found = rehearse(built, run, assumed)
    else:
        found = predict(built, run, assumed)
    if as_json:
        print_json({"base": base, "mode": run.tune.mode, "preset": run.preset, "fits": found.fits(run.preset), **found.to_json()})
    else:
        print_plan(found, run, why)
