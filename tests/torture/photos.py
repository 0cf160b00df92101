"""Malformed and unusual images of every format: read correctly, or rejected; within limits of time and memory, without output."""

from __future__ import annotations

import io
import multiprocessing
import os
import random
import re
import resource
import struct
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageCms, features

from imagic_lora.core.errors import ImagicError
from imagic_lora.photos.canvas import to_canvas
from imagic_lora.photos.files.opening import MAX_PIXELS
from imagic_lora.photos.reading import read_metadata, read_photo

try:
    import pillow_heif
except ImportError:
    pillow_heif = None

SECONDS = 5  # of processor time, for one case
HANGS = 60  # seconds after which a case is given up
MEMORY = 320 * 2**20  # bytes that reading a case may take
MEMORY_AT_THE_CAP = 1_200 * 2**20
T = TypeVar("T")
ORIENTATION, SRGB = 0x0112, ImageCms.createProfile("sRGB")
_JPEG: dict[str, Any] = {"quality": 95, "subsampling": 0}
LOSSY = {"JPEG": _JPEG, "MPO": _JPEG, "AVIF": {"quality": 95, "subsampling": "4:4:4"}, "HEIF": {"quality": 95, "chroma": 444}}
SUFFIXES = ["", ".jpg", ".png", ".gif", ".bmp", ".txt", ".heic", ".avif", ".webp", ".tiff", ".py", ".eps", ".svg", ".TGA"]
BOXED = ["AVIF"] * bool(features.check("avif")) + ["HEIF"] * (pillow_heif is not None)  # what comes in boxes, and can be read here


@dataclass(frozen=True)
class Case:
    """A file, and what is to come of it.

    Args:
        what: it is.
        data: of the file.
        pixels: ``[H, W, 3]`` as they should be read; None where nobody knows.
        far: how far the pixels may be from these, on average.
        refused: whether an error is expected; None if both outcomes are accepted.
        name: of the file.
        place: makes, in a folder, what is no plain file, and gives its path.
        memory: bytes that reading it may take.
    """

    what: str
    data: bytes = b""
    pixels: np.ndarray | None = None
    far: float = 1.0
    refused: bool | None = None
    name: str = "photo.jpg"
    place: Callable[[Path], Path] | None = None
    memory: int = MEMORY


class Chance(random.Random):
    """What is random in a case, and the turn of its kind, of which the cases that have names go by."""

    def __init__(self, seed: str, turn: int) -> None:
        super().__init__(seed)
        self.turn = turn

    def next_of(self, several: Sequence[T]) -> T:
        return several[self.turn % len(several)]


Kind = Callable[[Chance], Case]
Makes = dict[str, Callable[[], bytes]]
Tags = Mapping[int, tuple[int, Sequence[int]]]  # of a TIFF: type and values
KINDS: list[Kind] = []


def torture(cases: int, seed: int, folder: Path) -> Iterator[str]:
    """Kinds of cases in turn, each of its own chance; done in a process of its own, which may crash or hang."""
    spawn, at = multiprocessing.get_context("spawn"), 0
    while at < cases:
        ours, theirs = spawn.Pipe(duplex=False)
        worker = spawn.Process(target=_work, args=(theirs, range(at, cases), seed, folder), daemon=True)
        worker.start()
        theirs.close()
        what = "the start of Python"
        try:
            while at < cases:
                if not ours.poll(HANGS):
                    raise TimeoutError("hangs")
                done, text = ours.recv()
                if done:
                    yield f"{what}: {text}" if text else ""
                    at += 1
                else:
                    what = f"{at} {text}"
        except (EOFError, TimeoutError) as error:
            worker.kill()
            worker.join()
            yield f"{what}: {error or f'ended Python with code {worker.exitcode}'}"
            at += 1
        ours.close()
        worker.join()


def _work(pipe: Connection, indices: range, seed: int, folder: Path) -> None:
    """Sends, for each case, ``(False, what it is)`` and then ``(True, what went wrong)``."""
    folder.mkdir(parents=True, exist_ok=True)
    said = os.open(folder / "said", os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(said, 2)  # decoders in C warn there
    _run(Case("a picture", _saved(Image.new("RGB", (9, 9)), "PNG")), folder)  # so that imports are on nobody's account
    for index in indices:
        case = KINDS[index % len(KINDS)](Chance(f"{seed} {index}", seed + index // len(KINDS)))
        pipe.send((False, case.what))
        os.ftruncate(said, 0)
        wrong = _run(case, folder / str(index))
        if os.fstat(said).st_size and case.data[:2] not in (b"II", b"MM"):  # libtiff says on stderr what it finds amiss
            wrong = f"{wrong}; wrote to stderr: {os.pread(said, 200, 0)!r}"
        pipe.send((True, wrong))
    pipe.close()


def _run(case: Case, folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    if case.place:
        path = case.place(folder)
    else:
        path = folder / case.name
        path.write_bytes(case.data)
    before, start = _memory(reset=True), time.process_time()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            wrong = _answer(case, path)
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
    took, grown = time.process_time() - start, _memory() - before
    if took > SECONDS:
        wrong += f"; took {took:.1f} s"
    if grown > case.memory:
        wrong += f"; took {grown >> 20} MiB"
    if warned:
        wrong += f"; warned {[str(one.message) for one in warned]}"
    if not case.place:
        path.unlink()
    return wrong.strip("; ")


def _answer(case: Case, path: Path) -> str:
    try:
        image = read_photo(path).image
        canvas = to_canvas(image, 64, 8).pixels
    except ImagicError as error:
        return f"rejected: {error}" if case.pixels is not None or case.refused is False else ""
    else:
        if case.refused:
            return f"read as {image.size}"
        if image.mode != "RGB" or canvas.abs().max() > 1:
            return "not a photo"
        if case.pixels is not None:
            found = np.asarray(image).astype(float)
            if found.shape != case.pixels.shape:
                return f"is {found.shape}, should be {case.pixels.shape}"
            if (away := np.abs(found - case.pixels).mean()) > case.far:
                return f"is {away:.1f} from what it should be"
        return ""
    finally:
        with suppress(ImagicError):
            read_metadata(path)


def _memory(reset: bool = False) -> int:
    """The most that this process has held, in bytes; since the last reset where the system can do that."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # pyright: ignore
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def kind(make: Kind) -> Kind:
    KINDS.append(make)
    return make


# Pixels, and files made of them


def _noise(chance: Chance, *shape: int) -> np.ndarray:
    return np.random.default_rng(chance.randrange(2**32)).integers(0, 256, shape, dtype=np.uint8)


def _smooth(chance: Chance, width: int, height: int) -> np.ndarray:
    """What survives lossy coding."""
    return np.asarray(Image.fromarray(_noise(chance, 3, 3, 3)).resize((width, height), Image.Resampling.BICUBIC))


def _size(chance: Chance) -> tuple[int, int]:
    return chance.randint(1, 70), chance.randint(1, 70)


def _three(gray: np.ndarray) -> np.ndarray:
    return np.repeat(gray[..., None], 3, axis=-1)


def _on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    opacity = alpha[..., None] / 255
    return colours * opacity + 255 * (1 - opacity)


def _curve(light: np.ndarray) -> np.ndarray:
    """The curve of sRGB, from [0, 1] to [0, 255]."""
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * np.maximum(light, 1e-9) ** (1 / 2.4) - 0.055)


def _of_lightness(lightness: np.ndarray) -> np.ndarray:
    """The sRGB gray of a CIE L* in [0, 100]."""
    root = (lightness + 16) / 116
    return _curve(np.where(root > 6 / 29, root**3, (root - 4 / 29) * 3 * (6 / 29) ** 2))


def _saved(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    if format == "HEIF":  # from_pillow() would turn it
        heif = pillow_heif.from_bytes("RGB", image.size, image.tobytes())  # pyright: ignore
        heif.info["exif"] = image.info.get("exif")
        heif.save(file, **options)
    else:
        image.save(file, format, **options)
    return file.getvalue()


def _chunk(name: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def _png(
    width: int, height: int, depth: int, colour: int, rows: Sequence[bytes], before: bytes = b"", interlaced: int = 0, after: bytes = b""
) -> bytes:
    """A PNG of packed rows, with chunks before and after the pixels."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced))
    pixels = _chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows), 1))
    return b"\x89PNG\r\n\x1a\n" + header + before + pixels + after + _chunk(b"IEND")


def _directory(tags: Tags, order: str, at: int, following: int = 0) -> bytes:
    """A TIFF directory to stand at a place: ``{tag: (type, values)}``; the types are 1, 3, 4, 7 and 5, whose values come in pairs."""
    table, outside = struct.pack(order + "H", len(tags)), b""
    place = at + 2 + 12 * len(tags) + 4
    for tag, (code, values) in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(values)}{ {1: 'B', 3: 'H', 4: 'I', 5: 'I', 7: 'B'}[code] }", *values)
        count = len(values) // 2 if code == 5 else len(values)
        if len(packed) > 4:
            packed, outside = struct.pack(order + "I", place + len(outside)), outside + packed
        table += struct.pack(order + "HHI", tag, code, count) + packed.ljust(4, b"\0")
    return table + struct.pack(order + "I", following) + outside


