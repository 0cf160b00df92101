"""One schema, four levels: every setting arrives, and what is wrong is refused by name."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel, ValidationError

from imagic_lora.config import PRESETS, RunConfig, merged, read_yaml, resolve
from imagic_lora.errors import ImagicError

Leaf = tuple[str, ...]
LEVELS = ("preset", "file", "flags")
CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def leaves(group: type[BaseModel] = RunConfig, above: Leaf = ()) -> Iterator[tuple[Leaf, Any, Any]]:
    """The path, annotation and default of every setting."""
    for name, info in group.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from leaves(info.annotation, (*above, name))
        else:
            yield (*above, name), info.annotation, info.default


def another(annotation: Any, default: Any) -> Any:
    """A valid value that is not the default."""
    if get_origin(annotation) is Literal:
        return next(value for value in get_args(annotation) if value != default)
    kind = next((arm for arm in get_args(annotation) if arm is not type(None)), annotation)
    return {int: 64, float: 0.375, str: "other"}[kind]


SETTINGS = {path: (default, another(annotation, default)) for path, annotation, default in leaves()}
each_setting = pytest.mark.parametrize("path", SETTINGS, ids=".".join)


def nested(path: Leaf, value: Any) -> dict[str, Any]:
    """A mapping of mappings that holds one value."""
    return {path[0]: nested(path[1:], value) if path[1:] else value}


def at(config: Any, path: Leaf) -> Any:
    """The value of a setting."""
    return at(getattr(config, path[0]), path[1:]) if path else config


def resolved(preset: Mapping[str, Any], file: Mapping[str, Any], flags: Mapping[str, Any]) -> RunConfig:
    """The settings of a run whose preset is the same in both modes."""
    return resolve(flags, file, {"lora": preset, "full": preset})


@each_setting
def test_nothing_given_is_the_default(path: Leaf) -> None:
    """The built-in level is the model's own default, whose value is valid when given, too."""
    default, _ = SETTINGS[path]
    assert at(resolved({}, {}, {}), path) == default == at(resolved({}, {}, nested(path, default)), path)


@each_setting
@pytest.mark.parametrize("level", range(3), ids=LEVELS)
def test_a_level_alone_beats_the_default_and_touches_nothing_else(path: Leaf, level: int) -> None:
    """A setting given once arrives from wherever it was given."""
    given = [nested(path, SETTINGS[path][1]) if k == level else {} for k in range(3)]
    config = resolved(*given)
    assert at(config, path) == SETTINGS[path][1]
    assert config.model_dump() == merged(RunConfig().model_dump(), given[level])


@each_setting
@pytest.mark.parametrize("explicit", [0, 1], ids=["default", "other"])
@pytest.mark.parametrize(("higher", "lower"), [("flags", "file"), ("flags", "preset"), ("file", "preset")])
def test_a_higher_level_beats_a_lower_one(path: Leaf, explicit: int, higher: str, lower: str) -> None:
    """What is given higher up wins, be it the default given explicitly."""
    values = SETTINGS[path]
    given = {level: {} for level in LEVELS} | {higher: nested(path, values[explicit]), lower: nested(path, values[1 - explicit])}
    assert at(resolved(**given), path) == values[explicit]


@pytest.mark.parametrize("level", ["file", "flags"])
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_mode_chooses_its_half_of_the_preset(level: str, mode: str) -> None:
    """File and flags can both ask for a mode, and get what the preset has for it."""
    given = {"file": {}, "flags": {}} | {level: {"tune": {"mode": mode}}}
    preset: Any = {"lora": {"tune": {"steps": 11}}, "full": {"tune": {"steps": 22}}}
    assert resolve(**given, preset=preset).tune.steps == {"lora": 11, "full": 22}[mode]


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_and_arrives_whole(name: str, mode: Any) -> None:
    """A preset laid over the defaults is the run, in both modes."""
    flags = {"tune": {"mode": mode}}
    assert resolve(flags, {}, PRESETS[name]).model_dump() == merged(RunConfig().model_dump(), PRESETS[name][mode], flags)


