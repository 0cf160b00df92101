"""Stage 1: optimises the text embedding on the photo with a frozen model (section 3.2, step A of Imagic, arXiv 2210.09276)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import Parameter

from ..bases.base import Base
from ..core.conditioning import Conditioning
from ..core.config import EmbedConfig
from ..core.noise import noise_at
from ..core.runtime import Processes, to_device
from .stage import Stage


def embed_stage(
    base: Base, latents: Tensor, target: Conditioning, config: EmbedConfig, seed: int, processes: Processes, prompt: str = ""
) -> Stage:
    """Returns the stage that starts from the embedding ``e_tgt`` and trains its tokens, and its pooled embedding where there is one.

    If ``target`` has the vectors of its tokens, it trains those of words and padding, and encodes them at every step. Trained start and
    end tokens would keep less of the photo (docs/log.md).

    ``stage.conditioning()`` returns the current embedding with gradients; :func:`optimised` returns a detached copy.

    Args:
        latents: latents of the photo, ``[1, C, h, w]``.
        target: conditioning of the target prompt; its extra inputs are passed through unchanged.
        seed: seed of noise and timesteps.
        processes: the processes that share the batch.
        prompt: the target prompt, of which vectors are encoded.
    """
    initial = {"tokens": target.tokens} if target.pooled is None else {"tokens": target.tokens, "pooled": target.pooled}
    trained = target.vectors or initial
    trainables = {name: Parameter(value.detach().float().clone()) for name, value in trained.items()}

    masks = base.vector_masks(prompt) if target.vectors else {}

    def conditioning() -> Conditioning:
        if target.vectors:
            vectors = {name: torch.where((m.words | m.padding)[..., None], trainables[name], target.vectors[name]) for name, m in masks.items()}
            return replace(base.encode_vectors(prompt, vectors), extra=target.extra, mask=target.mask)
        return Conditioning(trainables["tokens"], trainables.get("pooled"), target.extra, target.mask)

    if not config.noise:
        return Stage("embed", base, latents, conditioning, trainables, config, seed, processes)
    scales = {name: config.noise * value.detach().float().std() for name, value in initial.items()}
    return Stage("embed", base, latents, conditioning, trainables, config, seed, processes, partial(with_noise, scales, seed))


def with_noise(scales: Mapping[str, Tensor], seed: int, conditioning: Conditioning, k: int, samples: range) -> Conditioning:
    """Returns the conditioning of each sample of a step with normal noise, which depends only on the seed, the step and the sample.

    Noise makes the embedding that is found one around which the loss is low as well (as NEFTune, arXiv 2310.05914, does for language
    models).

    Args:
        scales: standard deviations of the noise of ``tokens`` and ``pooled``, scalars.
        seed: seed of the run.
        conditioning: conditioning ``[1, ...]``.
        k: index of the step.
        samples: indices of the samples.
    """

    def noisy(name: str, value: Tensor) -> Tensor:
        noise = noise_at(seed, f"embed/{name}", k, samples, tuple(value.shape[1:]))
        return value + scales[name] * to_device(noise, value.device)

    pooled = None if conditioning.pooled is None else noisy("pooled", conditioning.pooled)
    return Conditioning(noisy("tokens", conditioning.tokens), pooled, conditioning.expand(len(samples)).extra)


def optimised(stage: Stage) -> Conditioning:
    """Returns ``e_opt``: a detached copy of the current embedding of an embedding stage."""
    current = stage.conditioning()
    pooled = None if current.pooled is None else current.pooled.detach().clone()
    vectors = {name: value.detach().clone() for name, value in current.vectors.items()}
    return Conditioning(current.tokens.detach().clone(), pooled, current.extra, current.mask, vectors)
