"""The evaluator: every measure against an independent computation on tiny random models, and the published arithmetic by hand."""

from __future__ import annotations

import io
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics.functional.image.lpips as published
from common import each
from layouts import save_backbone, save_models, scene
from models import SIDE
from PIL import Image
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.functional.multimodal import clip_score
from transformers import AutoImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer, ViTModel

from imagic_lora.bench.evaluator.evaluator import Evaluator, Settings, Subject, squared
from imagic_lora.bench.evaluator.lpips import backbone, load_lpips
from imagic_lora.bench.evaluator.sources import LPIPS, METRICS, Sources, parse_sources
from imagic_lora.core.errors import ImagicError

SIZE = 64


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_models(tmp_path_factory.mktemp("models"))


def evaluator(models: dict[str, Path], *names: str, as_published: bool = False) -> Evaluator:
    """An evaluator of some metrics."""
    named = tuple((name, str(models[name])) for name in names if name in models)
    return Evaluator.load(Settings(Sources(names, named, offline=True), SIZE, as_published))


def mask() -> Image.Image:
    """A mask that leaves more than half of the picture."""
    area = Image.new("L", (SIZE, SIZE))
    area.paste(255, (10, 20, 45, 60))
    return area


def subject(lossy: bool = True, area: Image.Image | None = None) -> Subject:
    """Two pictures, both prompts, and a mask."""
    return Subject(scene(1, (SIZE, SIZE)), scene(2, (SIZE, SIZE)), "a cat", "a dog", area or mask(), lossy)


def unit(image: Image.Image) -> Tensor:
    """A picture as a tensor ``[1, 3, H, W]`` in [0, 1], in float64."""
    return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=float) / 255).permute(2, 0, 1)[None]


# pixels


def ssim_map(first: Tensor, second: Tensor) -> np.ndarray:
    """The SSIM of every window of 11 x 11 pixels in float64, by its definition."""
    weights = np.exp(-np.square(np.arange(11) - 5) / (2 * 1.5**2))
    window = np.outer(weights, weights) / weights.sum() ** 2
    found = np.zeros(first.shape[1:])
    for channel in range(3):
        a, b = (np.pad(x[0, channel].numpy(), 5, mode="reflect") for x in (first, second))
        for row in range(found.shape[1]):
            for column in range(found.shape[2]):
                x, y = (z[row : row + 11, column : column + 11] for z in (a, b))
                mx, my = (window * x).sum(), (window * y).sum()
                vx, vy = (window * x * x).sum() - mx * mx, (window * y * y).sum() - my * my
                cov = (window * x * y).sum() - mx * my
                top = (2 * mx * my + 1e-4) * (2 * cov + 9e-4)
                found[channel, row, column] = top / ((mx * mx + my * my + 1e-4) * (vx + vy + 9e-4))
    return found


def test_pixels_of_whole_pictures_are_those_of_torchmetrics() -> None:
    """PSNR, SSIM and MSE."""
    found = evaluator({}, "pixels").scores(subject())
    a, b = unit(subject().edited), unit(subject().source)
    assert found["mse"] == pytest.approx((a - b).square().mean().item(), rel=1e-5)
    assert found["psnr"] == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1.0).item(), abs=1e-5)
    expected: Any = structural_similarity_index_measure(a, b, data_range=1.0)
    assert found["ssim"] == pytest.approx(expected.item(), abs=1e-5)


def test_pixels_of_a_region_are_means_over_its_pixels() -> None:
    """By the definitions in float64, outside and inside of the mask; nothing outside of a region has an influence."""
    found = evaluator({}, "pixels").scores(subject())
    inside = np.asarray(mask()) > 0
    for suffix, region in (("_background", ~inside), ("_edited", inside)):
        a, b = (unit(image) * torch.from_numpy(region) for image in (subject().edited, subject().source))
        errors = (a - b).square()[0].numpy()[:, region]
        assert found[f"mse{suffix}"] == pytest.approx(errors.mean(), rel=1e-5)
        assert found[f"psnr{suffix}"] == pytest.approx(-10 * np.log10(errors.mean()), abs=1e-5)
        assert found[f"ssim{suffix}"] == pytest.approx(ssim_map(a, b)[:, region].mean(), abs=1e-5)


