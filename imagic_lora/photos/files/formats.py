"""Detection of the format of an image file by its first bytes."""

from __future__ import annotations

from PIL import features

_MAGIC = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"P4": "PPM",  # P1 to P3 are plain text and left out: their decoder can be made to run for hours
    b"P5": "PPM",
    b"P6": "PPM",
    b"Pf": "PPM",
}
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}


def detect_format(head: bytes) -> str | None:
    """Detects the format from the first bytes of a file; None if it is not supported."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        box = head[8 : int.from_bytes(head[:4], "big")]
        brands = {box[at : at + 4] for at in range(0, len(box), 4)}
        if brands & {b"avif", b"avis"}:
            return "AVIF" if features.check("avif") else None
        return "HEIF" if brands & _HEIF_BRANDS else None
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)
