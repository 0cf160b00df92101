"""Detection of the format of an image file by its first bytes."""

from __future__ import annotations

from PIL import features

from ...core.errors import ImagicError

REMEDY = "give a JPEG, PNG, WebP, AVIF, HEIC, TIFF, BMP or GIF file that other programs can open"
_MAGIC = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",  # BigTIFF
    b"MM\0+": "TIFF",
    b"P4": "PPM",
    b"P5": "PPM",
    b"P6": "PPM",
    b"Pf": "PPM",
}
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
_UNSUPPORTED = {
    b"\xff\x0a": "a JPEG XL image",
    b"\0\0\0\x0cJXL ": "a JPEG XL image",
    b"\0\0\0\x0cjP  ": "a JPEG 2000 image",
    b"\xff\x4f\xff\x51": "a JPEG 2000 image",
    b"II\xbc": "a JPEG XR image",
    b"v/1\x01": "an OpenEXR image of linear light",
    b"#?": "a Radiance HDR image of linear light",
    b"8BPS": "a Photoshop document",
    b"gimp xcf": "a GIMP document",
    b"%PDF": "a PDF document",
    b"%!PS": "a PostScript document",
    b"<svg": "an SVG drawing",
    b"qoif": "a QOI image",
    b"DDS ": "a DDS texture",
    b"\0\0\x01\0": "an icon",
    b"FUJIFILMCCD-RAW": "a camera raw file",
    b"IIRO": "a camera raw file",
    b"IIU\0": "a camera raw file",
    b"PK\x03\x04": "a ZIP archive",
    b"\x1aE\xdf\xa3": "a video",
}
_UNSUPPORTED_NETPBM: dict[bytes, str] = dict.fromkeys(
    (b"P1", b"P2", b"P3"), "a Netpbm image in plain text"
)  # its decoder can be made to run for hours
_UNSUPPORTED_NETPBM |= {b"PF": "a PFM image of linear light", b"P7": "a PAM image"}
_OTHER_BRANDS = {b"crx ": "a camera raw file", b"jxl ": "a JPEG XL image", b"jp2 ": "a JPEG 2000 image"}


def detect_format(head: bytes) -> str:
    """Detects the format, by its name in Pillow, from the first bytes of a file.

    Raises:
        ImagicError: the format is not supported.
    """
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    found = _of_brands(head) if head[4:8] == b"ftyp" else next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)
    if found:
        return found
    other = _unsupported(head)
    what = f"is {other}, not an image in a supported format" if other else "is not an image in a supported format"
    raise ImagicError(what, "an image file", REMEDY)


def _unsupported(head: bytes) -> str:
    """The name of a format that is not supported; empty if it is not known."""
    if head[4:12] in (b"ftypavif", b"ftypavis"):
        return "an AVIF image, for which Pillow is built without a decoder"
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide"):
        return _OTHER_BRANDS.get(head[8:12], "a video")
    if head[2:3].isspace() and head[:2] in _UNSUPPORTED_NETPBM:
        return _UNSUPPORTED_NETPBM[head[:2]]
    return next((name for magic, name in _UNSUPPORTED.items() if head.startswith(magic)), "")


def _of_brands(head: bytes) -> str | None:
    """The format of a file that starts with the box ``ftyp``."""
    box = head[8 : int.from_bytes(head[:4], "big")]
    brands = {box[at : at + 4] for at in range(0, len(box), 4)}
    if brands & {b"avif", b"avis"}:
        return "AVIF" if features.check("avif") else None
    return "HEIF" if brands & _HEIF_BRANDS else None
