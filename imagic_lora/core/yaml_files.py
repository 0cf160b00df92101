"""YAML files without two readings: a value that YAML 1.1 and YAML 1.2 read differently is rejected, and so is a duplicate key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from .errors import ImagicError

_TAG = "tag:yaml.org,2002:"
_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
_MAX_BYTES = 2**20
_MAX_MERGED = 10_000  # keys that merge keys add; each can double them, so that a few lines fill the memory
_ALIKE = {  # the plain text that both versions read as this type; YAML 1.1 also has yes, 010 (8), 1:30 (90), 1_000 and dates
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+",
    "float": rf"{_FLOAT}|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    "timestamp": r"(?!)",
}


class _Loader(yaml.SafeLoader):
    """Reads plain data, never objects. The message of every error gives the line."""

    _merged = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Reads the next node and checks it. ``index`` is the key of the node in a mapping, None for a key itself."""
        node = super().compose_node(parent, index)
        if isinstance(node, yaml.ScalarNode):  # a tag such as !!int makes a number of quoted text too
            self._check_scalar(node, f"{index.value}: {node.value}" if isinstance(index, yaml.ScalarNode) else node.value)
        if isinstance(node, yaml.MappingNode):
            self._check_keys(node)
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Replaces the merge keys of a mapping by the keys of the merged mappings, within bounds."""
        before = len(node.value)
        super().flatten_mapping(node)
        self._merged += max(0, len(node.value) - before)
        if self._merged > _MAX_MERGED:
            got = f"{self.name}, line {node.start_mark.line + 1}: merge keys (<<) add more than {_MAX_MERGED:,} keys"
            raise ImagicError(got, "merge keys that add few keys", "write the keys out")

    def _check_scalar(self, node: yaml.ScalarNode, text: str) -> None:
        alike = _ALIKE.get(node.tag.removeprefix(_TAG))
        if alike and not re.fullmatch(alike, node.value):
            got = f"{self.name}, line {node.start_mark.line + 1}: {text!r} is not the same in YAML 1.1 and YAML 1.2"
            raise ImagicError(got, "decimal numbers, true or false", "write it as one of these, or in quotes if it is text")

    def _check_keys(self, node: yaml.MappingNode) -> None:
        first: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            if key.value in first:
                got = f"{self.name}, line {line}: the key {key.value!r} is in line {first[key.value]} already"
                raise ImagicError(got, "each key once", "remove one of them")
            first[key.value] = line


_Loader.add_implicit_resolver(f"{_TAG}float", re.compile(rf"(?:{_FLOAT})\Z"), list("-+.0123456789"))  # 1e-4 is text in YAML 1.1


def read_yaml(path: Path, example: str = "configs/") -> dict[str, Any]:
    """Reads the mapping of a YAML file; an empty file gives an empty one.

    Args:
        path: the file, in UTF-8 or UTF-16.
        example: where the user finds a valid file, for the error message.

    Raises:
        ImagicError: the file cannot be read, is not YAML, or is not one mapping; a key occurs twice; YAML 1.1 and 1.2 differ on a value.
    """
    try:
        if path.exists() and not path.is_dir() and (not path.is_file() or path.stat().st_size > _MAX_BYTES):
            raise ValueError(f"not a file of at most {_MAX_BYTES:,} bytes")  # reading a pipe may block forever
        with path.open("rb") as file:
            content = yaml.load(file, _Loader)  # a SafeLoader
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ImagicError(f"{path} cannot be read as YAML: {_reason(error)}", "a YAML file", f"see {example} for an example") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ImagicError(f"{path} holds a {type(content).__name__}", "a mapping", f"see {example} for an example")
    return content


def _reason(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"line {error.problem_mark.line + 1}: {', '.join(filter(None, (error.context, error.problem)))}"
    return getattr(error, "strerror", None) or " ".join(str(error).split())
