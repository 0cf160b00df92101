"""Named bases: the built-in ones, those of the user's file, the settings of their entries, and distilled bases."""

from __future__ import annotations

import errno
import pwd
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from common import PROMPT, each, opened, tiny_config
from diffusers import EulerAncestralDiscreteScheduler, LCMScheduler, StableDiffusionPipeline
from tiny import save_tiny

from imagic_lora.adapters.adapter import Adapter
from imagic_lora.adapters.contents import read_embeddings
from imagic_lora.adapters.store import Store
from imagic_lora.bases.loading import registry
from imagic_lora.bases.loading.configs import architecture, read_architecture, with_entry
from imagic_lora.bases.loading.known import EMBEDDED, SHIPPED, VARIABLE, BaseEntry, bases_file, known_base, named_bases
from imagic_lora.bases.loading.published import PUBLISHED
from imagic_lora.bases.loading.registry import architecture_of, load_base, locate
from imagic_lora.core.device_config import MemoryConfig
from imagic_lora.core.errors import ImagicError, ImagicWarning
from imagic_lora.core.runtime import resolve_runtime
from imagic_lora.core.settings.recipes import recipe_of
from imagic_lora.memory.plan import assume
from imagic_lora.memory.prediction import predict
from imagic_lora.sampling.editor import Editor
from imagic_lora.training.fit import fit, result
from imagic_lora.training.rehearsing.rehearsal import rehearse


@pytest.fixture
def listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes the user's list of bases."""
    path = tmp_path / "bases.yaml"
    monkeypatch.setenv(VARIABLE, str(path))

    def write(content: Any) -> Path:
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return write


@pytest.fixture(scope="module")
def lcm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A latent consistency model: its guidance is an input."""
    return save_tiny(tmp_path_factory.mktemp("lcm") / "base", scheduler="lcm", guided=True)


def on_cpu(name: str) -> Any:
    return load_base(name, resolve_runtime(MemoryConfig(device="cpu")))


def test_what_is_known_agrees_with_what_is_published(tiny_dit: Path) -> None:
    """Resolution, prediction type and sampling steps of every built-in base."""
    for name, known in SHIPPED.items():
        built = architecture(name)
        assert (built.resolution, built.scheduler.get("prediction_type", built.process), built.few_steps) == (
            known.resolution,
            known.prediction,
            known.few_steps,
        )
    assert set(PUBLISHED) | set(EMBEDDED) == set(SHIPPED)


def test_a_users_own_base_is_opened_by_its_name(listed: Any, folder: Path) -> None:
    """With what the user says of it, in the plan and in the base alike; it remembers the name."""
    listed({"mine": {"source": str(folder), "resolution": 64, "prediction": "v_prediction"}})
    base, built = on_cpu("mine"), architecture("mine")
    assert (base.name, base.resolution, base.prediction_type) == ("mine", 64, "v_prediction")
    assert built == architecture_of("mine") == base.architecture
    assert base.pipeline("text2image").scheduler.config.prediction_type == "v_prediction"
    assert known_base("critters").entry == SHIPPED["critters"]


def test_without_a_list_there_are_the_built_in_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The list lies among the user's settings, or where the variable says."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert bases_file() == tmp_path / "imagic-lora/bases.yaml"
    assert named_bases() == SHIPPED
    bases_file().parent.mkdir()
    bases_file().write_text("mine: {source: owner/name, revision: abc}")
    assert named_bases()["mine"] == BaseEntry(source="owner/name", revision="abc")
    monkeypatch.delenv("XDG_CONFIG_HOME")
    assert bases_file() == Path.home() / ".config/imagic-lora/bases.yaml"


def test_a_base_in_a_folder_that_is_not_utf8_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even by a relative path: an adapter records the absolute one, and its record could not be read again."""
    place = tmp_path / "caf\udce9"
    try:
        shutil.copytree(folder, place / "base")
    except OSError:
        pytest.skip("the file system accepts UTF-8 only")
    monkeypatch.chdir(place)
    with pytest.raises(ImagicError, match=r"the path of the base .* is not UTF-8"):
        on_cpu("./base")


def no_such_user(_: int) -> None:
    raise KeyError("uid not found")


