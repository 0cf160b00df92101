"""A list is checked whole before anything starts: every wrong line is named at once, and nothing is read and ignored."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from common import each
from PIL import Image

from imagic_lora.core.config import RunConfig
from imagic_lora.core.errors import ImagicError
from imagic_lora.fleet import lists
from imagic_lora.fleet.columns import settings
from imagic_lora.fleet.table import Entry, Table
from imagic_lora.photos.region import Region

_LISTS = "\n".join(["a0: &a0 {x: 1}", *(f"a{k}: &a{k} [*a{k - 1}, *a{k - 1}]" for k in range(1, 60)), "photos: *a59"])
_MERGED = "\n".join(["a0: &a0 {x: 1, y: 2}", *(f"a{k}: &a{k}\n  <<: [*a{k - 1}, *a{k - 1}]" for k in range(1, 60))])
FLAGS = {"base": "critters", "memory": {"device": "cpu"}}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of three photos and a text file."""
    for name in ("a.png", "b c.png", "d.PNG"):
        Image.new("RGB", (16, 16), "red").save(tmp_path / name, "PNG")
    (tmp_path / "notes.txt").write_text("not a photo")
    return tmp_path


def entries(path: Path, content: str | bytes | None = None, prompt: str | None = None, flags: Any = FLAGS) -> list[Entry]:
    """The entries of a list, which is written first."""
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return Table(path, flags, {}).entries(prompt)


def problems(path: Path, content: str | bytes, prompt: str | None = None) -> list[str]:
    """What is wrong with a list: the lines and what was got."""
    with pytest.raises(lists.ListError) as caught:
        entries(path, content, prompt)
    return [f"{', '.join(problem.places)}: {problem.got}" for problem in caught.value.problems]


def check_named(found: Sequence[str], expected: Sequence[str]) -> None:
    """Each of the problems is there, by its beginning, and no other."""
    for start in expected:
        assert any(problem.startswith(start) for problem in found), (start, found)
    assert len(found) == len(expected)


def test_every_format_gives_the_same_entries(photos: Path) -> None:
    """Settings by their dotted keys or by their flags, nested or not; empty cells are left out; names from the file names."""
    rows = [
        {"photo": "a.png", "prompt": "a cat, jumping", "rank": 3, "seed": 2**40, "edit.guidance-scale": 1.5, "region": "0,0,16,8"},
        {"photo": "b c.png", "prompt": "ein Käfer", "name": "bug", "tune": {"learning_rate": 1e-4}},
        {"photo": "d.PNG", "prompt": "a dog", "eta": 0.5},
    ]
    header = "photo;prompt;rank;seed;edit.guidance-scale;region;name;tune.learning_rate;eta"
    lines = ["a.png;a cat, jumping;3;1099511627776;1.5;0,0,16,8;;;", "b c.png;ein Käfer;;;;;bug;1e-4;", "", "d.PNG;a dog;;;;;;;0.5"]
    comma = '"photo","prompt",rank\na.png,"a cat, jumping",3\n'
    found = entries(photos / "list.csv", "\ufeff" + "\r\n".join([header, *lines]))
    assert found == entries(photos / "wide.csv", "\n".join([header, *lines]).encode("utf-16"))
    for other in (
        entries(photos / "list.jsonl", "\n".join(json.dumps(row) for row in rows)),
        entries(photos / "list.yaml", "photos:\n" + "".join(f"- {json.dumps(row, ensure_ascii=False)}\n" for row in rows)),
    ):
        assert [(e.name, e.photo, e.prompt, e.region, e.config) for e in other] == [
            (e.name, e.photo, e.prompt, e.region, e.config) for e in found
        ]
    first, second, third = found
    assert [entry.name for entry in found] == ["a", "bug", "d"]
    assert (first.photo, first.region, first.config.tune.rank) == (photos / "a.png", Region(0, 0, 16, 8), 3)
    assert (first.config.seed, first.config.edit.guidance_scale, third.config.eta) == (2**40, 1.5, 0.5)
    assert second.config.tune.learning_rate == 1e-4
    assert third.config.tune.rank == 4  # that of the recipe
    assert [entry.place for entry in found] == ["line 2", "line 3", "line 5"]
    assert entries(photos / "comma.csv", comma)[0].config.tune.rank == 3


