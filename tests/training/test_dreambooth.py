"""fit --method dreambooth: two losses added, class pictures made once, a store and a resume as those of Imagic."""

from __future__ import annotations

import json
from collections.abc import Generator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import TUNED, Run, each, opened, same, tiny_config, weights
from PIL import Image
from safetensors.torch import load_file
from tiny import save_tiny_sdxl

from imagic_lora.adapters.adapter import Adapter
from imagic_lora.adapters.export import export
from imagic_lora.adapters.store import Store
from imagic_lora.bases.base import Base
from imagic_lora.bases.loading.registry import architecture_of
from imagic_lora.core.config import EmbedConfig, Mode, RunConfig
from imagic_lora.core.errors import ImagicError, ImagicWarning, Stopped
from imagic_lora.core.noise import noise_at, times_at
from imagic_lora.core.runtime import Processes
from imagic_lora.core.settings.merging import merged
from imagic_lora.memory.plan import assume
from imagic_lora.memory.prediction import predict
from imagic_lora.photos.canvas import to_canvas
from imagic_lora.sampling.editor import Editor
from imagic_lora.training.fit import fit, result
from imagic_lora.training.prior import Prior, PriorStage
from imagic_lora.training.rehearsing.rehearsal import rehearse

PROMPT, CLASS = "a sks cat", "a cat"
PICTURES = 3


def config(folder: Path, mode: Mode = "lora", **changes: Any) -> RunConfig:
    """A DreamBooth run of 4 steps with 3 class pictures."""
    own = {"method": "dreambooth", "dreambooth": {"class_prompt": CLASS, "class_pictures": PICTURES}}
    return tiny_config(folder, mode, **merged(own, changes)).model_copy(update={"embed": EmbedConfig()})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of class pictures, which is not the user's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "imagic-lora" / "class-pictures"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of a wide and a tall photo, and a hidden file."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for k, size in enumerate([(40, 30), (30, 44)]):
        pixels = np.random.default_rng(k).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
    (folder / ".hidden").write_text("no photo")
    return folder


def fitted(photo: Path, run: RunConfig, store: Path, name: str = "one", base: Base | None = None, **options: Any) -> Adapter:
    adapter = result(fit(photo, PROMPT, run, Store(store), name, base=base, **options))
    assert adapter is not None
    return adapter


def begin(steps: Generator[Any, None, Any]) -> None:
    """Runs a fit until its first report."""
    next(steps)
    steps.close()


@each("weight", [1.0, 0.5, 0.0])
def test_the_loss_is_the_sum_of_two_means(folder: Path, weight: float) -> None:
    """On a fixed batch, by float64 from the denoiser's own predictions: each half has its prompt, its noise and its times."""
    base, run = opened(folder), config(folder).tune.model_copy(update={"batch_size": 2})
    generator = torch.Generator().manual_seed(1)
    photo, pictures = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(3, 4, 8, 8, generator=generator)
    target, known = base.encode_prompt(PROMPT), base.encode_prompt(CLASS)
    parameters = {"one": torch.nn.Parameter(torch.zeros(1))}
    stage = PriorStage(Prior(pictures, known), weight, base, photo, target, parameters, run, 5, Processes())
    with torch.no_grad():
        found = stage.loss(stage.batch(1).run()).item()
    halves = []
    for name, clean, conditioning in (("tune", photo[[0, 0]], target), ("tune/class", pictures[[2, 0]], known)):
        noise, times = noise_at(5, name, 1, range(2), (4, 8, 8)), times_at(5, name, 1, range(2), 2, run.timesteps)
        timesteps = base.timesteps(times)
        kept = base.process.scheduler.alphas_cumprod.double()[timesteps].view(-1, 1, 1, 1)  # pyright: ignore[reportAttributeAccessIssue]
        noisy = kept.sqrt() * clean.double() + (1 - kept).sqrt() * noise.double()
        with torch.no_grad():
            predicted = base.denoiser(noisy.float(), timesteps, conditioning.tokens.expand(2, -1, -1)).sample.double()
        halves.append((predicted - noise.double()).square().mean().item())
    assert found == pytest.approx(halves[0] + weight * halves[1], rel=1e-5)