def test_a_user_without_a_home_has_the_built_in_bases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a container that runs as a user without passwd entry: no list is read, and a name that is unknown is an error."""
    monkeypatch.chdir(tmp_path)
    for name in (VARIABLE, "XDG_CONFIG_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", no_such_user)
    assert named_bases() == SHIPPED
    with pytest.raises(ImagicError, match="no base called 'dreams'"):
        locate("dreams")


def test_a_download_without_a_home_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the folder for downloads; huggingface_hub raises what pathlib does."""

    def homeless(*_: object, **__: object) -> None:
        Path("~").expanduser()

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", no_such_user)
    monkeypatch.setattr(registry, "snapshot_download", homeless)
    with pytest.raises(ImagicError, match="HF_HOME"):
        locate("owner/name")


def test_a_list_that_may_not_be_read_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also where its folder belongs to somebody else; it is not taken for a list that does not exist."""

    def denied(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(Path, "is_file", denied)
    with pytest.raises(ImagicError, match=r"bases\.yaml cannot be read \(Permission denied\)"):
        named_bases()


@each(
    "content, why",
    [
        ({"mine": {"path": "x"}}, "mine.source"),
        ({"mine": {"source": "x", "colour": 1}}, "mine.colour"),
        ({"mine": {"source": "x", "few_steps": 0}}, "mine.few_steps = 0"),
        ({"mine": {"source": "x", "prediction": "noise"}}, "mine.prediction = 'noise'"),
        ({"sd15": {"source": "x"}}, "defines sd15.*choose other names"),
        ({"a/b": {"source": "x"}}, "a/b"),
        ("- mine", "holds a list"),
        ("mine: [", "cannot be read as YAML"),
    ],
)
def test_a_list_that_is_wrong_is_refused(listed: Any, content: Any, why: str) -> None:
    """With its path, and what of it."""
    path = listed(content)
    with pytest.raises(ImagicError, match=why) as caught:
        known_base("mine")
    assert str(path) in caught.value.got


def test_a_listed_base_that_is_not_there_is_named(listed: Any) -> None:
    """With its path and whose it is; a revision of a local one is refused rather than recorded."""
    path = listed({"mine": {"source": "/no/such.safetensors"}, "local": {"source": ".", "revision": "abc"}})
    with pytest.raises(ImagicError, match=rf"/no/such\.safetensors, the source of base mine in {path}"):
        locate("mine")
    with pytest.raises(ImagicError, match="revision abc for the local path"):
        locate("local")


def test_a_path_needs_no_list(listed: Any, folder: Path) -> None:
    """However wrong that is; but what it might say about the path is missed with a warning."""
    listed("mine: [")
    with pytest.warns(ImagicWarning, match=rf"cannot be read as YAML.*what it says about {folder} is ignored"):
        assert locate(str(folder)) == folder
    assert known_base("sd15").entry == known_base(SHIPPED["sd15"].source).entry == SHIPPED["sd15"]


@pytest.mark.parametrize("resumed", [8.0, 2.0])
def test_a_resumed_fit_has_the_same_guidance_scale(lcm: Path, photo_file: Path, tmp_path: Path, resumed: float) -> None:
    """Where it is an input of the denoiser, another is another run."""
    store, config = Store(tmp_path), tiny_config(lcm, edit={"guidance_scale": 8.0})
    steps = fit(photo_file, PROMPT, config, store, "cat")
    next(steps)
    steps.close()
    config = tiny_config(lcm, edit={"guidance_scale": resumed})
    again = fit(photo_file, PROMPT, config, store, "cat", resume=True)
    if resumed == 8.0:
        assert result(again) is not None
    else:
        with pytest.raises(ImagicError, match=r"guidance_scale was 8\.0, is 2\.0"):
            result(again)


@pytest.fixture(scope="module")
def of_lcm(lcm: Path, photo_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """An adapter of that model, fitted at guidance scale 8."""
    config = tiny_config(lcm, edit={"guidance_scale": 8.0})
    adapter = result(fit(photo_file, PROMPT, config, Store(tmp_path_factory.mktemp("of_lcm")), "cat"))
    assert adapter is not None
    return adapter


@each("start", ["noise", "inverted"])
def test_more_steps_than_a_sampler_has_are_refused_before_the_training(
    lcm: Path, of_lcm: Adapter, photo_file: Path, tmp_path: Path, start: Any
) -> None:
    """And in an edit; nothing is lost."""
    with pytest.raises(ImagicError, match="60 steps with scheduler LCMScheduler"):
        next(fit(photo_file, PROMPT, tiny_config(lcm, edit={"steps": 60, "start": start}), Store(tmp_path), "cat"))
    with pytest.raises(ImagicError, match="60 steps with scheduler"):
        next(Editor(opened(lcm)).edit(of_lcm, [0.5], [0], of_lcm.record.config.edit.model_copy(update={"steps": 60, "start": start})))


def test_the_noise_of_the_photo_is_found_at_the_guidance_that_it_is_used_at(lcm: Path, of_lcm: Adapter) -> None:
    """A base whose denoiser takes the guidance scale gets the same scale in every pass of inversion and sampling."""
    config = tiny_config(lcm, edit={"guidance_scale": 8.0, "start": "inverted", "steps": 4})
    base, embedded = opened(lcm), []
    base.denoiser.register_forward_pre_hook(lambda _, args, more: embedded.append(more["timestep_cond"]), with_kwargs=True)
    next(Editor(base).edit(of_lcm, [0.5], [0], config.edit))
    assert len(embedded) == 8
    assert all(torch.equal(one, embedded[0]) for one in embedded)


@pytest.mark.slow
def test_the_plan_of_a_consistency_model_counts_one_pass(lcm: Path) -> None:
    """For a picture, at any guidance."""
    built, run = architecture(str(lcm)), tiny_config(lcm, edit={"guidance_scale": 8.0})
    plain = tiny_config(lcm, edit={"guidance_scale": 1.0})
    assert predict(built, run).stages["sample"] == predict(built, plain).stages["sample"]
    assert rehearse(built, run, assume(run)).stages["sample"] == rehearse(built, plain, assume(plain)).stages["sample"]


def test_a_list_that_is_not_there_is_refused(listed: Any) -> None:
    """Where it was asked for."""
    with pytest.raises(ImagicError, match="which is not a file"):
        known_base("mine")


def test_a_config_of_a_folder_is_not_ignored(listed: Any, folder: Path) -> None:
    """A folder has its own."""
    listed({"mine": {"source": str(folder), "config": "sd15"}})
    for use in (architecture, on_cpu):
        with pytest.raises(ImagicError, match="config = 'sd15' for the folder"):
            use("mine")


class Hub:
    """Stands in for the hub: a repository and what of it was fetched."""

    def __init__(self, files: Path, cache: Path) -> None:
        self.files, self.cache, self.asked = files, cache, []

    def __call__(self, source: str, revision: str | None, allow_patterns: list[str]) -> str:
        self.asked.append((source, revision))
        for path in self.files.rglob("*"):
            name = path.relative_to(self.files)
            if path.is_file() and any(name.match(pattern) for pattern in allow_patterns):
                (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, self.cache / name)
        return str(self.cache)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_hub_id_that_comes_in_half_precision_alone_is_fetched_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str | None
) -> None:
    """Its configs alone where no more is asked for."""
    files = save_tiny(tmp_path / "files", variant=variant, dtype=torch.float16)
    hub = Hub(files, tmp_path / "cache")
    monkeypatch.setattr(registry, "snapshot_download", hub)
    assert architecture_of("owner/name") == read_architecture(files)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert on_cpu("owner/name").fingerprint == opened(files).fingerprint
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 3


def test_a_revision_that_is_known_is_asked_for_and_remembered(
    listed: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless another is given."""
    listed({"mine": {"source": "owner/name", "revision": "abc"}})
    hub = Hub(folder, tmp_path / "cache")
    monkeypatch.setattr(registry, "snapshot_download", hub)
    assert on_cpu("mine").revision == "abc"
    assert load_base("mine", resolve_runtime(MemoryConfig(device="cpu")), "def").revision == "def"
    assert {revision for _, revision in hub.asked} == {"abc", "def"}
    locate("mine")
    assert hub.asked[-1] == ("owner/name", "abc")


