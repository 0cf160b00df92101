"""Stage 1: the text embedding is optimised on the photo, the model frozen (section 3.2, step A of Imagic, arXiv 2210.09276)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import Parameter

from ..bases.base import Base
from ..core.conditioning import Conditioning
from ..core.config import EmbedConfig
from ..core.runtime import Processes
from .stage import Stage


def embed_stage(base: Base, latents: Tensor, target: Conditioning, config: EmbedConfig, seed: int, processes: Processes) -> Stage:
    """The stage that starts from ``target`` and trains its tokens, and its pooled embedding where there is one.

    ``stage.conditioning()`` is the embedding so far: :func:`optimised` takes it out at the end.
    """
    parts = {"tokens": target.tokens} if target.pooled is None else {"tokens": target.tokens, "pooled": target.pooled}
    trainables = {name: Parameter(value.detach().float().clone()) for name, value in parts.items()}

    def conditioning() -> Conditioning:
        return Conditioning(trainables["tokens"], trainables.get("pooled"), target.extra)

    return Stage("embed", base, latents, conditioning, trainables, config, seed, processes)


def optimised(stage: Stage) -> Conditioning:
    """``e_opt``: what an embedding stage has come to, detached."""
    now = stage.conditioning()
    return Conditioning(now.tokens.detach().clone(), None if now.pooled is None else now.pooled.detach().clone(), now.extra)
