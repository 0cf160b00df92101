"""Bytes of the states of an optimizer."""

from __future__ import annotations

from math import prod

_BLOCK = 256  # elements that share an fp32 scale
_FP32 = 4  # bytes
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


def state_bytes(optimizer: str, *shape: int) -> int:
    """Bytes of the states that an optimizer holds for a parameter.

    Args:
        optimizer: ``adam8bit``, ``adam`` or ``adafactor``.
        shape: of the parameter. Adafactor takes it as a matrix of its first dimension and all others, and holds a row and a column.
    """
    match optimizer:
        case "adam":
            return 2 * _FP32 * prod(shape)
        case "adafactor":
            return _FP32 * (shape[0] + prod(shape[1:]) if len(shape) > 1 else prod(shape))
        case _:
            return states_8bit(prod(shape))
