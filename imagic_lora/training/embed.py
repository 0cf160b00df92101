"""Stage 1: optimises the text embedding on the photo with a frozen model (section 3.2, step A of Imagic, arXiv 2210.09276)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import Parameter

from ..bases.base import Base
from ..core.conditioning import Conditioning, changed, difference
from ..core.config import EmbedConfig
from ..core.noise import noise_at
from ..core.runtime import Processes, to_device
from .stage import Stage


def embed_stage(
    base: Base, latents: Tensor, target: Conditioning, config: EmbedConfig, seed: int, processes: Processes, prompt: str = ""
) -> Stage:
    """Returns the stage that starts from the embedding ``e_tgt`` and trains its tokens, and its pooled embedding where there is one.

    ``stage.conditioning()`` returns the current embedding with gradients; :func:`optimised` returns a detached copy. Where
    :attr:`~imagic_lora.core.config.EmbedConfig.stores_difference` holds, what is trained is ``d`` of ``e = e_tgt + s d``, at the tokens of
    the mask of ``target`` or at all; ``s`` is 1, or the root mean square of the token.

    If ``target`` has the vectors of its tokens, those of words and padding are trained, and encoded at every step. Trained start and end
    tokens would keep less of the photo (docs/log.md).

    Args:
        latents: latents of the photo, ``[1, C, h, w]``.
        target: conditioning of the target prompt; its extra inputs are passed through unchanged.
        seed: seed of noise and timesteps.
        processes: the processes that share the batch.
        prompt: the target prompt, of which vectors are encoded.
    """
    initial = {"tokens": target.tokens} if target.pooled is None else {"tokens": target.tokens, "pooled": target.pooled}
    initial = {name: value.detach().float() for name, value in initial.items()}
    sizes = {name: _size(value, config.relative) for name, value in initial.items()}
    if target.vectors:
        trainables = {name: Parameter(value.clone()) for name, value in target.vectors.items()}
        masks = {name: (words | padding)[..., None] for name, (words, padding) in base.vector_masks(prompt).items()}

        def conditioning() -> Conditioning:
            vectors = {name: torch.where(mask, trainables[name], target.vectors[name]) for name, mask in masks.items()}
            return replace(base.encode_vectors(prompt, vectors), extra=target.extra, mask=target.mask)
    elif config.stores_difference:
        start = replace(target, tokens=initial["tokens"], pooled=initial.get("pooled"))
        zeros = difference(start, start)
        trainables = {name: Parameter(value) for name, value in zeros.items()}
        units = {name: torch.ones_like(value) * (sizes[name] if config.relative else 1) for name, value in initial.items()}
        scales = difference(replace(start, tokens=units["tokens"], pooled=units.get("pooled")), _zeros(start))

        def conditioning() -> Conditioning:
            return changed(start, {name: scales[name] * value for name, value in trainables.items()})
    else:
        trainables = {name: Parameter(value.clone()) for name, value in initial.items()}

        def conditioning() -> Conditioning:
            return replace(target, tokens=trainables["tokens"], pooled=trainables.get("pooled"))

    if not config.noise:
        return Stage("embed", base, latents, conditioning, trainables, config, seed, processes)
    noise = {name: config.noise * size for name, size in sizes.items()}
    if config.tokens == "words" and target.mask is not None:  # tokens that are not trained stay those of the target prompt
        noise["tokens"] = noise["tokens"] * target.mask.view(*target.mask.shape, *(1,) * (target.tokens.ndim - 2))
    return Stage("embed", base, latents, conditioning, trainables, config, seed, processes, partial(with_noise, noise, seed))


def _size(value: Tensor, relative: bool) -> Tensor:
    """The standard deviation of an embedding, a scalar; if rates are relative, the root mean square of each token, ``[1, T, 1]``."""
    if not relative:
        return value.std()
    channels = tuple(range(min(2, value.ndim - 1), value.ndim))
    return value.square().mean(dim=channels, keepdim=True).sqrt()


def _zeros(start: Conditioning) -> Conditioning:
    pooled = None if start.pooled is None else torch.zeros_like(start.pooled)
    return replace(start, tokens=torch.zeros_like(start.tokens), pooled=pooled)


def with_noise(scales: Mapping[str, Tensor], seed: int, conditioning: Conditioning, k: int, samples: range) -> Conditioning:
    """Returns the conditioning of each sample of a step with normal noise, which depends only on the seed, the step and the sample.

    Noise makes the embedding that is found one around which the loss is low as well (as NEFTune, arXiv 2310.05914, does for language
    models).

    Args:
        scales: standard deviations of the noise of ``tokens`` and ``pooled``, scalars or of the shape ``[1, T, 1]``.
        seed: seed of the run.
        conditioning: conditioning ``[1, ...]``.
        k: index of the step.
        samples: indices of the samples.
    """

    def noisy(name: str, value: Tensor) -> Tensor:
        noise = noise_at(seed, f"embed/{name}", k, samples, tuple(value.shape[1:]))
        return value + scales[name] * to_device(noise, value.device)

    expanded = conditioning.expand(len(samples))
    pooled = None if conditioning.pooled is None else noisy("pooled", conditioning.pooled)
    return replace(expanded, tokens=noisy("tokens", conditioning.tokens), pooled=pooled)


def optimised(stage: Stage, target: Conditioning | None = None) -> Conditioning:
    """Returns ``e_opt``: a detached copy of the current embedding of an embedding stage.

    Args:
        stage: the embedding stage.
        target: conditioning of the target prompt, if the adapter stores the difference to it: the result has the difference in bf16.
    """
    current = stage.conditioning()
    pooled = None if current.pooled is None else current.pooled.detach().clone()
    vectors = {name: value.detach().clone() for name, value in current.vectors.items()}
    found = replace(current, tokens=current.tokens.detach().clone(), pooled=pooled, vectors=vectors)
    if target is None:
        return found
    return changed(target, {name: value.bfloat16().float() for name, value in difference(found, target).items()})