@pytest.mark.parametrize("mode", TUNED)
def test_a_fit_is_stored_and_its_base_given_back(folder: Path, photo_file: Path, tmp_path: Path, cache: Path, mode: Mode) -> None:
    """Stage 2 alone; the denoiser is bit-equal afterwards; images of another prompt differ from those of the base."""
    base = opened(folder, mode)
    before = weights(base.denoiser)
    steps = fit(photo_file, PROMPT, config(folder, mode), Store(tmp_path / "store"), "one", base=base)
    reports = [(report.stage, report.step, report.loss is None) for report in steps]
    assert reports == [*(("class", k, True) for k in (1, 2, 3)), *(("tune", k, False) for k in (1, 2, 3, 4))]
    assert same(weights(base.denoiser), before)
    adapter = Store(tmp_path / "store").read("one")
    assert list(adapter.record.losses) == ["tune"]
    assert adapter.record.source.file is None
    assert adapter.record.eta == 1.0
    editor = Editor(base)
    images = [next(editor.edit(adapter, [1.0], [3], adapter.record.config.edit, "a sks cat up", tuned)).image for tuned in (True, False)]
    assert images[0].tobytes() != images[1].tobytes()
    editor.close()
    assert same(weights(base.denoiser), before)
    with pytest.raises(ImagicError, match=r"eta 0\.5 with adapter one of method dreambooth"):
        next(editor.edit(adapter, [0.5], [0], adapter.record.config.edit))


def test_without_a_prior_it_is_a_plain_fit_of_the_prompt(folder: Path, photo_file: Path, tmp_path: Path, cache: Path) -> None:
    """No class pictures are made, and the losses are those of the photo alone."""
    run = config(folder, dreambooth={"prior_weight": 0.0})
    steps = list(islice(fit(photo_file, PROMPT, run, Store(tmp_path), "one"), 4))
    assert not cache.exists()
    assert [report.stage for report in steps] == ["tune"] * 4


def made(cache: Path) -> dict[str, list[Path]]:
    """The class pictures by folder."""
    return {path.name: sorted(path.glob("*.png")) for path in cache.iterdir()} if cache.is_dir() else {}


def test_class_pictures_are_made_once_and_again_when_anything_they_depend_on_changes(
    folder: Path, photo_file: Path, tmp_path: Path, cache: Path
) -> None:
    """More of them are added to those that are there; a broken one alone is made again, the same."""
    base = opened(folder)
    fitted(photo_file, config(folder), tmp_path, "a", base)
    ((_, files),) = made(cache).items()
    content = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}
    assert len(files) == PICTURES
    more = config(folder, seed=9, tune={"steps": 2}, dreambooth={"class_pictures": 4})
    begin(fit(photo_file, PROMPT, more, Store(tmp_path), "b", base=base))
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files} == content
    assert [len(files) for files in made(cache).values()] == [4]
    files[1].write_bytes(b"broken")
    with pytest.warns(ImagicWarning, match="made again"):
        begin(fit(photo_file, PROMPT, config(folder), Store(tmp_path), "c", base=base))
    assert {file: file.read_bytes() for file in files} == {file: data for file, (data, _) in content.items()}
    changes: list[dict[str, Any]] = [
        {"dreambooth": {"class_prompt": "a dog"}},
        {"dreambooth": {"class_seed": 1}},
        {"edit": {"guidance_scale": 2.0}},
        {"edit": {"steps": 3}},
        {"edit": {"negative_prompt": "x"}},
        {"resolution": 24},
    ]
    for k, change in enumerate(changes):
        begin(fit(photo_file, PROMPT, config(folder, **change), Store(tmp_path), f"d{k}", base=base))
        assert len(made(cache)) == 2 + k, change
    described = [json.loads((path / "class.json").read_text()) for path in cache.iterdir()]
    assert {one["base"] for one in described} == {base.fingerprint}


def test_another_base_has_other_class_pictures(
    folder: Path, folders: dict[str, Path], photo_file: Path, tmp_path: Path, cache: Path
) -> None:
    """The fingerprint is part of what they depend on."""
    for k, path in enumerate((folder, folders["v_prediction"])):
        begin(fit(photo_file, PROMPT, config(path), Store(tmp_path), f"a{k}"))
        assert len(made(cache)) == k + 1


