"""The procedural world: pure pictures, true captions, true edits."""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from common import each
from transformers import CLIPTokenizer

from imagic_lora.bases.loading.known import CRITTERS
from imagic_lora.critters import ATTRIBUTES, SIZE, Scene, backdrop, caption, longest_caption, render, sample_caption, scene_at
from imagic_lora.critters.judge import Judge, Reading, identity_targets
from imagic_lora.critters.scene import IDENTITY, RANGES, WORDS, Split, displaced

DOG = Scene("dog", "sitting", "brown", "grass", "hat", 0.25, 1.0, 32.0, 57.5, 1, 2, 0.75, 39.0, -0.5)
CAT = Scene("cat", "jumping", "orange", "night", "none", -0.5, 1.125, 30.0, 58.0, -1, 3, 0.25, 36.0, 0.5)
BIRD = Scene("bird", "standing", "blue", "snow", "ball", 0.0, 0.9375, 34.0, 56.0, 1, 0, 0.5, 42.0, 1.0)
RABBIT = Scene("rabbit", "sleeping", "white", "sand", "none", 1.0, 1.0625, 31.5, 59.0, -1, 1, 0.0, 35.0, 0.0)
WORLD = [DOG, CAT, BIRD, RABBIT]
HASHES = [
    "c95ff75f2280b269a8680c509dc7f6e76298d96b8df9003539d6c785d91c039b",
    "4fb760d2e251b6bb027235e46151b5f720b55c46222ed7cdc646a1016dbc55b9",
    "5ff3cc2623550164b5f855c39d73e998f9316337ada2310b632aa9473baccc85",
    "07aaa04cf77e446a3493e89fe7d5db346193d1a13e1a8eb8f4bd21aa1df81e74",
]
PHRASES = {
    "place": {"grass": "on the grass", "sand": "on the sand", "snow": "in the snow", "night": "at night"},
    "thing": {"hat": "wearing a hat", "ball": "with a ball"},
}


@each("scene, digest", list(zip(WORLD, HASHES, strict=True)))
def test_a_picture_is_the_same_on_every_machine(scene: Scene, digest: str) -> None:
    """The pixels of fixed scenes have stored digests."""
    assert hashlib.sha256(render(scene).tobytes()).hexdigest() == digest


@each("scene", WORLD)
def test_rendering_is_pure(scene: Scene) -> None:
    """An equal scene gives equal pixels, whatever was drawn before."""
    first = render(scene)
    render(BIRD if scene is not BIRD else CAT)
    assert (first.mode, first.size) == ("RGB", (SIZE, SIZE)) == ("RGB", (64, 64))
    assert render(replace(scene)).tobytes() == first.tobytes()


@each("scene", WORLD)
@each("attribute", list(ATTRIBUTES))
def test_every_value_of_an_attribute_has_its_own_picture(scene: Scene, attribute: str) -> None:
    """No two values look the same."""
    pictures = {render(scene.edited(**{attribute: value})).tobytes() for value in ATTRIBUTES[attribute]}
    assert len(pictures) == len(ATTRIBUTES[attribute])


@each(
    "change",
    [
        {"shade": 0.9},
        {"size": 0.92},
        {"x": 29.5},
        {"y": 55.5},
        {"facing": -1},
        {"spots": 3},
        {"sun": 0.1},
        {"horizon": 34.5},
        {"tint": 0.8},
    ],
)
def test_every_part_of_the_identity_shows(change: dict[str, Any]) -> None:
    """What an edit must keep can be seen, so losing it can be measured."""
    assert render(replace(DOG, **change)).tobytes() != render(DOG).tobytes()


@each("attribute, value", [(name, value) for name, values in ATTRIBUTES.items() for value in values])
def test_an_edit_changes_only_what_it_names(attribute: str, value: str) -> None:
    """Every other field stays, and the scene itself too."""
    before = asdict(DOG)
    assert asdict(DOG.edited(**{attribute: value})) == before | {attribute: value}
    assert asdict(DOG) == before


def test_an_edit_of_several_attributes_changes_them_all() -> None:
    """Two changes at once are the two one after the other."""
    assert DOG.edited(pose="jumping", place="snow") == DOG.edited(place="snow").edited(pose="jumping") != DOG


