"""What the U-Net of the embedded base is shown and told in its training; docs/critters.md says why.

Pictures come in groups that share the noise and the timestep, so that what tells them apart is what they are told.
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
"""How often the scenes of a group differ in each factor: more often where the caption is slow to be heard."""
GROUP = 4  # neighbours in the U-Net's training set, which differ in one or two factors of the identity
EDITS, EDITS_EVERY, EDITS_FROM = 192, 120, 0.25  # how many are made at a time, after how many steps more, and where their timesteps begin
WAY_STEPS = 23  # of the sampler by which the defaults edit
EDIT_STEPS, EDIT_RATES = 36, (5.5e-2, 6.5e-2)  # of the optimisation of their embeddings, which so move as far as in stage 1's 60 at 5e-2


def neighbour(index: int) -> Scene:
    """Training scene number ``index`` of the U-Net: the first of a group is one of its own, the others differ from it in one or two factors
    of the identity, each moved by half of its range (around its end), so that every factor still is drawn evenly."""
    scene, rng = scene_at("train", index // GROUP), random.Random(f"critters/neighbour/{index}")
    if index % GROUP == 0:
        return scene
    for name in set(rng.choices(tuple(MOVED), tuple(MOVED.values()), k=rng.choice((1, 2)))):
        scene = displaced(scene, name)
    return scene


def members(rng: np.random.Generator, groups: int, pictures: int) -> np.ndarray:
    """Indices of all of ``groups`` random groups, of the first ``pictures``."""
    return (GROUP * rng.integers(0, pictures // GROUP, groups)[:, None] + np.arange(GROUP)).ravel()


def tensor(batch: np.ndarray, device: str) -> torch.Tensor:
    """Pictures as ``[B, 3, 64, 64]`` in [-1, 1]."""
    return torch.from_numpy(batch.copy()).permute(0, 3, 1, 2).to(device).float().div(127.5).sub(1)


@torch.no_grad()
def scaled(vae: Any, batch: np.ndarray, device: str) -> torch.Tensor:
    """The scaled latent means of pictures, ``[B, 8, 8, 8]``."""
    return vae.encode(tensor(batch, device)).latent_dist.mean.float() * vae.config.scaling_factor


def tokens(words: CLIPTokenizer, texts: list[str], device: torch.device | str) -> torch.Tensor:
    return words(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)


def changed(scene: Scene, draw: random.Random) -> tuple[Scene, str]:
    """The scene with another value of one attribute, in half of the cases the pose, and the name of that."""
    name = "pose" if draw.random() < 0.5 else draw.choice(("colour", "place", "thing", "animal"))
    return scene.edited(**{name: draw.choice([value for value in ATTRIBUTES[name] if value != getattr(scene, name)])}), name


def sentence(scene: Scene, name: str, draw: random.Random) -> str:
    """What a user would write to ask for one attribute of a scene."""
    return describe(scene, {name}, before=draw.random() < 0.5)


def spoken(indices: np.ndarray, loud: list[bool], draw: random.Random) -> tuple[list[str], list[float]]:
    """What the U-Net is told of each picture: two captions, the first ones before the second ones, and the share of the second.

    A loud picture is told all that there is to tell. In six of ten loud groups the two contradict each other in one attribute: all of a
    scene before an edit, and the sentence that asks for it; what has the larger share is true of the picture, in three of four the
    sentence. Of the other groups one in ten is told nothing, for guidance; half of the rest hear two true captions, mixed. All of a group
    hear the same kind.
    """
    first, second, share = [], [], []
    for k, all_said in zip(indices[::GROUP], loud[::GROUP], strict=True):
        seeds, part, happened = (draw.random(), draw.random()), draw.random(), draw.random() < 0.75
        silent, mixed = draw.random() < 0.1, draw.random() < (0.6 if all_said else 0.5)
        for index in range(int(k), int(k) + GROUP):
            scene, one, other = neighbour(index), random.Random(seeds[0]), random.Random(seeds[1])
            if not all_said:
                first.append("" if silent else sample_caption(scene, one))
                second.append(sample_caption(scene, other))
                share.append(part if mixed and not silent else 0.0)
            elif not mixed:
                first.append(longest_caption(scene))
                second.append("")
                share.append(0.0)
            else:
                counterpart, name = changed(scene, one)
                before, after = (counterpart, scene) if happened else (scene, counterpart)
                first.append(longest_caption(before))
                second.append(sentence(after, name, other))
                share.append(0.5 + 0.4 * part if happened else 0.5 * part)
    return first + second, share


def etas(happened: torch.Tensor) -> torch.Tensor:
    """An eta for each edit, at which it has happened or not yet.

    Seven in ten are near those at which the defaults edit (0.7) and invert (0.35): in a mixture, a little of much looks like much of a
    little unless the share is known.
    """
    near, u = torch.rand(len(happened)) < 0.7, torch.rand(len(happened))
    after = torch.where(near, 0.66 + 0.08 * u, 0.55 + 0.35 * u)
    before = torch.where(near, 0.31 + 0.08 * u, 0.4 * u)
    return torch.where(happened, after, before)


@cache
def gone(scheduler: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Timesteps of an edit from edit-friendly noise (arXiv 2304.06140), and the share of the difference between edit and photo that is in
    the latents before each of them, if at every step the clean latents predicted of the two differ by just that.

    What a step adds is the same for both, so their difference goes the way of DDIM from nothing, adding nothing.
    """
    path: Any = NoiseRecorder.from_config(scheduler.config)
    path.set_timesteps(WAY_STEPS)
    share, found = torch.zeros(1), []
    for t in path.timesteps:
        known = path.alphas_cumprod[t]
        found.append(share)
        share = path.mean((share - known.sqrt()) / (1 - known).sqrt(), int(t), share, eta=1.0)
    return path.timesteps, torch.cat(found)