def test_a_distilled_base_is_trained_where_it_samples(folder: Path) -> None:
    """At the timesteps of its sampler, which begins at pure noise, each as often."""
    built = with_entry(read_architecture(folder), BaseEntry(source="x", few_steps=4))
    assert built.scheduler["timestep_spacing"] == "trailing"
    turbo: Any = EulerAncestralDiscreteScheduler.from_config(PUBLISHED["sdxl-turbo"].scheduler)
    turbo.set_timesteps(4)
    assert turbo.timesteps.tolist() == [999, 749, 499, 249]


def test_turbo_by_the_users_own_list(listed: Any, tmp_path: Path) -> None:
    """``few_steps`` alone makes one of any base."""
    listed({"turbo": {"source": str(save_tiny(tmp_path / "base", scheduler="euler")), "few_steps": 4}})
    base = on_cpu("turbo")
    assert base.timesteps(torch.tensor([0.0, 0.24, 0.25, 0.5, 0.99])).tolist() == [249, 249, 499, 749, 999]
    assert base.null() is not None
    assert recipe_of("turbo", base.architecture.few_steps)["lora"]["edit"] == {"steps": 4, "guidance_scale": 0.0}


def test_a_consistency_model_is_trained_at_all_its_timesteps(lcm: Path) -> None:
    """Those that it was distilled at, among which are those of any few steps."""
    base = opened(lcm)
    every = base.timesteps(torch.arange(50) / 50).tolist()
    assert every == list(range(19, 1000, 20))
    for steps in (1, 2, 4, 8):
        sampler: Any = LCMScheduler.from_config(base.pipeline("text2image").scheduler.config)  # pyright: ignore[reportAttributeAccessIssue]
        sampler.set_timesteps(steps)
        assert set(sampler.timesteps.tolist()) <= set(every)


