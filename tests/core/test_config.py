"""One schema, five levels: every setting arrives, and what is wrong is refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from common import MODES, each
from pydantic import BaseModel, ValidationError

from imagic_lora.cli.app import app
from imagic_lora.core.config import DreamBoothConfig, InversionConfig, Preset, RunConfig, TuneConfig
from imagic_lora.core.errors import ImagicError
from imagic_lora.core.settings.merging import differences, merged
from imagic_lora.core.settings.presets import PRESETS
from imagic_lora.core.settings.reading import read_settings
from imagic_lora.core.settings.recipes import RECIPES, RecipePart, recipe_of
from imagic_lora.core.settings.resolve import resolve
from imagic_lora.core.yaml_files import read_yaml

Leaf = tuple[str, ...]
LEVELS = ("recipe", "preset", "file", "flags")
CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


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
    return {int: 64, float: 0.375, str: "other", bool: not default}[kind]


SETTINGS = {path: (default, another(annotation, default)) for path, annotation, default in leaves()}
COMPANIONS: dict[Leaf, dict[str, Any]] = {
    ("memory", "master_weights"): {"tune": {"mode": "full"}},
    ("memory", "autocast_cache"): {"tune": {"mode": "full"}},
    ("edit", "strength"): {"edit": {"start": "image"}},
    ("edit", "source_eta"): {"edit": {"start": "inverted"}},
    ("edit", "padding_eta"): {"embed": {"space": "input"}},
    **{("dreambooth", name): {"method": "dreambooth"} for name in DreamBoothConfig.model_fields},
    **{("inversion", name): {"method": "textual-inversion"} for name in InversionConfig.model_fields},
    ("monitoring", "patience"): {"monitoring": {"early_stop": "both"}},
    ("monitoring", "min_improvement"): {"monitoring": {"early_stop": "both"}},
}
"""What has to be given along with a setting for it to be valid."""
each_setting = each("path", list(SETTINGS))


def reach(path: Leaf) -> tuple[str, ...]:
    """The levels that can set something: a preset is named by file or flags alone."""
    return LEVELS[2:] if path == ("preset",) else LEVELS


def nested(path: Leaf, value: Any) -> dict[str, Any]:
    """A mapping of mappings that holds one value."""
    return {path[0]: nested(path[1:], value) if path[1:] else value}


def named(value: Any) -> str:
    """For the names of cases."""
    return ".".join(value) if isinstance(value, tuple) else str(value)


def at(config: Any, path: Leaf) -> Any:
    """The value of a setting."""
    return at(getattr(config, path[0]), path[1:]) if path else config


Resolved = Callable[..., RunConfig]


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch) -> Resolved:
    """Resolves a run whose recipe and preset are the same in all modes; its preset is 16gb where the preset level is given."""

    def run(recipe: Any = (), preset: Any = None, file: Any = (), flags: Any = ()) -> RunConfig:
        for name in PRESETS:
            monkeypatch.setitem(PRESETS, name, {mode: dict(preset or {}) for mode in MODES})
        return resolve(dict(flags), dict(file), {part: dict(recipe) for part in get_args(RecipePart)}, "16gb" if preset else None)

    return run


@each_setting
def test_nothing_given_is_the_default(path: Leaf, resolved: Resolved) -> None:
    """The built-in level is the model's own default, whose value is valid when given, too."""
    default, _ = SETTINGS[path]
    given = merged(nested(path, default), COMPANIONS.get(path, {}))
    assert at(resolved(), path) == default == at(resolved(flags=given), path)


@each("path, level", [(path, level) for path in SETTINGS for level in reach(path)])
def test_a_level_alone_beats_the_default_and_touches_nothing_else(path: Leaf, level: str, resolved: Resolved) -> None:
    """A setting given once arrives from wherever it was given."""
    given, companion = nested(path, SETTINGS[path][1]), COMPANIONS.get(path, {})
    config = resolved(**({"flags": companion} | {level: merged(given, companion)}))
    assert at(config, path) == SETTINGS[path][1]
    chosen = {"preset": "16gb"} if level == "preset" else {}
    chosen |= {"tune": {"mode": "embedding"}} if config.method == "textual-inversion" else {}
    assert config.model_dump() == merged(RunConfig().model_dump(), given, companion, chosen)


