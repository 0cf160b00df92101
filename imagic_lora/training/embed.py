"""Stage 1: optimises the text embedding on the photo with a frozen model (section 3.2, step A of Imagic, arXiv 2210.09276)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import Parameter

from ..bases.base import Base
from ..core.conditioning import Conditioning
from ..core.config import EmbedConfig
from ..core.runtime import Processes
from .stage import Stage


def embed_stage(base: Base, latents: Tensor, target: Conditioning, config: EmbedConfig, seed: int, processes: Processes) -> Stage:
    """Returns the stage that starts from the embedding ``e_tgt`` and trains its tokens, and its pooled embedding where there is one.

    ``stage.conditioning()`` returns the current embedding with gradients; :func:`optimised` returns a detached copy.

    Args:
        latents: latents of the photo, ``[1, C, h, w]``.
        target: conditioning of the target prompt; its extra inputs are passed through unchanged.
        seed: seed of noise and timesteps.
        processes: the processes that share the batch.
    """
    initial = {"tokens": target.tokens} if target.pooled is None else {"tokens": target.tokens, "pooled": target.pooled}
    trainables = {name: Parameter(value.detach().float().clone()) for name, value in initial.items()}

    def conditioning() -> Conditioning:
        return Conditioning(trainables["tokens"], trainables.get("pooled"), target.extra)

    return Stage("embed", base, latents, conditioning, trainables, config, seed, processes)


def optimised(stage: Stage) -> Conditioning:
    """Returns ``e_opt``: a detached copy of the current embedding of an embedding stage."""
    current = stage.conditioning()
    pooled = None if current.pooled is None else current.pooled.detach().clone()
    return Conditioning(current.tokens.detach().clone(), pooled, current.extra)