def _tiff(width: int, height: int, tags: Tags, pixels: bytes, order: str = "<", following: int = 0) -> bytes:
    """A TIFF of one strip, or of strips or tiles at the places among the pixels that its tags say."""
    strip = {} if 324 in tags else {273: (4, [0]), 278: (4, [height]), 279: (4, [len(pixels)])}
    every = {256: (4, [width]), 257: (4, [height]), 259: (3, [1]), **strip, **tags}
    start = 8 + len(_directory(every, order, 8))
    for tag in {273, 324} & set(every):
        code, places = every[tag]
        every[tag] = (4, [min(start + place, 2**32 - 1) for place in places]) if code in (3, 4) else (code, places)
    return (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8) + _directory(every, order, 8, following) + pixels


def _exif(orientation: int, more: Tags | None = None, order: str = "<", following: int = 0) -> bytes:
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    return head + _directory({ORIENTATION: (3, [orientation]), **(more or {})}, order, 8, following)


def _stored(upright: np.ndarray, orientation: int) -> np.ndarray:
    """How a camera held so stores what should be seen upright, after the EXIF standard."""
    turned = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1), 6: np.rot90, 7: lambda a: a[::-1, ::-1].swapaxes(0, 1), 8: lambda a: np.rot90(a, -1),
    }  # fmt: skip
    return np.ascontiguousarray(turned[orientation](upright))


def _segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def _with_segments(jpeg: bytes, segments: bytes) -> bytes:
    return jpeg[:2] + segments + jpeg[2:]


