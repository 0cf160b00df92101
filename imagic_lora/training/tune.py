"""Stage 2: trains the denoiser on the photo with the optimised embedding fixed (section 3.2, step B of Imagic, arXiv 2210.09276)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import Parameter

from ..bases.base import Base
from ..core.conditioning import Conditioning
from ..core.config import TuneConfig
from ..core.runtime import Processes
from .stage import Stage


def tune_stage(
    base: Base,
    latents: Tensor,
    optimised: Conditioning,
    trainables: Mapping[str, Parameter],
    config: TuneConfig,
    seed: int,
    processes: Processes,
) -> Stage:
    """Returns the stage that trains ``trainables`` at the fixed embedding ``e_opt``.

    Args:
        latents: latents of the photo, ``[1, C, h, w]``.
        optimised: the embedding ``e_opt`` of stage 1.
        trainables: parameters by name: LoRA layers or the whole denoiser.
        seed: seed of noise and timesteps.
        processes: the processes that share the batch.
    """
    return Stage("tune", base, latents, lambda: optimised, trainables, config, seed, processes)
