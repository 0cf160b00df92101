"""The code of the README and the guide, run: Python as it is written, and every command that can run on any machine (documents.py).

The world that it runs in: a folder with a photo, a mask and prompts, and a store with the adapters that the pages name. Fits take two steps
a stage, and images two sampling steps where a page does not say how many. Names of published bases stand for tiny ones of random weights.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import array, each, opened, tiny_config
from diffusers import ControlNetModel, UNet2DConditionModel
from documents import PAGES, ROOT, Block, arguments, blocks, why_not_run
from PIL import Image
from safetensors.torch import save_file
from tiny import save_tiny, save_tiny_klein, save_tiny_sd3, save_tiny_sdxl

import imagic_lora.cli.app as cli
from imagic_lora import Store, configure, fit, result
from imagic_lora.adapters.adapter import Adapter
from imagic_lora.adapters.contents import read_canvas
from imagic_lora.adapters.export import export
from imagic_lora.core.settings.merging import merged
from imagic_lora.core.settings.recipes import RECIPES
from imagic_lora.sampling.editor import Editor

pytestmark = [  # two steps of training change little, which some commands warn of
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::imagic_lora.core.errors.ImagicWarning"),
]

SHORT = {"embed": {"steps": 2}, "tune": {"steps": 2}, "edit": {"steps": 2}}
HUB = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stabilityai/stable-diffusion-3.5-medium": "sd3",
    "black-forest-labs/FLUX.2-klein-base-4B": "klein",
}
FAMILIES: dict[str, Callable[[Path], Path]] = {
    "sd": save_tiny, "sdxl": save_tiny_sdxl, "sd3": save_tiny_sd3, "klein": save_tiny_klein,
}  # fmt: skip
README, DIFFUSERS = ROOT / "README.md", ROOT / "docs" / "guide" / "diffusers.md"
PYTHON = [page for page in PAGES if any(block.kind == "python" for block in blocks(page))]


@pytest.fixture(scope="module", autouse=True)
def short() -> Iterator[None]:
    """Recipes of critters with few steps."""
    with pytest.MonkeyPatch.context() as patch:
        recipes = deepcopy(RECIPES["critters"])
        for part, settings in recipes.items():
            known = {name: value for name, value in SHORT.items() if name in settings}
            recipes[part] = merged(settings, known | {"edit": {"steps": 2}})
        patch.setitem(RECIPES, "critters", recipes)
        yield


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A photo of 64 x 64 pixels."""
    path = tmp_path_factory.mktemp("photo") / "dog.png"
    shutil.copyfile(ROOT / "adapters" / "rex-jumps" / "source.png", path)
    return path


@pytest.fixture(scope="module")
def fitted_on_critters(photo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the adapters that the pages name."""
    root = tmp_path_factory.mktemp("store")
    settings = {"base": "critters", "edit": {"start": "noise", "ddim_eta": 0.0}}  # as Stable Diffusion has them
    made = result(fit(photo, "a dog jumping", configure(settings), Store(root), "rex"))
    assert made is not None
    for name in ("rex-jumps", "mia-wears-a-hat"):
        shutil.copytree(root / "rex", root / name)
    word = {"base": "critters", "method": "textual-inversion", "inversion": {"initial_word": "dog"}}
    result(fit(photo, "a photo of <my-dog>", configure(word), Store(root), "my-dog"))
    return root


@pytest.fixture
def world(photo: Path, fitted_on_critters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the files that the pages name."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(fitted_on_critters, tmp_path / "adapters")
    with Image.open(photo) as opened_photo:
        image = opened_photo.convert("RGB")
    for name in ("dog.jpg", "rex.png", "tom.png", "edges.png", "outputs/demo/photo.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / name)
    mask = Image.new("L", image.size)
    mask.paste(255, (32, 0, 64, 64))
    mask.save(tmp_path / "mask.png")
    (tmp_path / "prompts.txt").write_text("a dog jumping\na dog sleeping\n")
    return tmp_path


# Commands


@pytest.mark.parametrize("page", [page for page in PAGES if any(block.commands for block in blocks(page))], ids=lambda page: page.stem)
def test_commands_run(page: Path, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With exit code 0, or 2 where the error says that the embedded base is not one for this command."""
    for block in blocks(page):
        for tokens in filter(None, map(arguments, block.commands)):
            if why_not_run(tokens) is None:
                tokens = ["rex" if token == "NAME" else token for token in tokens]
                _run(block, tokens, world, capsys)


def _run(block: Block, tokens: list[str], world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs a command; what an earlier one wrote is removed, but an image that this one reads is made."""
    shutil.rmtree(world / "outputs", ignore_errors=True)
    if tokens[0] == "reproduce":
        assert cli.main(["edit", "rex", "--eta", "0.7"]) == 0
    if tokens[0] == "fit":
        shutil.rmtree(world / "adapters" / "dog", ignore_errors=True)
    capsys.readouterr()
    code = cli.main(tokens)
    said = " ".join(capsys.readouterr().err.split())
    assert code == 0 or (code == 2 and "critters" in said), f"{block}: {tokens}: {said}"


# Python


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the folder of the tiny base that stands for a published one; ``net`` is a ControlNet."""
    root = tmp_path_factory.mktemp("tiny")

    @cache
    def saved(family: str) -> Path:
        if family == "net":
            unet: Any = UNet2DConditionModel.from_pretrained(saved("sd") / "unet")
            ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32, 96)).save_pretrained(root / family)
            return root / family
        return FAMILIES[family](root / family)

    return saved