def _box(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", len(body) + 8, name) + body


def _profile(space: bytes, tags: dict[bytes, bytes], connection: bytes = b"XYZ ", kind: bytes = b"mntr", version: int = 4) -> bytes:
    """An ICC profile, with D50 for its white."""
    white = struct.pack(">III", 0xF6D6, 0x10000, 0xD32D)
    tags = {b"wtpt": b"XYZ \0\0\0\0" + white} | tags
    start, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        table += struct.pack(">4sII", name, start + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    head = struct.pack(">I4sI4s4s4s12x4s28x12s", start + len(body), b"none", version << 24, kind, space, connection, b"acsp", white)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def _of_inks() -> bytes:
    """A CMYK profile in which only black darkens, and evenly in CIE L*."""
    nodes = bytes(value for node in range(16) for value in (0 if node % 2 else 255, 128, 128))
    straight = bytes(range(256))
    table = b"mft1\0\0\0\0\4\3\2\0" + struct.pack(">9i", *np.eye(3, dtype=int).ravel() * 65536) + straight * 4 + nodes + straight * 3
    return _profile(b"CMYK", {b"A2B0": table}, b"Lab ", b"prtr", 2)


def _endless(count: int) -> bytes:
    """A profile that takes littleCMS hours: as many curves, one after the other, before each node of a table."""
    curve = b"curf\0\0\0\0\0\1\0\0parf\0\0\0\0\0\0\0\0" + struct.pack(">4f", 1.1, 1, 0, 0)
    curves = b"cvst\0\0\0\0\0\3\0\3" + struct.pack(">II", 36, len(curve)) * 3 + curve
    chain = b"mpet\0\0\0\0" + struct.pack(">HHI", 3, 3, count) + struct.pack(">II", 16 + 8 * count, len(curves)) * count + curves
    return _profile(b"RGB ", {b"D2B0": chain})


def _scans(width: int, height: int, count: int) -> bytes:
    """A gray progressive JPEG that goes over all its blocks as many times."""
    blocks = -(-width // 8) * -(-height // 8)
    tables = _segment(0xDB, b"\0" + b"\1" * 64) + _segment(0xC2, struct.pack(">BHHB", 8, height, width, 1) + b"\1\x11\0")
    tables += _segment(0xC4, b"\0" + b"\1" + b"\0" * 15 + b"\0") + _segment(0xC4, b"\x10" + b"\0\1" + b"\0" * 14 + b"\xe0")
    bits = "".join(f"00{max(min(32767, blocks - at), 16384) - 16384:014b}" for at in range(0, blocks, 32767))
    empty = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    first = _segment(0xDA, b"\1\1\0\0\0\0") + b"\0" * -(-blocks // 8)
    return b"\xff\xd8" + tables + first + (_segment(0xDA, b"\1\1\0\1\x3f\0") + empty) * count + b"\xff\xd9"


def _any(chance: Chance, size: tuple[int, int] | None = None) -> tuple[str, bytes, np.ndarray, float]:
    """A good file of any format, the pixels in it, and how far they may be from that."""
    width, height = size or _size(chance)
    lossless = {"PNG": {}, "BMP": {}, "TIFF": {}, "PPM": {}, "WEBP": {"lossless": True}}
    name = chance.choice([*lossless, "JPEG", "MPO", "GIF", *BOXED])
    if name in lossless:
        pixels = _noise(chance, height, width, 3)
        return name, _saved(Image.fromarray(pixels), name, **lossless[name]), pixels, 0
    if name == "GIF":
        gray = _noise(chance, height, width)
        return name, _saved(Image.fromarray(gray), name), _three(gray), 0
    pixels = _smooth(chance, width, height)
    return name, _saved(Image.fromarray(pixels), name, **LOSSY[name]), pixels, 6


def _one_of(chance: Chance, makes: Makes, **options: Any) -> Case:
    what = chance.next_of(list(makes))
    return Case(what, makes[what](), **options)


# Unusual, to be read correctly


@kind
def good(chance: Chance) -> Case:
    format, data, pixels, far = _any(chance)
    return Case(f"a good {format}", data, pixels, far)


@kind
def other_suffix(chance: Chance) -> Case:
    format, data, pixels, far = _any(chance)
    name = f"photo{chance.choice(SUFFIXES)}"
    return Case(f"{format} named {name}", data, pixels, far, name=name)


@kind
def odd_name(chance: Chance) -> Case:
    format, data, pixels, far = _any(chance)
    odd = ["\n", "\x1b[31m", "\udcff\udc80", "狗 🐕", "--help", "'\"", "%s{0}", " ", "x" * 200, "‮gpj", "\t\r", "[red]", "~", "$(id)", "\\"]
    name = chance.choice(odd) + ".jpg"
    return Case(f"{format} named {name!a}", data, pixels, far, name=name)


@kind
def odd_name_of_a_bad_file(chance: Chance) -> Case:
    name = chance.choice(["\n", "\x1b[31m", "\udcff\udc80", "狗 🐕", "[red]", "{}", "%d"]) + ".jpg"
    return Case(f"text named {name!a}", b"a photo of a dog", refused=True, name=name)


@kind
def thin(chance: Chance) -> Case:
    long = chance.choice([1, 2, 1000, 65_000, 100_000])
    width, height = chance.choice([(1, long), (long, 1), (2, long), (long, 3)])
    pixels = _noise(chance, height, width, 3)
    format = chance.choice(["PNG", "TIFF", "BMP", "PPM"])
    return Case(f"{width}x{height} {format}", _saved(Image.fromarray(pixels), format), pixels, 0)


@kind
def modes(chance: Chance) -> Case:
    """Every mode that a format can hold."""
    width, height = _size(chance)
    gray, colours, alpha = _noise(chance, height, width), _noise(chance, height, width, 3), _noise(chance, height, width)
    bits, palette = gray > 127, _noise(chance, 256, 3)
    paletted = Image.frombytes("P", (width, height), gray.tobytes())
    paletted.putpalette(palette.tobytes())
    deep = gray.astype(np.uint16) * 257
    mode, formats, image, pixels = chance.choice(
        [
            ("L", "PNG BMP TIFF PPM GIF", Image.fromarray(gray), _three(gray)),
            ("1", "PNG BMP TIFF PPM", Image.fromarray(bits), _three(bits * 255)),
            ("P", "PNG BMP TIFF GIF", paletted, palette[gray]),
            ("RGBA", "PNG WEBP TIFF", Image.fromarray(np.dstack([colours, alpha])), _on_white(colours, alpha)),
            ("LA", "PNG TIFF", Image.fromarray(np.dstack([gray, alpha])), _on_white(_three(gray), alpha)),
            ("I;16", "PNG TIFF PPM", Image.frombytes("I;16", (width, height), deep.astype("<u2").tobytes()), _three(gray)),
            ("I;16B", "TIFF", Image.frombytes("I;16B", (width, height), deep.astype(">u2").tobytes()), _three(gray)),
            ("F", "TIFF PPM", Image.fromarray(gray.astype(np.float32) / 255 + 1e-4), _three(gray)),
            ("I", "TIFF", Image.fromarray(np.maximum(deep.astype(np.int32), 256)), _three(gray)),
        ]
    )
    format = chance.choice(formats.split())
    options: dict[str, Any] = {"lossless": True, "exact": True} if format == "WEBP" else {}
    if format == "TIFF":
        options["compression"] = chance.choice([None, "tiff_lzw", "tiff_adobe_deflate", "packbits"] + ["group4"] * (mode == "1"))
    return Case(f"{mode} in {format} {options}", _saved(image, format, **options), pixels)


@kind
def inks(chance: Chance) -> Case:
    """CMYK as a press sees it without a profile, and CMYK with one."""
    width, height = _size(chance)
    values = _noise(chance, height, width, 4)
    image = Image.frombytes("CMYK", (width, height), values.tobytes())
    if chance.random() < 0.5:
        pixels = (255 - values[..., :3].astype(float)) * (255 - values[..., 3:].astype(float)) / 255
        return Case("CMYK without a profile", _saved(image, "TIFF"), pixels)
    pixels = _three(_of_lightness(100 - values[..., 3] / 2.55))
    if chance.random() < 0.5:
        return Case("CMYK with a profile", _saved(image, "TIFF", icc_profile=_of_inks()), pixels)
    dark = Image.fromarray(np.asarray(Image.fromarray(values[:1, :1, 3]).resize((width, height))))
    image = Image.merge("CMYK", [dark] * 4)
    pixels = _three(_of_lightness(100 - np.asarray(dark) / 2.55))
    return Case("CMYK in JPEG with a profile", _saved(image, "JPEG", quality=100, icc_profile=_of_inks()), pixels, 3)


@kind
def lab(chance: Chance) -> Case:
    width, height = _size(chance)
    lightness = _noise(chance, height, width)
    image = Image.merge("LAB", [Image.fromarray(lightness), *[Image.new("L", (width, height), 128)] * 2])
    return Case("LAB", _saved(image, "TIFF"), _three(_of_lightness(lightness / 2.55)), 1.5)


@kind
def deep_png(chance: Chance) -> Case:
    """Every depth and colour type, row by row, and Adam7."""
    width, height = _size(chance)
    colour, depth = chance.choice([(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (2, 8), (2, 16), (4, 8), (4, 16), (6, 8), (6, 16)])
    channels, most = {0: 1, 2: 3, 4: 2, 6: 4}[colour], 2**depth - 1
    values = np.random.default_rng(chance.randrange(2**32)).integers(0, most + 1, (height, width, channels))

    def packed(part: np.ndarray) -> list[bytes]:
        if depth >= 8:
            return [row.astype(f">u{depth // 8}").tobytes() for row in part]
        bits = np.unpackbits(part[..., 0].astype(np.uint8)[..., None], axis=-1)[..., 8 - depth :]
        return [np.packbits(row).tobytes() for row in bits.reshape(part.shape[0], -1)]

    interlaced = chance.random() < 0.5
    adam7 = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    starts = adam7 if interlaced else [(0, 0, 1, 1)]
    parts = [values[top::down, left::right] for top, left, down, right in starts]
    data = _png(width, height, depth, colour, [row for part in parts if part.size for row in packed(part)], interlaced=int(interlaced))
    scaled = values * 255 / most
    pixels = scaled[..., :3] if colour in (2, 6) else _three(scaled[..., 0])
    if colour in (4, 6):
        pixels = _on_white(pixels, scaled[..., -1])
    return Case(f"PNG of type {colour}, {depth} bits, interlaced {interlaced}", data, pixels)


@kind
def transparent_colour(chance: Chance) -> Case:
    """tRNS: one gray, one colour, or an opacity for each entry of the palette."""
    width, height = _size(chance)
    gray, colours, palette, alpha = (_noise(chance, *shape) for shape in ((height, width), (height, width, 3), (256, 3), (256,)))
    match chance.turn % 5:
        case 0:
            chunk = _chunk(b"tRNS", struct.pack(">H", int(gray[0, 0])))
            data = _png(width, height, 8, 0, [row.tobytes() for row in gray], chunk)
            return Case("a transparent gray", data, _on_white(_three(gray), np.where(gray == gray[0, 0], 0, 255)))
        case 1:
            clear = (colours == colours[0, 0]).all(-1)
            chunk = _chunk(b"tRNS", struct.pack(">3H", *colours[0, 0].tolist()))
            data = _png(width, height, 8, 2, [row.tobytes() for row in colours], chunk)
            return Case("a transparent colour", data, _on_white(colours, np.where(clear, 0, 255)))
        case 2:
            chunks = _chunk(b"PLTE", palette.tobytes()) + _chunk(b"tRNS", alpha.tobytes())
            data = _png(width, height, 8, 3, [row.tobytes() for row in gray], chunks)
            return Case("a transparent palette", data, _on_white(palette[gray], alpha[gray]))
        case 3:
            rows = [row.astype(">u2").tobytes() for row in colours]
            return Case("a transparent colour of 16 bits", _png(width, height, 16, 2, rows, _chunk(b"tRNS", bytes(6))), refused=True)
        case _:
            deep = (gray.astype(int) * 257).astype(">u2")
            chunk = _chunk(b"tRNS", struct.pack(">H", int(deep[0, 0])))
            data = _png(width, height, 16, 0, [row.tobytes() for row in deep], chunk)
            return Case("a transparent gray of 16 bits", data, _on_white(_three(gray), np.where(gray == gray[0, 0], 0, 255)))


@kind
def orientations(chance: Chance) -> Case:
    """All eight in every format that has them; the boxes of AVIF and HEIC turn by themselves."""
    orientation, (width, height) = chance.randint(1, 8), (chance.randint(16, 60), chance.randint(16, 60))
    upright = _smooth(chance, width, height)
    image, exif = Image.fromarray(_stored(upright, orientation)), Image.Exif()
    exif[ORIENTATION] = orientation
    format = chance.choice(["JPEG", "PNG", "WEBP", "TIFF", "MPO", *BOXED])
    options = {} if format in ("PNG", "TIFF") else dict(LOSSY.get(format, {"quality": 95}))
    if format == "HEIF":
        image.info["exif"] = exif.tobytes()
    elif format == "TIFF":
        options["tiffinfo"] = {ORIENTATION: orientation}
        options["compression"] = chance.choice([None, "tiff_lzw"])
    else:
        options["exif"] = exif
    return Case(f"{format} of orientation {orientation}", _saved(image, format, **options), upright, 6)


@kind
def odd_exif(chance: Chance) -> Case:
    """Directories that point at themselves, that hold thousands of tags, in either byte order; the orientation is there to be found."""
    orientation, order = chance.randint(1, 8), chance.choice("<>")
    upright = _smooth(chance, chance.randint(16, 60), chance.randint(16, 60))
    more, following = chance.next_of(
        [
            ({}, 8),
            ({34665: (4, [8]), 34853: (4, [8]), 40965: (4, [8])}, 8),
            ({tag: (3, [tag % 7]) for tag in range(40_000, 44_000)}, 0),
            ({tag: (5, [1, 0] * 30) for tag in range(40_000, 40_150)}, 2**31),
            ({37500: (7, [0xFF] * 40_000), 282: (5, [0, 0]), 283: (5, [1, 0]), 296: (3, [3])}, 0),
            ({34665: (4, [2**32 - 1]), 513: (4, [0]), 514: (4, [2**32 - 1])}, 2**32 - 1),
            ({271: (3, [1] * 9), 305: (4, [5])}, 0),
        ]
    )
    exif = _exif(orientation, more, order, following)
    image, what = Image.fromarray(_stored(upright, orientation)), f"orientation {orientation} among {len(more)} odd tags"
    if chance.random() < 0.5:
        return Case(f"JPEG, {what}", _with_segments(_saved(image, "JPEG", quality=95), _segment(0xE1, b"Exif\0\0" + exif)), upright, 6)
    rows = [row.tobytes() for row in np.asarray(image)]
    return Case(f"PNG, {what}", _png(*image.size, 8, 2, rows, _chunk(b"eXIf", exif)), upright, 0)


@kind
def broken_exif(chance: Chance) -> Case:
    """Says nothing, so the picture is upright."""
    pixels = _smooth(chance, chance.randint(16, 60), chance.randint(16, 60))
    heads = [b"", b"II", b"MM\0*\xff\xff\xff\xff", b"II*\0\0\0\0\0", b"XX*\0\x08\0\0\0", chance.randbytes(99)]
    junk = chance.choice(heads)
    jpeg = _saved(Image.fromarray(pixels), "JPEG", quality=95, subsampling=0)
    data = _with_segments(jpeg, _segment(0xE1, b"Exif\0\0" + junk))
    return Case(f"EXIF of {junk[:16]!r}", data, pixels, 6)


@kind
def profiles(chance: Chance) -> Case:
    """Those that cannot be read, or that would take hours, are passed over."""
    pixels = _noise(chance, *_size(chance), 3)
    good = ImageCms.ImageCmsProfile(SRGB).tobytes()
    what, profile = chance.next_of(
        [
            ("of noise", chance.randbytes(500)),
            ("cut off", good[: chance.randrange(1, 400)]),
            ("of a megabyte", b"\0" * 1_000_000),
            ("of sRGB with a long tail", good + chance.randbytes(900_000)),
            ("of inks", _of_inks()),
            ("that is endless", _endless(chance.choice([1000, 10_000, 80_000]))),
            ("that claims to be huge", struct.pack(">I", 2**31) + good[4:]),
            ("of LAB", ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()),
        ]
    )
    format = chance.choice(["PNG", "TIFF", "WEBP"])
    options: dict[str, Any] = {"lossless": True} if format == "WEBP" else {}
    return Case(f"{format}, a profile {what}", _saved(Image.fromarray(pixels), format, icc_profile=profile, **options), pixels, 1)


@kind
def declared_colours(chance: Chance) -> Case:
    """Linear light, stated in every way, some of them twice."""
    values = _noise(chance, *_size(chance), 3)
    rows, linear = [row.tobytes() for row in values], _chunk(b"gAMA", struct.pack(">I", 100_000))
    cicp, tags = _chunk(b"cICP", bytes([1, 8, 0, 1])), {258: (3, [8] * 3), 262: (3, [2]), 277: (3, [3])}
    makes: Makes = {
        "gAMA": lambda: _png(*values.shape[1::-1], 8, 2, rows, linear),
        "cICP": lambda: _png(*values.shape[1::-1], 8, 2, rows, cicp),
        "cICP before sRGB": lambda: _png(*values.shape[1::-1], 8, 2, rows, cicp + _chunk(b"sRGB", b"\0")),
        "TransferFunction": lambda: _tiff(*values.shape[1::-1], tags | {301: (3, [value * 257 for value in range(256)])}, values.tobytes()),
    }
    return _one_of(chance, makes, pixels=_curve(values / 255))


@kind
def hostile_declarations(chance: Chance) -> Case:
    """Counts and offsets beyond the file, in all that declares colours."""
    image, wild = Image.new("RGB", (16, 16)), struct.pack(">I", chance.choice([2**31, 2**32 - 1, 2**24]))
    junk = chance.randbytes(chance.choice([0, 3, 4, 32, 40]))
    exif = _exif(1, {34665: (4, [chance.choice([8, 26, 2**32 - 1])]), 40965: (4, [8])})
    profile = bytearray(ImageCms.ImageCmsProfile(SRGB).tobytes())
    profile[128:132], profile[132:136] = wild, b"cicp"
    bmp = b"BM" + struct.pack("<IHHI", 200, 0, 0, 138) + struct.pack("<IiiHHIIiiII", 124, 2, 2, 1, 24, *[0] * 6) + bytes(16) + b"DEBM"
    makes: Makes = {
        "chunks": lambda: _png(1, 1, 8, 2, [bytes(3)], _chunk(chance.choice([b"cICP", b"gAMA", b"cHRM", b"sRGB", b"iCCP"]), junk)),
        "EXIF": lambda: _with_segments(_saved(image, "JPEG"), _segment(0xE1, b"Exif\0\0" + exif)),
        "a profile": lambda: _saved(image, "PNG", icc_profile=bytes(profile)),
        "BMP": lambda: bmp + bytes(52) + wild * 2 + bytes(100),
        "BigTIFF": lambda: b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, chance.choice([2**60, 70_000, 9])) + chance.randbytes(500),
        "associations": lambda: _saved(image, "AVIF").replace(b"ipma\0\0\0\0", b"ipma" + junk.ljust(4, b"\1")[:4]),
    }
    return _one_of(chance, makes)


@kind
def animations(chance: Chance) -> Case:
    """Two or thousands of frames: the first."""
    width, height, count = chance.randint(8, 40), chance.randint(8, 40), chance.choice([2, 30, 2000])
    format = chance.choice(["GIF", "PNG", "WEBP", "TIFF", *(name for name in BOXED if name == "AVIF")])
    count = min(count, 30 if format in ("AVIF", "WEBP") else 300 if format == "PNG" else count)
    frames = [Image.new("L", (width, height), (k * 37) % 256) for k in range(count)]
    first = _three(np.asarray(Image.fromarray(_noise(chance, 1, 1)).resize((width, height))))
    options: dict[str, Any] = {"lossless": True, "method": 0} if format == "WEBP" else {}
    if format in ("AVIF", "WEBP"):
        frames = [frame.convert("RGB") for frame in frames]
    image = Image.fromarray(first if format in ("AVIF", "WEBP") else first[..., 0])
    data = _saved(image, format, save_all=True, append_images=frames, **options)
    return Case(f"{format} of {count} frames", data, first, 3)


@kind
def several(chance: Chance) -> Case:
    """Two files in one: the first counts."""
    format, data, pixels, far = _any(chance)
    while format in ("AVIF", "HEIF", "WEBP"):  # what follows these may be taken for a box
        format, data, pixels, far = _any(chance)
    what, other = chance.choice(
        [
            ("a picture", _any(chance)[1]),
            ("a zip", b"PK\3\4" + chance.randbytes(90)),
            ("zeros", b"\0" * 5000),
            ("HTML", b"<script>"),
            ("a video", chance.randbytes(3_000_000)),
        ]
    )
    return Case(f"{format} and then {what}", data + other, pixels, far)


@kind
def tiffs(chance: Chance) -> Case:
    """Layouts that Pillow does not write: planes, tiles, strips of one row, white as zero, 12 bits, premultiplied opacity, loops."""
    width, height = chance.randint(1, 60), chance.randint(1, 60)
    order, following = chance.choice("<>"), chance.choice([0, 8, 2**32 - 1])
    colours, gray, alpha = _noise(chance, height, width, 3), _noise(chance, height, width), _noise(chance, height, width)
    rgb: Tags = {258: (3, [8, 8, 8]), 262: (3, [2]), 277: (3, [3])}
    match chance.turn % 7:
        case 0:
            planes = {**rgb, 284: (3, [2]), 273: (4, [k * width * height for k in range(3)]), 279: (4, [width * height] * 3)}
            return Case("TIFF in planes", _tiff(width, height, planes, colours.transpose(2, 0, 1).tobytes(), order, following), colours, 0)
        case 1:
            whole = np.zeros((-(-height // 16) * 16, -(-width // 16) * 16, 3), np.uint8)
            whole[:height, :width] = colours
            body = b"".join(whole[y : y + 16, x : x + 16].tobytes() for y in range(0, height, 16) for x in range(0, width, 16))
            starts = range(0, len(body), 768)
            tiled = {**rgb, 322: (3, [16]), 323: (3, [16]), 324: (4, starts), 325: (4, [768] * len(starts))}
            return Case("TIFF in tiles", _tiff(width, height, tiled, body, order, following), colours, 0)
        case 2:
            rows = {**rgb, 278: (4, [1]), 273: (4, range(0, width * height * 3, width * 3)), 279: (4, [width * 3] * height)}
            return Case("TIFF in rows", _tiff(width, height, rows, colours.tobytes(), order, following), colours, 0)
        case 3:
            tags = {258: (3, [16]), 262: (3, [0]), 277: (3, [1])}
            inverted = (65535 - gray.astype(int) * 257).astype("<u2")
            return Case("TIFF of 16 bits, white is 0", _tiff(width, height, tags, inverted.tobytes()), _three(gray))
        case 4:
            even = gray[:, : width // 2 * 2] if width > 1 else np.repeat(gray, 2, 1)
            twelve = (even.astype(int) * 4095 // 255).reshape(height, -1, 2)
            first, second = twelve[..., 0], twelve[..., 1]
            packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1).astype(np.uint8)
            tags = {258: (3, [12]), 262: (3, [1]), 277: (3, [1])}
            return Case("TIFF of 12 bits", _tiff(even.shape[1], height, tags, packed.tobytes()), _three(even))
        case 5:
            tags = {258: (3, [8, 8]), 262: (3, [1]), 277: (3, [2]), 338: (3, [1])}
            premultiplied = np.round(gray * (alpha / 255)).astype(np.uint8)
            data = _tiff(width, height, tags, np.dstack([premultiplied, alpha]).tobytes(), order, following)
            return Case("TIFF of premultiplied gray", data, _on_white(_three(premultiplied * (255 / np.maximum(alpha, 1))), alpha), 2)
        case _:
            tags = {258: (3, [8] * 4), 262: (3, [2]), 277: (3, [4]), 338: (3, [1])}
            premultiplied = np.round(colours * (alpha[..., None] / 255)).astype(np.uint8)
            data = _tiff(width, height, tags, np.dstack([premultiplied, alpha]).tobytes(), order, following)
            return Case("TIFF of premultiplied colours", data, premultiplied + 255.0 - alpha[..., None], 2)


@kind
def bmps(chance: Chance) -> Case:
    """Top down, 16 bits, run lengths."""
    width, height = chance.randint(1, 60), chance.randint(1, 60)
    gray = _noise(chance, height, width)

    def bmp(bits: int, compression: int, body: bytes, palette: bytes = b"", signed_height: int = height) -> bytes:
        start = 54 + len(palette)
        head = struct.pack("<2sIHHI", b"BM", start + len(body), 0, 0, start)
        colours = len(palette) // 4
        head += struct.pack("<IiiHHIIiiII", 40, width, signed_height, 1, bits, compression, len(body), 0, 0, colours, 0)
        return head + palette + body

    ramp = b"".join(bytes([k, k // 2, 255 - k, 0]) for k in range(256))
    shown = np.stack([255 - gray, gray // 2, gray], -1)
    rows = [row.tobytes().ljust(-(-width // 4) * 4, b"\0") for row in gray]
    match chance.randrange(3):
        case 0:
            return Case("BMP from the top", bmp(8, 0, b"".join(rows), ramp, -height), shown, 0)
        case 1:
            colours = _noise(chance, height, width, 3).astype(np.uint16) >> 3
            packed = (colours[..., 0] << 10 | colours[..., 1] << 5 | colours[..., 2]).astype("<u2")
            body = b"".join(row.tobytes().ljust(-(-width // 2) * 4, b"\0") for row in packed[::-1])
            return Case("BMP of 15 bits", bmp(16, 0, body), colours * (255 / 31), 3)
        case _:
            runs = b"".join(b"".join(bytes([1, value]) for value in row) + b"\0\0" for row in gray[::-1]) + b"\0\1"
            return Case("BMP of run lengths", bmp(8, 1, runs, ramp), shown, 0)


@kind
def texts(chance: Chance) -> Case:
    """Text chunks in plenty, before or after the pixels."""
    pixels = _noise(chance, *_size(chance), 3)
    rows = [row.tobytes() for row in pixels]
    what, chunks = chance.choice(
        [
            ("a thousand texts", b"".join(_chunk(b"tEXt", b"key%d\0value" % k) for k in range(1000))),
            ("a compressed text", _chunk(b"zTXt", b"key\0\0" + zlib.compress(b"x" * 900_000))),
            ("a text of noise", _chunk(b"tEXt", chance.randbytes(500))),
            ("no text at all", _chunk(b"tEXt") + _chunk(b"zTXt") + _chunk(b"iTXt")),
            ("broken Unicode", _chunk(b"iTXt", b"key\0\0\0\0\0\xff\xfe\xfd")),
            ("private chunks", b"".join(_chunk(b"prVt", chance.randbytes(9)) for _ in range(3000))),
        ]
    )
    before = chance.random() < 0.5
    data = _png(pixels.shape[1], pixels.shape[0], 8, 2, rows, chunks if before else b"", after=b"" if before else chunks)
    return Case(f"PNG with {what} {'before' if before else 'after'} its pixels", data, pixels, 0)


@kind
def at_the_cap(chance: Chance) -> Case:
    """As many pixels as there may be, of one colour, in the formats that take most; now and then a row more, or a sixteenth."""
    side = int(MAX_PIXELS**0.5) // 16 * 16
    height, turn = MAX_PIXELS // side, chance.turn % 12
    if turn in (5, 6):
        return Case(f"PNG of {side}x{height + 1}", _png(side, height + 1, 8, 2, [b""]), refused=True)
    if turn == 7:
        data = _saved(Image.new("RGB", (side, height), (150, 140, 90)), "PNG", compress_level=1)
        hdr = data[:33] + _chunk(b"cICP", bytes([9, 16, 0, 1])) + data[33:]
        return Case(f"HDR in PNG of {side}x{height}", hdr, refused=False, memory=MEMORY_AT_THE_CAP)
    size = (side, height) if turn < 5 else (side // 4, height // 4)
    mode, format = [("RGBA", "PNG"), ("RGBA", "WEBP"), ("L", "JPEG"), ("CMYK", "JPEG"), ("F", "TIFF")][turn % 5]
    options: dict[str, Any] = (
        {"lossless": True, "quality": 0, "method": 0} if format == "WEBP" else {"compress_level": 1, "progressive": True}
    )
    data = _saved(Image.new(mode, size, (9, 99, 199, 99) if mode == "RGBA" else 0), format, **options)
    return Case(f"{mode} in {format} of {size}", data, refused=False, memory=MEMORY_AT_THE_CAP)


# Invalid, to be rejected


@kind
def other_formats(chance: Chance) -> Case:
    format = chance.next_of(["TGA", "ICO", "PCX", "SGI", "DDS", "JPEG2000", "PDF", "EPS", "ICNS", "QOI", "IM"])
    return Case(format, _saved(Image.fromarray(_noise(chance, 20, 20, 3)), format), refused=True)


@kind
def no_image(chance: Chance) -> Case:
    makes: Makes = {
        "SVG": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "MP4": lambda: _box(b"ftyp", b"isom\0\0\2\0isomiso2avc1mp41") + chance.randbytes(99),
        "CR3": lambda: _box(b"ftyp", b"crx \0\0\0\1crx isom") + chance.randbytes(99),
        "a plain PPM": lambda: b"P3 1 1 255 " + b"#\n" * 400_000 + b"1 2 3 ",
        "a zip": lambda: b"PK\3\4" + chance.randbytes(99),
        "PSD": lambda: b"8BPS\0\1" + bytes(30),
        "noise": lambda: b"\1" + chance.randbytes(999),
        "text": lambda: b"a photo of a dog",
        "a program": lambda: b"\x7fELF" + chance.randbytes(99),
        "BigTIFF": lambda: b"II+\0\x08\0\0\0\x10\0\0\0\0\0\0\0",
        "nothing": lambda: b"",
        "zeros": lambda: bytes(1000),
    }
    return _one_of(chance, makes, refused=True)


@kind
def no_file(chance: Chance) -> Case:
    """Folders, pipes, links to nowhere."""

    def pipe(path: Path) -> Path:
        os.mkfifo(path)
        return path

    def link(path: Path, to: str) -> Path:
        path.symlink_to(to)
        return path

    places: dict[str, Callable[[Path], Path]] = {
        "a folder": lambda folder: folder,
        "nothing": lambda folder: folder / "photo.jpg",
        "a pipe": lambda folder: pipe(folder / "photo.jpg"),
        "a link to nothing": lambda folder: link(folder / "photo.jpg", "nothing"),
        "a link to itself": lambda folder: link(folder / "photo.jpg", "photo.jpg"),
        "a link to a device": lambda folder: link(folder / "photo.jpg", "/dev/zero"),
    }
    return _place(chance, places)


@kind
def no_photo(chance: Chance) -> Case:
    """Holes, devices, paths that cannot be."""

    def hole(path: Path, head: bytes, size: int) -> Path:
        path.write_bytes(head)
        os.truncate(path, size)
        return path

    places: dict[str, Callable[[Path], Path]] = {
        "/dev/zero": lambda _: Path("/dev/zero"),
        "/dev/tty": lambda _: Path("/dev/tty"),
        "/proc/self/mem": lambda _: Path("/proc/self/mem"),
        "a hole": lambda folder: hole(folder / "photo.jpg", b"", 2**40),
        "a hole after a JPEG's start": lambda folder: hole(folder / "photo.jpg", b"\xff\xd8\xff\xe0", 2**40),
        "a smaller hole after a PNG's start": lambda folder: hole(folder / "photo.png", b"\x89PNG\r\n\x1a\n", 2**27),
        "a smaller hole after a TIFF's start": lambda folder: hole(folder / "photo.tif", b"II*\0\x08\0\0\0", 2**27),
        "a NUL": lambda folder: folder / "photo\0.jpg",
        "a name too long": lambda folder: folder / ("x" * 5000),
        "below a file": lambda folder: hole(folder / "file", b"x", 1) / "photo.jpg",
    }
    return _place(chance, places)


def _place(chance: Chance, places: Mapping[str, Callable[[Path], Path]]) -> Case:
    what = chance.next_of(list(places))
    return Case(what, refused=True, place=places[what], memory=2**29)


@kind
def huge_claims(chance: Chance) -> Case:
    """Headers of sizes that nobody has memory for."""
    huge = chance.choice([40_000, 65_535, 2**31 - 1])
    canvas = b"VP8X" + struct.pack("<II", 10, 16) + b"\xff" * 6
    frame = _segment(0xC0, struct.pack(">BHHB", 8, 65_500, 65_500, 3) + b"\1\x11\0\2\x11\0\3\x11\0")
    makes: Makes = {
        "PNG": lambda: _png(huge, huge, chance.choice([1, 8, 16]), 0, [b""]),
        "PNG of a line": lambda: _png(1, 2**31 - 1, 8, 0, [b""]),
        "PNG of a long line": lambda: _png(40_000_000, 1, 8, 0, [bytes(40_000_000)]),
        "GIF": lambda: b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(6) + b",\0\0\0\0\1\0\1\0\0\2\2D\1\0;",
        "frame of a GIF": lambda: b"GIF89a\1\0\1\0\x80\0\0" + bytes(6) + b"!\xf9\4\x08\0\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\2\2D\1\0;",
        "JPEG": lambda: b"\xff\xd8" + frame + _segment(0xDA, b"\3\1\0\2\0\3\0\0\x3f\0"),
        "WebP": lambda: b"RIFF" + struct.pack("<I", len(canvas) + 4) + b"WEBP" + canvas,
    }
    return _one_of(chance, makes, refused=True)


@kind
def other_huge_claims(chance: Chance) -> Case:
    def bmp(width: int, height: int) -> bytes:
        return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 0, 0, 0, 54, 40, width, height, 1, 24, *[0] * 6)

    makes: Makes = {
        "BMP": lambda: bmp(65_000, 65_000),
        "BMP of negative size": lambda: bmp(-5, -5),
        "PPM": lambda: b"P6 99999 99999 255\n",
        "PPM of digits": lambda: b"P6 " + b"9" * 100_000 + b" 1 255\n",
        "PPM of comments": lambda: b"P6" + b"#\n" * 2_000_000,
        "PPM of slow pixels": lambda: b"P6 4000 2000 254\n" + bytes(24_000_000),
        "TIFF": lambda: _tiff(60_000, 60_000, {258: (3, [8]), 262: (3, [1])}, b"\0"),
        "tile of a TIFF": lambda: _large_tile(24_000),
    }
    return _one_of(chance, makes, refused=True)


def _large_tile(side: int) -> bytes:
    """A picture of 10 x 10 in one compressed tile of a gigabyte."""
    body = zlib.compress(bytes(side * side), 9)
    gray = {258: (3, [8]), 259: (3, [8]), 262: (3, [1])}
    return _tiff(10, 10, gray | {322: (4, [side]), 323: (4, [side]), 324: (4, [0]), 325: (4, [len(body)])}, body)


@kind
def many_pieces(chance: Chance) -> Case:
    """Millions of chunks and segments: a turn of a loop for each, or worse."""
    jpeg, exif = _saved(Image.new("L", (9, 9)), "JPEG"), _segment(0xE1, b"Exif\0\0" + _exif(6).ljust(60_000, b"\0"))
    png, much = partial(_png, 9, 9, 8, 0, [bytes(9)] * 9), zlib.compress(bytes(1_000_000))
    makes: Makes = {
        "PNG of empty chunks": lambda: png(_chunk(b"prVt") * 600_000),
        "PNG of empty pixels": lambda: png(_chunk(b"IDAT") * 600_000),
        "PNG of texts": lambda: png(_chunk(b"zTXt", b"\0\0" + much) * 20_000),
        "PNG of profiles": lambda: png(_chunk(b"iCCP", b"k\0\0" + much) * 20_000),
        "JPEG of empty segments": lambda: _with_segments(jpeg, _segment(0xEB, b"") * 500_000),
        "JPEG of junk": lambda: _with_segments(jpeg, b"\xff" + bytes(2_000_000)),
        "JPEG of EXIF": lambda: _with_segments(jpeg, exif * 400),
        "JPEG of scans": lambda: _scans(2000, 2000, 5000),
        "JPEG of hidden scans": lambda: _with_segments(_scans(2000, 2000, 150), exif + _segment(0xFE, b"\xff\xd9")),
    }
    return _one_of(chance, makes, refused=True, memory=2**29)


@kind
def other_pieces(chance: Chance) -> Case:
    """Millions of blocks, runs, tags."""
    gif, tags = b"GIF89a\1\0\1\0\0\0\0", {258: (3, [8]), 262: (3, [1])}
    bmp = struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 0, 0, 0, 1078, 40, 2400, 2400, 1, 8, 1, 0, 0, 0, 256, 0) + bytes(range(256)) * 4
    makes: Makes = {
        "GIF of comments": lambda: gif + b"!\xfe" + b"\1x" * 1_000_000 + b"\0;",
        "GIF of extensions": lambda: gif + b"!\xff\0" * 1_000_000 + b";",
        "TIFF of numbers": lambda: _tiff(9, 9, tags | {338: (3, [0] * 9_000_000)}, bytes(81)),
        "TIFF of strips": lambda: _tiff(9, 9, tags | {273: (4, [0] * 2_000_000), 278: (4, [1])}, bytes(81)),
        "TIFF of tags": lambda: _tiff(9, 9, tags | {tag: (3, [5] * 5) for tag in range(1000, 65_500)}, bytes(81)),
        "BMP of runs": lambda: bmp + b"\1\5" * 2_000_000,
    }
    return _one_of(chance, makes, refused=True, memory=2**29)


@kind
def bombs(chance: Chance) -> Case:
    """Small files that decompress to large data; read or rejected, without using that much memory."""
    rows, much = [bytes(27)] * 9, zlib.compress(bytes(50_000_000), 1)
    plain = partial(_png, 9, 9, 8, 2)
    makes: Makes = {
        "pixels": lambda: plain([bytes(50_000_000)]),
        "zTXt": lambda: plain(rows, _chunk(b"zTXt", b"key\0\0" + much)),
        "iTXt": lambda: plain(rows, _chunk(b"iTXt", b"key\0\1\0\0\0" + much)),
        "iTXt after the pixels": lambda: plain(rows, after=_chunk(b"iTXt", b"key\0\1\0\0\0" + much)),
        "iCCP": lambda: plain(rows, _chunk(b"iCCP", b"key\0\0" + much)),
        "hundreds of zTXt": lambda: plain(rows, _chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(1_000_000))) * 300),
        "EXIF of numbers": lambda: plain(rows, _chunk(b"eXIf", _exif(6, {ORIENTATION: (3, [6] * 3_000_000)}))),
        "EXIF of fractions": lambda: plain(rows, _chunk(b"eXIf", _exif(6, {282: (5, [1, 3] * 60_000), 34665: (4, [8])}))),
        "metadata": lambda: plain(rows, _chunk(b"tEXt", b"imagic-lora\0" + b"[" * 100_000)),
        "metadata of digits": lambda: plain(rows, _chunk(b"tEXt", b"imagic-lora\0" + b"9" * 100_000)),
        "metadata that is a list": lambda: plain(rows, _chunk(b"tEXt", b"imagic-lora\0[1]")),
    }
    return _one_of(chance, makes)


@kind
def out_of_range(chance: Chance) -> Case:
    """Floats that are not numbers, and numbers beyond every range."""
    if chance.turn % 3 == 0:
        odd: float = chance.choice([2**31 - 1, -(2**31), 70_000])
        values = np.full((9, 9), odd, np.int32)
    else:
        odd = chance.next_of([np.nan, np.inf, -np.inf, 1e30, -1e30])
        values = np.random.default_rng(chance.randrange(2**32)).random((9, 9)).astype(np.float32)
        values[chance.randrange(9), chance.randrange(9)] = odd
    return Case(f"TIFF of {values.dtype} with {odd}", _saved(Image.fromarray(values), "TIFF"), refused=True)


@kind
def raw(chance: Chance) -> Case:
    """A camera's raw file starts with a small preview."""
    tags = {254: (4, [1]), 258: (3, [8] * 3), 262: (3, [2]), 277: (3, [3]), 330: (4, [8]), 50706: (1, [1, 4, 0, 0])}
    return Case("a raw file", _tiff(16, 12, tags, chance.randbytes(16 * 12 * 3)), refused=True, name="IMG.DNG")


# Broken; any result but a crash is accepted


@kind
def cut(chance: Chance) -> Case:
    format, data, *_ = _any(chance)
    at = chance.randrange(len(data))
    return Case(f"{format} cut at {at} of {len(data)}", data[:at])


@kind
def flipped(chance: Chance) -> Case:
    format, good, *_ = _any(chance)
    data, count = bytearray(good), chance.choice([1, 2, 8, 64])
    for _ in range(count):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return Case(f"{format} with {count} bits flipped", bytes(data))


@kind
def flipped_header(chance: Chance) -> Case:
    format, good, *_ = _any(chance)
    data = bytearray(good)
    for _ in range(chance.choice([1, 3, 9])):
        data[chance.randrange(min(120, len(data)))] = chance.choice([0, 1, 127, 128, 255, chance.randrange(256)])
    return Case(f"{format} with a broken header", bytes(data))


@kind
def holed(chance: Chance) -> Case:
    """A piece is missing, doubled, zeroed or replaced by a piece of another."""
    (format, data, *_), other = _any(chance), _any(chance)[1]
    start, size = chance.randrange(len(data)), chance.choice([1, 4, 16, 100])
    piece = chance.choice([b"", data[start : start + size] * 2, b"\0" * size, b"\xff" * size, other[start : start + size]])
    return Case(f"{format} with another piece at {start}", data[:start] + piece + data[start + size :])


@kind
def noise_after_magic(chance: Chance) -> Case:
    heads = [b"\xff\xd8\xff", b"GIF89a", b"BM", b"P5\n9 9\n255\n", b"P6\n", b"Pf 9 9 -1\n", b"II*\0\x08\0\0\0"]
    head = chance.choice([*heads, _any(chance)[1][: chance.choice([2, 4, 8, 12, 16, 32])]])
    return Case(f"noise after {head!r}", head + chance.randbytes(chance.choice([0, 1, 10, 1000, 20_000])))


@kind
def chunks(chance: Chance) -> Case:
    """The chunks of a PNG, whole and with right sums, but in disorder."""
    pixels = _noise(chance, 9, 9, 3)
    parts = [_chunk(b"IHDR", struct.pack(">IIBBBBB", 9, 9, 8, chance.choice([2, 2, 3, 6]), 0, 0, chance.randrange(2)))]
    parts += [
        _chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels))),
        _chunk(b"IEND"),
        _chunk(b"PLTE", chance.randbytes(chance.randrange(800))),
    ]
    names = b"tRNS gAMA cHRM sRGB pHYs iCCP acTL fcTL fdAT eXIf tEXt zTXt iTXt IDAT IHDR abcd ____".split()
    parts += [_chunk(chance.choice(names), chance.randbytes(chance.choice([0, 1, 4, 8, 26, 32, 99]))) for _ in range(4)]
    keys = [b"Raw profile type exif", *b"transparency icc_profile exif xmp bbox interlace gamma default_image XML:com.adobe.xmp".split()]
    parts += [_chunk(b"tEXt", chance.choice(keys) + b"\0" + chance.choice([b"1", b"", b"zz\n1\n2\n3\nzz"]))]
    first, rest = parts[0], parts[1:]
    chance.shuffle(rest)
    return Case("PNG in disorder", b"\x89PNG\r\n\x1a\n" + first + b"".join(rest))


@kind
def segments(chance: Chance) -> Case:
    """The segments of a JPEG, doubled, left out, in disorder, and others among them."""
    image = Image.fromarray(_smooth(chance, 33, 21))
    data = _saved(image, "JPEG", progressive=chance.random() < 0.5, restart_marker_blocks=chance.choice([0, 1]))
    parts, at = [], 2
    while data[at + 1] != 0xDA:
        end = at + 2 + struct.unpack_from(">H", data, at + 2)[0]
        parts.append(data[at:end])
        at = end
    bodies = [
        b"ICC_PROFILE\0\1\1",
        b"ICC_PROFILE\0\0\0",
        b"MPF\0II*\0\x08\0\0\0\xff\xff",
        b"Exif\0\0",
        b"Adobe\0d\0\0\0\0\2",
        b"JFIF\0",
        b"",
    ]
    markers = [0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE, 0xC0, 0xC3, 0xC4, 0xC9, 0xDB, 0xDD]
    parts += [_segment(chance.choice(markers), chance.choice([*bodies, chance.randbytes(40)])) for _ in range(chance.randrange(5))]
    match chance.randrange(3):
        case 0:
            chance.shuffle(parts)
        case 1:
            parts.pop(chance.randrange(len(parts)))
        case _:
            parts.insert(0, chance.choice(parts))
    return Case("JPEG in disorder", data[:2] + b"".join(parts) + data[at:])


@kind
def tags(chance: Chance) -> Case:
    """A TIFF whose tags say anything."""
    known = [*range(254, 285), 317, *range(320, 326), 330, 338, 339, 347, *range(512, 533), 700, 34665, 34675]
    tags: dict[int, tuple[int, Sequence[int]]] = {258: (3, [8] * 3), 262: (3, [2]), 277: (3, [3])}
    codes = [1, 2, 3, 4, 5, 6, 7, 8, 32773, 32946, 34712, 34925, 50000, 50001, 0]
    tags[259] = (3, [chance.choice(codes)])
    for _ in range(chance.randrange(1, 5)):
        code = chance.choice([1, 3, 3, 4, 4, 5, 7])
        most = {1: 2**8, 3: 2**16, 4: 2**32, 5: 2**32, 7: 2**8}[code] - 1
        values = [chance.choice([0, 1, 2, 3, 5, 8, 9, 16, most]) for _ in range(chance.choice([1, 1, 2, 3, 4, 9]))]
        tags[chance.choice(known)] = (code, values * 2 if code == 5 else values)
    return Case(f"TIFF of {tags}", _tiff(9, 9, tags, chance.randbytes(500), chance.choice("<>"), chance.choice([0, 8])))


@kind
def boxes(chance: Chance) -> Case:
    """AVIF and HEIC with false sizes, rotations, brands and offsets in their boxes."""
    image = Image.fromarray(_smooth(chance, 40, 30))
    if not BOXED:
        return Case("no AVIF and no HEIC here", b"\0\0\0\x18ftypavif", refused=True)
    data = bytearray(_saved(image, chance.choice(BOXED), quality=50))
    name = chance.choice(b"ispe irot imir pixi iloc iinf infe ipma pitm hdlr ftyp av1C hvcC colr meta mdat".split())
    if (at := data.find(name)) < 0:
        return Case("boxes as they are", bytes(data), refused=False)
    if name == b"ispe" and chance.random() < 0.5:
        data[at + 8 : at + 16] = struct.pack(">II", *chance.choice([(2**31, 2**31), (30_000, 30_000), (0, 0), (1, 1), (16_384, 16_384)]))
    elif chance.random() < 0.5:
        data[at - 4 : at] = struct.pack(">I", chance.choice([0, 1, 7, 8, 2**31, 2**32 - 1]))
    else:
        place = at + chance.randrange(4, 24)
        data[place : place + 4] = chance.choice([b"\0" * 4, b"\xff" * 4, b"\0\0\0\1", chance.randbytes(4)])
    return Case(f"another {name.decode()} box", bytes(data))


@kind
def frames(chance: Chance) -> Case:
    """GIF frames that are partly or wholly outside their canvas."""
    x, y, wide, high = (chance.choice([0, 1, 5, 300, 65535]) for _ in range(4))
    gif = b"GIF89a" + struct.pack("<HHBBB", chance.choice([0, 1, 9, 300]), 9, chance.choice([0, 0x80, 0xF7]), 7, 0) + chance.randbytes(6)
    gif += b"!\xf9\4" + bytes([chance.choice([0, 1, 4, 8, 9, 12]), 0, 0, chance.randrange(256)]) + b"\0"
    gif += b"," + struct.pack("<4HB", x, y, wide, high, chance.choice([0, 64, 128, 135])) + bytes([chance.choice([0, 2, 8, 12, 255])])
    return Case("GIF of a frame elsewhere", gif + b"\4" + chance.randbytes(4) + chance.choice([b"\0;", b"\0", b""]))
