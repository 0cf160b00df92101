"""Captions and edits that the U-Net of the embedded base is trained on; docs/internals/embedded-base.md gives the reasons.

Images come in groups that share noise and timestep, so that the images of a group differ only in their scenes and captions. A group whose
captions name every attribute and factor of its scenes is called *loud*.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CLIPTokenizer

from imagic_lora.critters import ATTRIBUTES, Scene, longest_caption, render, sample_caption, scene_at
from imagic_lora.critters.scene import describe, displaced
from imagic_lora.sampling.inversion import NoiseRecorder

MOVED = {"shade": 3, "size": 1, "x": 1, "y": 1, "spots": 4, "sun": 1, "horizon": 1, "tint": 2, "facing": 1}
"""Weight of each factor when a neighbour is drawn: higher where the U-Net learns the words for it slowly."""
GROUP = 4  # neighbours in the U-Net's training set, which differ in one or two factors of the identity
EDITS = 192  # edits created at a time
EDITS_EVERY = 120  # training steps between two creations of edits
EDITS_FROM = 0.25  # smallest timestep of edits, in [0, 1)
SAMPLER_STEPS = 23  # of an edit with the default settings
EDIT_STEPS = 36  # of optimising an embedding; at EDIT_RATES they move it as far as stage 1's 60 steps at 5e-2
EDIT_RATES = (5.5e-2, 6.5e-2)  # range of the learning rate of that optimisation


def neighbour(index: int) -> Scene:
    """Training scene number ``index`` of the U-Net.

    The first scene of a group is an independent one. The others differ from it in one or two factors of the identity, each moved by half of
    its range (modulo the range), so that every factor is still distributed uniformly.
    """
    scene, rng = scene_at("train", index // GROUP), random.Random(f"critters/neighbour/{index}")
    if index % GROUP == 0:
        return scene
    for name in set(rng.choices(tuple(MOVED), tuple(MOVED.values()), k=rng.choice((1, 2)))):
        scene = displaced(scene, name)
    return scene


def random_groups(rng: np.random.Generator, groups: int, images: int) -> np.ndarray:
    """Indices of all members of ``groups`` random groups among the first ``images`` images, ``[groups * GROUP]``."""
    return (GROUP * rng.integers(0, images // GROUP, groups)[:, None] + np.arange(GROUP)).ravel()


def tensor(batch: np.ndarray, device: str) -> torch.Tensor:
    """Images as ``[B, 3, 64, 64]`` in [-1, 1]."""
    return torch.from_numpy(batch.copy()).permute(0, 3, 1, 2).to(device).float().div(127.5).sub(1)


@torch.no_grad()
def scaled(vae: Any, batch: np.ndarray, device: str) -> torch.Tensor:
    """The scaled latent means of images, ``[B, 8, 8, 8]``."""
    return vae.encode(tensor(batch, device)).latent_dist.mean.float() * vae.config.scaling_factor


def tokens(words: CLIPTokenizer, texts: list[str], device: torch.device | str) -> torch.Tensor:
    """Token ids of texts, padded to the tokenizer's maximum length, ``[B, T]``."""
    return words(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)


def changed(scene: Scene, draw: random.Random) -> tuple[Scene, str]:
    """The scene with another value of one attribute (the pose with probability 0.5), and the name of that attribute."""
    name = "pose" if draw.random() < 0.5 else draw.choice(("colour", "place", "thing", "animal"))
    return scene.edited(**{name: draw.choice([value for value in ATTRIBUTES[name] if value != getattr(scene, name)])}), name


def edit_prompt(scene: Scene, name: str, draw: random.Random) -> str:
    """A prompt with which a user asks for one attribute of a scene."""
    return describe(scene, {name}, pose_first=draw.random() < 0.5)


def caption_pairs(indices: np.ndarray, loud: list[bool], draw: random.Random) -> tuple[list[str], list[float]]:
    """Two captions of each image, whose embeddings are interpolated, and the weight of the second.

    A loud image has a caption that names everything. In 60% of the loud groups the two captions contradict each other in one attribute:
    the first is the whole caption of a scene before an edit, the second the prompt that asks for the edit. The caption with the larger
    weight is true of the image; in three of four cases it is the prompt. 10% of the other groups have the empty caption, for
    classifier-free guidance; half of the remaining ones have two true captions. All images of a group have the same type of captions.

    Args:
        indices: of training scenes, whole groups, ``[N]``.
        loud: whether the caption of an image names everything, ``[N]``, equal within a group.

    Returns:
        ``2 * N`` captions, all the first ones before the second ones; the weights of the second in [0, 1), ``[N]``.
    """
    first, second, share = [], [], []
    for k, complete in zip(indices[::GROUP], loud[::GROUP], strict=True):
        seeds, weight, happened = (draw.random(), draw.random()), draw.random(), draw.random() < 0.75
        empty, mixed = draw.random() < 0.1, draw.random() < (0.6 if complete else 0.5)
        for index in range(int(k), int(k) + GROUP):
            scene, first_draw, second_draw = neighbour(index), random.Random(seeds[0]), random.Random(seeds[1])
            if not complete:
                first.append("" if empty else sample_caption(scene, first_draw))
                second.append(sample_caption(scene, second_draw))
                share.append(weight if mixed and not empty else 0.0)
            elif not mixed:
                first.append(longest_caption(scene))
                second.append("")
                share.append(0.0)
            else:
                counterpart, name = changed(scene, first_draw)
                before, after = (counterpart, scene) if happened else (scene, counterpart)
                first.append(longest_caption(before))
                second.append(edit_prompt(after, name, second_draw))
                share.append(0.5 + 0.4 * weight if happened else 0.5 * weight)
    return first + second, share


