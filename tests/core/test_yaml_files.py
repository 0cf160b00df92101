"""YAML files: read as their writer means them, or rejected with the line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from common import each

from imagic_lora.core.errors import ImagicError
from imagic_lora.core.settings.reading import validated
from imagic_lora.core.yaml_files import read_yaml


@each(
    "content, expected",
    {
        "empty": ("", {}),
        "comment": ("# nothing\n", {}),
        "groups": ("tune:\n  steps: 5\n", {"tune": {"steps": 5}}),
        "exponents": ("{a: 1e-4, b: 1.5e3, c: .5, d: 2.}", {"a": 1e-4, "b": 1500.0, "c": 0.5, "d": 2.0}),
        "integers": ("{a: 0, b: -7, c: 0x1F}", {"a": 0, "b": -7, "c": 31}),
        "switches": ("{a: true, b: False, c: ~, d:}", {"a": True, "b": False, "c": None, "d": None}),
        "text in quotes": ("{a: 'yes', b: \"010\", c: !!str 1:30}", {"a": "yes", "b": "010", "c": "1:30"}),
        "text in blocks": ("a: >-\n  yes\nb: |-\n  010\n", {"a": "yes", "b": "010"}),
        "merge key": ("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}", {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}),
        "Windows lines": ("a: 1\r\nb: 2\r\n", {"a": 1, "b": 2}),
    },
)
def test_a_file_is_read_as_a_mapping(content: str, expected: dict[str, Any], tmp_path: Path) -> None:
    """An empty file is an empty mapping. A byte order mark and UTF-16, which YAML allows, change nothing."""
    path = tmp_path / "run.yaml"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_bytes(content.encode(encoding))
        assert read_yaml(path) == expected


@each(
    "text",
    ["a: 010", "a: 00", "a: 1:30", "a: 1:30.5", "a: yes", "a: On", "a: no", "a: 1_000", "a: 0b11", "a: 2030-01-31", "a: 2030-13-45",
     "a: 0x_", "a: !!int 010"],
)  # fmt: skip
def test_a_value_with_two_readings_is_rejected(text: str, tmp_path: Path) -> None:
    """Octal, base 60, yes and no, underscores and dates are not the same in YAML 1.1 and 1.2. The line and the key are named."""
    path = tmp_path / "run.yaml"
    for before, after in (("", ""), ("x: {", "}"), ("x: [", "]")):
        path.write_text(f"# settings\n{before}{text}{after}")
        with pytest.raises(ImagicError, match=rf"run\.yaml, line 2: 'a: {text.split()[-1]}' is not the same"):
            read_yaml(path)
    path.write_text(f"{text.split()[-1]}: 1")
    with pytest.raises(ImagicError, match="line 1"):
        read_yaml(path)


@each("text", ['a: !!int "010"', 'a: !!bool "yes"', "a: !!float '1:30'"])
def test_a_tag_gives_quoted_text_no_other_reading(text: str, tmp_path: Path) -> None:
    """It makes a number of the text, as without quotes."""
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ImagicError, match="is not the same in YAML"):
        read_yaml(tmp_path / "run.yaml")


def test_what_may_have_no_end_is_not_read(tmp_path: Path) -> None:
    """A pipe that nobody writes to, a device, and a file of a size that no settings have."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large.yaml").write_text("# " + " " * 2**20)
    for path in (tmp_path / "pipe", tmp_path / "large.yaml", Path(os.devnull)):
        with pytest.raises(ImagicError, match="not a file of at most 1,048,576 bytes"):
            read_yaml(path)


@each(
    "text, line, first",
    [("a: 1\nb: 2\na: 1", 3, 1), ("a: 1\n'a': 2", 2, 1), ("x: {a: 1, a: 2}", 1, 1), ("x:\n  a: 1\n  a: 2", 3, 2),
     ("a: &a {x: 1}\nb:\n  <<: *a\n  <<: *a", 4, 3)],
)  # fmt: skip
def test_a_duplicate_key_is_rejected(text: str, line: int, first: int, tmp_path: Path) -> None:
    """PyYAML keeps the last one without a word. Both lines are named."""
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ImagicError, match=rf"run\.yaml, line {line}: the key .* is in line {first} already"):
        read_yaml(tmp_path / "run.yaml")


@each(
    "content, why",
    {
        "missing": (None, "No such file"),
        "broken": (b"a: [1", "line 1: while parsing a flow sequence"),
        "list": (b"- 1\n- 2", "holds a list"),
        "text": (b"text", "holds a str"),
        "two documents": (b"a: 1\n---\nb: 2", "line 2: expected a single document"),
        "tab": (b"a:\n\tb: 1", "line 2: .*that cannot start any token"),
        "Latin-1": ("a: é".encode("latin-1"), "unacceptable character"),
        "NUL": (b"a: \0", "unacceptable character"),
        "object": (b"a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        "list as a key": (b"? [1, 2]\n: 3", "unhashable key"),
        "too deep": (b"[" * 5000, "recursion"),
        "too many digits": (b"a: " + b"1" * 5000, "digits"),
    },
)
def test_a_file_that_is_no_mapping_is_rejected(content: bytes | None, why: str, tmp_path: Path) -> None:
    """The file is named, and the line where there is one."""
    if content is not None:
        (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(ImagicError, match=rf"run\.yaml.*{why}"):
        read_yaml(tmp_path / "run.yaml")


@each(
    "text, got, expected",
    [
        ("seed: true", "seed = True", "a number"),
        ("tune: {steps: false}", "tune.steps = False", "a number"),
        ("tune: {alpha: true}", "tune.alpha = True", "a number"),
        ("resolution: true", "resolution = True", "a number"),
        ("seed:", "seed = None", "a whole number"),
        ("seed: .inf", "seed = inf", "a finite number"),
        ("tune:\n# rank: 8", "tune = None", "a mapping"),
        ("base: 2.1", "base = 2.1", "text, in quotes if it consists of digits"),
        ("revision: 123e456", "revision = inf", "text, in quotes if it consists of digits"),
        ('base: "\\ud800"', r"base = '\ud800'", "text of whole UTF-8 characters"),
        ("1: 2", "1 = 1", "a name, in quotes if it consists of digits"),
    ],
)
def test_a_value_of_another_type_is_rejected_by_name(text: str, got: str, expected: str, tmp_path: Path) -> None:
    """pydantic would read true as 1; and its words for Python are not those of a file."""
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ImagicError) as caught:
        validated(read_yaml(tmp_path / "run.yaml"))
    assert (caught.value.got, caught.value.expected) == (got, expected)