@pytest.mark.parametrize("mode", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_a_stopped_fit_resumes_to_the_same_bytes(folder: Path, photos: Path, tmp_path: Path, mode: Mode) -> None:
    """Stopped among the class pictures, and at two steps of stage 2."""
    base = opened(folder, mode)
    whole = fitted(photos, config(folder, mode), tmp_path / "whole", base=base)
    for k, steps in enumerate((PICTURES + 1, PICTURES + 3)):
        store = tmp_path / str(k)
        if k == 0:
            seen = iter([False] * 3)
            with pytest.raises(Stopped, match="class pictures are stored"):
                fitted(photos, config(folder, mode, dreambooth={"class_seed": 3}), store, base=base, stop=partial(next, seen, True))
            assert Store(store).unfinished() == []
        run = fit(photos, PROMPT, config(folder, mode), Store(store), "one", base=base)
        list(islice(run, steps - PICTURES))
        run.close()
        again = fitted(photos, config(folder, mode), store, base=base, resume=True)
        for file in whole.record.weight_files:
            assert (again.folder / file).read_bytes() == (whole.folder / file).read_bytes(), (file, steps)
        assert again.record.losses == whole.record.losses


def test_a_resumed_fit_with_other_class_pictures_or_photos_is_refused(folder: Path, photos: Path, tmp_path: Path, cache: Path) -> None:
    """What differs is named."""
    base = opened(folder)
    run = fit(photos, PROMPT, config(folder), Store(tmp_path), "one", base=base)
    list(islice(run, PICTURES + 2))
    run.close()
    with pytest.raises(ImagicError, match="class_prompt"):
        fitted(photos, config(folder, dreambooth={"class_prompt": "a dog"}), tmp_path, base=base, resume=True)
    ((_, files),) = made(cache).items()  # none were made for the other prompt
    Image.new("RGB", (32, 32), "red").save(files[0])
    with pytest.raises(ImagicError, match="class_pictures was"):
        fitted(photos, config(folder), tmp_path, base=base, resume=True)
    Image.new("RGB", (30, 30), "red").save(photos / "1.png")
    with pytest.raises(ImagicError, match="photos was"):
        fitted(photos, config(folder), tmp_path, base=base, resume=True)


def test_photos_of_a_folder_are_squares_that_the_steps_take_in_turn(folder: Path, photos: Path, tmp_path: Path) -> None:
    """The latents of each are those of its middle; the record has the hashes of all."""
    seen, base = [], opened(folder)

    class Watched(PriorStage):
        def batch(self, k: int) -> Any:
            seen.append(super().batch(k))
            return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("imagic_lora.training.fit.PriorStage", Watched)
        adapter = fitted(photos, config(folder, tune={"batch_size": 1}), tmp_path, base=base)
    squares = [Image.open(photos / "0.png").crop((5, 0, 35, 30)), Image.open(photos / "1.png").crop((0, 7, 30, 37))]
    latents = [base.encode_image(to_canvas(image, 32, 8).pixels) for image in squares]
    for k, batch in enumerate(seen):
        assert torch.equal(batch.latents[:1], latents[k % 2])
    assert len(adapter.record.source.others) == 1
    assert adapter.record.source.size == (30, 30)


@pytest.mark.slow
def test_sdxl(photo_file: Path, tmp_path: Path) -> None:
    """Two encoders, pooled embeddings and size ids in both halves."""
    folder = save_tiny_sdxl(tmp_path / "base")
    assert fitted(photo_file, config(folder), tmp_path).record.weight_files == ["pytorch_lora_weights.safetensors"]


def test_the_export_has_no_embeddings(folder: Path, photo_file: Path, tmp_path: Path) -> None:
    """The layers are those of the adapter, and the page names the prompt."""
    adapter = fitted(photo_file, config(folder, tune={"targets": "attention"}), tmp_path)
    weights_file, page = export(adapter, "kohya", tmp_path / "out")
    assert {name.partition("_")[0] for name in load_file(weights_file)} == {"lora"}
    assert PROMPT in page.read_text(encoding="utf-8")
    assert "eta" not in page.read_text(encoding="utf-8").split()
    names = {path.name for path in export(adapter, "diffusers", tmp_path / "out")}
    assert names == {"pytorch_lora_weights.safetensors", "README.md"}


def test_the_plan_counts_two_halves(folder: Path) -> None:
    """A batch of 1 with the prior needs what one of 2 without it needs."""
    architecture = architecture_of(str(folder), None)
    both, alone = config(folder, tune={"batch_size": 1}), config(folder, tune={"batch_size": 2}, dreambooth={"prior_weight": 0.0})
    plans = [predict(architecture, run) for run in (both, alone)]
    assert list(plans[0].stages) == ["encode", "class", "tune", "sample", "decode"]
    assert plans[0].stages["tune"] == plans[1].stages["tune"]


@pytest.mark.slow
def test_the_exact_plan_has_the_same_stages(folder: Path) -> None:
    """Counted on fake tensors."""
    architecture, both = architecture_of(str(folder), None), config(folder)
    plan = predict(architecture, both)
    exact = rehearse(architecture, both, assume(both))
    assert list(exact.stages) == list(plan.stages)
    for name in ("class", "tune"):
        assert exact.stages[name].total == pytest.approx(plan.stages[name].total, rel=0.35), name


@pytest.fixture
def arguments(folder: Path, photo_file: Path, tmp_path: Path) -> list[str]:
    """A valid command without its photo."""
    tiny = ["--tune.steps", "1", "--edit.steps", "1", "--class-pictures", "1", "--store", str(tmp_path / "store"), "--device", "cpu"]
    return [PROMPT, "--base", str(folder), "--method", "dreambooth", "--class-prompt", CLASS, *tiny]


def test_the_commands(run: Run, arguments: list[str], photo_file: Path, tmp_path: Path) -> None:
    """fit, list, edit with a prompt; what belongs to an eta is refused by name."""
    code, _, errors = run("fit", str(photo_file), *arguments, "--name", "rex")
    assert code == 0, errors
    assert "class pictures 1/1" in errors
    assert "--prompt 'a sks cat' --seed" in errors
    assert "dreambooth-lora" in run("list", "--store", str(tmp_path / "store"))[1]
    edit = ["edit", "rex", "--store", str(tmp_path / "store"), "--device", "cpu", "--out", str(tmp_path / "out")]
    code, out, errors = run(*edit, "--prompt", "a sks cat up", "--seed", "0:2", "--json")
    assert code == 0, errors
    assert [Path(one["file"]).name for one in json.loads(out)["pictures"]] == ["seed0.png", "seed1.png"]
    for flags in (["--eta", "0.5"], ["--eta", "auto"], ["--keep", "auto"], ["--source-eta", "0.1"]):
        code, _, errors = run(*edit, *flags)
        assert (code, flags[0] in errors, "method dreambooth" in errors) == (2, True, True), errors
    assert run("sweep", "rex", "--store", str(tmp_path / "store"))[0] == 2


def test_bad_input_is_refused(run: Run, arguments: list[str], photo_file: Path, tmp_path: Path) -> None:
    """With exit code 2, and what to do; nothing is stored."""
    empty, mixed = tmp_path / "empty", tmp_path / "mixed"
    for path in (empty, mixed):
        path.mkdir()
    Image.new("RGB", (9, 9)).save(mixed / "a.png")
    (mixed / "b.txt").write_text("not a photo")
    without = [one for one in arguments if one not in ("--class-prompt", CLASS)]
    cases = [
        ([str(empty), *arguments], "holds 0 files"),
        ([str(mixed), *arguments], "b.txt"),
        ([str(photo_file), *without], "without a --class-prompt"),
        ([str(photo_file), *without, "--class-prompt", PROMPT], "the prompt itself"),
        ([str(photo_file), *arguments, "--region", "0,0,8,8"], "--region together with --method dreambooth"),
        ([str(photo_file), *arguments, "--eta", "0.5"], "--eta"),
        ([str(photo_file), *arguments, "--embed.steps", "2"], "--embed.steps"),
        ([str(photo_file), *arguments, "--mode", "embedding"], "--mode"),
        ([str(mixed), PROMPT, "--base", arguments[2]], "is a folder, with --method imagic"),
        ([str(photo_file), *arguments[:1], "--base", "sd35-medium", *arguments[3:]], "a flow transformer"),
    ]
    for given, expected in cases:
        code, _, errors = run("fit", *given)
        assert (code, expected in errors) == (2, True), (given, errors)
    assert Store(tmp_path / "store").names() == []