def test_equal_pictures_have_the_best_scores(models: dict[str, Path]) -> None:
    """PSNR at its cap, in every region."""
    one = scene(1, (SIZE, SIZE))
    found = evaluator(models, "pixels", "lpips-squeeze", "dino").scores(Subject(one, one, "a cat", mask=mask()))
    assert {found[f"psnr{suffix}"] for suffix in ("", "_background", "_edited")} == {100.0}
    assert {found[name] for name in found if name.startswith(("mse", "lpips", "structure"))} == {0.0}


def test_pictures_are_compared_as_centre_squares() -> None:
    """Of any size and shape; the mask goes with the photo."""
    wide = scene(1, (96, 64))
    found = evaluator({}, "pixels").scores(Subject(wide, wide.crop((16, 0, 80, 64)), "a cat", mask=Image.new("L", wide.size, 255)))
    assert (found["mse"], found["mse_edited"]) == (0, 0)
    assert "mse_background" not in found
    large = scene(1, (128, 128))
    assert squared(large, 64, Image.Resampling.BICUBIC) == large.resize((64, 64), Image.Resampling.BICUBIC)


def test_a_region_that_is_empty_has_no_measures(models: dict[str, Path]) -> None:
    """Nor has a picture without a mask; as published, the border is always part of the mask."""
    empty = Image.new("L", (SIZE, SIZE))
    found = evaluator(models, "pixels", "clip-l14").scores(subject(area=empty))
    assert not [name for name in found if name.endswith("_edited")]
    assert found["mse_background"] == found["mse"]
    found = evaluator(models, "pixels", "clip-l14", as_published=True).scores(subject(area=empty))
    assert {"mse_edited", "clip_l14_edited"} <= set(found)
    plain = Subject(scene(1), scene(2), "a cat")
    assert not [name for name in evaluator({}, "pixels").scores(plain) if name.endswith(("_edited", "_background"))]


# the published arithmetic, by hand


def test_as_published_counts_zeros_and_the_border() -> None:
    """A picture that is 0.2 off everywhere, its left half masked: 31 x 62 of 64 x 64 pixels are left once the border is masked too."""
    black, gray = Image.new("RGB", (SIZE, SIZE)), Image.new("RGB", (SIZE, SIZE), (51, 51, 51))
    left = Image.new("L", (SIZE, SIZE))
    left.paste(255, (0, 0, 32, 64))
    right, wrong = (
        evaluator({}, "pixels", as_published=how).scores(Subject(black, gray, "a cat", mask=left, lossy=True)) for how in (False, True)
    )
    assert right["mse_background"] == pytest.approx(0.04)
    assert wrong["mse_background"] == pytest.approx(0.04 * 31 * 62 / 4096)
    assert right["psnr_background"] == pytest.approx(13.979, abs=1e-3)
    assert wrong["psnr_background"] == pytest.approx(13.979 + 10 * np.log10(4096 / 1922), abs=1e-3)
    assert wrong["mse_edited"] == pytest.approx(0.04 * (4096 - 1922) / 4096)
    assert wrong["mse"] == right["mse"] == pytest.approx(0.04)


def test_as_published_is_that_of_torchmetrics_on_masked_pictures(models: dict[str, Path]) -> None:
    """PSNR, SSIM, MSE and LPIPS of pictures that are multiplied by the mask, over the full frame."""
    found = evaluator(models, "pixels", "lpips-squeeze", as_published=True).scores(subject())
    inside = np.asarray(mask()) > 0
    inside[[0, -1]] = inside[:, [0, -1]] = True
    for suffix, region in (("_background", ~inside), ("_edited", inside)):
        a, b = (unit(image) * torch.from_numpy(region) for image in (subject().edited, subject().source))
        assert found[f"mse{suffix}"] == pytest.approx((a - b).square().mean().item(), rel=1e-5)
        assert found[f"psnr{suffix}"] == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1.0).item(), abs=1e-5)
        expected: Any = structural_similarity_index_measure(a, b, data_range=1.0)
        assert found[f"ssim{suffix}"] == pytest.approx(expected.item(), abs=1e-5)
        network, _ = load_lpips("lpips-squeeze", str(models["lpips-squeeze"]), True)
        assert found[f"lpips_squeeze{suffix}"] == pytest.approx(network.distance(2 * a.float() - 1, 2 * b.float() - 1), rel=1e-5)