@each("path, lower, higher", [(path, *pair) for path in SETTINGS for pair in combinations(reach(path), 2)])
@each("explicit", [0, 1])
def test_a_higher_level_beats_a_lower_one(path: Leaf, explicit: int, higher: str, lower: str, resolved: Resolved) -> None:
    """What is given higher up wins, be it the default given explicitly."""
    values, companion = SETTINGS[path], COMPANIONS.get(path, {})
    given = {higher: nested(path, values[explicit]), lower: nested(path, values[1 - explicit])}
    assert at(resolved(**(given | {"flags": merged(given.get("flags", {}), companion)})), path) == values[explicit]


@each("level", ["file", "flags"])
@each("mode", MODES)
@each("divided", ["recipe", "preset"])
def test_the_mode_chooses_its_part(divided: str, level: str, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """File and flags can both ask for a mode, and get what recipe and preset have for it."""
    given: dict[str, Any] = {"file": {}, "flags": {}, "recipe": {}} | {level: {"tune": {"mode": mode}}}
    parts: Any = {mode: {"embed": {"steps": 11 + k}} for k, mode in enumerate(MODES)}
    if divided == "recipe":
        given["recipe"] = parts
    else:
        monkeypatch.setitem(PRESETS, "12gb", parts)
    assert resolve(**given, preset="12gb").embed.steps == 11 + MODES.index(mode)


@each("mode", MODES)
@each("name", list(RECIPES))
def test_every_recipe_is_valid_and_arrives_whole(name: str, mode: Any) -> None:
    """A recipe laid over the defaults is the run, in every mode."""
    flags = {"tune": {"mode": mode}}
    assert resolve(flags, {}, RECIPES[name]).model_dump() == merged(RunConfig().model_dump(), RECIPES[name][mode], flags)


@each("mode", MODES)
@each("name", get_args(Preset))
@each("level", ["file", "flags", "auto"])
def test_every_preset_is_valid_and_arrives_whole(level: str, name: Any, mode: Any) -> None:
    """Laid over the recipe it is the run, in every mode, whether asked for or taken for auto."""
    levels = {"file": {}, "flags": {"tune": {"mode": mode}}}
    given = levels | ({level: merged(levels[level], {"preset": name})} if level in levels else {})
    found = resolve(**given, recipe=RECIPES["sd"], preset=name if level == "auto" else None)
    expected = merged(RunConfig().model_dump(), RECIPES["sd"][mode], PRESETS[name][mode], levels["flags"], {"preset": name})
    assert found.model_dump() == expected


def test_the_preset_of_the_flags_takes_the_place_of_that_of_the_file() -> None:
    """Nothing is left of the levers that the file asked for by name, while those it spelled out stay."""
    file = {"preset": "8gb", "memory": {"vae_slicing": True}}
    expected = merged(RunConfig().model_dump(), PRESETS["cpu"]["lora"], file, {"preset": "cpu"})
    assert resolve({"preset": "cpu"}, file, {}).model_dump() == expected
    assert resolve({"preset": "auto"}, file, {}).model_dump() == merged(RunConfig().model_dump(), file, {"preset": "auto"})


@each("base, kind", [("critters", "critters"), ("sd15", "sd"), ("sd21", "sd"), ("./critters", "sd")])
def test_a_base_has_its_own_recipe_or_that_of_stable_diffusion(base: str, kind: str) -> None:
    """By its name alone."""
    assert recipe_of(base) is RECIPES[kind]


@each("path", [("rnak",), ("embed", "rank"), ("tune", "rnak"), ("edit", "eta"), ("memory", "rank")])
@each("level", ["file", "flags"])
def test_an_unknown_name_is_refused_with_the_known_ones(path: Leaf, level: str) -> None:
    """The error names the setting that was got and every one that its group knows."""
    given = {"file": {}, "flags": {}} | {level: nested(path, 1)}
    with pytest.raises(ImagicError) as caught:
        resolve(**given, recipe={})
    assert ".".join(path) in caught.value.got
    group = at(RunConfig(), path[:-1])
    assert caught.value.expected == "one of " + ", ".join(type(group).model_fields)


@each(
    "path, value",
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
        (("preset",), "4gb"),
        (("memory", "device"), "mps"),
        (("memory", "idle"), "drop"),
        (("memory", "vae_tiling"), "sometimes"),
        (("memory", "gradient_checkpointing"), "auto"),
        (("memory", "optimizer"), "sgd"),
        (("memory", "quantize"), "int4"),
        (("memory", "master_weights"), "fp8"),
        (("embed",), 5),
        (("tune",), None),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(path: Leaf, value: Any) -> None:
    """The error says which setting and what it was given."""
    with pytest.raises(ImagicError) as caught:
        resolve({}, nested(path, value), RECIPES["critters"])
    assert caught.value.got == f"{'.'.join(path)} = {value!r}"


@each("name, value", [("rank", 8), ("alpha", 4.0), ("targets", "attention")])
@each("level", ["file", "flags"])
def test_a_lora_setting_clashes_with_mode_full(name: str, value: Any, level: str) -> None:
    """Both flags are named, wherever the LoRA setting came from."""
    given = {"file": {}, "flags": {}} | {level: {"tune": {name: value}}}
    with pytest.raises(ImagicError, match=rf"--{name} \(from the .*\) together with --mode full"):
        resolve(merged(given["flags"], {"tune": {"mode": "full"}}), given["file"], RECIPES["sd"])


EXPLICIT = {"steps": 300, "learning_rate": 2e-4, "batch_size": 1, "timesteps": "stratified", "rank": 16, "alpha": None, "targets": "all"}


@each("name", [name for name in TuneConfig.model_fields if name != "mode"])
@each("level", ["file", "flags"])
def test_a_setting_of_stage_2_clashes_with_mode_embedding(name: str, level: str) -> None:
    """Every one, were it only its default given explicitly; the error has its flag on the command line. One of the recipe does not."""
    flag = f"--{name}" if name in ("rank", "alpha", "targets") else f"--tune.{name.replace('_', '-')}"
    assert app["fit"].assemble_argument_collection().get(flag) is not None
    given = {"file": {}, "flags": {}} | {level: {"tune": {name: EXPLICIT[name]}}}
    with pytest.raises(ImagicError) as caught:
        resolve(merged(given["flags"], {"tune": {"mode": "embedding"}}), given["file"], {})
    assert caught.value.got == f"{flag} (from the {level}) together with --mode embedding"
    assert "--mode lora or --mode full" in caught.value.expected
    assert resolve({"tune": {"mode": "embedding"}}, {}, {"embedding": {"tune": {name: EXPLICIT[name]}}}).tune.mode == "embedding"


@each("mode", MODES)
def test_mode_embedding_has_no_stage_2(mode: Any) -> None:
    """The stages that run, in their order, with their settings."""
    run = resolve({"tune": {"mode": mode}}, {}, RECIPES["critters"])
    assert list(run.stages.items()) == [("embed", run.embed)] + ([] if mode == "embedding" else [("tune", run.tune)])


FULL, STOCHASTIC = {"tune": {"mode": "full"}}, {"memory": {"master_weights": "bf16-stochastic"}}
EMBEDDING = {"tune": {"mode": "embedding"}}
CLASHES = {
    "--quantize and --mode full": ({"memory": {"quantize": "nf4"}}, FULL),
    "--master-weights and --mode lora": (STOCHASTIC, {}),
    "--autocast-cache and --mode lora": ({"memory": {"autocast_cache": True}}, {}),
    "--master-weights and --mode embedding": (STOCHASTIC, EMBEDDING),
    "--autocast-cache and --mode embedding": ({"memory": {"autocast_cache": True}}, EMBEDDING),
    "--autocast-cache and --master-weights bf16-stochastic": ({"memory": {"autocast_cache": True}}, merged(FULL, STOCHASTIC)),
    "--master-weights and --dtype fp16": (STOCHASTIC, merged(FULL, {"memory": {"dtype": "fp16"}})),
    "--master-weights and --dtype fp32": (STOCHASTIC, merged(FULL, {"memory": {"dtype": "fp32"}})),
    "--strength and --start noise": ({"edit": {"strength": 0.8}}, {}),
    "--strength and --start inverted": ({"edit": {"strength": 0.5}}, {"edit": {"start": "inverted"}}),
    "--source-eta and --start image": ({"edit": {"source_eta": 0.3}}, {"edit": {"start": "image"}}),
    "--padding-eta and --embed.space output": ({"edit": {"padding_eta": 0.3}}, {}),
    "--early-stop and --convergence-every 0": ({"monitoring": {"early_stop": "both"}}, {"monitoring": {"convergence_every": 0}}),
    "--early-stop and --mode embedding": ({"monitoring": {"early_stop": "tune"}}, EMBEDDING),
    "--preview-every and --mode embedding": ({"monitoring": {"preview_every": 10}}, EMBEDDING),
    "--patience and --early-stop off": ({"monitoring": {"patience": 3}}, {}),
    "--min-improvement and --early-stop off": ({"monitoring": {"min_improvement": 0.1}}, {}),
}


@each("clash", list(CLASHES))
@each("other_level", ["file", "flags"])
@each("level", ["file", "flags"])
def test_levers_that_rule_each_other_out_are_refused(clash: str, level: str, other_level: str) -> None:
    """Both flags are named in what was got and in what to do, wherever each of them came from; alone the others are fine."""
    (setting, others), (flag, other) = CLASHES[clash], clash.split(" and ")
    given = {"file": {}, "flags": {}} | {other_level: others}
    assert resolve(**given, recipe={}).model_dump() == merged(RunConfig().model_dump(), others)
    given[level] = merged(given[level], setting)
    with pytest.raises(ImagicError) as caught:
        resolve(**given, recipe={})
    assert caught.value.got == f"{flag} (from the {level}) together with {other}"
    assert caught.value.remedy == f"change {other} or leave out {flag}"


@each("settings", [{"memory": {"quantize": "nf4"}}, merged(EMBEDDING, {"memory": {"quantize": "nf4"}}),
                                      merged(FULL, STOCHASTIC, {"memory": {"dtype": "bf16"}}),
                                      merged(FULL, {"memory": {"autocast_cache": True, "dtype": "bf16"}})])  # fmt: skip
@each("preset", list(PRESETS))
def test_levers_that_agree_are_taken_over_any_preset(settings: dict[str, Any], preset: Any) -> None:
    """Each arrives, and none is taken for a clash."""
    found = resolve(settings, {}, RECIPES["sd"], preset).model_dump()
    assert merged(found, settings) == found


@each("value", ["bf16", "fp16"])
@each("level", ["file", "flags"])
def test_master_weights_in_plain_half_precision_are_refused_with_the_reason(level: str, value: str) -> None:
    """The error says what is right, and why this is not."""
    given = {"file": {}, "flags": {}} | {level: merged(FULL, {"memory": {"master_weights": value}})}
    with pytest.raises(ImagicError) as caught:
        resolve(**given, recipe={})
    assert caught.value.got == f"memory.master_weights = '{value}'"
    assert caught.value.expected.startswith("fp32 or bf16-stochastic: ")
    assert f"updates round to zero in plain {value}" in caught.value.expected


@each("group", ["embed", "tune", "edit", "memory", None])
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


def test_a_file_is_valid_by_itself(tmp_path: Path) -> None:
    """What is wrong in it is refused with its path, before a flag could take its place."""
    (tmp_path / "run.yaml").write_text("memory: 5")
    with pytest.raises(ImagicError, match=r"run\.yaml: memory = 5"):
        read_settings(tmp_path / "run.yaml")


@each("path", CONFIGS)
@each("recipe", ["sd", "flow"])
def test_every_shipped_config_resolves(path: Path, recipe: str) -> None:
    """Each of its values arrives, over the recipe of either process."""
    found = resolve({}, read_yaml(path), RECIPES[recipe]).model_dump()
    assert merged(found, read_yaml(path)) == found


SAVED: dict[str, Any] = {"seed": 2**63 - 1, "quantize": None, "embed": {"steps": 3, "timesteps": "stratified"}}
DIFFERENT: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    ({}, {}, []),
    (SAVED, dict(reversed(SAVED.items())), []),
    (SAVED, SAVED | {"more": 1}, ["more was missing, is 1"]),
    (SAVED, SAVED | {"more": None}, ["more was missing, is None"]),
    ({}, {"seed": 0, "embed": {"steps": 3}}, ["seed was missing, is 0", "embed was missing, is {'steps': 3}"]),
    ({"a": 1, "c": 3}, {"b": 2, "c": 4, "a": 1}, ["c was 3, is 4", "b was missing, is 2"]),
    ({"embed": {}}, {"embed": {"steps": 3}}, ["embed.steps was missing, is 3"]),
    ({"embed": {}}, {"embed": {"optimizer": "adam"}}, ["embed.optimizer was missing, is 'adam'"]),
    ({"seed": 0}, {"seed": 1}, ["seed was 0, is 1"]),
    ({"prompt": "a cat"}, {"prompt": "a 'dog'\n"}, ["""prompt was 'a cat', is "a 'dog'\\n\""""]),
    ({"optimizer": "adam"}, {}, ["optimizer was 'adam', is missing"]),
    ({"rank": None}, {}, ["rank was None, is missing"]),
    ({"a": 1, "b": 2, "c": 3}, {"c": 4, "b": 2, "a": 0}, ["a was 1, is 0", "c was 3, is 4"]),
    ({"embed": {"steps": 3, "rate": 0.1}}, {"embed": {"steps": 3, "rate": 0.2}}, ["embed.rate was 0.1, is 0.2"]),
    ({"a": {"b": {"c": 1, "d": [1, 2]}}}, {"a": {"b": {"c": 2, "d": [1, 3]}}}, ["a.b.c was 1, is 2", "a.b.d was [1, 2], is [1, 3]"]),
    ({"embed": {"steps": 3}}, {"embed": None}, ["embed was {'steps': 3}, is None"]),
    ({"rank": None}, {"rank": 4}, ["rank was None, is 4"]),
]


@each("was, now, expected", DIFFERENT)
def test_differences_have_both_values(was: dict[str, Any], now: dict[str, Any], expected: list[str]) -> None:
    """By the full name, in order, those that are new last."""
    assert differences(was, now) == expected


@each(
    "given, flag, method",
    [
        ({"dreambooth": {"class_prompt": "a dog"}}, "--class-prompt", "imagic"),
        ({"inversion": {"word": "<x>"}}, "--word", "imagic"),
        ({"method": "dreambooth", "inversion": {"vectors": 2}}, "--vectors", "dreambooth"),
        ({"method": "dreambooth", "embed": {"steps": 3}}, "--embed.steps", "dreambooth"),
        ({"method": "dreambooth", "eta": 0.5}, "--eta", "dreambooth"),
        ({"method": "dreambooth", "edit": {"start": "inverted", "source_eta": 0.1}}, "--edit.source-eta", "dreambooth"),
        ({"method": "dreambooth", "tune": {"mode": "embedding"}}, "--mode", "dreambooth"),
        ({"method": "dreambooth", "monitoring": {"early_stop": "both"}}, "--early-stop", "dreambooth"),
        ({"method": "textual-inversion", "dreambooth": {"prior_weight": 2.0}}, "--prior-weight", "textual-inversion"),
        ({"method": "textual-inversion", "tune": {"steps": 3}}, "--tune.steps", "textual-inversion"),
        ({"method": "textual-inversion", "tune": {"mode": "lora"}}, "--mode", "textual-inversion"),
        ({"method": "textual-inversion", "embed": {"space": "input"}}, "--embed.space", "textual-inversion"),
        ({"method": "textual-inversion", "embed": {"noise": 0.1}}, "--embed.noise", "textual-inversion"),
    ],
)
@each("level", ["file", "flags"])
def test_a_setting_that_the_method_does_not_read_is_refused_by_name(given: Any, flag: str, method: str, level: str) -> None:
    """Wherever it was given; the method is named beside it."""
    with pytest.raises(ImagicError) as caught:
        resolve(**({"flags": {}, "file": {}} | {level: given}), recipe=RECIPES["sd"])
    assert caught.value.got.startswith(f"{flag} (from the {level}) together with --method {method}"), caught.value.got


@each("name", list(RECIPES))
@each("given", [{"method": "dreambooth"}, {"method": "dreambooth", "tune": {"mode": "full"}}, {"method": "textual-inversion"}])
def test_another_method_has_a_recipe_of_its_own(name: str, given: Any) -> None:
    """None of the settings of Imagic, such as the space that critters' embedding is trained in."""
    run = resolve(given, {}, RECIPES[name])
    part: RecipePart = "textual-inversion" if run.method != "dreambooth" else "dreambooth-full" if "tune" in given else "dreambooth-lora"
    fixed = {"tune": {"mode": "embedding"}} if run.method == "textual-inversion" else {}
    assert run.model_dump() == merged(RunConfig().model_dump(), RECIPES[name].get(part, {}), given, fixed)
    assert list(run.stages) == (["tune"] if run.method == "dreambooth" else ["embed"])