@pytest.fixture(scope="module")
def tiny_adapter(
    photo: Path, tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Adapter]:
    """Gives the adapter ``rex`` of a family and a mode; ``word`` is textual inversion."""

    @cache
    def make(family: str, mode: Any) -> Adapter:
        store = Store(tmp_path_factory.mktemp("rex"))
        if mode == "word":
            inversion = {"initial_word": "d", "templates": "prompt"}
            word = tiny_config(tiny_folder(family), "embedding", method="textual-inversion", inversion=inversion)
            made = result(fit(photo, "<my-dog>", word, store, "my-dog"))
        else:
            targets = {"tune": {"targets": "attention"}} if mode == "lora" else {}
            made = result(fit(photo, "a cat", tiny_config(tiny_folder(family), mode, **targets), store, "rex"))
        assert made is not None
        return made

    return make


def substituted(code: str, tiny_folder: Callable[[str], Path]) -> str:
    """The code with the names of bases replaced by folders; nothing else of it changes."""
    names = {**HUB, "lllyasviel/sd-controlnet-canny": "net", "sd15": "sd"}
    for name, family in names.items():
        if f'"{name}"' in code:
            code = code.replace(f'"{name}"', repr(str(tiny_folder(family))))
    return code


def executed(block: Block, names: dict[str, Any], tiny_folder: Callable[[str], Path]) -> None:
    """Runs a block; an error gives its line in the page."""
    code = "\n" * (block.line - 1) + substituted(block.code, tiny_folder)
    exec(compile(code, str(block.page), "exec"), names)


def test_readme_is_executed(world: Path, tiny_folder: Callable[[str], Path]) -> None:
    """And saves an image for each eta."""
    shutil.rmtree(world / "adapters")
    for block in blocks(README):
        if block.kind == "python":
            executed(block, {}, tiny_folder)
    assert {path.name for path in world.glob("rex-*.png")} == {"rex-0.6.png", "rex-0.8.png"}


@pytest.mark.parametrize("page", [page for page in PYTHON if page not in (README, DIFFUSERS)], ids=lambda page: page.stem)
def test_python_of_a_page_is_executed(page: Path, world: Path, tiny_folder: Callable[[str], Path]) -> None:
    """After that of the README, whose names it uses."""
    names: dict[str, Any] = {}
    for block in [*blocks(README), *blocks(page)]:
        if block.kind == "python":
            if "fit(" in block.code:
                shutil.rmtree(world / "adapters", ignore_errors=True)
            executed(block, names, tiny_folder)