def random_etas(happened: torch.Tensor) -> torch.Tensor:
    """A random eta for each edit, large where the edit has happened and small where it has not.

    70% are close to the etas with which the defaults edit (0.7) and invert (0.35): a small share of a large change and a large share of a
    small change give similar embeddings, which can be distinguished only if the share is known.

    Args:
        happened: whether the image at this eta is the one after the edit, bool.
    """
    near, u = torch.rand(len(happened)) < 0.7, torch.rand(len(happened))
    after = torch.where(near, 0.66 + 0.08 * u, 0.55 + 0.35 * u)
    before = torch.where(near, 0.31 + 0.08 * u, 0.4 * u)
    return torch.where(happened, after, before)


@cache
def difference_shares(scheduler: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Timesteps of an edit from edit-friendly noise (arXiv 2304.06140), and the share of the edit that is in the latents at each of them.

    A share of 1 is the whole difference between the clean latents of edit and photo. The shares hold before each step, if the two predicted
    clean latents differ by that difference at every step. A step adds the same noise to both, so their difference follows the mean of the
    DDIM step, starting at zero.

    Returns:
        Timesteps and shares, ``[SAMPLER_STEPS]`` each.
    """
    path: Any = NoiseRecorder.from_config(scheduler.config)
    path.set_timesteps(SAMPLER_STEPS)
    share, shares = torch.zeros(1), []
    for t in path.timesteps:
        alpha = path.alphas_cumprod[t]
        shares.append(share)
        share = path.mean((share - alpha.sqrt()) / (1 - alpha).sqrt(), int(t), share, eta=1.0)
    return path.timesteps, torch.cat(shares)


@dataclass
class EditPairs:
    """Edits at an intermediate step of the sampler, each with its photo in the same noise.

    An edit equals the photo plus the accumulated difference of the two predicted clean latents. So the difference of the predictions is
    trained; an error that both predictions share has no effect.

    Args:
        prompts: target prompt of each edit.
        timesteps: ``[N]``.
        edit, photo: noisy latents, ``[N, 8, 8, 8]``.
        difference: noise to be predicted for the edit minus noise to be predicted for the photo.
        moves, photo_moves: added to the embedding of the prompt for the edit and for the photo, ``[N, tokens, width]``.
    """

    prompts: list[str]
    timesteps: torch.Tensor
    edit: torch.Tensor
    photo: torch.Tensor
    difference: torch.Tensor
    moves: torch.Tensor
    photo_moves: torch.Tensor


@dataclass
class Edits:
    """Edits as Imagic sees them: embeddings optimised on the image before the edit, starting from the target prompt.

    Args:
        prompts: target prompt of each edit.
        before, after: latents of the images before and after the edit, ``[N, 8, 8, 8]``.
        moves: added to the embedding of the prompt by the optimisation, ``[N, tokens, width]``.
    """

    prompts: list[str]
    before: torch.Tensor
    after: torch.Tensor
    moves: torch.Tensor

    def __len__(self) -> int:
        return len(self.prompts)

    @classmethod
    def load(cls, path: Path) -> Edits:
        """The edits in a file; no edits if there is no file."""
        if not path.exists():
            return cls([], *(torch.zeros(0) for _ in range(3)))
        state = torch.load(path, weights_only=True)
        return cls(state["sentences"], state["before"], state["after"], state["moves"])

    def add(self, others: Edits, path: Path) -> None:
        """Adds edits to these and writes all of them to a file."""
        for name, value in vars(others).items():
            mine = getattr(self, name)
            setattr(self, name, mine + value if isinstance(value, list) else torch.cat([mine, value]) if len(mine) else value)
        part = path.with_suffix(".part")  # "sentences" keeps old files readable
        torch.save({"sentences": self.prompts, "before": self.before, "after": self.after, "moves": self.moves}, part)
        part.rename(path)

    @classmethod
    def create(cls, parts: Any, words: CLIPTokenizer, vae: Any, scheduler: Any, rng: np.random.Generator, images: int) -> Edits:
        """``EDITS`` random edits, with embeddings optimised on the current weights.

        Args:
            parts: the modules ``unet`` and ``text``.
            images: size of the training set that the edits are taken from.
        """
        draw, device = random.Random(int(rng.integers(2**62))), parts["unet"].device
        pairs: list[tuple[Scene, Scene]] = []
        prompts: list[str] = []
        for group in rng.integers(0, images // GROUP, EDITS // GROUP):
            seeds = draw.random(), draw.random()
            for index in range(GROUP * int(group), GROUP * int(group) + GROUP):
                scene = neighbour(index)
                after, name = changed(scene, random.Random(seeds[0]))
                if name == "thing":  # the benchmark only adds things
                    scene = replace(scene, thing="none")
                    after = scene.edited(thing=random.Random(seeds[1]).choice(("hat", "ball")))
                pairs.append((scene, after))
                prompts.append(edit_prompt(after, name, random.Random(seeds[1])))
        before, after = (scaled(vae, np.stack([np.asarray(render(pair[k])) for pair in pairs]), device) for k in (0, 1))
        rate = math.exp(rng.uniform(math.log(EDIT_RATES[0]), math.log(EDIT_RATES[1])))
        parts.requires_grad_(False)
        with torch.no_grad():
            start = parts["text"](tokens(words, prompts, device)).last_hidden_state.float()
        chunks = zip(before.split(64), start.split(64), strict=True)
        cast = torch.is_autocast_enabled(device.type)
        with torch.autocast(device.type, enabled=cast, cache_enabled=False):  # the cache would keep the first step's cast of the embeddings
            moved = torch.cat([cls._optimised(parts["unet"], scheduler, clean, some, rate) for clean, some in chunks])
        parts.requires_grad_(True)
        return cls(prompts, before, after, moved - start)

    def mixed(self, rng: np.random.Generator, groups: int) -> tuple[list[str], torch.Tensor, torch.Tensor, torch.Tensor]:
        """Random groups of edits at a random eta each; about 65% of the groups show the image after the edit.

        Returns:
            The prompts; the latents of the image at that eta; timesteps in [0, 1); what is added to the embeddings of the prompts.
        """
        which, happened = random_groups(rng, groups, len(self)), torch.rand(groups) < 0.65
        eta = random_etas(happened).repeat_interleave(GROUP).to(self.moves)
        happened = happened.repeat_interleave(GROUP).to(self.after.device)
        latents = torch.where(happened[:, None, None, None], self.after[which], self.before[which])
        times = EDITS_FROM + (1 - EDITS_FROM) * ((torch.arange(groups) + torch.rand(groups)) / groups).repeat_interleave(GROUP)
        return [self.prompts[k] for k in which], latents, times, (1 - eta)[:, None, None] * self.moves[which]

    def pairs(self, rng: np.random.Generator, noise: torch.Tensor, scheduler: Any) -> EditPairs:
        """Random groups of edits at random etas and sampler steps, without the sampler's first two and last two.

        Args:
            noise: ``[N, 8, 8, 8]``, equal within a group; added to the photos.
        """
        groups, which = len(noise) // GROUP, random_groups(rng, len(noise) // GROUP, len(self))
        timesteps, share = difference_shares(scheduler)
        k = 2 + ((SAMPLER_STEPS - 4) * (torch.arange(groups) + torch.rand(groups)) / groups).long().repeat_interleave(GROUP)
        t, off = (
            timesteps[k].to(noise.device),
            (0.75 + 0.3 * torch.rand(groups)).repeat_interleave(GROUP),
        )  # the edit may be behind or ahead of that share
        share, alpha = (value.to(noise)[:, None, None, None] for value in (share[k] * off, scheduler.alphas_cumprod[timesteps[k]]))
        apart, moves = (self.after - self.before)[which], self.moves[which]
        photo = scheduler.add_noise(self.before[which], noise, t)
        edit_eta, photo_eta = (
            random_etas(torch.full((groups,), after)).repeat_interleave(GROUP)[:, None, None].to(moves) for after in (True, False)
        )
        difference = (share - alpha.sqrt()) * apart / (1 - alpha).sqrt()
        prompts = [self.prompts[k] for k in which]
        return EditPairs(prompts, t, photo + share * apart, photo, difference, (1 - edit_eta) * moves, (1 - photo_eta) * moves)

    @staticmethod
    def _optimised(unet: Any, scheduler: Any, clean: torch.Tensor, start: torch.Tensor, rate: float) -> torch.Tensor:
        """Embeddings optimised against latents with a frozen U-Net, as stage 1 does; timesteps follow a golden-ratio sequence."""
        embeddings = start.clone().requires_grad_()
        optimizer, offset = torch.optim.Adam([embeddings], rate), torch.rand(len(clean), device=clean.device)
        for step in range(EDIT_STEPS):
            t = ((offset + step * 0.618034) % 1 * scheduler.config.num_train_timesteps).long()
            noise = torch.randn_like(clean)
            predicted = unet(scheduler.add_noise(clean, noise, t), t, embeddings).sample
            (predicted.float() - noise).square().mean((1, 2, 3)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return embeddings.detach()
