"""Bytes of Adam's 8-bit states."""

from __future__ import annotations

_BLOCK = 256  # elements that share an fp32 scale
_SMALLEST = 4096  # smaller tensors have 32-bit states


def scales_8bit(size: int) -> int:
    """Number of fp32 scales in one state of bitsandbytes' Adam8bit.

    Args:
        size: number of elements of the parameter.

    Returns:
        One scale for every 256 elements; 0 for a parameter under 4,096 elements, whose states have 32 bits.
    """
    return 0 if size < _SMALLEST else -(-size // _BLOCK)


def states_8bit(size: int) -> int:
    """Bytes of the two states that bitsandbytes' Adam8bit holds for a parameter.

    Args:
        size: number of elements of the parameter.

    Returns:
        Two bytes an element and the scales of both states; 8 bytes an element where the states have 32 bits.
    """
    return 2 * (size + 4 * scales_8bit(size)) if scales_8bit(size) else 8 * size