def test_a_consistency_model_takes_the_guidance_scale(lcm: Path) -> None:
    """As an input, in training as in sampling; there is no unconditional pass."""
    base, noise = opened(lcm), torch.randn(2, 4, 8, 8)
    assert base.null() is None
    assert base.architecture.few_steps == 4
    text = base.with_added_conditions(base.encode_prompt(PROMPT), 32, 32, 6.5)
    pipe: Any = StableDiffusionPipeline.from_pretrained(lcm)
    scale = pipe.get_guidance_scale_embedding(torch.full((2,), 5.5), embedding_dim=12)
    times = torch.tensor([19, 999])
    with torch.no_grad():
        found = base.predict(noise, times, text)
        expected = pipe.unet(noise, times, text.tokens.expand(2, -1, -1), timestep_cond=scale).sample
        other = base.predict(noise, times, base.with_added_conditions(text, 32, 32, 2.0))
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(found, other)


def test_the_guidance_scale_changes_an_edit_without_an_unconditional_pass(lcm: Path, of_lcm: Adapter) -> None:
    """Another scale, another picture."""
    config, adapter = tiny_config(lcm, edit={"guidance_scale": 8.0}), of_lcm
    assert read_embeddings(adapter)["target"].extra["guidance"].tolist() == [8.0]
    assert "null" not in read_embeddings(adapter)
    with_scale = [config.edit.model_copy(update={"guidance_scale": scale}) for scale in (8.0, 2.0)]
    one, other = (next(Editor(opened(lcm)).edit(adapter, [0.5], [0], edit)).image for edit in with_scale)
    assert one.tobytes() != other.tobytes()


@each("steps, guidance, expected", [(4, "cfg", (4, 0.0)), (8, "embedded", (8, 8.0))])
@each("mode", ["lora", "full"])
def test_the_recipe_of_a_distilled_base(mode: Any, steps: int, guidance: str, expected: tuple[int, float]) -> None:
    """Few steps; guided through its input or not at all; all else as ever."""
    found, plain = recipe_of("x", steps, guidance)[mode], recipe_of("x")[mode]
    assert (found["edit"]["steps"], found["edit"]["guidance_scale"]) == expected
    assert {name: value for name, value in found.items() if name != "edit"} == plain
    assert recipe_of("x") == recipe_of("sd15")