def test_as_published_an_edit_passes_through_jpeg() -> None:
    """Unless it comes from such a file; by default it never does."""
    file = io.BytesIO()
    subject().edited.save(file, "JPEG", quality=75)
    again = Image.open(file).convert("RGB")
    expected = (unit(again) - unit(subject().source)).square().mean().item()
    assert evaluator({}, "pixels", as_published=True).scores(subject(lossy=False))["mse"] == pytest.approx(expected, rel=1e-6)
    exact = (unit(subject().edited) - unit(subject().source)).square().mean().item()
    for found in (evaluator({}, "pixels", as_published=True).scores(subject()), evaluator({}, "pixels").scores(subject(lossy=False))):
        assert found["mse"] == pytest.approx(exact, rel=1e-6)


# DINO


def structure_by_hand(folder: Path, first: Tensor, second: Tensor) -> float:
    """The distance in float64 from the input of the last layer: its first norm, its keys, cosines of all pairs."""
    network = ViTModel.from_pretrained(folder).double().eval()
    layer, found = network.layers[-1], []
    for pixels in (first, second):
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        with torch.no_grad():
            states = network(pixel_values=(pixels - mean.double()) / std.double(), output_hidden_states=True).hidden_states[-2]
            keys = (layer.layernorm_before(states) @ layer.attention.k_proj.weight.T + layer.attention.k_proj.bias)[0].numpy()
        found.append(np.array([[a @ b / np.sqrt((a @ a) * (b @ b)) for b in keys] for a in keys]))
    return float(np.square(found[0] - found[1]).mean())


def test_structure_is_the_distance_of_the_self_similarities(models: dict[str, Path]) -> None:
    """With values in [0, 1] and a filter that grows with the scale; as published with 0 to 255 and without."""
    pair = [unit(image) for image in (subject().edited, subject().source)]
    small = [torch.nn.functional.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True) for x in pair]
    right = evaluator(models, "dino").scores(subject())["structure"]
    assert right == pytest.approx(structure_by_hand(models["dino"], *small), abs=1e-5)
    levels = [torch.nn.functional.interpolate(x * 255, (SIDE, SIDE), mode="bilinear", antialias=False) for x in pair]
    wrong = evaluator(models, "dino", as_published=True).scores(subject())["structure"]
    assert wrong == pytest.approx(structure_by_hand(models["dino"], *levels), abs=1e-5)
    assert abs(wrong - right) > 1e-3


# CLIP


class Former(CLIPModel):
    """Returns its features as torchmetrics expects them of transformers 4."""

    def get_image_features(self, *arguments: Any, **options: Any) -> Any:
        return super().get_image_features(*arguments, **options).pooler_output

    def get_text_features(self, *arguments: Any, **options: Any) -> Any:
        return super().get_text_features(*arguments, **options).pooler_output


def test_clip_is_that_of_torchmetrics(models: dict[str, Path]) -> None:
    """100 times, and not below 0, of whole pictures and of masked ones: as published. By default it is the cosine itself."""
    model = Former.from_pretrained(models["clip-l14"]).eval()
    processor = CLIPProcessor(AutoImageProcessor.from_pretrained(models["clip-l14"]), CLIPTokenizer.from_pretrained(models["clip-l14"]))
    area = np.asarray(mask()) > 0
    found = evaluator(models, "clip-l14").scores(subject())
    bordered = area.copy()
    bordered[[0, -1]] = bordered[:, [0, -1]] = True
    floored = evaluator(models, "clip-l14", as_published=True).scores(subject())
    edited = np.array(subject().edited)
    for name, values in (("clip_l14", [edited, edited]), ("clip_l14_edited", [edited * area[..., None], edited * bordered[..., None]])):
        for scores, pixels in zip((found, floored), values, strict=True):
            expected: Any = clip_score(torch.from_numpy(pixels).permute(2, 0, 1), "a cat", lambda: (model, processor))
            assert max(scores[name], 0) == pytest.approx(expected.item() / 100, abs=1e-5)
    assert min(floored["clip_l14"], floored["clip_l14_edited"]) >= 0


