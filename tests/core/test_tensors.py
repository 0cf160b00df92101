"""Tensors to and from files: what safetensors itself reads, equal bytes for equal content, nothing that is not finite."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import pytest
import torch
from common import each, same
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from imagic_lora.core.errors import ImagicError, NotFinite
from imagic_lora.core.tensors import all_finite, check_finite, open_safetensors, read, safetensors_pieces, shapes

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
DTYPES = [*FLOATS, torch.int64, torch.uint8]
METADATA = {"format": "pt", "prompt": '"é" \n\\ \U0001f415', "a": "", "": "nothing"}


def tensors() -> dict[str, Tensor]:
    """Every dtype in every form: odd sizes, 0-dim, empty, not contiguous, parts and views of others, with a gradient."""
    base = torch.arange(-60, 60).reshape(2, 3, 4, 5)
    found = {}
    for dtype in DTYPES:
        values, name = base.to(dtype), str(dtype).removeprefix("torch.")
        found |= {
            f"{name}.whole": values,
            f"{name}.odd": values.flatten()[:7],
            f"{name}.scalar": values[1, 1, 1, 1],
            f"{name}.empty": values[:0],
            f"{name}.swapped": values.transpose(0, 3),
            f"{name}.every second": values[..., ::2],
            f"{name}.every third": values.flatten()[::3],
            f"{name}.expanded": values[:1, :1].expand(4, 2, 4, 5),
        }
    found["a few bytes"] = torch.arange(3, dtype=torch.uint8)
    found["float32.trained"] = torch.tensor([-3e38, 3e38]).requires_grad_()
    found["float32.small"] = torch.tensor([0.0, -0.0, 1e-45, 1 / 3])
    found['é \U0001f415 " \\ \n'] = torch.ones(3)
    return found


def write(path: Path, given: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """A file of the pieces."""
    path.write_bytes(b"".join(safetensors_pieces(given, metadata)))
    return path


def bits(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """By name, in order, as bytes: so that -0.0 is not 0.0."""
    return {name: given[name].detach().contiguous().reshape(-1).view(torch.uint8) for name in sorted(given)}


@each("metadata", [None, {}, METADATA])
def test_safetensors_reads_what_was_written(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    """Names, dtypes, shapes, bits and metadata."""
    given, path = tensors(), tmp_path / "file"
    write(path, given, metadata)
    for found in (load_file(path), read(path, whole_numbers=True)):
        assert {n: (v.dtype, v.shape) for n, v in found.items()} == {n: (v.dtype, v.shape) for n, v in given.items()}
        assert same(bits(found), bits(given))
    assert shapes(path) == {name: tuple(value.shape) for name, value in given.items()}
    with safe_open(path, "pt") as file:
        assert (file.metadata() or {}) == (metadata or {})


def test_a_file_without_tensors(tmp_path: Path) -> None:
    """Is one too."""
    assert read(write(tmp_path / "file", {})) == load_file(tmp_path / "file") == shapes(tmp_path / "file") == {}


def test_every_tensor_starts_at_a_multiple_of_its_width(tmp_path: Path) -> None:
    """In the file, counted from its beginning, and one after the other without a gap: it can be mapped."""
    raw = write(tmp_path / "file", tensors(), METADATA).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__")
    places = sorted((*one["data_offsets"], one["dtype"]) for one in header.values())
    widths = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U8": 1}
    assert length % 8 == 0
    assert all((8 + length + start) % widths[dtype] == 0 for start, _, dtype in places)
    assert [end for _, end, _ in places] == [start for start, _, _ in places[1:]] + [len(raw) - 8 - length]


def test_equal_content_is_equal_bytes() -> None:
    """Whatever order names and metadata come in, and whatever the strides."""
    given = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(2, 2, dtype=torch.float16), "c": torch.arange(3), "d": torch.ones(3)}
    metadata = {letter: letter * 3 for letter in "wxyz"}
    other = given | {"b": given["b"].t().contiguous().t()}
    whole = b"".join(safetensors_pieces(given, metadata))
    for names, keys in zip(permutations(given), permutations(metadata), strict=True):
        found = safetensors_pieces({name: other[name] for name in names}, {key: metadata[key] for key in keys})
        assert b"".join(found) == whole
    assert b"".join(safetensors_pieces(given | {"d": torch.zeros(3)}, metadata)) != whole
    assert b"".join(safetensors_pieces(given, metadata | {"z": ""})) != whole


def test_a_file_comes_tensor_by_tensor() -> None:
    """No piece is larger than one of them, and none is a copy."""
    given = {name: torch.rand(1000) for name in "abc"}
    pieces = list(safetensors_pieces(given))
    assert [len(bytes(piece)) for piece in pieces[1:]] == [4000] * 3
    given["b"][:] = 7
    assert bytes(pieces[2]) == given["b"].numpy().tobytes()


PLACES: dict[str, Callable[[Tensor], Tensor]] = {
    "alone": lambda value: value[:1],
    "first": lambda value: value,
    "last": lambda value: value.flip(0),
    "scalar": lambda value: value[0],
    "not contiguous": lambda value: value.expand(3, -1).t(),
}


@each("dtype", FLOATS)
@each("value", [torch.nan, torch.inf, -torch.inf])
@each("place", PLACES)
def test_what_is_not_finite_does_not_go_out(dtype: torch.dtype, value: float, place: Callable[[Tensor], Tensor]) -> None:
    """The error names the tensor, and comes before the first byte."""
    wrong = place(torch.tensor([value, *range(5)], dtype=dtype))
    given = {"fine": torch.ones(3), "wrong": wrong, "whole": torch.arange(3), "fine too": torch.ones(2, dtype=dtype)}
    with pytest.raises(NotFinite, match=r"^wrong holds numbers that are not finite"):
        next(safetensors_pieces(given))
    assert not all_finite([given["fine"], wrong])


@each("dtype", FLOATS)
@each("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_does_not_come_in(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    """The error names the tensor and the file."""
    save_file({"fine": torch.ones(3), "wrong": torch.tensor([1, value], dtype=dtype)}, tmp_path / "file")
    with pytest.raises(NotFinite, match=rf"^wrong in {tmp_path}/file holds numbers"):
        read(tmp_path / "file")


@each("dtype", FLOATS)
def test_a_finite_tensor_whose_norm_overflows_is_finite(tmp_path: Path, dtype: torch.dtype) -> None:
    """The largest numbers of each type; NaN among them is still found."""
    large = torch.full((100,), torch.finfo(dtype).max, dtype=dtype)
    assert torch.linalg.vector_norm(large).isinf() or dtype == torch.float16
    assert same(read(write(tmp_path / "file", {"large": large})), {"large": large})
    with pytest.raises(NotFinite, match="wrong"):
        check_finite({"large": large, "wrong": torch.tensor([torch.nan], dtype=dtype)})


def test_nothing_at_all_is_finite() -> None:
    """No tensors, empty ones, and those that are whole numbers."""
    assert all_finite([])
    assert all_finite([torch.empty(0), torch.empty(3, 0, dtype=torch.float16)])
    check_finite({"whole": torch.arange(3), "bytes": torch.full((3,), 255, dtype=torch.uint8), "none": torch.empty(0)})


def test_what_was_read_outlives_the_file(tmp_path: Path) -> None:
    """It is a copy: not a map of a file that may be written over or removed."""
    given = {"a": torch.rand(5000), "b": torch.arange(3)}
    path = write(tmp_path / "file", given)
    found = read(path, whole_numbers=True)
    with path.open("r+b") as file:  # the same file, which a map would see
        file.write(bytes(path.stat().st_size))
    path.unlink()
    assert same(found, given)
    found["a"][0] = 2


def test_shapes_are_read_without_the_tensors(tmp_path: Path) -> None:
    """NaN or not."""
    save_file({"a": torch.full((2, 3), torch.nan), "b": torch.empty(0, 4), "c": torch.tensor(1)}, tmp_path / "file")
    assert shapes(tmp_path / "file") == {"a": (2, 3), "b": (0, 4), "c": ()}


def raw(header: object, data: bytes = b"") -> bytes:
    """A file of a header and what follows."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def header_of(**changes: object) -> object:
    """A header of one tensor of two numbers, but for these."""
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


