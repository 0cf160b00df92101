"""Tags of TIFF files, BigTIFF files and EXIF, read without trusting their counts."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}  # bytes of each type
_CODES = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q"}  # of types that are whole numbers; 5 is a fraction of two
_MAX_ENTRIES = 2**16
BYTE_TYPES = (1, 2, 7)  # BYTE, ASCII and UNDEFINED, which Pillow keeps as bytes


@dataclass(frozen=True)
class Directory:
    """A directory of tags.

    Args:
        data: what the offsets refer to: a TIFF file, or EXIF from its byte order on.
        order: byte order, ``<`` or ``>``.
        big: whether this is BigTIFF.
        entries: type, count, and the bytes that hold the values or their offset, of each tag.
    """

    data: bytes = b""
    order: str = "<"
    big: bool = False
    entries: dict[int, tuple[int, int, bytes]] = field(default_factory=dict)

    def numbers(self, tag: int, most: int = 16) -> tuple[float, ...]:
        """The values of a tag; none if it is absent, has more values than ``most``, or holds no numbers of zero or more."""
        kind, count, inline = self.entries.get(tag, (0, 0, b""))
        if count > most or kind not in (*_CODES, 5):
            return ()
        size = _SIZES[kind] * count
        if size > len(inline):
            at = int.from_bytes(inline, "little" if self.order == "<" else "big")
            inline = self.data[at : at + size]
        if len(inline) < size:
            return ()
        if kind == 5:
            pairs = struct.iter_unpack(f"{self.order}II", inline[:size])
            return tuple(above / below if below else 0.0 for above, below in pairs)
        return struct.unpack(f"{self.order}{count}{_CODES[kind]}", inline[:size])

    def number(self, tag: int, default: float) -> float:
        """The first value of a tag."""
        return (*self.numbers(tag), default)[0]

    def text(self, tag: int) -> bytes:
        """The text of a tag that has at most four letters; empty if it has more or is absent."""
        kind, count, inline = self.entries.get(tag, (0, 0, b""))
        return inline[:count].rstrip(b"\0") if kind == 2 and count <= 4 else b""

    def directory(self, tag: int) -> Directory:
        """The directory that a tag refers to; empty if there is none."""
        return _directory(self.data, self.order, self.big, int(self.number(tag, 0)))


def first_directory(data: bytes) -> Directory:
    """The first directory of a TIFF file, or of EXIF with or without its marker; empty if there is none."""
    data = data.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(data[:2], "")
    if not order or len(data) < 16:
        return Directory()
    big = 43 in data[2:4]
    (at,) = struct.unpack_from(f"{order}Q" if big else f"{order}I", data, 8 if big else 4)
    return _directory(data, order, big, at)


def _directory(data: bytes, order: str, big: bool, at: int) -> Directory:
    head, entry = ("Q", "HHQ8s") if big else ("H", "HHI4s")
    start = at + struct.calcsize(f"={head}")
    if not 0 < at <= len(data) - (start - at):
        return Directory()
    (count,) = struct.unpack_from(order + head, data, at)
    if count > _MAX_ENTRIES:
        raise ValueError(f"it has {count} tags")
    size = struct.calcsize(f"={entry}")
    table = data[start : start + count * size]
    rows = struct.iter_unpack(order + entry, table[: len(table) // size * size])
    return Directory(data, order, big, {tag: (kind, number, value) for tag, kind, number, value in rows})
