"""Stage 2: the denoiser is trained on the photo at the optimised embedding (section 3.2, step B of Imagic, arXiv 2210.09276)."""

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
    """The stage that trains ``trainables``: LoRA layers or the whole denoiser."""
    return Stage("tune", base, latents, lambda: optimised, trainables, config, seed, processes)