@dataclass
class Ways:
    """Edits on their way from the photo's noise, each beside the photo itself in the same noise.

    An edit turns out as the photo plus what the two predictions of clean latents differ by; so it is that which is to be right, and what
    both of them miss alike does no harm.

    Args:
        sentences: of each edit, as a user would ask for it.
        timesteps: ``[N]``.
        edit, photo: noisy latents, ``[N, 8, 8, 8]``.
        difference: of the noise to be predicted, edit less photo.
        moves, photo_moves: what is added to the embedding of the sentence, ``[N, tokens, width]``.
    """

    sentences: list[str]
    timesteps: torch.Tensor
    edit: torch.Tensor
    photo: torch.Tensor
    difference: torch.Tensor
    moves: torch.Tensor
    photo_moves: torch.Tensor


@dataclass
class Edits:
    """Edits as Imagic sees them: embeddings optimised on the picture before, from the sentence that asks for the edit.

    Args:
        sentences: of each edit, as a user would ask for it.
        before, after: latents of both pictures, ``[N, 8, 8, 8]``.
        moves: what the optimisation added to the embedding of the sentence, ``[N, tokens, width]``.
    """

    sentences: list[str]
    before: torch.Tensor
    after: torch.Tensor
    moves: torch.Tensor

    def __len__(self) -> int:
        return len(self.sentences)

    @classmethod
    def kept(cls, path: Path) -> Edits:
        """Those that a file keeps, or none."""
        kept = torch.load(path, weights_only=True) if path.exists() else {}
        return cls(**kept) if kept else cls([], *(torch.zeros(0) for _ in range(3)))

    def add(self, others: Edits, path: Path) -> None:
        """Takes others in, and keeps all in a file."""
        for name, value in vars(others).items():
            mine = getattr(self, name)
            setattr(self, name, mine + value if isinstance(value, list) else torch.cat([mine, value]) if len(mine) else value)
        part = path.with_suffix(".part")
        torch.save(vars(self), part)
        part.rename(path)

    @classmethod
    def made(cls, parts: Any, words: CLIPTokenizer, vae: Any, scheduler: Any, rng: np.random.Generator, pictures: int) -> Edits:
        """``EDITS`` of them of the first ``pictures``, by the weights as they are, at a rate drawn from ``EDIT_RATES``."""
        draw, device = random.Random(int(rng.integers(2**62))), parts["unet"].device
        pairs: list[tuple[Scene, Scene]] = []
        sentences: list[str] = []
        for group in rng.integers(0, pictures // GROUP, EDITS // GROUP):
            seeds = draw.random(), draw.random()
            for index in range(GROUP * int(group), GROUP * int(group) + GROUP):
                scene = neighbour(index)
                after, name = changed(scene, random.Random(seeds[0]))
                if name == "thing":  # added, never taken away, as in the benchmark
                    scene = replace(scene, thing="none")
                    after = scene.edited(thing=random.Random(seeds[1]).choice(("hat", "ball")))
                pairs.append((scene, after))
                sentences.append(sentence(after, name, random.Random(seeds[1])))
        before, after = (scaled(vae, np.stack([np.asarray(render(pair[k])) for pair in pairs]), device) for k in (0, 1))
        rate = math.exp(rng.uniform(math.log(EDIT_RATES[0]), math.log(EDIT_RATES[1])))
        parts.requires_grad_(False)
        with torch.no_grad():
            start = parts["text"](tokens(words, sentences, device)).last_hidden_state.float()
        each = zip(before.split(64), start.split(64), strict=True)
        cast = torch.is_autocast_enabled(device.type)
        with torch.autocast(device.type, enabled=cast, cache_enabled=False):  # a cache holds the embeddings as they are in the first step
            moved = torch.cat([cls._optimised(parts["unet"], scheduler, clean, some, rate) for clean, some in each])
        parts.requires_grad_(True)
        return cls(sentences, before, after, moved - start)

    def mixed(self, rng: np.random.Generator, groups: int) -> tuple[list[str], torch.Tensor, torch.Tensor, torch.Tensor]:
        """Groups of them at random etas, one for each: the sentences, the latents of what is to be seen there, times in [0, 1), and what is
        added to the embeddings of the sentences. About two in three have happened."""
        which, happened = members(rng, groups, len(self)), torch.rand(groups) < 0.65
        eta = etas(happened).repeat_interleave(GROUP).to(self.moves)
        happened = happened.repeat_interleave(GROUP).to(self.after.device)
        seen = torch.where(happened[:, None, None, None], self.after[which], self.before[which])
        times = EDITS_FROM + (1 - EDITS_FROM) * ((torch.arange(groups) + torch.rand(groups)) / groups).repeat_interleave(GROUP)
        return [self.sentences[k] for k in which], seen, times, (1 - eta)[:, None, None] * self.moves[which]

    def ways(self, rng: np.random.Generator, noise: torch.Tensor, scheduler: Any) -> Ways:
        """Groups of them on the way, at random etas and timesteps (but the first two of the sampler's and the last two), in this noise."""
        groups, which = len(noise) // GROUP, members(rng, len(noise) // GROUP, len(self))
        timesteps, share = gone(scheduler)
        k = 2 + ((WAY_STEPS - 4) * (torch.arange(groups) + torch.rand(groups)) / groups).long().repeat_interleave(GROUP)
        t, off = timesteps[k].to(noise.device), (0.75 + 0.3 * torch.rand(groups)).repeat_interleave(GROUP)  # it may lag behind, or go ahead
        far, known = (one.to(noise)[:, None, None, None] for one in (share[k] * off, scheduler.alphas_cumprod[timesteps[k]]))
        apart, moves = (self.after - self.before)[which], self.moves[which]
        photo = scheduler.add_noise(self.before[which], noise, t)
        edit, of_photo = (etas(torch.full((groups,), after)).repeat_interleave(GROUP)[:, None, None].to(moves) for after in (True, False))
        difference = (far - known.sqrt()) * apart / (1 - known).sqrt()
        told = [self.sentences[k] for k in which]
        return Ways(told, t, photo + far * apart, photo, difference, (1 - edit) * moves, (1 - of_photo) * moves)

    @staticmethod
    def _optimised(unet: Any, scheduler: Any, clean: torch.Tensor, start: torch.Tensor, rate: float) -> torch.Tensor:
        embeddings = start.clone().requires_grad_()
        optimizer, place = torch.optim.Adam([embeddings], rate), torch.rand(len(clean), device=clean.device)
        for step in range(EDIT_STEPS):
            t = ((place + step * 0.618034) % 1 * scheduler.config.num_train_timesteps).long()
            noise = torch.randn_like(clean)
            predicted = unet(scheduler.add_noise(clean, noise, t), t, embeddings).sample
            (predicted.float() - noise).square().mean((1, 2, 3)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return embeddings.detach()
