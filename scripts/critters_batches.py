"""The batches of the U-Net's training and their loss: usual groups of pictures, loud ones and edits; docs/critters.md says why."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from critters_lessons import GROUP, Edits, Ways, members, spoken, tokens
from diffusers.training_utils import compute_snr
from transformers import CLIPTokenizer

LOUD_WEIGHT = 0.2  # of the loss in latents, of the part of a batch that is told all
APART = 10  # weight, in that part, of what sets the errors of a group apart: there the captions are heard, the rest of the error is common
ROUGH = 0.15  # largest standard deviation of the noise on the embeddings of texts, as optimised ones are off them


@dataclass
class Batch:
    """What the U-Net is shown and told in one step: ``N`` pictures, in groups that share noise and timestep.

    Args:
        told: two captions of each picture, all the first ones before the second ones.
        share: of the second in what is told, ``[N]``.
        rough: standard deviation of the noise on the embeddings of each group, ``[N / GROUP, 1, 1]``.
        moves: what edits add to the embeddings, ``[N, tokens, width]``, or a zero where there are none.
        noisy: latents, ``[N, 8, 8, 8]``.
        timesteps: ``[N]``.
        target: what is to be predicted, as ``noisy``.
        aloud: whether the loss of a picture is weighed as one in latents, and what sets it apart from its group more, ``[N]``.
        pairs: of the last pictures, which are edits on their way, the photos; None where there are none.
    """

    told: list[str]
    share: list[float]
    rough: torch.Tensor
    moves: torch.Tensor
    noisy: torch.Tensor
    timesteps: torch.Tensor
    target: torch.Tensor
    aloud: torch.Tensor
    pairs: Ways | None


@dataclass
class Batches:
    """Draws batches of so many groups: loud ones first, edits last, the usual ones between them.

    Args:
        data: latents of all neighbours, ``[pictures, 8, 8, 8]``.
        scheduler: that of the base, which adds the noise.
        spread: standard deviation of what the VAE's own noise adds to latents.
        groups: of a batch.
        loud, edited: how many of them are told all there is to tell, and how many are edits.
        ways: how many of the edits are on their way.
        loud_from: where the timesteps of the loud part begin, in [0, 1).
        device: where the batch is to be.
    """

    data: torch.Tensor
    scheduler: Any
    spread: float
    groups: int
    loud: int
    edited: int
    ways: int
    loud_from: float
    device: str

    def drawn(self, rng: np.random.Generator, edits: Edits) -> Batch:
        """One batch; its edits are some of these."""
        size, groups = self.groups * GROUP, self.groups
        indices = members(rng, groups, len(self.data))
        loud = (torch.arange(groups) < self.loud).repeat_interleave(GROUP)
        told, share = spoken(indices, loud.tolist(), random.Random(int(rng.integers(2**62))))
        clean = self.data[indices].to(self.device).float()
        noise = torch.randn(groups, *clean.shape[1:], device=self.device).repeat_interleave(GROUP, 0)
        u = torch.cat([(torch.arange(some) + torch.rand(some)) / max(some, 1) for some in (self.loud, groups - self.loud)])
        u = u.repeat_interleave(GROUP)
        u = torch.where(loud, self.loud_from + (1 - self.loud_from) * u, u)
        aloud, moves, rough = loud.clone(), torch.zeros(()), ROUGH * torch.rand(groups, 1, 1)
        first, last = size - self.edited * GROUP, slice(size - self.ways * GROUP, size)
        if self.edited:  # in place of the last groups
            part = slice(first, last.start)
            told[part], clean[part], u[part], moved = edits.mixed(rng, self.edited - self.ways)
            share[first:], aloud[first:], rough[-self.edited :] = [0.0] * (self.edited * GROUP), True, 0.0
            moves = F.pad(moved, (0, 0, 0, 0, first, self.ways * GROUP))
        clean = clean + self.spread * torch.randn_like(clean[::GROUP]).repeat_interleave(GROUP, 0)
        timesteps = (u * self.scheduler.config.num_train_timesteps).long().to(self.device)
        noisy, target = self.scheduler.add_noise(clean, noise, timesteps), noise.clone()
        pairs = edits.ways(rng, noise[last], self.scheduler) if self.ways else None
        if pairs:
            told[last], timesteps[last], noisy[last], target[last] = pairs.sentences, pairs.timesteps, pairs.edit, pairs.difference
            moves[last] = pairs.moves
        return Batch(told, share, rough, moves, noisy, timesteps, target, aloud, pairs)


def loss(parts: Any, words: CLIPTokenizer, scheduler: Any, batch: Batch) -> torch.Tensor:
    """The loss of a batch, of the modules ``unet`` and ``text``."""
    noisy, timesteps, aloud = batch.noisy, batch.timesteps, batch.aloud.to(batch.noisy.device)
    states, others = parts["text"](tokens(words, batch.told, noisy.device)).last_hidden_state.chunk(2)
    states = torch.lerp(states, others, torch.tensor(batch.share, device=noisy.device)[:, None, None].to(states))
    rough = batch.rough.to(noisy.device) * torch.randn(len(batch.rough), *states.shape[1:], device=noisy.device)
    states = states + rough.repeat_interleave(GROUP, 0) + batch.moves
    shown, at = noisy, timesteps
    if pairs := batch.pairs:  # of these the photo is predicted too
        last = slice(len(noisy) - len(pairs.photo), len(noisy))
        shown, at = torch.cat([noisy, pairs.photo]), torch.cat([timesteps, timesteps[last]])
        states = torch.cat([states, states[last] + pairs.photo_moves - pairs.moves])
    predicted, of_photo = parts["unet"](shown, at, states).sample.float().tensor_split([len(noisy)])
    snr = compute_snr(scheduler, timesteps)
    usual = snr.clamp(max=5) / snr / snr.clamp(max=1).sqrt()  # min-SNR (arXiv 2303.09556); where noise rules, arXiv 2310.08442
    weight = torch.where(aloud, LOUD_WEIGHT / snr, usual)
    error = predicted - batch.target
    error[len(error) - len(of_photo) :] -= of_photo
    common = error.unflatten(0, (-1, GROUP)).mean(1).repeat_interleave(GROUP, 0)
    squares = torch.stack([(error - common).square(), common.square()]).mean((2, 3, 4))
    return ((squares[0] * torch.where(aloud, APART, 1) + squares[1]) * weight).mean()
