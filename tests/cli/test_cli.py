"""The command line: what it accepts, rejects, prints and writes."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import signal
import warnings
from collections.abc import Callable
from inspect import isfunction
from pathlib import Path
from types import MethodType
from typing import Any, get_args

import numpy as np
import pytest
import torch
from common import MODES, Run, array, each, slow_but
from cyclopts import CycloptsError
from files import forbid
from PIL import Image
from pydantic import BaseModel
from tiny import save_tiny

import imagic_lora.cli.app as cli
import imagic_lora.cli.commands.fit as fitting
import imagic_lora.core.choices as choices
import imagic_lora.core.runtime as runtime
import imagic_lora.memory.presets as fits
import imagic_lora.sampling.opening as opening
import imagic_lora.sampling.outputs as outputs
import imagic_lora.training.fit as imagic
import imagic_lora.training.run as run_module
from imagic_lora.adapters.store import Store
from imagic_lora.cli.options import suggested_etas
from imagic_lora.core.config import DreamBoothConfig, EditConfig, InversionConfig, Mode, MonitoringConfig, RunConfig
from imagic_lora.core.config_group import Config
from imagic_lora.core.device_config import DeviceConfig, MemoryConfig
from imagic_lora.core.settings.merging import merged
from imagic_lora.core.settings.presets import PRESETS
from imagic_lora.core.settings.reading import validated
from imagic_lora.core.settings.recipes import RECIPES, RecipePart
from imagic_lora.photos.reading import read_metadata, read_photo
from imagic_lora.training.stage import Stage, StepReport


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("cli") / "base")


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "my dog.png"
    Image.radial_gradient("L").resize((40, 32)).convert("RGB").save(path)
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, base: Path, photo: Path) -> Path:
    """A store with one adapter, ``rex``."""
    folder = tmp_path_factory.mktemp("store")
    assert cli.main(["fit", str(photo), "a [b]dog", "--base", str(base), *SHORT, "--store", str(folder), "--name", "rex"]) == 0
    return folder


SHORT = ("--embed.steps", "2", "--tune.steps", "2", "--edit.steps", "2", "--rank", "2", "--convergence-every", "0")


def test_fit_then_edit_writes_pictures_a_sheet_and_json(run: Run, base: Path, photo: Path) -> None:
    """The two main commands, end to end, at the photo's own size."""
    code, out, err = run("fit", photo, "a dog jumping", "--base", base, *SHORT, "--json")
    assert code == 0
    made = json.loads(out)
    assert made["name"] == "my-dog"
    assert Path(made["folder"], "adapter.json").is_file()
    assert "adam (8-bit states are not needed on the CPU)" in err
    code, out, _ = run("edit", "my-dog", "--eta", "0:1:0.5", "--seed", "0:2", "--steps", "2", "--json")
    answer = json.loads(out)
    assert code == 0
    assert [(p["eta"], p["seed"]) for p in answer["pictures"]] == [(e, s) for e in (0.0, 0.5, 1.0) for s in (0, 1)]
    for one in answer["pictures"]:
        assert read_photo(Path(one["file"])).image.size == (40, 32)
        assert read_metadata(Path(one["file"]))["eta"] == one["eta"]
    assert read_photo(Path(answer["sheet"])).image.width > 3 * 192


def test_mode_embedding_from_the_fit_to_the_list(run: Run, base: Path, photo: Path) -> None:
    """The settings and the progress show stage 1 alone; list, show and verify know the adapter; rm removes it."""
    code, out, err = run(
        "fit", photo, "a dog jumping", "--base", base, "--mode", "embedding", "--embed.steps", 2, "--edit.steps", 2, "--json"
    )
    assert code == 0, err
    said = " ".join(err.split())
    assert "tuning none, the embedding alone is trained" in said
    assert "embed 2/2 loss" in said
    assert not re.search(r"\btune\b", said)
    made = json.loads(out)
    assert (made["mode"], list(made["losses"]), list(made["seconds"])) == ("embedding", ["embed"], ["embed"])
    assert made["bytes"] == Path(made["folder"], "embeddings.safetensors").stat().st_size
    assert json.loads(run("list", "--json")[1])["adapters"][0]["mode"] == "embedding"
    assert "embedding" in run("list")[1]
    assert json.loads(run("show", "my-dog", "--json")[1])["parts"] == []
    assert run("verify", "my-dog")[0] == run("edit", "my-dog", "--eta", "0.5", "--steps", "2")[0] == run("rm", "my-dog")[0] == 0
    assert json.loads(run("list", "--json")[1])["adapters"] == []


EDIT = ("edit", "rex", "--steps", 2)


def test_two_edits_never_share_a_file(run: Run, store: Path) -> None:
    """Etas that differ in the eighth digit have names of their own; one that is given twice is one image."""
    code, out, _ = run(*EDIT, "--store", store, "--eta", "0.70000001,0.70000002,0.7,0.70", "--seed", "1,1", "--json")
    assert code == 0
    files = [Path(one["file"]).name for one in json.loads(out)["pictures"]]
    assert files == ["eta0.70000001-seed1.png", "eta0.70000002-seed1.png", "eta0.7-seed1.png"]
    assert sorted(path.name for path in Path("outputs/rex").iterdir()) == sorted([*files, "sheet.png"])
    assert read_metadata(Path("outputs/rex", files[1]))["eta"] == 0.70000002


def test_an_edit_replaces_no_other_edit_unasked(run: Run, store: Path) -> None:
    """The same command runs again, with any batch size; another prompt, other settings and a stranger's file need --overwrite."""
    image = Path("outputs/rex/eta0.7-seed0.png")
    assert run(*EDIT, "--store", store)[0] == run(*EDIT, "--store", store, "--batch-size", 1, "--seed", "0:2")[0] == 0
    first = image.read_bytes()
    for flags, change in ((("--prompt", "a cat"), "prompt was 'a [b]dog', is 'a cat'"), (("--steps", 3), "edit.steps was 2, is 3")):
        code, _, err = run(*EDIT[:2], *(flags if flags[0] == "--steps" else (*EDIT[2:], *flags)), "--store", store)
        assert (code, f"{image} is another image: {change}" in err, "--overwrite" in err) == (2, True, True)
    assert image.read_bytes() == first
    assert run(*EDIT, "--prompt", "a cat", "--store", store, "--overwrite")[0] == 0
    assert read_metadata(image)["prompt"] == "a cat"
    image.write_text("mine")
    code, _, err = run(*EDIT, "--store", store)
    assert (code, "it was not written by imagic-lora edit" in err, image.read_text()) == (2, True, "mine")


