"""The command ``plan``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from ...core.config import RunConfig
from ...core.settings.merging import merged
from ...core.settings.reading import read_settings, validated
from ..console import print_json, print_plan
from ..libraries import import_libraries
from ..options import Flag, Json, Whole

if TYPE_CHECKING:
    from ...bases.architecture import Architecture
    from ...memory.plan import Assumed, Plan


def plan(
    *,
    settings: Annotated[RunConfig | None, Parameter(name="*")] = None,
    batch: Whole | None = None,
    config: Path | None = None,
    exact: Flag = False,
    as_json: Json = False,
) -> None:
    """Predict the peak memory of a fit.

    The prediction needs neither a GPU nor weights. It takes the same settings as fit, but no photo, prompt or name. Settings that do not
    affect memory do not change the result.

        imagic-lora plan --base sdxl --preset 12gb

    Parameters
    ----------
    batch
        Sets --embed.batch-size and, unless --mode is embedding, --tune.batch-size, where they are not given.
    config
        YAML file of settings, as for fit.
    exact
        Run the training code on tensors without data instead of computing the sizes; takes about ten seconds, half a minute to
        minutes for flow transformers. These are predicted in this way unless it was done before.
    """
    from ...bases.loading.configs import architecture, recipe_for
    from ...memory.prediction import predict
    from ...memory.presets import assumed_for, card_and_free_memory, choose_preset
    from ...memory.symbolic.layers import NotPlanned

    flags = settings.model_dump(exclude_unset=True) if settings else {}
    file = read_settings(config) if config else {}
    if batch is not None:
        flags = merged({stage: {"batch_size": batch} for stage in validated(merged(file, flags)).stages}, flags)
    given = validated(merged(file, flags))
    built = architecture(given.base)
    built.check_trainable(given.base)
    run, why = choose_preset(
        lambda: built,
        flags,
        file,
        recipe_for(built, given.base, given.revision),
        large=built.has_large_encoder,
        rehearse=_rehearsed,
    )
    card = card_and_free_memory(run.memory.device)[0] if given.preset == "auto" else None
    assumed = assumed_for(run, card)
    try:
        prediction = _rehearsed(built, run, assumed) if exact else predict(built, run, assumed)
    except NotPlanned:
        if built.process != "flow":
            raise
        prediction = _rehearsed(built, run, assumed)
    if as_json:
        settings_used = {"base": given.base, "mode": run.tune.mode, "preset": run.preset, "fits": prediction.fits(run.preset)}
        print_json({**settings_used, **prediction.to_json()})
    else:
        print_plan(prediction, run, why)


def _rehearsed(architecture: Architecture, run: RunConfig, assumed: Assumed) -> Plan:
    import_libraries()
    from ...training.rehearsing.rehearsal import rehearse

    return rehearse(architecture, run, assumed)