def test_a_folder_needs_a_prompt_and_leaves_other_files_out(photos: Path) -> None:
    assert [(entry.name, entry.prompt) for entry in entries(photos, prompt="a dog")] == [("a", "a dog"), ("b-c", "a dog"), ("d", "a dog")]
    with pytest.raises(ImagicError, match="without a prompt"):
        entries(photos)


def test_a_line_overrides_the_flags(photos: Path) -> None:
    flags = {**FLAGS, "tune": {"rank": 7, "steps": 5}}
    first, second = entries(photos / "list.csv", "photo,prompt,rank\na.png,a,2\nd.PNG,b,\n", flags=flags)
    assert [(e.config.tune.rank, e.config.tune.steps) for e in (first, second)] == [(2, 5), (7, 5)]


def test_every_setting_has_a_column() -> None:
    """By its key and, where it has one, by its flag."""
    found = settings()
    assert found["tune.rank"] == found["rank"] == ("tune", "rank")
    assert found["guidance_scale" if "guidance_scale" in found else "edit.guidance_scale"] == ("edit", "guidance_scale")

    def keys(values: dict[str, Any], group: str = "") -> set[str]:
        nested = [keys(value, f"{group}{name}.") if isinstance(value, dict) else {group + name} for name, value in values.items()]
        return set().union(*nested)

    assert {".".join(key) for key in found.values()} == keys(RunConfig().model_dump())


def test_all_wrong_lines_are_named_at_once(photos: Path) -> None:
    lines = [
        "photo,prompt,name,rank,region,mode",
        "a.png,a cat,,0,,",
        "gone.png,a cat,,,,",
        ",a cat,,,,",
        "d.PNG,,,,,",
        "d.PNG,a dog,../x,,,",
        "b c.png,a dog,,,1;2,",
        "a.png,a dog,one,,,",
        "b c.png,a dog,ONE,,,",
        "d.PNG,a dog,two,4,,embedding",
        "d.PNG,a dog,three",
        "notes.txt,a dog,four,,,lorra",
    ]
    found = problems(photos / "list.csv", "\n".join(lines))
    expected = [
        "line 2: tune.rank = '0'", "line 3: the photo", "line 4: no photo", "line 5: no prompt", "line 6: '../x' is not a valid name",
        "line 7: --region 1;2", "line 9: the name 'ONE' is that of line 8", "line 10: --rank", "line 11: 3 cells",
        "line 12: tune.mode = 'lorra'",
    ]  # fmt: skip
    check_named(found, expected)


def test_what_a_line_cannot_do_is_found_before_any_fit(photos: Path) -> None:
    """What the method of a line lacks, a base that it cannot train, and edits that the adapter of a line could not make."""
    lines = [
        "photo,prompt,name,method,base,class_prompt,initial_word,region,rank",
        "a.png,a sks dog,n2,dreambooth,,,,,",
        "a.png,a dog,n3,textual-inversion,,,dog,,",
        "a.png,a <x>,n4,textual-inversion,,,,,",
        'a.png,a sks dog,n5,dreambooth,,a dog,,"0,0,8,8",',
        "a.png,a sks dog,n6,dreambooth,critters-dit,a dog,,,",
        "a.png,a sks dog,n7,dreambooth,,a dog,,,2",
    ]
    found = problems(photos / "list.csv", "\n".join(lines))
    expected = [
        "line 2: --method dreambooth without a --class-prompt", "line 3: the prompt 'a dog', with no word", "line 4: no --initial-word",
        "line 5: --region together with", "line 6: --method dreambooth on critters-dit",
    ]  # fmt: skip
    check_named(found, expected)
    (photos / "list.csv").write_text("\n".join([lines[0], lines[6], "a.png,a dog,n8,,,,,,"]))
    with pytest.raises(lists.ListError, match=r"1 wrong line .*line 2: --edit with eta=0.5 and method dreambooth"):
        Table(photos / "list.csv", FLAGS, {}, [0.5], [0, 1]).entries()
    assert len(Table(photos / "list.csv", FLAGS, {}, [], [0, 1]).entries()) == 2
    with pytest.raises(lists.ListError, match="2 seeds with start inverted"):
        Table(photos / "list.csv", FLAGS, {"edit": {"start": "inverted"}}, [], [0, 1]).entries()