BROKEN = {
    "empty": b"",
    "short": b"\x01",
    "text": b"not a tensor " * 100,
    "zeros": bytes(1000),
    "ones": b"\xff" * 1000,
    "no JSON": struct.pack("<Q", 16) + b"{" * 16 + bytes(100),
    "no UTF-8": struct.pack("<Q", 4) + b'{"\xff"' + bytes(100),
    "a list": raw([]),
    "a header without end": struct.pack("<Q", 2**62) + b"{}",
    "data missing": raw(header_of(), bytes(7)),
    "data left over": raw(header_of(), bytes(9)),
    "another shape": raw(header_of(shape=[3]), bytes(8)),
    "a shape without end": raw(header_of(shape=[2**62, 2**62]), bytes(8)),
    "backwards": raw(header_of(data_offsets=[8, 0]), bytes(8)),
    "below": raw(header_of(data_offsets=[-8, 0]), bytes(8)),
    "no such type": raw(header_of(dtype="F128"), bytes(8)),
    "over one another": raw({name: {"dtype": "U8", "shape": [2], "data_offsets": [k, k + 2]} for k, name in enumerate("ab")}, bytes(3)),
    "metadata in metadata": raw({"__metadata__": {"a": {}}}),
}


@each("content", BROKEN)
def test_what_is_no_such_file_is_refused(tmp_path: Path, content: bytes) -> None:
    """In words that name it, whatever lies there."""
    (tmp_path / "file").write_bytes(content)
    for reader in (read, shapes):
        with pytest.raises(ImagicError, match=f"{tmp_path}/file is not a whole safetensors file"):
            reader(tmp_path / "file")


