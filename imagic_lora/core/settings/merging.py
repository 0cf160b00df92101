"""Nested mappings of settings: merging them, and naming their differences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merges nested mappings. Later layers override earlier ones key by key; the layers are not modified."""
    result: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            lower = result.get(name)
            result[name] = merged(lower, value) if isinstance(lower, Mapping) and isinstance(value, Mapping) else value
    return result


def differences(was: Mapping[str, Any], now: Mapping[str, Any], group: str = "") -> list[str]:
    """Returns one phrase for each value that differs between ``was`` and ``now`` or exists in only one of them.

    Args:
        was: nested mapping of the old values.
        now: nested mapping of the new values.
        group: prefix of the names, used for nested mappings.
    """
    phrases: list[str] = []
    for name in {**was, **now}:
        old, new = was.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            phrases += differences(old, new, f"{group}{name}.")
        elif old != new or (name in was) != (name in now):
            before, after = (repr(values[name]) if name in values else "missing" for values in (was, now))
            phrases.append(f"{group}{name} was {before}, is {after}")
    return phrases
