"""A base behaves in one way under all of its names: the name in a list, the hub id, and the path of its files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from common import each
from tiny import save_tiny_sdxl

from imagic_lora.bases.loading import registry
from imagic_lora.bases.loading.configs import architecture
from imagic_lora.bases.loading.known import CRITTERS, SHIPPED, VARIABLE, known_base
from imagic_lora.bases.loading.published import PUBLISHED
from imagic_lora.bases.loading.registry import architecture_of, load_base
from imagic_lora.core.device_config import MemoryConfig
from imagic_lora.core.errors import ImagicError
from imagic_lora.core.runtime import resolve_runtime
from imagic_lora.training.configure import configure

TURBO = SHIPPED["sdxl-turbo"].source
Listed = Callable[[dict[str, Any]], None]


@pytest.fixture
def listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Listed:
    """Writes the user's list of bases."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "bases.yaml"))
    (tmp_path / "bases.yaml").write_text("{}")
    return lambda content: (tmp_path / "bases.yaml").write_text(yaml.safe_dump(content)) and None


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Turbo as the hub caches it, tiny; it is also what a download returns."""
    folder = save_tiny_sdxl(tmp_path / "hub" / f"models--{TURBO.replace('/', '--')}" / "snapshots" / ("a" * 40))
    monkeypatch.setattr(registry, "snapshot_download", lambda *_, **__: str(folder))
    return folder


def on_cpu(name: str) -> Any:
    return load_base(name, resolve_runtime(MemoryConfig(device="cpu")))


@pytest.mark.slow
@each("name", ["sdxl-turbo", TURBO, TURBO.upper(), f"{TURBO}/", "the snapshot", "a link to the snapshot", "mine", "the source of mine"])
def test_turbo_is_distilled_by_every_name(name: str, snapshot: Path, tmp_path: Path, listed: Listed) -> None:
    """Trained at the timesteps that it samples at, and sampled in four steps without guidance; the plan agrees."""
    link, elsewhere = tmp_path / "link", tmp_path / "clone" / "of-turbo"
    link.symlink_to(snapshot)
    elsewhere.parent.mkdir()
    if name == "the source of mine":
        snapshot.rename(elsewhere)
    listed({"mine": {"source": TURBO}, "clone": {"source": str(elsewhere), "few_steps": 4}})
    given = {"the snapshot": str(snapshot), "a link to the snapshot": str(link), "the source of mine": str(elsewhere)}.get(name, name)
    run, base = configure({"base": given, "memory": {"device": "cpu"}}), on_cpu(given)
    assert (run.edit.steps, run.edit.guidance_scale) == (4, 0.0)
    assert base.process.trained_timesteps.tolist() == [249, 499, 749, 999]
    assert architecture(given).few_steps == architecture_of(given).few_steps == 4
    assert on_cpu(base.name).name == base.name


def test_what_is_recorded_is_found_again(snapshot: Path, tmp_path: Path, listed: Listed, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name in a list for a hub id, the absolute path for a path. A link is not followed: other files lie beside it."""
    assert on_cpu(TURBO.upper()).name == "sdxl-turbo"
    (tmp_path / "link").symlink_to(snapshot)
    monkeypatch.chdir(tmp_path)
    assert on_cpu("link").name == str(tmp_path / "link")
    listed({"mine": {"source": "owner/name", "revision": "abc"}})
    assert (known_base("Owner/Name", "abc").name, known_base("owner/name").name) == ("mine", "owner/name")


def test_the_embedded_base_has_its_recipe_by_every_name(listed: Listed) -> None:
    """By its folder, which is the built-in base whatever the list says, and by a name of the user's, with the settings stated there."""
    listed({"mine": {"source": str(CRITTERS), "resolution": 32}})
    expected = configure({"base": "critters", "memory": {"device": "cpu"}})
    for name in (str(CRITTERS), "mine"):
        found = configure({"base": name, "memory": {"device": "cpu"}})
        assert found.model_dump(exclude={"base"}) == expected.model_dump(exclude={"base"})
    assert (on_cpu(str(CRITTERS)).resolution, on_cpu("mine").resolution) == (64, 32)


def test_what_the_users_list_says_holds_for_the_source_too(snapshot: Path, listed: Listed) -> None:
    """Settings that it leaves out are those of the built-in base with the same source; another revision is another base."""
    listed({"mine": {"source": TURBO, "resolution": 64, "prediction": "v_prediction"}})
    mine = architecture_of("mine")
    assert (mine.few_steps, mine.resolution, mine.scheduler["prediction_type"]) == (4, 64, "v_prediction")
    path = snapshot.rename(snapshot.parents[3] / "moved")
    listed({"mine": {"source": str(path), "prediction": "v_prediction"}})
    assert on_cpu(str(path)).prediction_type == on_cpu("mine").prediction_type == "v_prediction"


def test_one_source_with_different_settings_is_given_by_name(snapshot: Path, listed: Listed) -> None:
    """The source alone does not say which is meant; equal settings are no conflict."""
    path = snapshot.rename(snapshot.parents[3] / "moved")
    listed({"four": {"source": str(path), "few_steps": 4}, "eight": {"source": str(path), "few_steps": 8}})
    with pytest.raises(ImagicError, match=r"is the source of eight, four in .*give the name"):
        architecture_of(str(path))
    assert architecture_of("eight").few_steps == 8
    listed({"four": {"source": str(path), "few_steps": 4}, "again": {"source": str(path), "few_steps": 4}})
    assert architecture_of(str(path)).few_steps == 4


def test_a_published_architecture_needs_no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name and by hub id."""
    monkeypatch.setattr(registry, "snapshot_download", lambda *_, **__: pytest.fail("a download"))
    for name in PUBLISHED:
        assert architecture_of(SHIPPED[name].source) == architecture_of(name) == architecture(SHIPPED[name].source) == PUBLISHED[name]