def test_equal_problems_are_one(photos: Path) -> None:
    lines = "".join(f"a.png,a cat,n{k},red\n" for k in range(2000))
    found = problems(photos / "list.csv", f"photo,prompt,name,colour\n{lines}")
    assert len(found) == 1
    assert found[0].endswith("unknown column 'colour'")


@each("content, name, said", {
    "no photo": ("photo,prompt\n", "list.csv", "holds no photos"),
    "empty": ("", "list.csv", "no column photo"),
    "empty lines": ("\n\n", "list.jsonl", "holds no photos"),
    "an empty YAML list": ("photos: []", "list.yaml", "holds no photos"),
    "another key": ("pictures: []", "list.yaml", "holds the keys 'pictures'"),
    "no list": ("photos: {a: 1}", "list.yaml", "photos of .* is a dict"),
    "numbers in YAML": ("photos: [1, 2]", "list.yaml", "photo 1, photo 2: it is no mapping"),
    "Latin-1": ("photo,prompt\na.png,ein Käfer\n".encode("latin1"), "list.csv", "line 2: the byte 0xe4 is not UTF-8"),
    "an open quote": ('photo,prompt\na.png,"a cat\n', "list.csv", "cannot be read"),
    "a column twice": ("photo,prompt,photo\na.png,x,a.png\n", "list.csv", "'photo' occurs twice"),
    "a setting twice": ("photo,prompt,rank,tune.rank\na.png,x,4,5\n", "list.csv", "the same setting"),
    "a key twice": ('{"photo": "a.png", "photo": "d.PNG", "prompt": "x"}', "list.jsonl", "a duplicate key"),
    "a setting twice, once nested": (
        '{"photo": "a.png", "prompt": "x", "tune.rank": 4, "tune": {"rank": 8}}', "list.jsonl", "'tune.rank' and a nested value"
    ),
    "no JSON": ("photo: a.png", "list.jsonl", "line 1: it cannot be read"),
    "deep JSON": ("[" * 100_000, "list.jsonl", "line 1: it cannot be read"),
    "NaN": ('{"photo": "a.png", "prompt": "x", "eta": NaN}', "list.jsonl", "not finite"),
    "a number for a prompt": ('{"photo": "a.png", "prompt": 5}', "list.jsonl", "prompt = 5"),
    "half a character": ('{"photo": "a.png", "prompt": "\\ud800"}', "list.jsonl", "not UTF-8"),
    "a nested value": ('{"photo": "a.png", "prompt": "x", "tune": {"rank": {"a": 1}}}', "list.jsonl", "tune.rank = "),
    "another ending": ("a.png", "list.txt", "is no list of photos"),
    "a NUL": ("photo,prompt\na\0.png,x\n", "list.csv", "cannot be read|does not exist"),
    "a bomb": (_LISTS, "list.yaml", "holds the keys"),
    "a bomb of merge keys": (_MERGED, "list.yaml", "merge keys"),
})  # fmt: skip
def test_a_bad_list_is_an_error(photos: Path, content: str | bytes, name: str, said: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ImagicError, match=said):
        entries(photos / name, content)
    assert time.perf_counter() - start < 5


def test_limits(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred thousand lines, or too many bytes, are an error at once; a repeated YAML alias too."""
    line = "a.png,a cat\n"
    with pytest.raises(ImagicError, match="more than 50,000 photos"):
        entries(photos / "long.csv", "photo,prompt\n" + line * 100_000)
    with pytest.raises(ImagicError, match="more than 50,000 photos"):
        entries(photos / "long.yaml", "photos:\n- &a {photo: a.png, prompt: x}" + "\n- *a" * 60_000)
    monkeypatch.setattr(lists, "MAX_BYTES", 100)
    with pytest.raises(ImagicError, match="at most 100 bytes"):
        entries(photos / "large.csv", "photo,prompt\n" + line * 20)


def test_a_pipe_and_a_missing_list(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "list.csv")
    with pytest.raises(ImagicError, match="not a file"):
        entries(tmp_path / "list.csv")
    with pytest.raises(ImagicError, match="cannot be read"):
        entries(tmp_path / "gone.csv")