def test_a_file_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    """Wherever."""
    given = write(tmp_path / "file", {"a": torch.rand(7), "b": torch.arange(3)}, METADATA).read_bytes()
    for end in range(len(given)):
        (tmp_path / "file").write_bytes(given[:end])
        with pytest.raises(ImagicError, match="is not a whole safetensors file"):
            read(tmp_path / "file")


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    """Nor is a folder a file."""
    (tmp_path / "folder").mkdir()
    for name in ("none", "folder"):
        with pytest.raises(ImagicError, match=rf"{name} cannot be read \((No such file|Is a directory)"):
            read(tmp_path / name)


def test_a_path_that_is_not_utf8_is_refused_as_one(tmp_path: Path) -> None:
    """The library opens no such path; the file itself may be whole."""
    with pytest.raises(ImagicError, match=r"the path '.*caf\\udce9', which is not UTF-8"):
        read(tmp_path / "caf\udce9")


BITS = {"F4": 4, "F6_E2M3": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "BOOL": 8, "U64": 64, "C64": 64}


@each("dtype", list(BITS))
def test_types_that_are_never_written_do_not_come_in(tmp_path: Path, dtype: str) -> None:
    """A stranger's file may hold numbers of few bits, or complex ones."""
    (tmp_path / "file").write_bytes(raw({"a": {"dtype": dtype, "shape": [192 // BITS[dtype]], "data_offsets": [0, 24]}}, bytes(24)))
    with pytest.raises(ImagicError, match="file"):
        read(tmp_path / "file")


@each("error", [RuntimeError("a bug"), OSError(28, "the disk is full"), FileNotFoundError("another file")])
def test_an_error_inside_is_not_the_files(tmp_path: Path, error: Exception) -> None:
    """What else goes wrong while a file is open passes as it is."""
    with pytest.raises(type(error)) as caught, open_safetensors(write(tmp_path / "file", {"a": torch.ones(1)})):
        raise error
    assert caught.value is error


def test_what_the_library_cannot_read_later_is_refused_too(tmp_path: Path) -> None:
    """A tensor that a whole file does not hold, in words that name the file."""
    with pytest.raises(ImagicError, match="file is not a whole safetensors file"), open_safetensors(write(tmp_path / "file", {})) as file:
        file.get_tensor("a")