@each("name, make", {"folder": ("eta0.7-seed0.png", Path.mkdir), "fifo": ("sheet.png", os.mkfifo), "file": ("", Path.touch)})
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    name: str, make: Callable[[Path], None], run: Run, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder or a FIFO, whose writer would wait for ever, in place of an image, or a file in place of the folder."""
    monkeypatch.setattr("imagic_lora.bases.loading.registry.load_base", lambda *_: pytest.fail("the base is loaded"))
    place = Path("pictures") / name
    place.parent.mkdir(exist_ok=True)
    make(place)
    code, _, err = run(*EDIT, "--store", store, "--out", "pictures")
    assert (code, str(place) in err) == (2, True), err
    shutil.rmtree("pictures", ignore_errors=True)
    Path("pictures").unlink(missing_ok=True)


@pytest.mark.filterwarnings("ignore:The target prompt has characters")
def test_a_folder_without_the_right_to_write_is_refused_before_the_work(run: Run, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By edit, demo, export and bench; so is a file in it that exists and cannot be replaced."""
    Path("mine").mkdir()
    with monkeypatch.context() as patch:
        forbid(patch, Path("mine"))
        export = ("export", "rex", "--store", store, "--format", "kohya")
        for command in ((*EDIT, "--store", store), ("demo",), export, ("bench", "critters", "--cases", 1)):
            code, _, err = run(*command, "--out", "mine")
            assert (code, "mine cannot be written to (Permission denied)" in err) == (2, True), err
    Path("mine/sheet.png").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "sheet.png")
    code, _, err = run(*EDIT, "--store", store, "--out", "mine")
    assert (code, "mine/sheet.png cannot be written to" in err) == (2, True)


@pytest.mark.filterwarnings("always::imagic_lora.core.errors.ImagicWarning")  # the random base changes next to nothing
def test_a_region_is_edited_in_its_photo_and_the_rest_stays(run: Run, base: Path, photo: Path) -> None:
    """From fit --region to edit --keep: the files, their metadata, the sheet with the masks, and what show says."""
    code, out, err = run(
        "fit",
        photo,
        "a dog",
        "--base",
        base,
        "--mode",
        "embedding",
        "--embed.steps",
        2,
        "--edit.steps",
        2,
        "--region",
        "8,4,24,20",
        "--json",
    )
    assert code == 0, err
    made = json.loads(out)
    assert (made["photo"], made["region"]) == ("40x32", [8, 4, 24, 20])
    assert made["stored_photo"] == {"file": "photo.png", "bytes": photo.stat().st_size}
    assert "photo.png" in run("show", "my-dog")[1]
    before, part = array(read_photo(photo).image), np.s_[4:24, 8:32]
    code, out, err = run("edit", "my-dog", "--eta", "0.5,2", "--keep", "auto", "--save-mask", "--json")
    assert code == 0, err
    pictures = json.loads(out)["pictures"]
    assert [picture["eta"] for picture in pictures] == [0.5, 2.0]
    for picture in pictures:
        metadata = read_metadata(Path(picture["file"]))
        assert (metadata["keep"], metadata["region"]) == ("auto", [8, 4, 24, 20])
        image, mask = array(Image.open(picture["file"])), array(Image.open(picture["mask"]))
        assert image.shape == before.shape
        assert np.array_equal(image[mask == 0], before[mask == 0])
        mask[part] = 0
        assert not mask.any()
    assert read_photo(Path(json.loads(out)["sheet"])).image.height > 2 * 192
    code, _, err = run("edit", "my-dog", "--eta", "0.5")
    assert (code, "keep was 'auto', is missing" in err) == (2, True)
    assert run("edit", "my-dog", "--eta", "0.5", "--overwrite")[0] == 0
    assert not np.array_equal(array(Image.open("outputs/my-dog/eta0.5-seed0.png"))[part], before[part])


def test_an_edit_keeps_what_a_mask_keeps(run: Run, store: Path, photo: Path) -> None:
    """Exactly, where it is black; eta 0 is generated for --keep auto only."""
    before = array(read_photo(photo).image)
    mask = Image.new("L", (40, 32))
    mask.paste(255, (10, 10, 30, 30))
    mask.save("mask.png")
    assert run(*EDIT, "--store", store, "--eta", "0.7", "--keep", "mask.png")[0] == 0
    assert sorted(path.name for path in Path("outputs/rex").iterdir()) == ["eta0.7-seed0.png", "sheet.png"]
    image = array(Image.open("outputs/rex/eta0.7-seed0.png"))
    black = array(mask) == 0
    assert np.array_equal(image[black], before[black])
    assert not np.array_equal(image[~black], before[~black])


BAD_KEEP = {
    ("--keep", "small.png"): "small.png has 20x16 pixels",
    ("--keep", "none.png"): "none.png cannot be read",
    ("--keep", "text.png"): "text.png is not an image",
    ("--keep", "black.png"): "black.png is black everywhere",
    ("--keep", "auto", "--photo", "small.png"): "small.png is not the photo that adapter rex was made from",
    ("--photo", "small.png"): "--photo small.png without --keep",
    ("--save-mask",): "--save-mask without --keep",
}


