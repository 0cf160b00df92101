"""The transformer of Stable Diffusion 3 with one CLIP text encoder, in a folder that takes VAE and text encoder from another base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from common import MODES, PROMPT, array, by_diffusers, by_pipeline, each, opened, tiny_config
from diffusers import AutoencoderKL
from diffusers import StableDiffusion3Pipeline as Pipeline
from test_sd3 import TEXT, canvas, sampled
from tiny import save_tiny, save_tiny_sd3_clip
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from imagic_lora.adapters.store import Store
from imagic_lora.bases.base import Base
from imagic_lora.bases.loading.known import VARIABLE
from imagic_lora.bases.loading.registry import architecture_of, load_base
from imagic_lora.core.config import EditConfig, Mode
from imagic_lora.core.device_config import MemoryConfig
from imagic_lora.core.errors import ImagicError
from imagic_lora.core.runtime import resolve_runtime
from imagic_lora.memory.plan import Assumed
from imagic_lora.sampling.editor import Editor
from imagic_lora.sampling.flow import FlowSampler
from imagic_lora.training.fit import fit, result
from imagic_lora.training.rehearsing.rehearsal import rehearse


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of Stable Diffusion, whose VAE and text encoder the flow shares."""
    return save_tiny(tmp_path_factory.mktemp("others") / "base")


@pytest.fixture(scope="module")
def folder(others: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The transformer and the scheduler of the flow."""
    return save_tiny_sd3_clip(tmp_path_factory.mktemp("clip") / "base", others)


@pytest.fixture(autouse=True)
def listed(folder: Path, others: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The user's list of bases with the flow as ``flow``; a call changes its entry."""
    path = tmp_path / "bases.yaml"
    monkeypatch.setenv(VARIABLE, str(path))

    def write(**changes: Any) -> None:
        path.write_text(yaml.safe_dump({"flow": {"source": str(folder), "parts": str(others)} | changes}))

    write()
    return write


def flow() -> Base:
    return load_base("flow", resolve_runtime(MemoryConfig(device="cpu")))


def plain(folder: Path, others: Path) -> Any:
    """The base, loaded by diffusers alone."""
    texts: Any = {f"{kind}{number}": None for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")}
    vae: Any = AutoencoderKL.from_pretrained(others / "vae")
    vae.register_to_config(shift_factor=0.0)  # this pipeline has no default for it
    pipe = Pipeline.from_pretrained(folder, vae=vae, **texts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def states(others: Path, text: str) -> tuple[Tensor, Tensor]:
    """Last states and pooled state of a prompt, by transformers alone."""
    words = CLIPTokenizer.from_pretrained(others / "tokenizer")
    ids = words(text, padding="max_length", truncation=True, return_tensors="pt").input_ids
    output = CLIPTextModel.from_pretrained(others / "text_encoder")(ids)
    return output.last_hidden_state, output.pooler_output


def test_our_steps_are_those_of_diffusers(folder: Path, others: Path) -> None:
    """The same noise, steps and guidance give the same latents, to 1e-4."""
    (tokens, pooled), (null, null_pooled) = states(others, TEXT), states(others, "")
    expected = plain(folder, others)(
        prompt_embeds=tokens,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=null,
        negative_pooled_prompt_embeds=null_pooled,
        num_inference_steps=6,
        guidance_scale=4.0,
        height=32,
        width=24,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images
    torch.testing.assert_close(sampled(flow(), EditConfig(steps=6, guidance_scale=4.0), [3]), expected, atol=1e-4, rtol=0)


@pytest.mark.slow
@each("mode", MODES)
def test_plain_diffusers_makes_the_same_picture(folder: Path, others: Path, photo_file: Path, tmp_path: Path, mode: Mode) -> None:
    """A fit by the name of the base, and its edit."""
    layers = {"tune": {"targets": "attention+mlp"}} if mode == "lora" else {}
    settings = tiny_config(Path("flow"), mode, **layers)
    adapter = result(fit(photo_file, PROMPT, settings, Store(tmp_path / "store"), mode))
    assert adapter is not None
    assert adapter.record.base.name == "flow"
    config = EditConfig(steps=3, guidance_scale=3.0)
    editor = Editor(flow())
    edited = array(next(editor.edit(adapter, [0.6], [5], config)).image)
    assert np.abs(edited - array(by_diffusers(plain(folder, others), adapter, 0.6, 5, config))).max() <= 1
    with editor.pipeline(adapter, 0.6, config) as edit:
        assert np.abs(edited - array(by_pipeline(edit, 5))).max() <= 1


def test_the_conditioning_is_what_the_plan_expects() -> None:
    """Shapes; the words are those of the prompt; the rehearsal runs the real code."""
    base, architecture = flow(), architecture_of("flow")
    encoded = base.encode_prompt("a cat")
    assert {"tokens": tuple(encoded.tokens.shape), "pooled": tuple(encoded.pooled.shape)} == architecture.conditioning  # type: ignore
    assert base.word_mask("a cat")[0].nonzero().flatten().tolist() == list(range(6))  # start, a, c, a, t, end
    run = tiny_config(Path("flow"), tune={"targets": "attention+mlp"})
    assert set(rehearse(architecture, run, Assumed("cpu", "fp32", "adam")).stages) >= {"embed", "tune"}


def test_an_inverted_photo_comes_back() -> None:
    base = flow()
    one, config = base.encode_prompt(TEXT), EditConfig(steps=20, guidance_scale=1.0, start="inverted", ddim_eta=1.0)
    found = FlowSampler(base, config, canvas(), None).latents([one], [3], [one])
    torch.testing.assert_close(found, base.encode_image(canvas().pixels), atol=1e-3, rtol=0)


# Refused


def test_what_is_nowhere_is_refused(folder: Path, listed: Any, tmp_path: Path) -> None:
    """A folder without its other components, and an entry that names none."""
    with pytest.raises(ImagicError, match=r"vae.config\.json"):
        opened(Path(shutil.copytree(folder, tmp_path / "alone")))
    listed(parts=str(tmp_path / "nowhere"))
    with pytest.raises(ImagicError, match=r"parts = .*nowhere"):
        flow()


def test_other_text_encoders_are_refused(folder: Path, others: Path, listed: Any, tmp_path: Path) -> None:
    """A second one beside a CLIPTextModel, and one of another width."""
    copy = save_tiny_sd3_clip(tmp_path / "wide", others, width=24)
    listed(source=str(copy))
    with pytest.raises(ImagicError, match="pooled_projection_dim, 16 and 24"):
        flow()
    index = json.loads((folder / "model_index.json").read_text()) | {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ImagicError, match="text_encoder_2 beside a CLIPTextModel"):
        flow()