def _of_export(block: Block) -> bool:
    return "outputs/export/rex" in block.code


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")  # the page says so
def test_pipelines_of_the_editor_are_executed(
    world: Path, tiny_folder: Callable[[str], Path], tiny_adapter: Callable[[str, str], Adapter]
) -> None:
    """The first is the edit of our own; the blocks of the page before those of an export run one after the other."""
    adapter, names = tiny_adapter("sd", "lora"), dict[str, Any]()
    shutil.rmtree(world / "adapters")
    shutil.copytree(adapter.folder, world / "adapters" / "rex")
    width = UNet2DConditionModel.load_config(tiny_folder("sd") / "unet")["block_out_channels"][0]  # type: ignore
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file({f"{layer}.lora_A.weight": torch.ones(2, width), f"{layer}.lora_B.weight": torch.ones(width, 2)}, world / "style.safetensors")
    found = [block for block in blocks(DIFFUSERS) if block.kind == "python" and not _of_export(block) and "my-dog" not in block.code]
    images = []
    for block in found:
        executed(block, names, tiny_folder)
        images.append(array(names["edit"].restored(names["image"])))
    edited = array(next(Editor(opened(tiny_folder("sd"))).edit(adapter, [0.7], [0], adapter.record.config.edit)).image)
    assert np.abs(images[0] - edited).max() <= 1
    assert len(images) == 4
    assert all(np.abs(images[0] - image).max() > 1 for image in images[2:])  # a new ControlNet adds nothing


@each("block", [block for block in blocks(DIFFUSERS) if _of_export(block) and block.kind == "python"])
def test_an_export_makes_the_edit_in_plain_diffusers(
    block: Block, world: Path, tiny_folder: Callable[[str], Path], tiny_adapter: Callable[[str, str], Adapter]
) -> None:
    """To 1 of 255, without a line of ours, in at most 15 lines. Family and mode are those of the block."""
    (family,) = (family for name, family in HUB.items() if name in block.code)
    adapter = tiny_adapter(family, "lora" if "load_lora_weights" in block.code else "full")
    export(adapter, "diffusers", world / "outputs" / "export", overwrite=True)
    assert len(block.code.strip().splitlines()) <= 15
    assert "imagic_lora" not in block.code
    canvas = read_canvas(adapter)
    height, width = canvas.pixels.shape[2:]
    sized = Block(block.page, block.line, block.kind, block.code.replace("height=1024, width=1024", f"height={height}, width={width}"))
    names: dict[str, Any] = {}
    executed(sized, names, tiny_folder)
    asked = re.search(r"num_inference_steps=(\d+), guidance_scale=([\d.]+)", block.code)
    assert asked
    config = adapter.record.config.edit.model_copy(update={"steps": int(asked[1]), "guidance_scale": float(asked[2])})
    edited = next(Editor(opened(tiny_folder(family))).edit(adapter, [0.7], [0], config)).image
    assert np.abs(array(canvas.restored(names["image"])) - array(edited)).max() <= 1


def test_every_family_and_mode_has_an_example() -> None:
    """LoRA and full."""
    exports = [block.code for block in blocks(DIFFUSERS) if _of_export(block)]
    found = {(name, "load_lora_weights" in code) for code in exports for name in HUB if name in code}
    assert found == {(name, lora) for name in HUB for lora in (True, False)}


def test_a_new_word_is_read_by_plain_diffusers(
    world: Path, tiny_folder: Callable[[str], Path], tiny_adapter: Callable[[str, str], Adapter]
) -> None:
    """Both files of SDXL, into both text encoders."""
    shutil.rmtree(world / "adapters")
    shutil.copytree(tiny_adapter("sdxl", "word").folder, world / "adapters" / "my-dog")
    names: dict[str, Any] = {}
    (block,) = (block for block in blocks(DIFFUSERS) if "my-dog" in block.code)
    executed(block, names, tiny_folder)
    assert all("<my-dog>" in tokenizer.get_vocab() for tokenizer in (names["pipe"].tokenizer, names["pipe"].tokenizer_2))


# Types


def test_the_examples_type_check(tmp_path: Path) -> None:
    """By pyright, as a user of the package runs it: py.typed, the lazy names, and the signatures of what they are."""
    readme = "\n".join(block.code for block in blocks(README) if block.kind == "python")
    for page in PYTHON:
        code = [block.code for block in blocks(page) if block.kind == "python" and "from diffusers" not in block.code]  # types of diffusers
        (tmp_path / f"page_{page.stem}.py").write_text("\n".join([*([readme] if page not in (README, DIFFUSERS) else []), *code]))
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"reportPrivateImportUsage": "none", "extraPaths": [str(ROOT)]}))
    command = [sys.executable, "-m", "pyright", "--project", str(tmp_path), "--pythonpath", sys.executable]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