def test_the_direction_and_the_likeness_are_cosines_of_embeddings(models: dict[str, Path]) -> None:
    """Of the change of the picture with the change of the prompt, and of the picture with the source; without a caption no direction."""
    one = evaluator(models, "clip-b32")
    model, words = CLIPModel.from_pretrained(models["clip-b32"]).eval(), CLIPTokenizer.from_pretrained(models["clip-b32"])
    processor = one._clips["clip-b32"].model.processor
    with torch.no_grad():
        texts = [model.get_text_features(**words([text], return_tensors="pt")).pooler_output[0].double() for text in ("a cat", "a dog")]
        inputs = [processor(images=image, return_tensors="pt") for image in (subject().edited, subject().source)]
        images = [model.get_image_features(**values).pooler_output[0].double() for values in inputs]
    (target, source), (edited, photo) = ([x / x.norm() for x in group] for group in (texts, images))
    change, asked = edited - photo, target - source
    found = one.scores(subject())
    assert found["clip_b32_direction"] == pytest.approx((change @ asked / change.norm() / asked.norm()).item(), abs=1e-5)
    assert found["clip_b32_image"] == pytest.approx((edited @ photo).item(), abs=1e-5)
    assert "clip_b32_direction" not in one.scores(Subject(subject().source, subject().edited, "a cat"))


# LPIPS


class Fire(nn.Module):
    """The module of SqueezeNet as torchvision has it."""

    def __init__(self, inplanes: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inplanes, squeeze, kernel_size=1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, kernel_size=1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.squeeze(x))
        return torch.cat([torch.relu(self.expand1x1(x)), torch.relu(self.expand3x3(x))], dim=1)


def conv(*arguments: int, **options: int) -> list[nn.Module]:
    return [nn.Conv2d(*arguments, **options), nn.ReLU()]


def torchvision_features(name: str) -> nn.Sequential:
    """The ``features`` of torchvision's networks, written out."""
    pool = nn.MaxPool2d(kernel_size=3, stride=2)
    if name == "alexnet":
        first = [*conv(3, 64, kernel_size=11, stride=4, padding=2), pool, *conv(64, 192, kernel_size=5, padding=2), pool]
        rest = [*conv(192, 384, kernel_size=3, padding=1), *conv(384, 256, kernel_size=3, padding=1)]
        return nn.Sequential(*first, *rest, *conv(256, 256, kernel_size=3, padding=1), pool)
    if name == "vgg16":
        layers, before = [], 3
        for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
            layers += conv(before, width, kernel_size=3, padding=1) if width else [nn.MaxPool2d(kernel_size=2, stride=2)]
            before = width or before
        return nn.Sequential(*layers)
    ceil = nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True)
    fires = [Fire(64, 16, 64), Fire(128, 16, 64), ceil, Fire(128, 32, 128), Fire(256, 32, 128), ceil]
    fires += [Fire(256, 48, 192), Fire(384, 48, 192), Fire(384, 64, 256), Fire(512, 64, 256)]
    return nn.Sequential(*conv(3, 64, kernel_size=3, stride=2), ceil, *fires)


def of_backbone(network: nn.Module, prefix: str) -> dict[str, Tensor]:
    """The weights of the backbone of LPIPS, with another beginning of their names."""
    return {f"{prefix}{name[9:]}": value for name, value in network.state_dict().items() if name.startswith("compared.")}


NETS = {"lpips-alex": ("alexnet", 2_469_696), "lpips-vgg": ("vgg16", 14_714_688), "lpips-squeeze": ("squeezenet1_1", 722_496)}