@each("changes", [{"x": "3"}, {"shade": "dark"}, {"mood": "happy"}, {"pose": "flying"}, {"colour": "grass"}, {"thing": ""}])
def test_an_edit_of_anything_else_is_refused(changes: dict[str, str]) -> None:
    """The error names what was got."""
    (name, value), *_ = changes.items()
    with pytest.raises(ValueError, match=f"not '{value if name in ATTRIBUTES else name}'"):
        DOG.edited(**changes)


@each(
    "scene, text",
    [
        (DOG, "a brown dog sitting on the grass wearing a hat"),
        (CAT, "an orange cat jumping at night"),
        (BIRD, "a blue bird standing in the snow with a ball"),
        (RABBIT, "a white rabbit sleeping on the sand"),
    ],
)
def test_a_caption_says_all_five_attributes(scene: Scene, text: str) -> None:
    """Colour, animal, pose, place, and the thing where there is one."""
    assert caption(scene) == text


def said(text: str) -> dict[str, set[str]]:
    """The values of every attribute that a text names."""
    return {
        name: {value for value in values if re.search(rf"\b{PHRASES.get(name, {}).get(value, value)}\b", text)}
        for name, values in ATTRIBUTES.items()
    }


def test_a_sampled_caption_says_only_what_is_true() -> None:
    """Over 300 scenes it names the animal, and of every other attribute the scene's own value or none."""
    draw = random.Random(0)
    for scene in (scene_at("heldout", index) for index in range(300)):
        values = said(sample_caption(scene, draw))
        assert values["animal"] == {scene.animal}
        assert all(values[name] <= {getattr(scene, name)} for name in values)


def test_a_sampled_caption_is_made_of_known_phrases_with_the_right_article() -> None:
    """Over 300 scenes nothing is left when the opening, the attributes, the words on the identity and their phrases are taken out."""
    draw = random.Random(1)
    words = "|".join((*WORDS["size"], *WORDS["shade"], *(value for name in ("animal", "pose", "colour") for value in ATTRIBUTES[name])))
    hours = "|".join((*WORDS["tint"], *WORDS["sun"]))
    tail = [*(phrase for name in ("spots", "y", "x", "horizon") for phrase in WORDS[name]), "facing (left|right)"]
    tail += [phrase for group in PHRASES.values() for phrase in group.values()]
    phrases = "|".join([*tail, f"in the( ({hours}))+ hours"])
    for index in range(300):
        text = sample_caption(scene_at("heldout", index), draw)
        assert re.fullmatch(rf"(a photo of )?(an (?=[aeiou])|a (?![aeiou]))({words})( ({words}))*( ({phrases}))*", text), text


@each(
    "scene, text",
    [
        (
            DOG,
            "a small light brown dog sitting with two spots facing right near rightward on the grass wearing a hat "
            "in the cool late hours lower horizon",
        ),
        (CAT, "a huge dark orange cat jumping with three spots facing left near leftmost at night in the hot earlier hours high horizon"),
    ],
)
def test_the_longest_caption_says_attributes_and_identity(scene: Scene, text: str) -> None:
    """Size and shade before the colour, the rest after the pose; and of 500 sampled captions none has a word that it lacks."""
    assert longest_caption(scene) == text
    draw = random.Random(4)
    words = {*text.split(), "a", "photo", "of"}
    assert all(set(sample_caption(scene, draw).split()) <= words | {"an"} for _ in range(500))


@each("name", [*IDENTITY, "facing"])
def test_a_displaced_factor_is_another_one_in_its_range_and_the_only_change(name: str) -> None:
    """Its word changes and no other one; twice displaced is back where it was."""
    for index in range(20):
        scene = scene_at("heldout", index)
        moved = displaced(scene, name)
        if name != "facing":
            low, high = RANGES[name]
            assert low <= getattr(moved, name) <= high
            assert abs(getattr(moved, name) - getattr(scene, name)) == pytest.approx(2 if name == "spots" else (high - low) / 2)
        assert replace(moved, **{name: getattr(scene, name)}) == scene
        assert longest_caption(moved) != longest_caption(scene)
        assert getattr(displaced(moved, name), name) == pytest.approx(getattr(scene, name))


