"""Scores by other models, on tiny random ones: closed forms, and models that are not there."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import each
from models import MEAN, SIDE, STD, save_clip, save_dino
from PIL import Image
from tiny import tokenizer
from torch import Tensor
from transformers import CLIPModel, Dinov2Model

from imagic_lora.core.errors import ImagicError
from imagic_lora.methods.comparison.captions import captioned
from imagic_lora.sampling.sweeps.metrics import clip_metric, dino_metric, measured


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dino(tmp_path_factory.mktemp("dino"))


def ramp(turned: bool = False) -> Image.Image:
    """A picture of the models' own size."""
    image = Image.linear_gradient("L").resize((SIDE, SIDE))
    return (image.rotate(90) if turned else image).convert("RGB")


def pixels(image: Image.Image) -> Tensor:
    """What the models are given."""
    values = torch.from_numpy(np.array(image)) / 255
    return ((values - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)[None]


def test_clip_is_a_cosine_of_its_embeddings(clip_folder: Path) -> None:
    """By the logits of the model itself; the direction by the differences of its embeddings, and only with a source prompt."""
    model, words = CLIPModel.from_pretrained(clip_folder), tokenizer()
    ids = words(["a cat", "a dog"], return_tensors="pt").input_ids
    with torch.no_grad():
        output = model(input_ids=ids, pixel_values=torch.cat([pixels(ramp()), pixels(ramp(True))]))
    cosines = output.logits_per_image / model.logit_scale.exp()
    plain = clip_metric(str(clip_folder), True, ramp(), "a cat", None)
    assert plain(ramp(True)) == {"clip": pytest.approx(cosines[1, 0].item(), abs=1e-5)}
    images, texts = F.normalize(output.image_embeds, dim=-1), F.normalize(output.text_embeds, dim=-1)
    direction = F.cosine_similarity(images[1] - images[0], texts[0] - texts[1], dim=0).item()
    found = clip_metric(str(clip_folder), True, ramp(), "a cat", "a dog")(ramp(True))
    assert found["clip_direction"] == pytest.approx(direction, abs=1e-3)


def test_dino_is_a_cosine_with_the_photo(clip_folder: Path, dino_folder: Path) -> None:
    """1 for the photo itself; several metrics together."""
    dino = dino_metric(str(dino_folder), True, ramp())
    assert dino(ramp()) == {"dino": pytest.approx(1)}
    with torch.no_grad():
        first, second = Dinov2Model.from_pretrained(dino_folder)(torch.cat([pixels(ramp()), pixels(ramp(True))])).pooler_output
    assert dino(ramp(True)) == {"dino": pytest.approx(F.cosine_similarity(first, second, dim=0).item(), abs=1e-5)}
    clip = clip_metric(str(clip_folder), True, ramp(), "a cat", None)
    assert set(measured([clip, dino], ramp())) == {"clip", "dino"}


@each("flag, source", [("--clip", "nobody/nothing"), ("--dino", "nobody/nothing"), ("--clip", "dino"), ("--dino", "clip")])
def test_a_model_that_cannot_be_used_is_an_error(clip_folder: Path, dino_folder: Path, flag: str, source: str) -> None:
    """It is not in the cache, or of another kind; the message says what to do."""
    name = {"clip": str(clip_folder), "dino": str(dino_folder)}.get(source, source)
    load = {"--clip": lambda: clip_metric(name, True, ramp(), "a cat", None), "--dino": lambda: dino_metric(name, True, ramp())}[flag]
    with pytest.raises(ImagicError, match=f"{flag} {name} cannot be loaded") as caught:
        load()
    assert "--offline" in caught.value.remedy


def test_offline_asks_no_other_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even for an adapter of the model, which the loaders of transformers look for first."""
    asked: list[object] = []

    def lookup(host: object, *_: object, **__: object) -> None:
        asked.append(host)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    loads = [
        lambda: clip_metric("nobody/nothing", True, ramp(), "a cat", None),
        lambda: dino_metric("nobody/nothing", True, ramp()),
        lambda: captioned(ramp(), "nobody/nothing", True),
    ]
    for load in loads:
        with pytest.raises(ImagicError, match="nobody/nothing cannot be loaded"):
            load()
    assert asked == []


def test_a_pickle_is_not_read(clip_folder: Path, tmp_path: Path) -> None:
    """Only safetensors files are."""
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((clip_folder / name).read_bytes())
    torch.save(CLIPModel.from_pretrained(clip_folder).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ImagicError, match="cannot be loaded"):
        clip_metric(str(tmp_path), True, ramp(), "a cat", None)
