"""Where jobs run: one worker for each card of this machine, or one worker on a machine with one card or none. It imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..core.machine import visible_cards


@dataclass(frozen=True)
class Place:
    """Where one worker runs.

    Args:
        id: the card, in letters, digits and ``-``: it names the files of the worker and stays the same over restarts of the server.
        name: the card, for people.
        model: of the card, which has the same memory as others of its model.
        environment: variables with which the worker sees this card alone; empty where it is the only one.
    """

    id: str
    name: str
    model: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


ANYWHERE = Place("any", "this machine")
"""The place without a card, or with cards that the driver does not list: its worker uses what PyTorch finds, so it runs alone."""


def places() -> list[Place]:
    """Returns a place for each card that this process may use; only :data:`ANYWHERE` without one."""
    found = []
    cards = visible_cards()
    for card, environment in cards:
        ((_, value),) = environment.items()
        name = re.sub(r"[^A-Za-z0-9-]", "-", value if value.startswith("GPU-") else f"card-{value}")
        found.append(Place(name, f"card {card.index}, {card.name}", card.name, environment if len(cards) > 1 else {}))
    return found or [ANYWHERE]
