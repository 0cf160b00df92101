"""Inpainting models: loading, the method ``inpaint`` against diffusers' pipelines, and what such a base cannot do."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import array, loaded, opened, same, slow_but, tiny_config, weights
from diffusers import DDIMScheduler, StableDiffusionInpaintPipeline, StableDiffusionXLInpaintPipeline
from original import write_single
from PIL import Image
from tiny import save_inpainting, save_tiny, save_tiny_sdxl

from imagic_lora.adapters.store import Store
from imagic_lora.bases.base import Base
from imagic_lora.core.errors import ImagicError
from imagic_lora.methods.catalogue import SAMPLING
from imagic_lora.methods.inpaint import Inpaint, InpaintConfig, inpainted
from imagic_lora.methods.masks import canvas_mask
from imagic_lora.methods.method import Context, EditRequest
from imagic_lora.methods.sampled import encode_request
from imagic_lora.photos.canvas import to_canvas
from imagic_lora.photos.reading import read_photo
from imagic_lora.sampling.trajectory import Trajectory, guided, last
from imagic_lora.training.fit import fit, result

KINDS = ("epsilon", "v_prediction", "sdxl")


@pytest.fixture(scope="module")
def inpainting(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An inpainting model of each kind, made from a tiny text-to-image base."""
    root = tmp_path_factory.mktemp("inpainting")
    sources = folders | {"sdxl": save_tiny_sdxl(root / "sources")}
    return {kind: save_inpainting(sources[kind], root / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def request_(photo_file: Path) -> EditRequest:
    """A photo of 50 x 37 pixels whose left part, up to column 20, may change."""
    photo = read_photo(photo_file).image
    mask = Image.new("L", photo.size)
    mask.paste(255, (0, 0, 20, photo.height))
    return EditRequest(photo, "a red dog", source_prompt="a cat", mask=mask, seed=3)


def by_diffusers(folder: Path, base: Base, request: EditRequest, strength: float) -> torch.Tensor:
    """The latents by diffusers alone, from the folder. Its VAE encodes to a draw: the mode is given instead, of the masked pixels."""
    xl = (folder / "text_encoder_2").is_dir()
    pipe: Any = (StableDiffusionXLInpaintPipeline if xl else StableDiffusionInpaintPipeline).from_pretrained(folder)
    config = pipe.scheduler.config
    pipe.scheduler = DDIMScheduler.from_config(config, clip_sample=False, set_alpha_to_one=config.get("set_alpha_to_one", True))
    pipe.set_progress_bar_config(disable=True)
    assert request.mask is not None
    pixels = to_canvas(request.photo, base.resolution, base.size_multiple).pixels
    mask = canvas_mask(base.architecture, request.mask)

    def encoded(image: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return pipe.vae.encode(image).latent_dist.mode() * pipe.vae.config.scaling_factor

    return pipe(
        prompt=request.target_prompt,
        image=encoded(pixels),
        mask_image=mask,
        masked_image_latents=encoded(torch.where(mask > 0.5, torch.zeros(()), pixels)),
        height=pixels.shape[2],
        width=pixels.shape[3],
        strength=strength,
        num_inference_steps=10,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="latent",
    ).images


@pytest.mark.parametrize("kind", slow_but(["v_prediction"], KINDS))
def test_inpainting_is_that_of_diffusers(inpainting: dict[str, Path], request_: EditRequest, kind: str) -> None:
    """From noise alone and from the noised photo; the mask and the masked photo both change the result."""
    base = opened(inpainting[kind])
    wanted = encode_request(base, request_, 3.0)
    for strength in (1.0, 0.6):
        made = inpainted(wanted, InpaintConfig(steps=10, guidance_scale=3.0, strength=strength))
        torch.testing.assert_close(made, by_diffusers(inpainting[kind], base, request_, strength), rtol=1e-3, atol=1e-3)
    assert request_.mask is not None
    other = replace(request_, mask=request_.mask.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert (inpainted(encode_request(base, other, 3.0), InpaintConfig(steps=10, strength=0.6)) - made).abs().max() > 1e-2


def test_new_inputs_of_weight_zero_change_nothing(folder: Path, tmp_path: Path, request_: EditRequest) -> None:
    """The model is then the text-to-image base that it was made from, sampled from noise."""
    base, plain = opened(save_inpainting(folder, tmp_path / "base", scale=0.0)), opened(folder)
    made = inpainted(encode_request(base, request_, 3.0), InpaintConfig(steps=5, guidance_scale=3.0))
    wanted = encode_request(plain, request_, 3.0)
    sampled = Trajectory(plain, 5).forwards(wanted.noise(), guided(plain, wanted.target, wanted.null, 3.0))
    torch.testing.assert_close(made, last(wanted.noise(), sampled), rtol=1e-5, atol=1e-5)


def test_pixels_outside_the_mask_are_those_of_the_photo(inpainting: dict[str, Path], request_: EditRequest) -> None:
    """Unless they are not pasted; the passes are as predicted, and the base is as before."""
    base = opened(inpainting["epsilon"])
    before = weights(base.denoiser)
    configs = {
        "pasted": InpaintConfig(steps=4),
        "decoded": InpaintConfig(steps=4, paste=False),
        "half": InpaintConfig(steps=4, strength=0.5, guidance_scale=1.0),
    }
    method = Inpaint(configs)
    results = list(method.edit(Context(base), request_))
    pasted, decoded, photo = (array(image) for image in (results[0].image, results[1].image, request_.photo))
    assert np.array_equal(pasted[:, 20:], photo[:, 20:])
    assert np.array_equal(pasted[:, :20], decoded[:, :20])
    assert not np.array_equal(decoded[:, 20:], photo[:, 20:])
    for found in results:
        assert method.passes(base)[found.row] == (found.cost.forward, 0, False)
    assert [found.cost.forward for found in results] == [8, 8, 2]
    assert same(before, weights(base.denoiser))


@pytest.mark.parametrize("kind", ["epsilon", "sdxl"])
def test_a_single_file_is_the_folder(inpainting: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """With the config of the folder, and with that of the text-to-image base that the model was made from: the same weights."""
    path = write_single(inpainting[kind], tmp_path / "one.safetensors")
    plain = (save_tiny if kind == "epsilon" else save_tiny_sdxl)(tmp_path / "plain")
    entries = {"same": inpainting[kind], "plain": plain}
    lines = [f"{name}:\n  source: {path}\n  config: {config}\n" for name, config in entries.items()]
    (tmp_path / "bases.yaml").write_text("".join(lines))
    monkeypatch.setenv("IMAGIC_LORA_BASES", str(tmp_path / "bases.yaml"))
    expected = opened(inpainting[kind])
    for name in entries:
        base: Any = loaded(name)
        assert base.architecture.inpaints
        assert base.fingerprint == expected.fingerprint
        assert same(weights(expected.denoiser), weights(base.denoiser))


def test_what_needs_a_text_to_image_base_is_refused_by_name(
    inpainting: dict[str, Path], folder: Path, photo_file: Path, tmp_path: Path, request_: EditRequest
) -> None:
    """A fit, every other method, a pipeline without a mask, a prediction without one; and inpainting on another base."""
    base: Any = opened(inpainting["epsilon"])
    with pytest.raises(ImagicError, match=r"a fit on .*, an inpainting model.*--methods inpaint"):
        result(fit(photo_file, "a dog", tiny_config(inpainting["epsilon"]), Store(tmp_path), "x", base=base))
    with pytest.raises(ImagicError, match=r"a fit on .*, an inpainting model"):
        result(fit(photo_file, "a dog", tiny_config(inpainting["epsilon"]), Store(tmp_path), "x"))
    for kind in SAMPLING.values():
        if kind is not Inpaint:
            with pytest.raises(ImagicError, match=rf"method {re.escape(kind.name)} on .*, an inpainting U-Net.*choose method inpaint"):
                kind().check(base, request_)
    with pytest.raises(ImagicError, match=r"the pipeline StableDiffusionPipeline on .*, an inpainting model"):
        base.pipeline("text2image")
    with pytest.raises(ImagicError, match=r"a prediction without a mask on .*, an inpainting model"):
        base.predict(torch.zeros(1, 4, 8, 8), torch.tensor([3]), base.encode_prompt("a"))
    plain = opened(folder)
    with pytest.raises(ImagicError, match=r"method inpaint on .*, a unet.*blended-latent"):
        Inpaint().check(plain, request_)
    with pytest.raises(ImagicError, match="a mask for the denoiser"):
        plain.with_masked_photo(plain.encode_prompt("a"), torch.zeros(1, 1, 8, 8), torch.zeros(1, 4, 8, 8))


def test_a_pipeline_that_clips_is_refused(inpainting: dict[str, Path], tmp_path: Path) -> None:
    """The inpainting pipeline of diffusers does not correct it, unlike the text-to-image one; the default of DDIM is to clip."""
    folder = save_inpainting(save_tiny(tmp_path / "plain"), tmp_path / "base")
    config = folder / "scheduler" / "scheduler_config.json"
    text = config.read_text()
    for clips in (text.replace('"clip_sample": false', '"clip_sample": true'), text.replace('"clip_sample": false,', "")):
        assert clips != text
        config.write_text(clips)
        with pytest.raises(ImagicError, match="StableDiffusionInpaintPipeline with clip_sample"):
            opened(folder)
