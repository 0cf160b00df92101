"""The published layouts of TEdBench and PIE-Bench with their oddities, made small, and models of the evaluator with random weights."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import save_clip, save_vit
from PIL import Image
from safetensors.torch import save_file

from imagic_lora.bench.evaluator.lpips import backbone

MODELS = ("clip-b32", "clip-l14", "lpips-alex", "lpips-squeeze", "dino")


def scene(number: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """A smooth picture of its own."""
    down, across = np.mgrid[0 : size[1], 0 : size[0]] / 16
    waves = [np.sin(down * (1 + 0.3 * number) + k) + np.cos(across * (1 + 0.2 * k) + number) for k in range(3)]
    return Image.fromarray((127 + 60 * np.stack(waves, -1)).astype(np.uint8))


def write_tedbench(folder: Path) -> Path:
    """TEdBench of six edits: one photo twice, once as a JPEG named .png; an RGBA photo; gray; a text with two sentences; returns it."""
    originals = folder / "originals"
    originals.mkdir(parents=True)
    scene(0).save(originals / "bird.jpeg", "JPEG")
    (originals / "bird.png").write_bytes((originals / "bird.jpeg").read_bytes())
    clear = scene(1).convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    clear.save(originals / "dog2_standing.png")
    scene(2, (41, 40)).convert("L").save(originals / "tree_1.jpeg", "JPEG")
    entries = [
        ("bird.jpeg", "A bird flies."),
        ("bird.png", "A bird naps."),
        ("dog2_standing.png", "A sitting dog."),
        ("dog2_standing.png", "A jumping dog."),
        ("tree_1.jpeg", "A tree. Old."),
        ("tree_1.jpeg", "A dead tree."),
    ]
    write_list(folder, [{"img_name": name, "target_text": text} for name, text in entries])
    return folder


def write_list(folder: Path, entries: Any) -> None:
    """Replaces the list of TEdBench."""
    (folder / "input_list.json").write_text(json.dumps(entries), encoding="utf-8")


@cache
def _photo(number: int) -> bytes:
    """A photo of PIE-Bench as a JPEG file."""
    file = io.BytesIO()
    scene(number, (512, 512)).save(file, "JPEG")
    return file.getvalue()


def write_pie(folder: Path, **changes: dict[str, Any]) -> Path:
    """PIE-Bench of three edits: brackets, a mask that runs over the end, an empty one, deep folders; returns it.

    Args:
        changes: values of entries that differ, by ``n`` and the number of the entry.
    """
    entries = {
        "000000000000": ("0_random_140/000000000000.jpg", "a [red] cat", "a [blue] cat", "0", [512 * 100 + 50, 200, 512 * 101 + 50, 200]),
        "111000000000": ("1_change_object_80/1_artificial/1_animal/111000000000.jpg", "a cat", "a [dog]", "1", [512 * 400, 90_000]),
        "922000000001": ("9_change_style_80/2_natural/922000000001.jpg", "a cat [and a dog]", "a cat", "9", []),
    }
    mapping = {}
    for number, (name, (path, source, target, kind, mask)) in enumerate(entries.items()):
        photo = folder / "annotation_images" / path
        photo.parent.mkdir(parents=True)
        photo.write_bytes(_photo(number))
        entry = {"image_path": path, "original_prompt": source, "editing_prompt": target, "editing_instruction": "", "mask": mask}
        mapping[name] = entry | {"editing_type_id": kind, "blended_word": "cat cat"} | changes.get(f"n{number}", {})
    (folder / "mapping_file.json").write_text(json.dumps(mapping), encoding="utf-8")
    return folder


def save_models(folder: Path) -> dict[str, Path]:
    """Random models of the evaluator, all but the large VGG16, by their names."""
    torch.manual_seed(1)
    found = {"clip-b32": save_clip(folder / "b32"), "clip-l14": save_clip(folder / "l14"), "dino": save_vit(folder / "dino")}
    for name in ("lpips-alex", "lpips-squeeze"):
        found[name] = save_backbone(folder, name)
    return found


def save_backbone(folder: Path, name: str) -> Path:
    """Random weights of a backbone of LPIPS under the names of torchvision; returns the file."""
    path = folder / f"{name}.safetensors"
    state = {f"features.{key}": value for key, value in backbone(name).state_dict().items()}
    save_file(state | {"classifier.1.weight": torch.zeros(1)}, path)
    return path


def flags(models: dict[str, Path], *names: str) -> list[str]:
    """The flags that measure pixels and some models, all of them by default."""
    chosen = [name for name in models if name in names] if names else list(models)
    return ["--metrics", ",".join(["pixels", *chosen]), *(part for name in chosen for part in ("--model", f"{name}={models[name]}"))]
