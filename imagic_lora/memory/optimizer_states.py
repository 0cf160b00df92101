"""Bytes of Adam's 8-bit states."""

from __future__ import annotations


def scales_8bit(size: int) -> int:
    """How many fp32 scales a state of Adam8bit has for a tensor: one for every 256 elements, none under 4,096, where it keeps 32 bits."""
    return 0 if size < 4096 else -(-size // 256)


def states_8bit(size: int) -> int:
    """Bytes of Adam8bit's two states for a tensor: a byte and a share of a scale each, or 32 bits."""
    return 2 * (size + 4 * scales_8bit(size)) if scales_8bit(size) else 8 * size
