"""DiffEdit and blended latent diffusion: against diffusers' pipelines, and what a mask of nothing or everything gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import array, each, opened, same, slow_but, weights
from diffusers import DDIMInverseScheduler, DDIMScheduler, StableDiffusionDiffEditPipeline, StableDiffusionInpaintPipeline
from PIL import Image
from torch import Tensor

from imagic_lora.bases.base import Base
from imagic_lora.core.errors import ImagicError
from imagic_lora.methods.blended import BlendedConfig, BlendedLatentDiffusion, blended
from imagic_lora.methods.diffedit import DiffEdit, DiffEditConfig, DiffEditInMask, DiffEditMaskConfig, edited, found_mask
from imagic_lora.methods.masks import latent_mask, mask_image
from imagic_lora.methods.method import Context, EditRequest
from imagic_lora.methods.sampled import EncodedRequest, SamplingMethod, encode_request
from imagic_lora.photos.canvas import to_canvas
from imagic_lora.photos.reading import read_photo
from imagic_lora.sampling.trajectory import Trajectory, guided, path

BASES = ("epsilon", "v_prediction", "sdxl", "critters")


@pytest.fixture(scope="module")
def request_(photo_file: Path) -> EditRequest:
    """A photo of 50 x 37 pixels whose left part, up to column 20, may change."""
    photo = read_photo(photo_file).image
    mask = Image.new("L", photo.size)
    mask.paste(255, (0, 0, 20, photo.height))
    return EditRequest(photo, "a red dog", source_prompt="a cat", mask=mask, seed=3)


def encoded(base: Base, request: EditRequest) -> EncodedRequest:
    return encode_request(base, request, 3.0)


def half(clean: Tensor) -> Tensor:
    """A mask of the left half of the latents."""
    mask = torch.zeros_like(clean[:, :1])
    mask[..., : mask.shape[3] // 2] = 1
    return mask


# DiffEdit


@each("kind", ["epsilon", "v_prediction"])
def test_the_mask_of_diffedit_is_that_of_diffusers(named: Any, request_: EditRequest, kind: str) -> None:
    """With the same noises, from the same latents, without guidance; with a source prompt and with the empty one."""
    base: Any = named(kind)
    parts = {name: getattr(base.pipeline("text2image"), name) for name in ("vae", "tokenizer", "unet")}
    others: Any = dict.fromkeys(("text_encoder", "safety_checker", "feature_extractor"))
    schedulers = {"scheduler": base.scheduler(DDIMScheduler), "inverse_scheduler": base.scheduler(DDIMInverseScheduler)}
    pipe: Any = StableDiffusionDiffEditPipeline(**parts, **others, **schedulers, requires_safety_checker=False)
    encode = pipe.encode_prompt
    pipe.encode_prompt = lambda *args, **kwargs: encode(*args, **kwargs)[::-1]  # it unpacks them in the other order
    for source in ("a cat", None):
        wanted = encoded(base, replace(request_, source_prompt=source))
        for maps, strength, limit in ((10, 0.5, 3.0), (3, 0.8, 2.0)):
            reference = wanted.source if wanted.source is not None else wanted.null
            assert reference is not None
            settings = {"mask_encode_strength": strength, "num_inference_steps": 20, "guidance_scale": 1.0}
            expected = pipe.generate_mask(
                image=wanted.clean,
                target_prompt_embeds=wanted.target.tokens,
                source_prompt_embeds=reference.tokens,
                num_maps_per_mask=maps,
                mask_thresholding_ratio=limit,
                generator=torch.Generator().manual_seed(3),
                output_type="np",
                **settings,
            )
            config = DiffEditConfig(steps=20, maps=maps, mask_strength=strength, mask_limit=limit)
            made = found_mask(wanted, config)
            assert 0 < made.sum() < made.numel()
            assert np.array_equal(made[0, 0].numpy(), expected[0])


@pytest.mark.parametrize("name", slow_but(["v_prediction", "sdxl"], BASES))
def test_diffedit_with_equal_prompts_is_the_photo(named: Any, request_: EditRequest, name: str) -> None:
    """The mask is empty; the latents are bit-equal, and the picture is the photo through the VAE."""
    base = named(name)
    prompts = replace(request_, target_prompt="a cat")
    wanted = encoded(base, prompts)
    config = DiffEditConfig(steps=5, maps=2)
    mask = found_mask(wanted, config)
    assert not mask.any()
    assert torch.equal(edited(wanted, config, mask), wanted.clean)
    (result,) = DiffEdit({"row": config}).edit(Context(base), prompts)
    assert np.array_equal(array(result.image), array(wanted.image(wanted.clean)))
    assert not np.asarray(result.extras["mask"]).any()


@pytest.mark.parametrize("name", BASES)
def test_diffedit_in_a_full_mask_is_ddim_inversion(named: Any, request_: EditRequest, name: str) -> None:
    """With the empty prompt, up to the ratio. In half a mask the other half is the photo, bit for bit."""
    base = named(name)
    wanted, config = encoded(base, request_), DiffEditConfig(steps=5, ratio=0.6, guidance_scale=3.0)
    trajectory, null = Trajectory(base, 5), wanted.null
    assert null is not None
    inverted = path(trajectory.backwards(wanted.clean, guided(base, null), end=2))
    expected = path(trajectory.forwards(inverted[2], guided(base, wanted.target, null, 3.0), start=2))
    full = torch.ones_like(wanted.clean[:, :1])
    assert torch.equal(edited(wanted, config, full), expected[5])
    made, width = edited(wanted, config, half(wanted.clean)), wanted.clean.shape[3] // 2
    assert torch.equal(made[..., width:], wanted.clean[..., width:])
    assert (made[..., :width] - wanted.clean[..., :width]).abs().max() > 1e-3


def test_diffedit_in_a_given_mask_takes_that_of_the_request(named: Any, request_: EditRequest) -> None:
    """The image is that of :func:`edited` in the mask at the size of the latents; the passes are as predicted."""
    base, config = named("epsilon"), DiffEditMaskConfig(steps=5, guidance_scale=3.0)
    wanted = encoded(base, request_)
    assert request_.mask is not None
    method = DiffEditInMask({"row": config})
    (result,) = method.edit(Context(base), request_)
    expected = wanted.image(edited(wanted, config, latent_mask(base.architecture, request_.mask)))
    assert np.array_equal(array(result.image), array(expected))
    assert (result.cost.forward, result.cost.backward) == method.passes(base)["row"][:2]
    with pytest.raises(ImagicError, match="diffedit-mask without a mask"):
        next(DiffEditInMask().edit(Context(base), replace(request_, mask=None)))


# blended latent diffusion


@each("strength", [0.75, 0.3])
def test_blended_latent_diffusion_is_diffusers_inpainting(named: Any, request_: EditRequest, strength: float) -> None:
    """With a text-to-image U-Net, one noise for all levels, and latents in place of a photo, whose encoding it would draw at random."""
    base: Any = named("epsilon")
    wanted = encoded(base, request_)
    mask = half(wanted.clean)
    parts = {name: getattr(base.pipeline("text2image"), name) for name in ("vae", "tokenizer", "unet")}
    others: Any = dict.fromkeys(("text_encoder", "safety_checker", "feature_extractor"))
    pipe: Any = StableDiffusionInpaintPipeline(**parts, **others, scheduler=base.scheduler(DDIMScheduler), requires_safety_checker=False)
    pixels = mask.repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert wanted.null is not None
    expected = pipe(
        prompt_embeds=wanted.target.tokens,
        negative_prompt_embeds=wanted.null.tokens,
        image=wanted.clean,
        mask_image=pixels,
        masked_image_latents=wanted.clean,
        height=pixels.shape[2],
        width=pixels.shape[3],
        strength=strength,
        num_inference_steps=12,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images
    made = blended(wanted, BlendedConfig(steps=12, guidance_scale=3.0, strength=strength, new_noise=False), mask)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
    fresh = blended(wanted, BlendedConfig(steps=12, guidance_scale=3.0, strength=strength), mask)
    assert (fresh - made).abs().max() > 1e-3


@pytest.mark.parametrize("name", BASES)
def test_an_empty_mask_gives_the_photo_and_a_full_one_image_to_image(named: Any, request_: EditRequest, name: str) -> None:
    """Latents bit for bit; in half a mask the other half is the photo."""
    base = named(name)
    wanted, config = encoded(base, request_), BlendedConfig(steps=5, guidance_scale=3.0, strength=0.6)
    full, width = torch.ones_like(wanted.clean[:, :1]), wanted.clean.shape[3] // 2
    assert torch.equal(blended(wanted, config, 0 * full), wanted.clean)
    trajectory = Trajectory(base, 5)
    start = trajectory.noised(wanted.clean, wanted.noise(), 2)
    expected = path(trajectory.forwards(start, guided(base, wanted.target, wanted.null, 3.0), start=2))
    assert torch.equal(blended(wanted, config, full), expected[5])
    made = blended(wanted, config, half(wanted.clean))
    assert torch.equal(made[..., width:], wanted.clean[..., width:])
    assert (made[..., :width] - wanted.clean[..., :width]).abs().max() > 1e-3


def test_pixels_outside_the_mask_are_those_of_the_photo(named: Any, request_: EditRequest) -> None:
    """Bit for bit at the size of the photo, unless they are not pasted; an empty mask gives the photo."""
    base, photo = named("epsilon"), array(request_.photo)
    configs = {"pasted": BlendedConfig(steps=4), "decoded": BlendedConfig(steps=4, paste=False)}
    pasted, decoded = (array(result.image) for result in BlendedLatentDiffusion(configs).edit(Context(base), request_))
    assert np.array_equal(pasted[:, 20:], photo[:, 20:])
    assert np.array_equal(pasted[:, :20], decoded[:, :20])
    assert not np.array_equal(decoded[:, 20:], photo[:, 20:])
    nothing = replace(request_, mask=Image.new("L", request_.photo.size))
    (result,) = BlendedLatentDiffusion({"pasted": configs["pasted"]}).edit(Context(base), nothing)
    assert np.array_equal(array(result.image), photo)


def test_a_mask_lies_where_it_lies_on_the_photo(named: Any, request_: EditRequest) -> None:
    """The photo is scaled and padded, the mask with it; values from 128 on count; back on the photo it is the same up to a position."""
    base = named("epsilon")
    wanted = encoded(base, request_)
    assert request_.mask is not None
    assert tuple(wanted.clean.shape[2:]) != (37, 50)
    mask = latent_mask(base.architecture, request_.mask)
    columns = mask.shape[3]
    assert torch.equal(mask[0, 0].amin(0), mask[0, 0].amax(0))
    assert int(mask[0, 0, 0].sum()) == sum((4 * column + 0.5) / (4 * columns) < 20 / 50 for column in range(columns))
    grey = request_.mask.point([127] * 128 + [128] * 128)
    assert torch.equal(latent_mask(base.architecture, grey), mask)
    back = np.asarray(mask_image(to_canvas(request_.photo, base.resolution, base.size_multiple), mask))
    assert back.shape == (37, 50)
    assert (np.abs(back.astype(int) - np.asarray(request_.mask).astype(int)) > 127).mean() <= 1 / columns


def test_blended_latent_diffusion_needs_a_mask_of_the_size_of_the_photo(folder: Path, request_: EditRequest, monkeypatch: Any) -> None:
    """Whose area does not vanish, where an edit of nothing would look like a failure of the method. Nothing is computed without one."""
    base, dark, point = opened(folder), Image.new("L", request_.photo.size, 127), Image.new("L", request_.photo.size)
    point.putpixel((3, 3), 255)
    for work in ("predict", "encode_image", "encode_prompt"):
        monkeypatch.setattr(base, work, None)
    for mask, message in (
        (None, "without a mask"),
        (Image.new("L", (3, 3)), "a mask of 3 x 3 pixels"),
        (dark, "a mask whose lightest value is 127"),
        (point, "a mask whose area is smaller than 4 pixels"),
    ):
        with pytest.raises(ImagicError, match=message):
            next(BlendedLatentDiffusion().edit(Context(base), replace(request_, mask=mask)))


METHODS: list[SamplingMethod[Any]] = [
    DiffEdit({"a": DiffEditConfig(steps=5, maps=3, guidance_scale=3.0), "b": DiffEditConfig(steps=5, ratio=0.5, guidance_scale=1.0)}),
    BlendedLatentDiffusion({"a": BlendedConfig(steps=5), "b": BlendedConfig(steps=5, strength=0.5, guidance_scale=1.0)}),
]


@each("method", METHODS)
def test_passes_are_predicted_and_the_base_is_as_before(folder: Path, request_: EditRequest, method: SamplingMethod[Any]) -> None:
    """As many as were measured; after an exception in the middle too."""
    base = opened(folder)
    before, processors = weights(base.denoiser), dict(base.denoiser.attn_processors)  # pyright: ignore[reportArgumentType, reportCallIssue]
    for result in method.edit(Context(base), request_):
        assert method.passes(base)[result.row] == (result.cost.forward, 0, False)
        assert result.image.size == request_.photo.size
    hook = base.denoiser.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        list(method.edit(Context(base), request_))
    hook.remove()
    assert same(before, weights(base.denoiser))
    assert processors == dict(base.denoiser.attn_processors)  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert not base.denoiser._forward_hooks