@pytest.mark.parametrize("path", [("rnak",), ("embed", "rank"), ("tune", "rnak"), ("edit", "eta"), ("memory", "rank")], ids=".".join)
@pytest.mark.parametrize("level", ["file", "flags"])
def test_an_unknown_name_is_refused_with_the_known_ones(path: Leaf, level: str) -> None:
    """The error names the setting that was got and every one that its group knows."""
    given = {"file": {}, "flags": {}} | {level: nested(path, 1)}
    with pytest.raises(ImagicError) as caught:
        resolve(**given, preset={})
    assert ".".join(path) in caught.value.got
    group = at(RunConfig(), path[:-1])
    assert caught.value.expected == "one of " + ", ".join(type(group).model_fields)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("base",), ""),
        (("seed",), -1),
        (("seed",), 2**63),
        (("resolution",), 7),
        (("eta",), 2.5),
        (("eta",), math.nan),
        (("embed", "steps"), 0),
        (("embed", "steps"), 1.5),
        (("embed", "learning_rate"), 0),
        (("embed", "timesteps"), "random"),
        (("tune", "mode"), "dora"),
        (("tune", "mode"), ["lora"]),
        (("tune", "rank"), 0),
        (("tune", "rank"), "many"),
        (("tune", "alpha"), 0),
        (("tune", "alpha"), math.inf),
        (("edit", "strength"), 0),
        (("edit", "strength"), 1.01),
        (("edit", "batch_size"), 257),
        (("memory", "device"), "mps"),
        (("embed",), 5),
        (("tune",), None),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(path: Leaf, value: Any) -> None:
    """The error says which setting and what it was given."""
    with pytest.raises(ImagicError) as caught:
        resolve({}, nested(path, value), PRESETS["critters"])
    assert caught.value.got == f"{'.'.join(path)} = {value!r}"


@pytest.mark.parametrize(("name", "value"), [("rank", 8), ("alpha", 4.0), ("targets", "attention")])
@pytest.mark.parametrize("level", ["file", "flags"])
def test_a_lora_setting_clashes_with_mode_full(name: str, value: Any, level: str) -> None:
    """Both flags are named, wherever the LoRA setting came from."""
    given = {"file": {}, "flags": {}} | {level: {"tune": {name: value}}}
    with pytest.raises(ImagicError, match=rf"--{name} \(from the .*\) together with --mode full"):
        resolve(merged(given["flags"], {"tune": {"mode": "full"}}), given["file"], PRESETS["sd"])


@pytest.mark.parametrize("group", ["embed", "tune", "edit", "memory", None])
def test_settings_are_frozen(group: str | None) -> None:
    """No setting changes after it was resolved."""
    config = getattr(RunConfig(), group) if group else RunConfig()
    name = next(iter(type(config).model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(config, name, getattr(config, name))


def test_merging_lays_groups_over_each_other_and_leaves_them_alone() -> None:
    """Later layers win leaf by leaf, and no layer is changed."""
    below, above = {"a": {"x": 1, "y": 2}, "b": 3}, {"a": {"y": 4}, "c": {"z": 5}}
    assert merged(below, above) == {"a": {"x": 1, "y": 4}, "b": 3, "c": {"z": 5}}
    assert (below, above) == ({"a": {"x": 1, "y": 2}, "b": 3}, {"a": {"y": 4}, "c": {"z": 5}})


@pytest.mark.parametrize(
    "content", [None, b"a: [1", b"- 1\n- 2", b"text", b"\xff\xfe\xfa"], ids=["missing", "broken", "list", "text", "bytes"]
)
def test_a_file_that_holds_no_settings_is_refused(content: bytes | None, tmp_path: Path) -> None:
    """The error names the file."""
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ImagicError, match=r"run\.yaml"):
        read_yaml(path)


@pytest.mark.parametrize(("text", "expected"), [("", {}), ("# nothing\n", {}), ("tune:\n  steps: 5\n", {"tune": {"steps": 5}})])
def test_a_file_is_read_as_a_mapping(text: str, expected: dict[str, Any], tmp_path: Path) -> None:
    """An empty file gives no settings, another gives its own."""
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert read_yaml(path) == expected


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_shipped_config_resolves(path: Path, preset: str) -> None:
    """Each of its values arrives, over either preset."""
    found = resolve({}, read_yaml(path), PRESETS[preset]).model_dump()
    assert merged(found, read_yaml(path)) == found