@pytest.mark.parametrize("model", NETS)
def test_lpips_is_that_of_torchmetrics(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the layers, names and numbers of weights of torchvision's networks, and the published linear weights."""
    network, weights = NETS[model]
    torch.manual_seed(3)
    ours, identity = load_lpips(model, str(save_backbone(tmp_path, model)), True)
    theirs = torchvision_features(network)
    assert sum(weight.numel() for weight in theirs.parameters()) == weights
    theirs.load_state_dict(
        backbone(model).state_dict()
        | {name.removeprefix("compared."): value for name, value in ours.state_dict().items() if name.startswith("compared.")}
    )
    monkeypatch.setattr(published, "_get_tv_model_features", lambda net, pretrained=False: theirs)
    reference = published._LPIPS(pretrained=True, net=model.removeprefix("lpips-"), pnet_rand=True)
    first, second = (2 * unit(scene(number, (70, 60))).float() - 1 for number in (1, 2))  # a size at which the rounding of pools matters
    with torch.no_grad():
        expected: Any = reference(first, second)
    assert ours.distance(first, second) == pytest.approx(expected.item(), rel=1e-5)
    assert identity.startswith("sha256 ")


def test_lpips_over_a_region_is_a_mean_of_its_map(models: dict[str, Path]) -> None:
    """Over all pixels it is that of torchmetrics' spatial map; both regions of a mask, by their sizes, are the whole."""
    network, _ = load_lpips("lpips-alex", str(models["lpips-alex"]), True)
    a, b = (2 * unit(image).float() - 1 for image in (subject().edited, subject().source))
    size = (SIZE, SIZE)
    scaled = [torch.nn.functional.interpolate(layer, size, mode="bilinear", align_corners=False) for layer in network.layers(a, b)]
    whole = sum(layer.double().mean().item() for layer in scaled)
    inside = (torch.from_numpy(np.array(mask())) > 0)[None, None].float()
    assert network.distance_over(a, b, torch.ones_like(inside)) == pytest.approx(whole, rel=1e-5)
    share = inside.mean().item()
    parts = share * network.distance_over(a, b, inside) + (1 - share) * network.distance_over(a, b, 1 - inside)
    assert parts == pytest.approx(whole, rel=1e-5)


# where models come from


def test_weights_are_taken_from_the_cache_of_torch_hub(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline too; without them the message names the file and how to go on."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ImagicError, match=r"lpips-squeeze needs squeezenet1_1-b8a52dc0\.pth") as caught:
        load_lpips("lpips-squeeze", None, True)
    assert "--model lpips-squeeze=FILE" in caught.value.remedy
    cached = tmp_path / "hub" / "checkpoints" / LPIPS["lpips-squeeze"]
    cached.parent.mkdir(parents=True)
    named, _ = load_lpips("lpips-squeeze", str(models["lpips-squeeze"]), True)
    torch.save(of_backbone(named, "features."), cached)
    found, _ = load_lpips("lpips-squeeze", None, True)
    assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), named.state_dict().values(), strict=True))


class Hostile:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("was-here",)


@each("content", ["pickle", "text", "empty", "other"])
def test_a_file_that_is_no_such_network_is_refused(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    """A pickle that runs code, which it does not; a text; nothing; the weights of another network."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pth"
    path.write_bytes({"text": b"hello", "empty": b""}.get(content, b""))
    if content == "pickle":
        torch.save({"features.0.weight": Hostile()}, path)
    source = models["lpips-alex"] if content == "other" else path
    with pytest.raises(ImagicError, match="lpips-squeeze cannot be loaded") as caught:
        load_lpips("lpips-squeeze", str(source), True)
    assert "torchvision" in caught.value.expected
    assert not (tmp_path / "was-here").exists()


@each("metric", [metric for metric in METRICS if metric != "pixels"])
def test_offline_asks_no_other_machine_for_a_model(metric: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the message says which one is missing, and how to leave it out."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    asked: list[object] = []

    def lookup(host: object, *_: object, **__: object) -> None:
        asked.append(host)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    source = () if metric in LPIPS else ((metric, "nobody/nothing"),)
    with pytest.raises(ImagicError, match=metric) as caught:
        Evaluator.load(Settings(Sources((metric,), source, offline=True)))
    assert f"leave {metric} out of --metrics" in caught.value.remedy
    assert asked == []


def test_a_model_of_another_kind_is_refused(models: dict[str, Path]) -> None:
    """A ViT is no CLIP model, and the other way round."""
    for metric, other in (("clip-b32", "dino"), ("dino", "clip-b32")):
        with pytest.raises(ImagicError, match="its model_type is"):
            Evaluator.load(Settings(Sources((metric,), ((metric, str(models[other])),), offline=True)))


def test_every_measure_is_described(models: dict[str, Path]) -> None:
    """What is measured has a description of its own, and what is described is measured; the weights have a name."""
    names = ("pixels", *models)
    one = evaluator(models, *names)
    described = {measure.name: measure for measure in one.settings.measures()}
    assert set(one.scores(subject())) == set(described)
    assert set(one.weights) == set(models)
    assert len(set(one.weights.values())) == len(models) - 1  # both CLIP models have the same random weights
    assert all(str(SIZE) in measure.preprocessing or "own size" in measure.preprocessing for measure in described.values())


@each(
    "metrics, given, message",
    [
        ("clip", [], "--metrics clip has 'clip'"),
        ("pixels", ["dino=x"], "--model dino without dino"),
        ("all", ["dino"], "--model dino"),
        ("all", ["vit=x"], "--model vit=x"),
        ("all", ["dino=x", "dino=y"], "--model dino=y"),
    ],
)
def test_wrong_flags_are_named(metrics: str, given: list[str], message: str) -> None:
    """Before anything is loaded."""
    with pytest.raises(ImagicError, match=message):
        parse_sources(metrics, given, False)
