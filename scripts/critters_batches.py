"""Batches of the U-Net's training and their loss: usual groups, loud groups and edits; see docs/internals/embedded-base.md."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from critters_lessons import GROUP, EditPairs, Edits, caption_pairs, random_groups, tokens
from diffusers.training_utils import compute_snr
from transformers import CLIPTokenizer

LOUD_WEIGHT = 0.2  # of the loss of loud groups and edits, which is measured in clean latents
DEVIATION_WEIGHT = 10  # of the errors' deviation from the group's mean, in those groups: only the deviation depends on the captions
MAX_EMBEDDING_NOISE = 0.15  # largest standard deviation of the noise on embeddings, about the distance of optimised embeddings from texts


@dataclass
class Batch:
    """Inputs and targets of one training step: ``N`` images, in groups that share noise and timestep.

    Args:
        captions: two captions of each image, all the first ones before the second ones.
        share: weight of the second caption's embedding, ``[N]``.
        embedding_noise: standard deviation of the noise on the embeddings of each group, ``[N / GROUP, 1, 1]``.
        moves: added to the embeddings by edits, ``[N, tokens, width]``; a scalar zero without edits.
        noisy: latents, ``[N, 8, 8, 8]``.
        timesteps: ``[N]``.
        target: to be predicted, like ``noisy``.
        in_latents: whether the loss of an image is measured in clean latents, with more weight on its deviation from the group, ``[N]``.
        pairs: the last images of the batch if these are pairs of edit and photo, otherwise None.
    """

    captions: list[str]
    share: list[float]
    embedding_noise: torch.Tensor
    moves: torch.Tensor
    noisy: torch.Tensor
    timesteps: torch.Tensor
    target: torch.Tensor
    in_latents: torch.Tensor
    pairs: EditPairs | None


@dataclass
class Batches:
    """Draws batches: loud groups first, edits last, the usual groups between them.

    Args:
        data: latents of all neighbours, ``[images, 8, 8, 8]``.
        scheduler: the base's scheduler, which adds the noise.
        vae_noise: standard deviation of the VAE's posterior, in scaled latents.
        groups: number of groups in a batch.
        loud, edited: numbers of loud groups and of groups of edits.
        paired: number of groups of edits that are pairs of edit and photo, at most ``edited``.
        loud_from: smallest timestep of the loud groups, in [0, 1).
        device: device of the batch.
    """

    data: torch.Tensor
    scheduler: Any
    vae_noise: float
    groups: int
    loud: int
    edited: int
    paired: int
    loud_from: float
    device: str

    def sample(self, rng: np.random.Generator, edits: Edits) -> Batch:
        """A random batch; its edits are a random choice of the given ones."""
        size, groups = self.groups * GROUP, self.groups
        indices = random_groups(rng, groups, len(self.data))
        loud = (torch.arange(groups) < self.loud).repeat_interleave(GROUP)
        captions, share = caption_pairs(indices, loud.tolist(), random.Random(int(rng.integers(2**62))))
        clean = self.data[indices].to(self.device).float()
        noise = torch.randn(groups, *clean.shape[1:], device=self.device).repeat_interleave(GROUP, 0)
        u = torch.cat([(torch.arange(some) + torch.rand(some)) / max(some, 1) for some in (self.loud, groups - self.loud)])
        u = u.repeat_interleave(GROUP)
        u = torch.where(loud, self.loud_from + (1 - self.loud_from) * u, u)
        in_latents, moves, embedding_noise = loud.clone(), torch.zeros(()), MAX_EMBEDDING_NOISE * torch.rand(groups, 1, 1)
        first, last = size - self.edited * GROUP, slice(size - self.paired * GROUP, size)
        if self.edited:  # they replace the last groups
            part = slice(first, last.start)
            captions[part], clean[part], u[part], moved = edits.mixed(rng, self.edited - self.paired)
            share[first:], in_latents[first:], embedding_noise[-self.edited :] = [0.0] * (self.edited * GROUP), True, 0.0
            moves = F.pad(moved, (0, 0, 0, 0, first, self.paired * GROUP))
        clean = clean + self.vae_noise * torch.randn_like(clean[::GROUP]).repeat_interleave(GROUP, 0)
        timesteps = (u * self.scheduler.config.num_train_timesteps).long().to(self.device)
        noisy, target = self.scheduler.add_noise(clean, noise, timesteps), noise.clone()
        pairs = edits.pairs(rng, noise[last], self.scheduler) if self.paired else None
        if pairs:
            captions[last], timesteps[last], noisy[last], target[last] = pairs.prompts, pairs.timesteps, pairs.edit, pairs.difference
            moves[last] = pairs.moves
        return Batch(captions, share, embedding_noise, moves, noisy, timesteps, target, in_latents, pairs)


def loss(parts: Any, words: CLIPTokenizer, scheduler: Any, batch: Batch) -> torch.Tensor:
    """The weighted mean squared error of a batch.

    Usual images have min-SNR weights (arXiv 2303.09556), with the weights of arXiv 2310.08442 at high noise; the images of
    ``batch.in_latents`` have ``LOUD_WEIGHT / SNR``. For pairs, the error is that of the difference of the two predictions.

    Args:
        parts: the modules ``unet`` and ``text``.
    """
    noisy, timesteps, in_latents = batch.noisy, batch.timesteps, batch.in_latents.to(batch.noisy.device)
    states, others = parts["text"](tokens(words, batch.captions, noisy.device)).last_hidden_state.chunk(2)
    states = torch.lerp(states, others, torch.tensor(batch.share, device=noisy.device)[:, None, None].to(states))
    deviation = batch.embedding_noise.to(noisy.device)
    states_noise = deviation * torch.randn(len(deviation), *states.shape[1:], device=noisy.device)
    states = states + states_noise.repeat_interleave(GROUP, 0) + batch.moves
    inputs, input_timesteps = noisy, timesteps
    if pairs := batch.pairs:  # the photos are appended to the batch
        last = slice(len(noisy) - len(pairs.photo), len(noisy))
        inputs, input_timesteps = torch.cat([noisy, pairs.photo]), torch.cat([timesteps, timesteps[last]])
        states = torch.cat([states, states[last] + pairs.photo_moves - pairs.moves])
    predicted, of_photo = parts["unet"](inputs, input_timesteps, states).sample.float().tensor_split([len(noisy)])
    snr = compute_snr(scheduler, timesteps)
    usual = snr.clamp(max=5) / snr / snr.clamp(max=1).sqrt()
    weight = torch.where(in_latents, LOUD_WEIGHT / snr, usual)
    error = predicted - batch.target
    error[len(error) - len(of_photo) :] -= of_photo
    common = error.unflatten(0, (-1, GROUP)).mean(1).repeat_interleave(GROUP, 0)
    squares = torch.stack([(error - common).square(), common.square()]).mean((2, 3, 4))
    return ((squares[0] * torch.where(in_latents, DEVIATION_WEIGHT, 1) + squares[1]) * weight).mean()