def test_the_longest_sampled_caption_fits_the_tokenizer() -> None:
    """Of 2,000, with the two tokens that frame it, none is cut off; every word is a token."""
    draw, words = random.Random(4), CLIPTokenizer.from_pretrained(CRITTERS / "tokenizer")
    texts = [sample_caption(scene_at("heldout", index), draw) for index in range(2000)]
    assert max(len(ids) for ids in words(texts).input_ids) <= words.model_max_length
    assert all(len(ids) == len(text.split()) + 2 for ids, text in zip(words(texts).input_ids, texts, strict=True))


def test_sampled_captions_leave_out_and_keep_every_attribute() -> None:
    """Of one scene, 200 captions hold the full one, the animal alone, and each attribute about three times in four."""
    draw = random.Random(2)
    texts = [sample_caption(DOG, draw) for _ in range(200)]
    assert caption(DOG) in texts
    assert "a dog" in texts
    for name in ("pose", "colour", "place", "thing"):
        assert 120 < sum(bool(said(text)[name]) for text in texts) < 180


@each(
    "factor, word, lower, higher",
    [
        ("size", "large", 1.03, 1.06),
        ("size", "tiny", 0.92, 0.96),
        ("shade", "pale", 0.51, 1.0),
        ("shade", "dark", -0.49, -0.01),
        ("spots", "with two spots", 2, 2),
        ("x", "leftmost", 29.0, 30.4),
        ("x", "rightward", 32.1, 33.4),
        ("y", "close", 58.8, 60.0),
        ("sun", "late", 0.76, 1.0),
        ("horizon", "high horizon", 34.0, 36.4),
        ("tint", "warm", 0.01, 0.49),
        ("facing", "facing left", -1, -1),
    ],
)
def test_a_sampled_caption_tells_of_the_identity_half_of_the_time(factor: str, word: str, lower: float, higher: float) -> None:
    """A word on a factor appears in about half of the captions of the scenes it is right for, and never of one it is not."""
    draw = random.Random(3)
    others = {"size": 1.0, "shade": 0.2, "spots": 0, "x": 31.0, "y": 56.5, "sun": 0.6, "horizon": 40.0, "tint": -0.2, "facing": 1}
    for value in (lower, higher):
        texts = [sample_caption(replace(DOG, **{factor: value}), draw) for _ in range(200)]
        assert 80 < sum(bool(re.search(rf"\b{word}\b", text)) for text in texts) < 130
    other = replace(DOG, **{factor: others[factor]})
    assert not any(re.search(rf"\b{word}\b", sample_caption(other, draw)) for _ in range(200))


def test_a_scene_is_a_function_of_its_split_and_number() -> None:
    """Drawn again it is equal, and the global generator is left alone."""
    state = random.getstate()
    assert [scene_at("heldout", k) for k in range(20)] == [scene_at("heldout", k) for k in range(20)]
    assert random.getstate() == state


def test_a_scene_is_the_same_on_every_machine() -> None:
    """A fixed number of a fixed split has stored values."""
    scene = scene_at("heldout", 0)
    assert (caption(scene), scene.shade, scene.facing, scene.spots) == (
        "a black rabbit jumping at night with a ball",
        -0.6958155790261844,
        1,
        2,
    )


def test_no_two_splits_or_numbers_share_a_scene() -> None:
    """The first 100 of every split are all different."""
    splits = get_args(Split)
    scenes = {split: {scene_at(split, index) for index in range(100)} for split in splits}
    assert all(len(found) == 100 for found in scenes.values())
    assert all(scenes[a].isdisjoint(scenes[b]) for a, b in combinations(splits, 2))


def test_scenes_stay_within_their_ranges_and_use_them() -> None:
    """Over 300 scenes every attribute value occurs and every part of the identity keeps to its range."""
    scenes = [scene_at("heldout", index) for index in range(300)]
    for name, values in ATTRIBUTES.items():
        assert {getattr(scene, name) for scene in scenes} == set(values)
    ranges = {"shade": (-1, 1), "size": (0.92, 1.12), "x": (29, 35), "y": (55, 60), "sun": (0, 1), "horizon": (34, 44), "tint": (-1, 1)}
    for name, (low, high) in ranges.items():
        found = [getattr(scene, name) for scene in scenes]
        assert low <= min(found) < low + 0.1 * (high - low) < high - 0.1 * (high - low) < max(found) <= high
    assert ({scene.facing for scene in scenes}, {scene.spots for scene in scenes}) == ({-1, 1}, {0, 1, 2, 3})


