"""The weights that ship: small, safe, loadable by plain diffusers, and as good as docs/internals/embedded-base.md says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from common import each
from critters_report import gains
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image

from imagic_lora.adapters.store import Store
from imagic_lora.bases.loading.known import CRITTERS
from imagic_lora.bases.loading.registry import load_base
from imagic_lora.bench.metrics import CritterAlignment, pixels, psnr
from imagic_lora.cli import app as cli
from imagic_lora.core.conditioning import concatenate
from imagic_lora.core.config import EditConfig
from imagic_lora.core.device_config import MemoryConfig
from imagic_lora.core.runtime import resolve_runtime
from imagic_lora.critters import ATTRIBUTES, Scene, caption, longest_caption, render, scene_at
from imagic_lora.critters.judge import Judge
from imagic_lora.critters.scene import IDENTITY, displaced
from imagic_lora.photos.canvas import to_canvas, to_image
from imagic_lora.sampling.generate import generate
from imagic_lora.training.objective import denoising_loss

HELD_OUT = [scene_at("heldout", 20_000 + k) for k in range(64)]
EXAMPLES = Path(__file__).parents[2] / "adapters"


def test_they_are_small_and_never_pickles() -> None:
    """32 MB together at the most; safetensors, JSON and text only."""
    files = [path for path in CRITTERS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 32e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt"}


def test_the_vae_keeps_held_out_pictures() -> None:
    """At least 31 dB PSNR, mean over 64 pictures."""
    vae = AutoencoderKL.from_pretrained(CRITTERS / "vae").eval()
    pictures = pixels([render(scene) for scene in HELD_OUT])
    with torch.no_grad():
        back = vae.decode(vae.encode(pictures).latent_dist.mode()).sample.clamp(-1, 1)
    error = (back - pictures).square().flatten(1).mean(1)
    assert (10 * torch.log10(4 / error)).mean() >= 31


def test_the_judge_is_right_on_held_out_renders() -> None:
    """At least 98% for each attribute."""
    seen = Judge.load().read_scenes(pixels([render(scene) for scene in HELD_OUT]))
    for attribute in ATTRIBUTES:
        right = [one.attributes[attribute] == getattr(scene, attribute) for one, scene in zip(seen, HELD_OUT, strict=True)]
        assert sum(right) / len(right) >= 0.98, attribute


@pytest.mark.slow
def test_plain_diffusers_samples_what_the_prompt_says() -> None:
    """Of 12 samples by StableDiffusionPipeline.from_pretrained, the judge finds each of pose, animal, colour and place in 11 at least."""
    pipe = StableDiffusionPipeline.from_pretrained(CRITTERS)
    pipe.set_progress_bar_config(disable=True)
    asked = HELD_OUT[:12]
    generator = torch.Generator().manual_seed(0)
    prompts = [caption(scene) for scene in asked]
    made = pipe(prompts, height=64, width=64, guidance_scale=3.0, num_inference_steps=20, generator=generator).images
    seen = Judge.load().read_scenes(pixels(made))
    for attribute in ("pose", "animal", "colour", "place"):
        right = [one.attributes[attribute] == getattr(scene, attribute) for one, scene in zip(seen, asked, strict=True)]
        assert sum(right) >= 11, attribute


def unguided(*configs: EditConfig) -> list[Image.Image]:
    """The reconstruction of a held-out picture by the VAE, and the image of its own caption at each of some settings, nothing fitted."""
    base, scene = load_base("critters", resolve_runtime(MemoryConfig(device="cpu"))), HELD_OUT[0]
    canvas, text = to_canvas(render(scene), 64, 8), base.encode_prompt(caption(scene))
    reconstruction = to_image(base.decode(base.encode_image(canvas.pixels))[0])
    return [reconstruction, *(next(generate(base, [text], [0], config, canvas, None, [text])) for config in configs)]


@pytest.mark.slow
def test_from_inverted_noise_comes_the_photo() -> None:
    """Without guidance and at its own caption: near to the VAE's reconstruction, nearly equal where every step replays the photo's noise;
    random noise gives another picture."""
    etas, least = (0.0, 0.5, 1.0), (25, 40, 40)
    plain = [EditConfig(steps=30, guidance_scale=1.0, ddim_eta=ddim_eta) for ddim_eta in etas]
    inverted = [config.model_copy(update={"start": "inverted"}) for config in plain]
    reconstruction, *made = unguided(*inverted, *plain)
    for k, ddim_eta in enumerate(etas):
        assert psnr(made[k], reconstruction) > least[k], ddim_eta
        assert psnr(made[3 + k], reconstruction) < 25, ddim_eta


def test_from_a_hardly_noised_photo_comes_the_photo() -> None:
    """Start image, whose latents have eight channels here and not four: near at a strength of 0.1, another picture at 1."""
    weak = EditConfig(steps=20, guidance_scale=1.0, start="image", strength=0.1)
    strong = weak.model_copy(update={"strength": 1.0})
    reconstruction, near, far = unguided(weak, strong)
    assert psnr(near, reconstruction) > 22 > psnr(far, reconstruction)


@pytest.mark.slow
@torch.no_grad()
def test_the_base_follows_the_words_on_the_identity() -> None:
    """Its loss on 48 held-out pictures, at timestep 850, is higher if any one factor of the caption is wrong."""
    base, scenes = load_base("critters", resolve_runtime(MemoryConfig(device="cpu"))), HELD_OUT[:48]
    clean = torch.cat([base.encode_image(pixels([render(scene)])) for scene in scenes])
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))

    def loss(described: list[Scene]) -> float:
        text = concatenate([base.encode_prompt(longest_caption(scene)) for scene in described])
        return denoising_loss(base, clean, text, noise, torch.full((len(described),), 0.85, dtype=torch.float64)).mean().item()

    right = loss(scenes)
    for name in ("facing", "x", "y", "size", "spots", "horizon", "tint", "shade"):
        assert loss([displaced(scene, name) for scene in scenes]) > right * 1.0005, name


@pytest.mark.slow
def test_the_response_to_a_factor_is_a_share_of_its_true_difference() -> None:
    """To the position most of it; to the sun, which this base does not follow, nothing."""
    response = gains(load_base("critters", resolve_runtime(MemoryConfig(device="cpu"))), HELD_OUT[:8], (900,))
    assert set(response) == {"facing", *IDENTITY}
    assert 0.5 < response["x"][0] < 1.1
    assert abs(response["sun"][0]) < 0.1


def test_clip_prefers_the_true_caption() -> None:
    """A picture fits its own caption better than one of another place, nearly always."""
    alignment = CritterAlignment.load()
    wins = 0
    for scene in HELD_OUT[:16]:
        other = scene.edited(place="night" if scene.place != "night" else "grass")
        own, wrong = alignment.scores([render(scene)], [caption(scene), caption(other)])[0]
        wins += bool(own > wrong)
    assert wins >= 15


@each("name", ["rex-jumps", "mia-wears-a-hat"])
def test_an_example_adapter_works_right_after_installation(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """edit writes the single pictures and one labelled sheet; the adapter belongs to the base that ships."""
    assert Store(EXAMPLES).read(name).size <= 2e6
    command = ["edit", name, "--eta", "0.3:1:0.35", "--steps", "3", "--store", str(EXAMPLES), "--out", str(tmp_path), "--json"]
    assert cli.main(command) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [one["eta"] for one in answer["pictures"]] == [0.3, 0.65, 1.0]
    assert Path(answer["sheet"]).is_file()