@each("flags", list(BAD_KEEP))
def test_what_cannot_be_kept_is_refused_before_the_work(
    flags: tuple[str, ...], run: Run, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name, with exit code 2."""
    monkeypatch.setattr("imagic_lora.bases.loading.registry.load_base", lambda *_: pytest.fail("the base is loaded"))
    Image.new("L", (20, 16), 255).save("small.png")
    Image.new("L", (40, 32)).save("black.png")
    Path("text.png").write_text("text")
    code, out, err = run(*EDIT, "--store", store, *flags, "--json")
    assert (code, BAD_KEEP[flags] in err) == (2, True), err
    assert "error" in json.loads(out)


@each(
    "region",
    {
        "0,0,41,10": "of a photo of 40x32 pixels",
        "0,0,9,7": "at least 8x8",
        "1,2,3": "four whole numbers",
        "a,0,9,9": "four",
        "": "four",
    }.items(),
)
def test_a_region_that_cannot_be_fitted_is_refused(region: tuple[str, str], run: Run, base: Path, photo: Path) -> None:
    """With one message and exit code 2; nothing is stored."""
    code, _, err = run("fit", photo, "a dog", "--base", base, *SHORT, "--region", region[0])
    assert (code, region[1] in err) == (2, True), err
    assert json.loads(run("list", "--json")[1])["adapters"] == []


def test_a_photo_that_is_not_stored_has_to_be_given(run: Run, base: Path, photo: Path) -> None:
    """And is neither in the adapter nor in an export of one that has it."""
    fit = ("fit", photo, "a dog", "--base", base, "--mode", "embedding", "--embed.steps", 1, "--edit.steps", 1)
    assert run(*fit, "--no-store-photo", "--region", "8,4,24,20")[0] == 0
    assert "stored_photo" not in json.loads(run("show", "my-dog", "--json")[1])
    code, _, err = run("edit", "my-dog")
    assert (code, "does not hold the photo" in err, "--photo FILE" in err) == (2, True, True)
    assert run("edit", "my-dog", "--photo", photo)[0] == 0
    assert run(*fit, "--name", "full")[0] == 0
    assert run("export", "full", "--format", "diffusers")[0] == 0
    assert not [path for path in Path("outputs/export").rglob("*") if path.suffix == ".png"]


def test_list_and_show_print_text_from_outside_as_it_is(run: Run, store: Path) -> None:
    """A prompt with console markup is printed, not obeyed."""
    assert "[b]" in run("list", "--store", store)[1]
    assert "[b]" in run("show", "rex", "--store", store)[1]
    listed = json.loads(run("list", "--store", store, "--json")[1])
    assert [a["name"] for a in listed["adapters"]] == ["rex"]
    shown = json.loads(run("show", "rex", "--store", store, "--json")[1])
    assert shown["prompt"] == "a [b]dog"


def test_a_broken_adapter_does_not_hide_the_others(run: Run, store: Path, tmp_path: Path) -> None:
    """It is named and passed over."""
    shutil.copytree(store, tmp_path / "store")
    broken = tmp_path / "store" / "max" / "adapter.json"
    broken.parent.mkdir()
    broken.write_text("{")
    code, out, err = run("list", "--store", tmp_path / "store", "--json")
    assert code == 0
    assert [a["name"] for a in json.loads(out)["adapters"]] == ["rex"]
    assert "max/adapter.json" in json.loads(out)["skipped"]["max"]
    assert "max" in err
    shutil.rmtree(tmp_path / "store" / "rex")
    code, out, err = run("list", "--store", tmp_path / "store")
    assert (code, out, "Skipped: " in err, "No adapters" in err) == (0, "", True, False)


def test_what_belongs_to_another_user_is_an_error(run: Run, store: Path, base: Path, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter, the store, a base, a photo or a file of settings that may not be read: exit code 2, with its path."""
    for place, commands in {
        store / "rex": (["show", "rex"], ["verify"], ["verify", "rex"], ["edit", "rex"], ["export", "rex", "--format", "kohya"]),
        store: (["list"], ["show", "rex"], ["verify"], ["edit", "rex"], ["rm", "rex"]),
        base: (["edit", "rex"], ["fit", photo, "a dog", "--base", base, "--name", "new"]),
        base.parent: (["edit", "rex"], ["fit", photo, "a dog", "--base", base, "--name", "new"]),
        photo: (["fit", photo, "a dog", "--base", base, "--name", "new"],),
    }.items():
        for command in commands:
            with monkeypatch.context() as patch:
                forbid(patch, place)
                code, _, err = run(*command, "--store", store)
            assert (code, "Permission denied" in err, str(place) in err) == (2, True, True), (command, err)


def test_doctor_names_every_library(run: Run) -> None:
    """The libraries, the choices and their reasons."""
    facts = json.loads(run("doctor", "--json")[1])
    assert set(facts) == {"system", "choices", "libraries", "missing"}
    assert "not installed" not in facts["libraries"].values()
    assert run("doctor")[0] == 0


def bad_input(base: Path, photo: Path, store: Path, tmp: Path) -> dict[str, tuple[list[object], str]]:
    """Bad input of every kind, with a word that the message must hold."""
    text, empty, unknown = tmp / "text.png", tmp / "empty.png", tmp / "unknown.yaml"
    text.write_text("not an image")
    empty.write_bytes(b"")
    unknown.write_text("embed: {stepz: 3}")
    other = save_tiny(tmp / "other", seed=1)
    fit: list[object] = ["fit", photo, "a dog", "--store", store, "--name", "new", "--base", base, *SHORT]
    full: list[object] = ["fit", photo, "a dog", "--base", base, "--device", "cpu", "--mode", "full"]
    return {
        "not an image": (["fit", text, "a dog", "--base", base], "not an image"),
        "empty file": (["fit", empty, "a dog", "--base", base], "is empty"),
        "missing file": (["fit", tmp / "none.png", "a dog", "--base", base], "cannot be read"),
        "empty prompt": (["fit", photo, "  ", "--base", base], "empty prompt"),
        "prompt that is not UTF-8": (["fit", photo, "a dog in a caf\udce9", "--base", base], "is not UTF-8"),
        "prompt that is not UTF-8 for an edit": (["edit", "rex", "--store", store, "--prompt", "a caf\udce9"], "is not UTF-8"),
        "store that is not UTF-8": (["fit", photo, "a dog", "--base", base, "--store", tmp / "caf\udce9"], "is not UTF-8"),
        "base that is not UTF-8": (["fit", photo, "a dog", "--base", "caf\udce9"], "base = "),
        "name that is not UTF-8": (["show", "caf\udce9", "--store", store], "not a valid name"),
        "eta that is not UTF-8": (["edit", "rex", "--store", store, "--eta", "\udce9"], "--eta"),
        "unknown base": (["fit", photo, "a dog", "--base", "nobody"], "critters"),
        "not a base": (["fit", photo, "a dog", "--base", tmp], "model_index.json"),
        "unknown config key": ([*fit, "--config", unknown], "stepz"),
        "unknown preset": ([*fit, "--preset", "nope"], "12gb"),
        "unknown preset for an edit": (["edit", "rex", "--store", store, "--preset", "nope"], "12gb"),
        "eta out of range": (["edit", "rex", "--store", store, "--eta", "3"], "eta 3"),
        "an empty eta": (["edit", "rex", "--store", store, "--eta", ""], "a number, several numbers"),
        "an empty base": (["edit", "rex", "--store", store, "--base", ""], "a folder in diffusers' format"),
        "eta not a number": (["edit", "rex", "--store", store, "--eta", "much"], "--eta much"),
        "seed with the noise of another": (["edit", "rex", "--store", store, "--seed", 2**32 + 5], "whose noise is that of seed 5"),
        "half a case": (["bench", "critters", "--cases", "1.5"], "no whole number"),
        "half a batch": (["plan", "--batch", "1.5"], "no whole number"),
        "seed not a number": (["edit", "rex", "--store", store, "--seed", "one"], "--seed one"),
        "adapter of another base": (["edit", "rex", "--store", store, "--base", other], "was made for base"),
        "no such adapter": (["edit", "max", "--store", store], "rex"),
        "empty prompt for an edit": (["edit", "rex", "--store", store, "--prompt", " "], "empty prompt"),
        "strength without a start": (["edit", "rex", "--store", store, "--strength", "0.5"], "--start image"),
        "strength with inverted noise": (["edit", "rex", "--store", store, "--start", "inverted", "--strength", "0.5"], "--start image"),
        "source eta without inverted noise": (
            ["edit", "rex", "--store", store, "--start", "noise", "--source-eta", "0.3"],
            "--start inverted",
        ),
        "seeds of inverted noise": (["edit", "rex", "--store", store, "--start", "inverted", "--seed", "0:2"], "--start noise"),
        "padding of an adapter without vectors": (["edit", "rex", "--store", store, "--padding-eta", "0.5"], "--embed.space"),
        "no step to take": (["edit", "rex", "--store", store, "--start", "image", "--strength", "0.1", "--steps", "2"], "strength 0.1"),
        "a path in a name": (["fit", photo, "a dog", "--base", base, "--name", "../x"], "no path"),
        "a path in an edit": (["edit", "../rex", "--store", store], "no path"),
        "existing name": (["fit", photo, "a dog", "--base", base, "--store", store, "--name", "rex"], "--overwrite"),
        "unknown command": (["fix"], "fix"),
        "unknown flag": (["edit", "rex", "--etta", "1"], "--etta"),
        "value out of range": ([*fit, "--embed.steps", "0"], "embed"),
        "wrong type": ([*fit, "--seed", "x"], "seed"),
        "clash": ([*fit, "--mode", "full"], "--rank"),
        "clash of levers": ([*full, "--quantize", "nf4"], "--quantize"),
        "clash with mode embedding": ([*fit, "--mode", "embedding"], "mode embedding has no stage 2"),
        "clash with mode embedding in a plan": (["plan", "--mode", "embedding", "--tune.steps", "9"], "--tune.steps"),
        "clash in a plan": (["plan", "--master-weights", "bf16-stochastic"], "--mode lora"),
        "no architecture to plan": (["plan", "--base", "nobody"], "critters"),
        "plain master weights": ([*fit, "--master-weights", "bf16"], "round to zero in plain bf16"),
        "stochastic without bf16": ([*full, "--master-weights", "bf16-stochastic"], "--dtype bf16"),
        "offload without CUDA": ([*fit, "--idle", "offload", "--device", "cpu"], "--idle release"),
        "offload without CUDA in an edit": (["edit", "rex", "--store", store, "--device", "cpu", "--idle", "offload"], "--idle release"),
        "xformers without CUDA": ([*fit, "--attention", "xformers", "--device", "cpu"], "sdpa"),
    }


def test_bad_input_is_one_clear_error(run: Run, base: Path, photo: Path, store: Path, tmp_path: Path) -> None:
    """Exit code 2, what was got, what to do, no traceback; JSON where it was asked for."""
    for case, (command, word) in bad_input(base, photo, store, tmp_path).items():
        code, _, err = run(*command)
        assert code == 2, case
        assert word in err, case
        assert "Traceback" not in err, case
        code, out, _ = run(*command, "--json")
        assert code == 2, case
        assert word in json.loads(out)["error"]["got"] + json.loads(out)["error"]["expected"] + json.loads(out)["error"]["remedy"], case


def test_an_error_is_shown_as_it_was_typed(run: Run, store: Path) -> None:
    """No emoji for :end:, and no name of a validation library."""
    assert "start:end:step" in run("edit", "rex", "--store", store, "--eta", "much")[2]
    assert "pydantic" not in run("edit", "rex", "--store", store, "--steps", "0")[2]


def test_a_long_prompt_is_a_warning_that_says_what_was_cut(run: Run, base: Path, photo: Path) -> None:
    """The fit goes on."""
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        code, _, err = run("fit", photo, "a dog in the garden squad", "--base", base, *SHORT)
    assert code == 0
    assert "Warning: the prompt is longer than the 14 tokens that this base encodes; the end is cut off: 'n squad'" in err


def test_an_interrupt_before_anything_is_trained_exits_130(run: Run, base: Path, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, and nothing is left."""
    monkeypatch.setattr(imagic, "embed_stage", lambda *_: signal.raise_signal(signal.SIGINT))
    code, _, err = run("fit", photo, "a dog", "--base", base, *SHORT)
    assert (code, err) == (130, "Interrupted: nothing was stored")
    assert not list(Path("adapters").iterdir())


@pytest.fixture
def signalled(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sends signals in the middle of a step of a stage."""
    plain = Stage.step

    def at_step(name: str, k: int, *signals: signal.Signals) -> None:
        def step(self: Stage, now: int) -> StepReport:
            for one in signals if (self.name, now) == (name, k) else ():
                signal.raise_signal(one)
            return plain(self, now)

        monkeypatch.setattr(Stage, "step", step)

    return at_step


@pytest.mark.parametrize(
    ("stage", "k", "signals"),
    slow_but(
        [("embed", 2, (signal.SIGTERM,))],
        [
            ("embed", 1, (signal.SIGINT,)),
            ("embed", 2, (signal.SIGTERM,)),
            ("tune", 0, (signal.SIGINT,) * 3),
            ("tune", 2, (signal.SIGINT,)),
        ],
    ),
    ids=["in embed", "terminated at the end of embed", "thrice in tune", "at the end of tune"],
)
def test_an_interrupted_fit_goes_on_by_the_command_it_prints(
    stage: str, k: int, signals: tuple[signal.Signals, ...], run: Run, base: Path, photo: Path, signalled: Callable[..., None]
) -> None:
    """The step is finished, it is saved, 130; the printed command, typed as it is, comes to the bytes of a run that was let be."""
    command = ["fit", photo, "a 'big' dog", "--base", base, "--embed.steps", 3, "--tune.steps", 3, "--edit.steps", 2, "--rank", 2, "--name"]
    assert run(*command, "whole")[0] == 0
    signalled(stage, k, *signals)
    handler = signal.getsignal(signal.SIGINT)
    code, out, err = run(*command, "rex", "--json")
    assert code == 130
    assert signal.getsignal(signal.SIGINT) is handler
    assert f"{k + 1} of 3 steps of stage {stage} are saved" in err
    printed = json.loads(out)["resume"]
    assert f"Resume with: {printed}" in err
    assert "Unfinished: rex" in run("list")[2]
    assert json.loads(run("list", "--json")[1])["unfinished"] == ["rex"]
    signalled("none", 0)
    assert run(*command, "rex")[0] == 2
    assert run(*shlex.split(printed)[1:])[0] == 0
    files = Store(Path("adapters")).read("rex").record.files
    assert files == Store(Path("adapters")).read("whole").record.files
    assert json.loads(run("list", "--json")[1])["unfinished"] == []


def test_an_interrupt_while_loading_leaves_what_was_saved(
    run: Run, base: Path, photo: Path, signalled: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once; the command to go on with is printed again, with one --resume."""
    signalled("tune", 0, signal.SIGINT)
    assert run("fit", photo, "a dog", "--base", base, *SHORT, "--name", "rex")[0] == 130
    monkeypatch.setattr(imagic, "open_base", lambda *_: signal.raise_signal(signal.SIGINT))
    code, _, err = run("fit", photo, "a dog", "--base", base, *SHORT, "--name", "rex", "--resume")
    assert code == 130
    assert "the previous checkpoint is unchanged" in err
    assert err.count("--resume") == 1


def test_verify_finds_a_changed_byte_and_names_the_file(run: Run, store: Path, tmp_path: Path) -> None:
    """Of one adapter, or of all; exit code 2. Only the count and what changed are printed."""
    shutil.copytree(store / "rex", tmp_path / "mine/rex")
    shutil.copytree(store / "rex", tmp_path / "mine/max")
    assert json.loads(run("verify", "--store", "mine", "--json")[1]) == {"unchanged": ["max", "rex"]}
    path = tmp_path / "mine/max/preview.png"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    code, _, err = run("verify", "--store", "mine")
    assert code == 2
    assert "Verified 2 adapters: 1 unchanged, 1 changed Changed: max: " in err
    assert err.count("max/preview.png is missing or has changed") == 2  # in its own line and in the error
    assert "rex" not in err
    code, out, _ = run("verify", "--store", "mine", "--json")
    assert "max/preview.png is missing or has changed" in json.loads(out)["error"]["got"]
    code, _, err = run("verify", "rex", "--store", "mine")
    assert (code, err) == (0, "Verified 1 adapter: 1 unchanged, 0 changed")
    code, _, err = run("verify", "nobody", "--store", "mine")
    assert (code, "Verified" in err) == (2, False)


def test_verify_names_unchanged_adapters_with_verbose(run: Run, store: Path, tmp_path: Path) -> None:
    """Without the flag it prints their number alone."""
    for name in ("rex", "max"):
        shutil.copytree(store / "rex", tmp_path / "mine" / name)
    code, _, err = run("verify", "--store", "mine", "--verbose")
    assert (code, err) == (0, "Unchanged: max Unchanged: rex Verified 2 adapters: 2 unchanged, 0 changed")
    assert run("verify", "--store", "mine")[2] == "Verified 2 adapters: 2 unchanged, 0 changed"


def test_rm_removes_an_adapter_and_an_unfinished_fit(
    run: Run, base: Path, photo: Path, store: Path, signalled: Callable[..., None]
) -> None:
    """Each by its name; what is not there is refused."""
    shutil.copytree(store / "rex", "adapters/rex")
    signalled("tune", 0, signal.SIGINT)
    assert run("fit", photo, "a dog", "--base", base, *SHORT, "--name", "max")[0] == 130
    assert run("rm", "rex")[0] == run("rm", "max")[0] == 0
    assert not list(Path("adapters").iterdir())
    assert run("rm", "rex")[0] == 2


def test_a_full_disk_is_an_error_with_a_remedy(run: Run, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of pictures too; an OSError elsewhere keeps its traceback."""

    def full(code: int) -> Callable[..., None]:
        def write(*_: object) -> None:
            raise OSError(code, os.strerror(code), "eta.png")

        return write

    monkeypatch.setattr(outputs, "write_png", full(errno.ENOSPC))
    code, _, err = run("edit", "rex", "--store", store, "--steps", 2)
    assert code == 2
    assert "the disk of outputs/rex is full" in err
    monkeypatch.setattr(outputs, "write_png", full(errno.EIO))
    code, _, err = run("edit", "rex", "--store", store, "--steps", 2)
    assert (code, "outputs/rex cannot be written to (Input/output error)" in err) == (2, True)
    monkeypatch.setattr(outputs, "sheet", full(errno.EIO))
    monkeypatch.setattr(outputs, "write_png", lambda *_: None)
    with pytest.raises(OSError, match="Input/output"):
        run("edit", "rex", "--store", store, "--steps", 2)


def test_out_of_memory_is_an_error_with_a_remedy(run: Run, base: Path, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 2 and no traceback; another RuntimeError keeps its own."""

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(imagic, "tune_stage", full)
    code, _, err = run("fit", photo, "a dog", "--base", base, *SHORT)
    assert code == 2
    assert "--preset 8gb" in err
    monkeypatch.setattr(imagic, "tune_stage", lambda *_: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        run("fit", photo, "a dog", "--base", base, *SHORT, "--overwrite")


def leaves(group: type[BaseModel] = RunConfig, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every setting, as the path of its names."""
    found: list[tuple[str, ...]] = []
    for name, field in group.model_fields.items():
        kind = field.annotation
        inner = isinstance(kind, type) and issubclass(kind, Config)
        found += leaves(kind, (*path, name)) if inner else [(*path, name)]  # pyright: ignore[reportArgumentType]
    return found


def at(config: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        config = getattr(config, name)
    return config


def other_value(path: tuple[str, ...]) -> Any:
    """A valid value of a setting that is not its default."""
    special = {
        "base": "sd21",
        "revision": "main",
        "resolution": 48,
        "alpha": 3.5,
        ("checkpoint", "steps"): 9,
        "device": "cpu",
        "strength": 0.25,
        "negative_prompt": "blurred",
        "guidance_scale": 2.5,
        "class_prompt": "a dog",
        "word": "rex",
        "initial_word": "wolf",
    }
    for known in (path, path[-1]):
        if known in special:
            return special[known]
    default, choices = at(RunConfig(), path), get_args(_annotation(path))
    if choices and isinstance(default, str):
        return next(c for c in choices if c != default)
    return {int: 7, float: 0.125, bool: True}[type(default)]


def _annotation(path: tuple[str, ...]) -> Any:
    group: Any = RunConfig
    for name in path[:-1]:
        group = group.model_fields[name].annotation
    return group.model_fields[path[-1]].annotation


FLAT = {"mode", "rank", "alpha", "targets", *MemoryConfig.model_fields, *MonitoringConfig.model_fields}
FLAT |= {*DreamBoothConfig.model_fields, *InversionConfig.model_fields}
COMPANIONS = {
    "master_weights": ("--mode", "full"),
    "autocast_cache": ("--mode", "full"),
    "strength": ("--edit.start", "image"),
    "source_eta": ("--edit.start", "inverted"),
    "padding_eta": ("--embed.space", "input"),
    "space": ("--embed.tokens", "all"),
    "patience": ("--early-stop", "tune"),
    "min_improvement": ("--early-stop", "tune"),
    "class_prompt": ("--method", "dreambooth"),
    **dict.fromkeys(("class_pictures", "class_seed", "prior_weight"), ("--method", "dreambooth", "--class-prompt", "a dog")),
    "initial_word": ("--method", "textual-inversion"),
    **dict.fromkeys(("word", "vectors", "templates"), ("--method", "textual-inversion", "--initial-word", "dog")),
}
"""Without these the other value of a setting is a clash."""
LEVELS = ("built-in", "recipe", "preset", "file", "flag")
CHOOSING = (("preset",), ("tune", "mode"), ("method",))
"""What chooses a preset, or the half of a recipe or preset, cannot come from one."""
ALONE = [path for path in leaves() if path in CHOOSING or path[-1] in COMPANIONS]
"""Settings whose other value clashes with that of another one."""
CASES = [(path, "flag") for path in leaves()] + [
    (path, level) for path in ALONE for level in LEVELS[:-1] if path not in CHOOSING or level not in ("recipe", "preset")
]


def token(path: tuple[str, ...]) -> str:
    """The flag of a setting, without its dashes."""
    return (path[-1] if path[-1] in FLAT else ".".join(path)).replace("_", "-")


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """The settings that fit() is given, in place of fitting; on a machine without a card."""
    found: list[RunConfig] = []
    monkeypatch.setattr(fitting, "_run", lambda _start, settings, *_: found.append(settings.run))
    monkeypatch.setattr(fits, "card_and_free_memory", lambda *_: (None, 0))
    return found


def arrived(
    level: str, settings: dict[str, Any], run: Run, photo: Path, given: list[RunConfig], monkeypatch: pytest.MonkeyPatch, *flags: object
) -> RunConfig:
    """What fit() is given when the real command line, a real file, a preset or a recipe holds these settings."""
    monkeypatch.setitem(RECIPES, "sd", {part: settings if level == "recipe" else {} for part in get_args(RecipePart)})
    monkeypatch.setitem(PRESETS, "8gb", {mode: settings if level == "preset" else {} for mode in MODES})
    tokens: list[object] = ["fit", photo, "a dog", *flags]
    if "--preset" not in flags and "preset" not in settings:
        tokens += ["--preset", "8gb"]
    if level == "file":
        Path("settings.yaml").write_text(json.dumps(settings))
        tokens += ["--config", "settings.yaml"]
    code, _, err = run(*tokens)
    assert code == 0, err
    return given.pop()


def nested(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """Settings that hold one value."""
    return {path[0]: nested(path[1:], value) if path[1:] else value}


@each("path, level", CASES)
def test_every_setting_reaches_the_fit(
    path: tuple[str, ...], level: str, run: Run, photo: Path, given: list[RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each by its flag; those that cannot be set along with all others by every other level, too."""
    value, flags = other_value(path), list(COMPANIONS.get(path[-1], ()))
    if level == "flag":
        flags += [f"--{token(path)}"] if value is True else [f"--{token(path)}", value]
    if level == "built-in":
        value = "cpu" if path == ("preset",) else at(RunConfig(), path)  # what auto comes to without a card
        flags += ["--preset", "auto"] if path == ("preset",) else []
    settings = nested(path, value) if level in ("recipe", "preset", "file") else {}
    assert at(arrived(level, settings, run, photo, given, monkeypatch, *flags), path) == value


@each("level", ["built-in", "recipe", "preset", "file"])
def test_all_settings_reach_the_fit_from_every_level(
    level: str, run: Run, photo: Path, given: list[RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All those that do not clash at once, from a real file, in a preset, in a recipe or as the defaults."""
    paths = [path for path in leaves() if path not in ALONE]
    wanted = {path: at(RunConfig(), path) if level == "built-in" else other_value(path) for path in paths}
    settings = {} if level == "built-in" else merged(*(nested(path, value) for path, value in wanted.items()))
    found = arrived(level, settings, run, photo, given, monkeypatch)
    assert {path: at(found, path) for path in paths} == wanted


@each("path", [path for path in leaves() if at(RunConfig(), path) is False])
def test_every_switch_can_be_turned_off_again(path: tuple[str, ...], run: Run, photo: Path, given: list[RunConfig]) -> None:
    """A flag takes back what a file turned on."""
    Path("settings.yaml").write_text(json.dumps({path[0]: {path[1]: True}}))
    tokens = ["fit", photo, "a dog", "--config", "settings.yaml", *COMPANIONS.get(path[-1], ())]
    *group, name = token(path).split(".")
    assert run(*tokens)[0] == run(*tokens, f"--{'.'.join([*group, f'no-{name}'])}")[0] == 0
    assert [at(config, path) for config in given] == [True, False]
    given.clear()


class Watched:
    """A configuration that notes which of its settings are read."""

    def __init__(self, config: Any, seen: set[tuple[str, ...]], path: tuple[str, ...] = ()) -> None:
        self._config, self._seen, self._path = config, seen, path

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._config, name)
        if isinstance(value, Config):
            return Watched(value, self._seen, (*self._path, name))
        if name not in type(self._config).model_fields:  # what a configuration derives from its settings reads them here too
            derived = type(self._config).__dict__.get(name)
            if isinstance(derived, property) and derived.fget:
                return derived.fget(self)
            return MethodType(derived, self) if isfunction(derived) else value
        self._seen.add((*self._path, name))
        return value


def test_every_setting_is_read_by_the_code(base: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting is accepted and ignored: over all modes fit reads each of them, but for the preset, which resolve() has read by then.

    What only plans, refuses or describes a run does not count here, and of the memory levers what the base's runtime was not asked for.
    """
    by_fit: set[tuple[str, ...]] = set()
    by_runtime: set[tuple[str, ...]] = set()
    resolved = runtime.resolve_runtime
    monkeypatch.setattr(imagic, "resolve_runtime", lambda memory: resolved(Watched(memory._config, by_runtime, ("memory",))))
    for module, name in ((imagic, "check_memory"), (imagic, "check_disk"), (choices, "_check_installed")):
        monkeypatch.setattr(module, name, lambda *_: None)
    monkeypatch.setattr(choices, "levers", lambda memory: [])
    monkeypatch.setattr(imagic.Store, "write", lambda *_: "stored")
    monkeypatch.setattr(run_module.Run, "record", lambda self, name: None)
    monkeypatch.setattr(run_module.Run, "inputs", lambda *_: {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    watched = {"convergence_every": 1, "early_stop": "both", "preview_every": 1}
    common = {"base": str(base), "edit": {"steps": 2, "start": "image"}, "monitoring": watched}
    runs: list[dict[str, Any]] = [
        {"embed": {"steps": 2}, "tune": {"mode": mode} if mode == "embedding" else {"steps": 1, "mode": mode}} for mode in MODES
    ]
    subject, word = {"class_prompt": "a cat", "class_pictures": 1}, {"initial_word": "c", "word": "<q>", "templates": "prompt"}
    runs.append({"method": "dreambooth", "dreambooth": subject, "tune": {"steps": 1}, "monitoring": watched | {"early_stop": "tune"}})
    runs.append({"method": "textual-inversion", "inversion": word, "embed": {"steps": 2}, "tune": {"mode": "embedding"}})
    for own in runs:
        config = validated(common | own)
        steps = imagic.fit(photo, "a <q> up", Watched(config, by_fit), Store(tmp_path), "x")  # pyright: ignore[reportArgumentType]
        assert imagic.result(steps) == "stored"
    assert set(leaves()) - {path for path in by_fit if path[0] != "memory"} - by_runtime == {("preset",)}


STARTS = (
    {"start": "image", "strength": 0.9, "scheduler": "ddim"},
    {"start": "inverted", "source_eta": 0.3, "guidance_rescale": 0.5},
    {"start": "noise", "scheduler": "dpm++2m", "karras_sigmas": True, "ddim_eta": 0.0},
)


@each("start", STARTS)
def test_edit_flags_override_what_the_adapter_stored(start: dict[str, Any], run: Run, store: Path) -> None:
    """Each setting of stage 3, from its flag to the metadata of the picture it made."""
    values = {"guidance_scale": 2.0, "steps": 3, "ddim_eta": 0.5, "batch_size": 2, "negative_prompt": "a cat", **start}
    assert set(values).union(*STARTS) == set(EditConfig.model_fields) - {
        "padding_eta",
        "reference",
    }  # which this adapter and base do not have
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    code, out, _ = run("edit", "rex", "--store", store, *flags, "--overwrite", "--json")
    assert code == 0
    assert read_metadata(Path(json.loads(out)["pictures"][0]["file"]))["edit"] == EditConfig().model_dump() | values


@each("flags, taken", [((), 4), (("--preset", "8gb"), 1), (("--preset", "8gb", "--batch-size", "3"), 3)])
def test_the_batch_of_an_edit_is_that_of_the_machine(flags: tuple[str, ...], taken: int, run: Run, store: Path) -> None:
    """A preset takes the place of what the adapter stored, and a flag that of the preset."""
    code, out, _ = run("edit", "rex", "--store", store, "--device", "cpu", *flags, "--json")
    assert code == 0
    assert read_metadata(Path(json.loads(out)["pictures"][0]["file"]))["edit"]["batch_size"] == taken


DEVICE = {"device": "cpu", "dtype": "bf16", "attention": "xformers", "idle": "release", "vae_tiling": True, "vae_slicing": True}


@each("level", ["built-in", "preset", "flag"])
@each("name", list(DeviceConfig.model_fields))
def test_every_device_setting_of_an_edit_reaches_its_runtime(
    name: str, level: str, run: Run, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a preset, from its flag over that of a preset, or as the default."""
    asked: list[MemoryConfig] = []

    def stopped(memory: MemoryConfig) -> None:
        asked.append(memory)
        raise KeyboardInterrupt

    monkeypatch.setattr(opening, "resolve_runtime", stopped)
    default, value = getattr(MemoryConfig(), name), DEVICE[name]
    in_preset = {"built-in": {}, "preset": {name: value}, "flag": {name: default}}[level]
    monkeypatch.setitem(PRESETS, "8gb", {mode: {"memory": in_preset} for mode in MODES})
    flag = [f"--{token((name,))}"] if value is True else [f"--{token((name,))}", value]
    assert run("edit", "rex", "--store", store, "--preset", "8gb", *(flag if level == "flag" else []))[0] == 130
    assert getattr(asked[0], name) == (default if level == "built-in" else value)


@each(
    "command",
    ["", "fit", "edit", "list", "show", "verify", "rm", "compress", "export", "plan", "bases", "bench critters", "demo", "doctor", "web"],
)
def test_help_explains_every_command(command: str, run: Run) -> None:
    """Help exits with 0 and names what it is about."""
    code, out, _ = run(*command.split(), "--help")
    assert code == 0
    assert "Usage" in out
    assert "None" not in out


KLEIN = ("klein-base-4b", "klein-base-9b", "klein-4b", "klein-9b")


def test_the_bases_are_listed(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Those that come along and the user's own, with the file that these are in."""
    path = tmp_path / "bases.yaml"
    path.write_text("mine: {source: owner/name, revision: abc, few_steps: 4}")
    monkeypatch.setenv("IMAGIC_LORA_BASES", str(path))
    code, out, _ = run("bases", "--json")
    found = json.loads(out)
    assert (code, found["file"]) == (0, str(path))
    assert list(found["bases"]) == [
        "critters",
        "critters-dit",
        "sd15",
        "sd21",
        "sdxl",
        "sd3-medium",
        "sd35-medium",
        *KLEIN,
        "sdxl-turbo",
        "mine",
    ]
    assert found["bases"]["mine"]["source"] == "owner/name"
    code, out, err = run("bases")
    assert code == 0
    assert "mine (yours)" in " ".join(out.split())
    assert "sdxl-turbo" in out
    assert str(path) in err
    path.write_text("mine: [")
    assert run("bases")[0] == 2


@pytest.mark.parametrize("mode", slow_but(["full"], MODES))
def test_a_fit_says_how_large_its_adapter_will_be(run: Run, photo: Path, mode: Mode) -> None:
    """Within a tenth of what it comes to, before the first step is shown."""
    steps = ("--embed.steps", 1, "--edit.steps", 1, *(() if mode == "embedding" else ("--tune.steps", 1)))
    code, out, err = run("fit", photo, "a cat", "--base", "critters", "--mode", mode, "--preset", "cpu", *steps, "--name", "cat", "--json")
    assert code == 0, err
    said = re.search(r"adapter about ([0-9.]+) MB", err)
    assert said is not None
    assert float(said[1]) * 1e6 == pytest.approx(json.loads(out)["bytes"], rel=0.1)


@pytest.mark.filterwarnings("always::imagic_lora.core.errors.ImagicWarning")
def test_another_base_of_the_same_shapes_can_be_forced(run: Run, store: Path, base: Path, tmp_path: Path) -> None:
    """It is said, and the pictures say so; the right base needs no force and is not called forced; other shapes stay refused."""
    other, wider = save_tiny(tmp_path / "other", seed=1), save_tiny(tmp_path / "wider", width=32)
    edit = ("edit", "rex", "--store", store, "--steps", 2, "--eta", "0.5", "--overwrite", "--json")
    code, out, err = run(*edit, "--base", other, "--force")
    assert code == 0
    assert f"made for base {base}" in err
    forced = read_metadata(Path(json.loads(out)["pictures"][0]["file"]))
    assert (forced["base"], forced["forced"]) == (str(other), str(base))
    code, out, err = run(*edit, "--force")
    plain = read_metadata(Path(json.loads(out)["pictures"][0]["file"]))
    assert (code, plain["base"], "forced" in plain, "made for base" in err) == (0, str(base), False, False)
    code, _, err = run(*edit, "--base", wider, "--force")
    assert (code, "embeddings of other shapes" in err, "--force" in err) == (2, True, False)
    assert run(*edit, "--base", other)[0] == 2


@each("rank, code", [("1.5", 2), ("0", 2), ("x", 2)])
def test_a_rank_is_a_whole_number(run: Run, store: Path, rank: str, code: int) -> None:
    """Not rounded to one."""
    assert run("compress", "rex", "--store", store, "--rank", rank)[0] == code
    assert cli.app.parse_args(["compress", "rex", "--rank", "3"], print_error=False, exit_on_error=False)[1].arguments["rank"] == 3
    with pytest.raises(CycloptsError):
        cli.app.parse_args(["compress", "rex", "--rank", "1.5"], print_error=False, exit_on_error=False)


def test_a_plan_says_whether_it_fits_the_card_of_its_preset(run: Run) -> None:
    """SDXL in full on 8 GB does not."""
    for preset, enough in (("8gb", False), ("24gb", True)):
        asked = ("plan", "--base", "sdxl", "--mode", "full" if preset == "8gb" else "lora", "--preset", preset)
        assert json.loads(run(*asked, "--json")[1])["fits"] == enough
        assert ("more than the card" in run(*asked)[2]) != enough


def test_a_plan_for_a_cpu_says_whether_it_fits_this_machine(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("plan", "--base", "sd15", "--preset", "cpu", "--device", "cpu")
    for free, enough in ((2**30, False), (2**40, True)):
        monkeypatch.setattr("imagic_lora.memory.plan.free_host_memory", lambda free=free: free)
        assert json.loads(run(*asked, "--json")[1])["fits"] == enough
        assert ("is free on this machine" in run(*asked)[2]) != enough


def test_what_to_look_at_first_is_around_the_eta_of_the_fit() -> None:
    """In steps that --eta takes."""
    assert [suggested_etas(eta) for eta in (0.7, 1.0, 0.2, 2.0)] == ["0.3:1.1:0.1", "0.6:1.4:0.1", "0:0.6:0.1", "1.6:2:0.1"]


def test_an_empty_store_is_not_called_verified(run: Run, tmp_path: Path) -> None:
    """A mistyped folder, for one."""
    code, _, err = run("verify", "--store", tmp_path / "nostore")
    assert (code, "No adapters in" in err) == (0, True)