def test_the_judge_is_stored_in_half_precision_and_nothing_else_is_lost(tmp_path: Path) -> None:
    """Each weight comes back as its own half."""
    torch.manual_seed(0)
    judge = Judge()
    judge.save(tmp_path / "judge.safetensors")
    loaded = Judge.load(tmp_path / "judge.safetensors").state_dict()
    assert loaded.keys() == judge.state_dict().keys()
    assert all(torch.equal(loaded[name], value.half().float()) for name, value in judge.state_dict().items())


def test_the_judge_names_the_likeliest_value_of_every_attribute() -> None:
    """What it sees is the largest logit, by the fixed order of the values; the identity comes back in the scene's own units."""
    torch.manual_seed(0)
    judge, pictures = Judge().eval(), torch.rand(5, 3, SIZE, SIZE) * 2 - 1
    outputs = {name: value.double().tolist() for name, value in judge(pictures).items()}
    middle = {"shade": 0, "size": 1.02, "x": 32, "y": 57.5, "spots": 1.5, "sun": 0.5, "horizon": 39, "tint": 0}
    for k, sight in enumerate(judge.read_scenes(pictures)):
        best = {name: outputs[name][k].index(max(outputs[name][k])) for name in (*ATTRIBUTES, "facing")}
        assert sight.attributes == {name: values[best[name]] for name, values in ATTRIBUTES.items()}
        assert sight.facing == (-1, 1)[best["facing"]]
        for name, value in zip(IDENTITY, outputs["identity"][k], strict=True):
            assert sight.identity[name] == pytest.approx(middle[name] + value * IDENTITY[name])


def test_what_the_judge_learns_of_a_scene_has_mean_zero_and_spread_one() -> None:
    """Over many scenes, for every factor of the identity."""
    learned = torch.tensor([identity_targets(scene_at("heldout", k)) for k in range(2000)])
    assert learned.shape == (2000, len(IDENTITY))
    assert learned.mean(0).abs().max() < 0.08
    assert (learned.std(0) - 1).abs().max() < 0.05


def test_a_sight_of_the_scene_itself_has_no_distance() -> None:
    """Neither in a factor nor together; nothing has changed."""
    sight = seen_as(DOG)
    assert sight.distance(DOG) == 0
    assert set(sight.deviations(DOG).values()) == {0.0}
    assert sight.changed(DOG) == []


@each("name", list(IDENTITY))
def test_the_distance_is_in_standard_deviations(name: str) -> None:
    """One factor of eight that is two standard deviations off makes 2 / sqrt(8), whichever it is."""
    other = replace(DOG, **{name: getattr(DOG, name) + 2 * IDENTITY[name]})
    assert seen_as(other).deviations(DOG)[name] == pytest.approx(2)
    assert seen_as(other).distance(DOG) == pytest.approx(2 / 8**0.5)


def test_an_animal_that_turned_round_is_another_one() -> None:
    """Whatever else is the same."""
    assert seen_as(replace(DOG, facing=-1)).distance(DOG) == float("inf")


def test_changed_attributes_are_named() -> None:
    """All of them, and they alone; they have no distance."""
    other = replace(DOG, pose="jumping", thing="none")
    assert seen_as(other).changed(DOG) == ["pose", "thing"]
    assert seen_as(other).distance(DOG) == 0


def seen_as(scene: Scene) -> Reading:
    """What a judge without error sees."""
    facts = asdict(scene)
    return Reading({name: facts[name] for name in ATTRIBUTES}, scene.facing, {name: float(facts[name]) for name in IDENTITY})


@each("scene", WORLD)
def test_the_backdrop_is_the_picture_without_its_animal(scene: Scene) -> None:
    """It does not depend on the animal; what differs from the picture is around the animal, and there it differs."""
    behind = np.asarray(backdrop(scene)).astype(int)
    assert (behind == np.asarray(backdrop(scene.edited(animal="bird", pose="sleeping", colour="blue", thing="ball")))).all()
    differs = (np.asarray(render(scene)).astype(int) != behind).any(2)
    rows, columns = differs.nonzero()
    assert 0.08 < differs.mean() < 0.5
    assert (abs(columns - scene.x).max(), rows.max()) <= (32, scene.y + 4)
