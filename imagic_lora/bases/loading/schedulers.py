"""The schedulers of a base: its own, the one that training noises with, and those of other classes. All have one noise schedule."""

from __future__ import annotations

import inspect
import reprlib
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
    schedulers,
)

from ...core.config import Scheduler
from ...core.errors import ImagicError
from .files import Files
from .vetting import FLOW_SCHEDULERS, library_errors, unusable_base

_CHANGES_OF_THE_PREDICTION = ("clip_sample", "thresholding")
_OTHER_SIGMAS = ("use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
_SAMPLERS: dict[Scheduler, tuple[Any, dict[str, Any]]] = {
    "dpm++2m": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpm++2m-sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "unipc": (UniPCMultistepScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "lcm": (LCMScheduler, {}),
}


def scheduler(config: dict[str, Any], files: Files, few_steps: int | None = None) -> Any:
    """A scheduler of the class that its config names, after a check that it produces a valid noise schedule.

    Args:
        config: config of the scheduler; ``_class_name`` is its class.
        files: files of the base.
        few_steps: number of sampling steps of a distilled base.

    Raises:
        ImagicError: diffusers has no scheduler class of this name; the config is invalid, or its prediction type is not known.
    """
    path, name = files.component_path("scheduler"), config.get("_class_name")
    with library_errors(path):
        scheduler_class: Any = getattr(schedulers, name, None) if isinstance(name, str) else None
        if not _is_scheduler(scheduler_class):
            raise unusable_base(
                f"{path} names the scheduler {reprlib.repr(name)}", "a scheduler of diffusers whose dependencies are installed"
            )
        trial = scheduler_class.from_config(config)
        if name in FLOW_SCHEDULERS:  # mu is the shift of a scheduler that gets it with the number of steps
            trial.set_timesteps(min(10, trial.config.num_train_timesteps), mu=1.0)
            return scheduler_class.from_config(config)
        if (prediction := trial.config.prediction_type) not in ("epsilon", "v_prediction", "sample"):
            raise ImagicError(f"{path} predicts {reprlib.repr(prediction)}", "epsilon, v_prediction or sample", "choose another base")
        trial.set_timesteps(min(10, trial.config.num_train_timesteps))
        distilled_timesteps(trial, few_steps)
        alphas = training_scheduler(trial).alphas_cumprod
        if len(alphas) != trial.config.num_train_timesteps or not bool(((alphas >= 0) & (alphas <= 1)).all()):
            raise unusable_base(
                f"{path} has betas that give no valid noise schedule", "betas between 0 and 1, one for each training timestep"
            )
        return scheduler_class.from_config(config)


def training_scheduler(own: Any) -> DDPMScheduler:
    """A DDPMScheduler with the noise schedule and the prediction type of another scheduler.

    It gets the betas that the scheduler computed, not the settings that they come from: the defaults of the classes differ, and some
    classes do not have all settings.

    Args:
        own: a scheduler of diffusers.
    """
    training: Any = DDPMScheduler(num_train_timesteps=own.config.num_train_timesteps, prediction_type=own.config.prediction_type)
    training.betas = torch.as_tensor(own.betas)
    training.alphas = 1.0 - training.betas
    training.alphas_cumprod = torch.cumprod(training.alphas, dim=0)
    return training


def copied(own: Any) -> Any:
    """A scheduler of the same class and config, without the timesteps that were set."""
    return type(own).from_config(_all_settings(own))


def _all_settings(own: Any) -> dict[str, Any]:
    """The config of a scheduler, without diffusers' note which settings are defaults: it would reset corrected settings to defaults."""
    return {name: value for name, value in own.config.items() if name != "_use_default_values"}


def converted(own: Any, scheduler_class: Any) -> Any:
    """A scheduler of another class with the noise schedule, the prediction type and the timesteps of a base's own scheduler.

    Args:
        own: the scheduler of the base.
        scheduler_class: class of diffusers that spaces its timesteps ``leading`` or ``trailing``, such as DDIMScheduler.
    """
    arguments = inspect.signature(type(own).__init__).parameters
    config = _all_settings(own)  # with the defaults of the own class, instead of those of the other one
    schedule = {"trained_betas": torch.as_tensor(own.betas).tolist(), "rescale_betas_zero_snr": False}
    # a class without these settings does not change the predicted sample, and the default of DDIM is to clip it
    unchanged = {name: False for name in _CHANGES_OF_THE_PREDICTION if name not in arguments}
    spacing = "trailing" if config.get("timestep_spacing") == "trailing" else "leading"  # DDIM inversion has no linspace
    return scheduler_class.from_config(config, **schedule, **unchanged, timestep_spacing=spacing)


def sampler(own: Any, name: Scheduler, karras_sigmas: bool) -> Any:
    """A scheduler to sample with, as ``from_config`` of its class makes it from the config of a base's own scheduler.

    Settings that diffusers corrected in that config keep their corrected value. A spacing of the timesteps that the base does not state
    is the default of the new class.

    Args:
        own: the scheduler of the base.
        name: ``base`` is the class of ``own``; ``ddim`` is that of :func:`converted`, which inversion needs.
        karras_sigmas: whether the noise levels are spaced as in arXiv 2206.00364, equation 5.

    Raises:
        ImagicError: the class has no such spacing of the noise levels.
    """
    scheduler_class, options = _SAMPLERS.get(name, (DDIMScheduler if name == "ddim" else type(own), {}))
    arguments = inspect.signature(scheduler_class.__init__).parameters
    if karras_sigmas and "use_karras_sigmas" not in arguments:
        named = scheduler_class.__name__ if name == "base" else name
        remedy = "use --no-karras-sigmas, or another scheduler"
        raise ImagicError(f"Karras sigmas with scheduler {named}", "one of dpm++2m, dpm++2m-sde, unipc and euler", remedy)
    if name == "ddim":
        return converted(own, DDIMScheduler)
    settings = _all_settings(own)
    if scheduler_class is not type(own) and "timestep_spacing" in own.config.get("_use_default_values", ()):
        del settings["timestep_spacing"]
    if karras_sigmas or (name != "base" and "use_karras_sigmas" in arguments):
        options = options | {"use_karras_sigmas": karras_sigmas} | {key: False for key in _OTHER_SIGMAS if key in arguments}
    return scheduler_class.from_config(settings, **options)


def distilled_timesteps(own: Any, few_steps: int | None) -> torch.Tensor | None:
    """Timesteps that a distilled base is trained at, ascending, int64; None for a base that is not distilled.

    They are the ``few_steps`` sampling timesteps. A scheduler of a consistency model selects its sampling timesteps from the
    ``original_inference_steps`` timesteps that the base was distilled at: for it, all of these are returned.
    """
    if few_steps is None:
        return None
    copy = copied(own)
    copy.set_timesteps(copy.config.get("original_inference_steps", few_steps))
    return copy.timesteps.round().long().sort().values


def _is_scheduler(candidate: Any) -> bool:
    return isinstance(candidate, type) and issubclass(candidate, SchedulerMixin)
