"""Boxes of AVIF files (ISO base media file format, ISO/IEC 14496-12 and 23008-12): properties of the primary image."""

from __future__ import annotations

import struct
from collections.abc import Iterator

_MAX_BOXES = 10_000
_MAX_ASSOCIATIONS = 2**16  # bytes


def primary_properties(data: bytes) -> list[tuple[bytes, bytes]]:
    """Type and content of every property of the primary image, in the file's order."""
    meta = _box(data, b"meta")[4:]
    pitm, iprp = _box(meta, b"pitm"), _box(meta, b"iprp")
    if not iprp or len(pitm) < 6:
        return []
    primary = int.from_bytes(pitm[4:8] if pitm[0] else pitm[4:6], "big")
    properties = list(_boxes(_box(iprp, b"ipco")))
    indices = [index for kind, body in _boxes(iprp) if kind == b"ipma" for item, index in _associations(body) if item == primary]
    return [properties[index - 1] for index in indices if 0 < index <= len(properties)]


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Type and content of each box; a box that is cut off ends them."""
    at = 0
    for _ in range(_MAX_BOXES):
        if at + 8 > len(data):
            return
        size, kind = struct.unpack_from(">I4s", data, at)
        head = 8
        if size == 1 and at + 16 <= len(data):
            (size,), head = struct.unpack_from(">Q", data, at + 8), 16
        end = at + size if size else len(data)
        if not at + head <= end <= len(data):
            return
        yield kind, data[at + head : end]
        at = end


def _box(data: bytes, kind: bytes) -> bytes:
    """The content of the first box of a type; empty if there is none."""
    return next((body for found, body in _boxes(data) if found == kind), b"")


def _associations(ipma: bytes) -> Iterator[tuple[int, int]]:
    """Pairs of an item and the index, from 1 on, of one of its properties."""
    ipma = ipma[:_MAX_ASSOCIATIONS]
    if len(ipma) < 8:
        return
    item_size, index_size = 4 if ipma[0] else 2, 2 if ipma[3] & 1 else 1
    at = 8
    while at + item_size < len(ipma):
        item, count = int.from_bytes(ipma[at : at + item_size], "big"), ipma[at + item_size]
        at += item_size + 1
        for _ in range(count):
            yield item, int.from_bytes(ipma[at : at + index_size], "big") & (0x7FFF if index_size == 2 else 0x7F)
            at += index_size
