"""LPIPS (Zhang et al. 2018, arXiv 1801.03924): the distance of two pictures by features of a classifier.

torchmetrics holds the published linear weights, but makes its backbones by torchvision, which is no dependency of this package. The
backbones here have the layers and the names of torchvision's, so that its published weights fit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torchmetrics.functional.image.lpips as published
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ...core.errors import ImagicError
from .sources import LPIPS, files_hash

_URL = "https://download.pytorch.org/models/{}"
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_TAPS = {"lpips-alex": (1, 4, 7, 9, 11), "lpips-vgg": (3, 8, 15, 22, 29), "lpips-squeeze": (1, 4, 7, 9, 10, 11, 12)}
"""Layers whose outputs are compared."""


class _Fire(nn.Module):
    """A module of SqueezeNet: one convolution to few channels, then two side by side."""

    def __init__(self, inside: int, squeezed: int, outside: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inside, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, outside, 1)
        self.expand3x3 = nn.Conv2d(squeezed, outside, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x).relu()
        return torch.cat([self.expand1x1(x).relu(), self.expand3x3(x).relu()], 1)


def _pool(ceil: bool = False) -> nn.MaxPool2d:
    return nn.MaxPool2d(3, 2, ceil_mode=ceil)


def _alexnet() -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), _pool(), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), _pool()]
    for inside, outside in ((192, 384), (384, 256), (256, 256)):
        layers += [nn.Conv2d(inside, outside, 3, padding=1), nn.ReLU()]
    return [*layers, _pool()]


def _vgg16() -> list[nn.Module]:
    layers, inside = list[nn.Module](), 3
    for outside, convolutions in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(convolutions):
            layers += [nn.Conv2d(inside, outside, 3, padding=1), nn.ReLU()]
            inside = outside
        layers.append(nn.MaxPool2d(2, 2))
    return layers


def _squeezenet() -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 2), nn.ReLU(), _pool(True), _Fire(64, 16, 64), _Fire(128, 16, 64), _pool(True)]
    layers += [_Fire(128, 32, 128), _Fire(256, 32, 128), _pool(True)]
    return [*layers, _Fire(256, 48, 192), _Fire(384, 48, 192), _Fire(384, 64, 256), _Fire(512, 64, 256)]


_BACKBONES = {"lpips-alex": _alexnet, "lpips-vgg": _vgg16, "lpips-squeeze": _squeezenet}


def backbone(model: str) -> nn.Sequential:
    """Returns the convolutional layers of a backbone with random weights: the ``features`` of torchvision's class.

    Args:
        model: one of ``lpips-alex``, ``lpips-vgg``, ``lpips-squeeze``.
    """
    return nn.Sequential(*_BACKBONES[model]())


class Lpips(nn.Module):
    """The distance with one backbone.

    Args:
        model: name of the model.
        features: the backbone.
        linear: weights of the channels of each compared layer, ``[1, C, 1, 1]``.
    """

    def __init__(self, model: str, features: nn.Sequential, linear: list[Tensor]) -> None:
        super().__init__()
        self.taps, self.compared = _TAPS[model], nn.ModuleList(list(features)[: _TAPS[model][-1] + 1])
        self.linear = nn.ParameterList(nn.Parameter(weight, requires_grad=False) for weight in linear)

    @torch.no_grad()
    def layers(self, first: Tensor, second: Tensor) -> list[Tensor]:
        """Returns the weighted squared difference of the normalised features of each compared layer, ``[1, 1, h, w]``.

        Args:
            first, second: pictures ``[1, 3, H, W]`` in [-1, 1].
        """
        differences = zip(self._normalised(first), self._normalised(second), strict=True)
        return [((a - b).square() * weight).sum(1, keepdim=True) for (a, b), weight in zip(differences, self.linear, strict=True)]

    def _normalised(self, x: Tensor) -> list[Tensor]:
        shift, scale = (torch.tensor(values, device=x.device).view(1, 3, 1, 1) for values in (_SHIFT, _SCALE))
        x, found = (x - shift) / scale, list[Tensor]()
        for index, layer in enumerate(self.compared):
            x = layer(x)
            if index in self.taps:
                found.append(x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt())
        return found

    def distance(self, first: Tensor, second: Tensor) -> float:
        """Returns the distance of whole pictures: the sum over layers of the mean over positions."""
        return sum(layer.mean().item() for layer in self.layers(first, second))

    def distance_over(self, first: Tensor, second: Tensor, region: Tensor) -> float:
        """Returns the distance over a region: each layer is scaled to the size of the pictures, and its mean is that over the region.

        Args:
            first, second: pictures ``[1, 3, H, W]`` in [-1, 1].
            region: 1 inside and 0 outside, ``[1, 1, H, W]``, not 0 everywhere.
        """
        scaled = (interpolate(layer, region.shape[2:], mode="bilinear", align_corners=False) for layer in self.layers(first, second))
        return sum(((layer * region).sum() / region.sum()).item() for layer in scaled)


def load_lpips(model: str, source: str | None, offline: bool) -> tuple[Lpips, str]:
    """Loads LPIPS with one backbone.

    Args:
        model: name of the model.
        source: file of the weights of the backbone, ``.pth`` or ``.safetensors``, or a folder with one such file. None for the file that
            torchvision publishes: from the cache of torch.hub, or downloaded into it.
        offline: whether nothing is downloaded.

    Returns:
        The model, and what tells its weights from others.

    Raises:
        ImagicError: the weights are not there, or are those of another network.
    """
    try:
        path = _file(model, source, offline)
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
        features = backbone(model)
        features.load_state_dict({name.removeprefix("features."): value for name, value in state.items() if not _classifies(name)})
    except ImagicError:
        raise
    except Exception as error:  # torch raises anything for a damaged file: UnpicklingError, EOFError, RuntimeError
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        expected = f"the weights of torchvision's network for {model}, as {LPIPS[model]} or in safetensors"
        remedy = f"check the connection, or name a file with --model {model}=FILE, or leave {model} out of --metrics"
        raise ImagicError(f"the weights of {model} cannot be loaded ({reason})", expected, remedy) from error
    return Lpips(model, features, linear_weights(model)).eval(), files_hash([path])


def _classifies(name: str) -> bool:
    return name.startswith("classifier.")


def _file(model: str, source: str | None, offline: bool) -> Path:
    """The file of the weights of a backbone."""
    if source is not None:
        path = Path(source)
        files = [one for one in sorted(path.iterdir()) if one.suffix in (".pth", ".safetensors")] if path.is_dir() else [path]
        if len(files) != 1 or not files[0].is_file():
            got = f"--model {model}={source}, {'a folder with ' + str(len(files)) + ' such files' if path.is_dir() else 'which is no file'}"
            raise ImagicError(got, "a .pth or .safetensors file, or a folder with one", f"name the file, such as {LPIPS[model]}")
        return files[0]
    cached = Path(torch.hub.get_dir()) / "checkpoints" / LPIPS[model]
    if not cached.is_file():
        if offline:
            remedy = f"leave out --offline to download it, name a file with --model {model}=FILE, or leave {model} out of --metrics"
            raise ImagicError(f"{model} needs {LPIPS[model]}, and the cache has no {cached}", "the file in the cache", remedy)
        torch.hub.load_state_dict_from_url(
            _URL.format(LPIPS[model]), map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    return cached


def linear_weights(model: str) -> list[Tensor]:
    """Returns the published weights of the channels of each compared layer, ``[1, C, 1, 1]``, which torchmetrics holds."""
    path = Path(published.__file__).parent / "lpips_models" / f"{model.removeprefix('lpips-')}.pth"
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return [state[f"lin{k}.model.1.weight"].float() for k in range(len(_TAPS[model]))]
