"""Folders that are complete or absent wherever their writer is interrupted, and manifests of which no byte may change."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import pytest
from common import each
from files import failing, forbid, manifest_bytes
from pydantic import ValidationError

from imagic_lora.adapters.atomic import AtomicWriter, atomic_folder, interrupted_writes, recover
from imagic_lora.adapters.manifest import Manifest, changed_file, read_manifest
from imagic_lora.adapters.writing import writable
from imagic_lora.core.errors import ImagicError

RECORD = "note.json"
FILES = {"card.md": b"words", "unet/config.json": b"{}"}


class Note(Manifest):
    """A record with something to say."""

    words: str = "new"


def write(final: Path, words: str = "new", files: dict[str, bytes] = FILES) -> None:
    """Writes a folder of these files and a record."""
    with atomic_folder(final) as writer:
        for name, content in files.items():
            writer.write(name, [content])
        writer.write_manifest(RECORD, Note(words=words))


def content(folder: Path) -> dict[str, bytes]:
    """All files below a folder; none where it is not there."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def final(tmp_path: Path) -> Path:
    """Where a folder is to be."""
    return tmp_path / "root" / "one"


def written_record(tmp_path: Path) -> Path:
    """The path of a valid record."""
    writer = AtomicWriter(tmp_path)
    writer.write("card.md", [b"words"])
    writer.write_manifest(RECORD, Note())
    return tmp_path / RECORD


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """The path of a valid record."""
    return written_record(tmp_path)


def test_what_is_written_is_read(final: Path) -> None:
    """The files, the manifest with their hashes, and nothing else in the folder or its parent."""
    write(final)
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}
    assert content(final) == FILES | {RECORD: manifest_bytes({"files": digests, "words": "new"})}
    found = read_manifest(final, RECORD, Note)
    assert (found.words, found.files) == ("new", digests)
    assert changed_file(final, found) is None
    assert list(final.parent.iterdir()) == [final]


def test_content_may_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any kind and size, none at all, and to a disk that takes a few bytes at a time."""
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, bytes(data[:3])))
    writer = AtomicWriter(tmp_path)
    for name, pieces in {"some": [b"", b"one, ", memoryview(b"two, three"), b"."], "none": []}.items():
        writer.write(name, pieces)
        whole = b"".join(pieces)
        assert (tmp_path / name).read_bytes() == whole
        assert writer.files[name] == hashlib.sha256(whole).hexdigest()


def test_any_changed_byte_of_a_record_is_refused(record: Path) -> None:
    """Wherever it stands, even a space; so is a manifest that was truncated or extended; the original is accepted again."""
    good = record.read_bytes()
    changed = [good[:k] + bytes([good[k] ^ (1 << k % 8)]) + good[k + 1 :] for k in range(len(good))]
    for text in [*changed, *(good[:k] for k in range(len(good))), good + b"\n", good + b" ", b"\n" + good]:
        record.write_bytes(text)
        with pytest.raises(ImagicError, match="is not a valid manifest"):
            read_manifest(record.parent, RECORD, Note)
    record.write_bytes(good)
    assert read_manifest(record.parent, RECORD, Note).words == "new"


REWRITTEN: dict[str, Callable[[bytes], bytes]] = {
    "without spaces": lambda text: json.dumps(json.loads(text)).encode(),
    "indented by one": lambda text: (json.dumps(json.loads(text), indent=1) + "\n").encode(),
    "in another order": lambda text: (json.dumps(dict(reversed(json.loads(text).items())), indent=2) + "\n").encode(),
    "lines of Windows": lambda text: text.replace(b"\n", b"\r\n"),
    "with a mark of order": lambda text: b"\xef\xbb\xbf" + text,
    "in UTF-16": lambda text: text.decode().encode("utf-16"),
    "a key twice": lambda text: text.replace(b'  "words"', b'  "words": "old",\n  "words"'),
    "a key twice, first in full": lambda text: text.replace(b"{\n", b"{\n" + text.strip(b"{}\n") + b",\n", 1),
    "escaped": lambda text: text.replace(b"new", b"n\\u0065w"),
}


@each("rewrite", REWRITTEN)
def test_the_same_record_written_another_way_is_refused(tmp_path: Path, rewrite: Callable[[bytes], bytes]) -> None:
    """Though it says the same, its own hash included: there is one way to write a record."""
    record = written_record(tmp_path)
    good = record.read_bytes()
    record.write_bytes(rewrite(good))
    assert record.read_bytes() != good
    with pytest.raises(ImagicError, match="is not a valid manifest"):
        read_manifest(record.parent, RECORD, Note)


DEEP = 100_000
BROKEN = {
    "nothing": b"",
    "zeros": bytes(300),
    "a brace": b"{",
    "a list": b"[]",
    "a list, well written": b"[]\n",
    "null": b"null",
    "null, well written": b"null\n",
    "a text": b'"note"',
    "lists in lists": b"[" * DEEP + b"]" * DEEP,
    "records in records": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "just too deep to write": b'{"a":' * 900 + b"1" + b"}" * 900,
    "a long number": b'{"a": ' + b"1" * 10_000 + b"}",
    "no UTF-8": b'{"a": "\xff"}',
    "no hash": b'{\n  "words": "new"\n}\n',
}


@each("text", BROKEN)
def test_what_is_no_record_is_refused(tmp_path: Path, text: bytes) -> None:
    """In words that name the file."""
    record = written_record(tmp_path)
    record.write_bytes(text)
    with pytest.raises(ImagicError, match=f"{RECORD} is not a valid manifest"):
        read_manifest(record.parent, RECORD, Note)


def test_a_record_that_is_not_there_is_refused(record: Path) -> None:
    """Nor is a folder one."""
    record.unlink()
    for _ in range(2):
        with pytest.raises(ImagicError, match="is not a valid manifest"):
            read_manifest(record.parent, RECORD, Note)
        record.mkdir(exist_ok=True)


@pytest.mark.parametrize(("size", "good"), [(2**20, True), (2**20 + 1, False), (2**24, False)])
def test_a_record_has_a_size(record: Path, size: int, good: bool) -> None:
    """At most a megabyte; a larger manifest with the right hash is not read."""
    fields = {"files": {}, "words": ""}
    fields["words"] = "w" * (size - len(manifest_bytes(fields)))
    record.write_bytes(manifest_bytes(fields))
    assert record.stat().st_size == size
    if good:
        assert read_manifest(record.parent, RECORD, Note).words == fields["words"]
        return
    with pytest.raises(ImagicError, match="it is missing or larger than 1,048,576 bytes"):
        read_manifest(record.parent, RECORD, Note)


HEX = "0123456789abcdef" * 4
ODD = {
    "an unknown field": {"surprise": 1},
    "another kind": {"words": ["new"]},
    "null": {"words": None},
    "files in a list": {"files": [["card.md", HEX]]},
    "files are null": {"files": None},
    "a short hash": {"files": {"card.md": HEX[1:]}},
    "a long hash": {"files": {"card.md": HEX + "0"}},
    "a hash in capitals": {"files": {"card.md": HEX.upper()}},
    "a hash and a line": {"files": {"card.md": HEX + "\n"}},
    "no hash": {"files": {"card.md": None}},
}


@each("change", ODD)
def test_a_record_of_another_shape_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    """Though its hash is right."""
    record = written_record(tmp_path)
    fields = {"files": {"card.md": HEX}, "words": "new"}
    record.write_bytes(manifest_bytes(fields))
    read_manifest(record.parent, RECORD, Note)
    record.write_bytes(manifest_bytes(fields | change))
    with pytest.raises(ImagicError, match="is not a valid manifest"):
        read_manifest(record.parent, RECORD, Note)


def test_a_record_with_half_a_letter_is_refused(record: Path) -> None:
    """Half of a surrogate pair is no text, and cannot be printed."""
    record.write_bytes(manifest_bytes({"files": {}, "words": "\ud800"}))
    with pytest.raises(ImagicError, match="is not a valid manifest"):
        read_manifest(record.parent, RECORD, Note)


GOOD_NAMES = ["card.md", "a", "_a", "-", "0", "unet/config.json", "a..b", "a./b.", "A-_.b", "a" * 100, "a" * 100 + "/" + "b" * 100]
BAD_NAMES = [
    "", ".", "..", "../a", "a/..", "a/../b", "/a", "/", "a/", "//a", "a//b", "a/b/c", "./a", "a/.", ".hidden", "a/.hidden", "a\\b", "..\\a",
    "\\a", "C:a", "C:\\a", "C:/a", "a:b", "a b", "a\n", "a\0", "é", "~", "a*", "a" * 101, "a/" + "b" * 101,
]  # fmt: skip


@each("name", BAD_NAMES)
def test_a_record_that_names_a_file_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    """In a parent or sibling folder, hidden, or by a path of any system: rejected before the file is read."""
    record = written_record(tmp_path)
    record.write_bytes(manifest_bytes({"files": {name: HEX}, "words": "new"}))
    with pytest.raises(ImagicError, match="is not a valid manifest"):
        read_manifest(record.parent, RECORD, Note)


@each("name", GOOD_NAMES)
def test_a_record_names_files_in_its_folder_and_one_below(tmp_path: Path, name: str) -> None:
    """Letters, digits, dot, underscore and hyphen."""
    record = written_record(tmp_path)
    record.write_bytes(manifest_bytes({"files": {name: HEX}, "words": "new"}))
    assert set(read_manifest(record.parent, RECORD, Note).files) == {name}


@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_is_found(final: Path, name: str) -> None:
    """One bit of it, a byte less or more, none left, a folder in its place; what is not on record is not looked at."""
    write(final)
    found, path, good = read_manifest(final, RECORD, Note), final / name, FILES[name]
    for changed in (bytes([good[0] ^ 1]) + good[1:], good[:-1], good + b"\0", b""):
        path.write_bytes(changed)
        assert changed_file(final, found) == path
    path.unlink()
    assert changed_file(final, found) == path
    path.mkdir()
    assert changed_file(final, found) == path
    path.rmdir()
    path.write_bytes(good)
    (final / "loose.txt").write_text("")
    assert changed_file(final, found) is None


def hole(path: Path, size: int) -> None:
    """Makes a file of zeros that has this size and takes no room."""
    path.unlink(missing_ok=True)
    path.touch()
    os.truncate(path, size)


class Small(Note):
    """A record that allows 100 bytes of a text, and 150 of everything."""

    MAX_BYTES: ClassVar[int] = 150

    def max_bytes(self, file: str) -> int:
        return 100 if file.endswith(".md") else self.MAX_BYTES


def test_a_folder_that_is_too_large_is_refused_unread(final: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file larger than its limit, or files that are too large together: no byte of any file is read."""
    write(final, files={"a.md": bytes(100), "b.bin": bytes(50)})
    found = read_manifest(final, RECORD, Small)
    assert changed_file(final, found) is None
    monkeypatch.setattr(Path, "open", lambda *_: pytest.fail("opened"))
    for name, size, limit in (("a.md", 101, 100), ("b.bin", 151, 100), ("b.bin", 2**40, 100)):
        hole(final / name, size)
        with pytest.raises(ImagicError, match=f"{name} has {size:,} bytes. Expected: at most {limit} bytes"):
            changed_file(final, found)
        hole(final / name, 50)


def test_a_file_without_an_end_is_not_read_to_it(final: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some files of the kernel are regular files of size 0 whose bytes never end: only their size is read."""
    write(final)
    found = read_manifest(final, RECORD, Note)
    endless = {RECORD: final / RECORD, "card.md": final / "card.md"}
    for path in endless.values():
        hole(path, 0)
    real = Path.open

    class Endless(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            assert size is not None
            assert size >= 0, "read to its end"
            return bytes(size)

    monkeypatch.setattr(Path, "open", lambda path, *mode: Endless() if path in endless.values() else real(path, *mode))
    assert changed_file(final, found) == final / "card.md"
    with pytest.raises(ImagicError, match="is not a valid manifest"):
        read_manifest(final, RECORD, Note)


def test_a_file_that_cannot_be_read_is_not_called_changed(final: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad sector, or no right to read it: the reason is given, for the manifest too."""
    write(final)
    found = read_manifest(final, RECORD, Note)
    monkeypatch.setattr(Path, "open", failing(errno.EIO))
    with pytest.raises(ImagicError, match=r"card\.md cannot be read \(Input/output error\)"):
        changed_file(final, found)
    forbid(monkeypatch, final)
    for look in (lambda: changed_file(final, found), lambda: read_manifest(final, RECORD, Note)):
        with pytest.raises(ImagicError, match=r"cannot be read \(Permission denied\)"):
            look()


@each(
    "fields, reason",
    [
        ({"words": 5}, "words = 5, expected text, in quotes if it consists of digits"),
        ({"words": "new", "surprise": 1}, "surprise = 1, expected"),
        ({"words": "new", "files": {"card.md": "0"}}, "files.card.md = '0', expected"),
        ({"words": "new", "losses": float("nan")}, "the number NaN is not finite"),
        ({"words": "new", "losses": float("-inf")}, "the number -Infinity is not finite"),
    ],
)
def test_a_record_that_is_wrong_is_refused_by_its_field(fields: dict[str, Any], reason: str, tmp_path: Path) -> None:
    """In plain words. NaN and infinity are no JSON, though Python writes and reads them."""
    (tmp_path / RECORD).write_bytes(manifest_bytes(fields))
    with pytest.raises(ImagicError) as caught:
        read_manifest(tmp_path, RECORD, Note)
    assert caught.value.got.startswith(f"{tmp_path / RECORD} is not a valid manifest ({reason}")


def test_numbers_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    """Neither by the model, nor where the model is copied without a check."""

    class Measured(Note):
        loss: float = 0.0

    with pytest.raises(ValidationError, match="finite"):
        Measured(loss=math.nan)
    with pytest.raises(ValueError, match="JSON compliant"):
        AtomicWriter(tmp_path).write_manifest(RECORD, Measured().model_copy(update={"loss": math.inf}))


def test_a_folder_is_replaced_as_a_whole(final: Path) -> None:
    """No file of the old one lingers; until the end the old one is there, whole, and the new one hidden."""
    write(final, "old", {"card.md": b"old words", "old.md": b""})
    old = content(final)
    with atomic_folder(final) as writer:
        writer.write("card.md", [b"new words"])
        writer.write_manifest(RECORD, Note())
        assert content(final) == old
        assert writer.folder.name.startswith(".")
    assert set(content(final)) == {"card.md", RECORD}
    assert read_manifest(final, RECORD, Note).words == "new"
    assert list(final.parent.iterdir()) == [final]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("there", [True, False])
def test_a_failing_writer_leaves_what_was_there(final: Path, error: type[BaseException], there: bool) -> None:
    """And nothing of its own."""
    if there:
        write(final, "old")
    before = content(final)

    def pieces() -> Iterator[bytes]:
        yield b"new"
        raise error

    with pytest.raises(error), atomic_folder(final) as writer:
        writer.write("card.md", pieces())
    assert content(final) == before
    assert list(final.parent.iterdir()) == [final] * there


def test_everything_is_flushed_before_it_has_its_name(final: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File by file, the record, the folders, then name after name; the old folder goes when the new one's name is safe."""
    write(final, "old")
    events: list[tuple[str, ...]] = []
    paths: dict[int, str] = {}
    real_open, real_rename, real_remove = os.open, os.rename, shutil.rmtree

    def opened(path: Path, *arguments: Any) -> int:
        handle = real_open(path, *arguments)
        paths[handle] = path.relative_to(final.parent).as_posix()
        return handle

    def rename(source: Path, target: Path) -> None:
        events.append(("rename", source.name, target.name))
        real_rename(source, target)

    def remove(path: Path, **settings: Any) -> None:
        if path.exists():
            events.append(("remove", path.name))
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", real_open)
            real_remove(path, **settings)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", lambda handle: events.append(("flush", paths[handle])))
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(shutil, "rmtree", remove)
    write(final)
    assert events == [
        ("flush", ".one.part/card.md"),
        ("flush", ".one.part/unet/config.json"),
        ("flush", f".one.part/{RECORD}"),
        ("flush", ".one.part/unet"),
        ("flush", ".one.part"),
        ("rename", "one", ".one.old"),
        ("flush", "."),
        ("rename", ".one.part", "one"),
        ("flush", "."),
        ("remove", ".one.old"),
    ]


class PowerCut(BaseException):
    """Nothing runs any more."""


CALLS = ("open", "write", "fsync", "mkdir", "rename", "unlink", "rmdir")


def cut(monkeypatch: pytest.MonkeyPatch, after: int, error: BaseException) -> list[int]:
    """Lets so many calls of the system pass, and fails the next; after a power cut all, clearing up included. Gives how many were left."""
    left = [after]

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            left[0] -= 1
            if left[0] == -1 or (left[0] < 0 and isinstance(error, PowerCut)):
                raise error
            return real(*arguments, **settings)

        return call

    monkeypatch.setattr(os, "fsync", lambda handle: None)
    for name in CALLS:
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    return left


@pytest.mark.filterwarnings("ignore:the folder that was replaced remains")
@pytest.mark.parametrize("error", [PowerCut(), OSError(errno.EIO, "a bad disk")], ids=["power", "disk"])
@pytest.mark.parametrize("there", [True, False])
def test_whichever_call_is_the_last_it_is_old_or_new(
    tmp_path: Path, final: Path, monkeypatch: pytest.MonkeyPatch, there: bool, error: BaseException
) -> None:
    """Whole, once it is recovered, and nothing else is in its parent; new where no error was raised, and old where one was."""
    write(tmp_path / "before" / "one", "old", {"card.md": b"old words", "old.md": b""})
    write(tmp_path / "after" / "one")
    old, new = content(tmp_path / "before" / "one") if there else {}, content(tmp_path / "after" / "one")
    outcomes: list[str] = []
    left = [-1]
    while left[0] < 0:
        silent = False
        shutil.rmtree(final.parent, ignore_errors=True)
        shutil.copytree(tmp_path / "before", final.parent) if there else final.parent.mkdir()
        with monkeypatch.context() as patch, suppress(PowerCut, ImagicError):
            left = cut(patch, len(outcomes), error)
            write(final)
            silent = True
        assert interrupted_writes(final.parent) == ["one"] * any(path != final for path in final.parent.iterdir())
        recover(final)
        assert content(final) in ([new] if silent else [old, new] if isinstance(error, PowerCut) else [old])
        assert list(final.parent.iterdir()) == [final] * bool(content(final))
        outcomes.append("new" if content(final) == new else "old")
    assert len(outcomes) > 15
    assert set(outcomes) == {"old", "new"}


STATES = {  # what lies at NAME, .NAME.part and .NAME.old; what is at NAME when it is recovered
    (None, None, None): None,
    ("one", None, None): "one",
    (None, "half", None): None,
    ("one", "half", None): "one",
    (None, "half", "one"): "one",
    (None, None, "one"): "one",
    ("two", None, "one"): "two",
    ("two", "half", "one"): "two",
}


@pytest.mark.parametrize(("state", "expected"), STATES.items(), ids=str)
def test_every_state_that_a_writer_may_leave_is_recovered(final: Path, state: tuple[str | None, ...], expected: str | None) -> None:
    """To the folder that was there last and whole; a second time there is nothing to do, and it can be written again."""
    final.parent.mkdir()
    for path, words in zip((final, final.with_name(".one.part"), final.with_name(".one.old")), state, strict=True):
        if words:
            path.mkdir()
            (path / "card.md").write_text(words)
    for _ in range(2):
        recover(final)
        assert content(final) == ({"card.md": expected.encode()} if expected else {})
        assert list(final.parent.iterdir()) == ([final] if expected else [])
    write(final)
    assert read_manifest(final, RECORD, Note).words == "new"


def test_what_a_writer_has_left_is_undone_by_the_next(final: Path) -> None:
    """Without being asked."""
    write(final, "old")
    final.rename(final.with_name(".one.old"))
    final.with_name(".one.part").mkdir()
    with atomic_folder(final) as writer:
        assert read_manifest(final, RECORD, Note).words == "old"
        writer.write_manifest(RECORD, Note())
    assert list(final.parent.iterdir()) == [final]


def test_what_was_cut_off_is_listed_by_name(tmp_path: Path) -> None:
    """Once each and in order, whatever dots a name has; nothing else that is hidden."""
    for name in (".b.part", ".b.old", ".a.old", ".rex.v2.part", ".x.old.part", ".c.lock", ".c.checkpoints", "d.part", "e"):
        (tmp_path / name).mkdir()
    assert interrupted_writes(tmp_path) == ["a", "b", "rex.v2", "x.old"]
    assert interrupted_writes(tmp_path / "none") == []


def test_a_folder_to_write_to_is_made(tmp_path: Path) -> None:
    """With those above it; one that is there stays."""
    for _ in range(2):
        with writable(tmp_path / "a" / "b"):
            (tmp_path / "a" / "b" / "file").touch()
    assert (tmp_path / "a" / "b" / "file").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_the_users_to_mend(final: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """In the middle of a file: the error says what is free and how to go on, the old folder is there, and no half of the new."""
    write(final, "old")
    before = content(final)
    real, calls = os.write, count()
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, data[:2]) if next(calls) < 2 else failing(number)())
    with pytest.raises(ImagicError, match=r"the disk of .*root is full or over its quota \([\d,]+ MiB free\).*--resume") as caught:
        write(final)
    assert isinstance(caught.value.__cause__, OSError)
    assert content(final) == before
    assert list(final.parent.iterdir()) == [final]


@pytest.mark.parametrize("call", ["open", "write", "fsync", "mkdir", "rename"])
@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EIO])
def test_a_folder_that_cannot_be_written_to_is_the_users_to_mend(
    final: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    """Whichever call it is that fails; what was there before still is."""
    write(final, "old")
    before = content(final)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(number))
        with pytest.raises(ImagicError, match=rf"root cannot be written to \({os.strerror(number)}\)"):
            write(final)
    recover(final)
    assert content(final) == before
    assert list(final.parent.iterdir()) == [final]


@pytest.mark.parametrize("place", ["root", "root/one/deeper"])
def test_a_file_in_the_way_is_the_users_to_mend(tmp_path: Path, place: str) -> None:
    """Where the folder should be, or one above it."""
    (tmp_path / "root").write_text("words")
    with pytest.raises(ImagicError, match="cannot be written to"), writable(tmp_path / place):
        pytest.fail("nothing to write to")
    assert (tmp_path / "root").read_text() == "words"


def test_a_disk_too_full_for_a_folder_is_the_users_to_mend(final: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the very first one."""
    monkeypatch.setattr(os, "mkdir", failing(errno.ENOSPC))
    with pytest.raises(ImagicError, match="is full"):
        write(final)


def test_other_errors_pass_as_they_are(tmp_path: Path) -> None:
    """With their own words."""
    for error in (ImagicError("this", "that", "do"), RuntimeError("a bug"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, writable(tmp_path):
            raise error
        assert caught.value is error


def test_a_manifest_with_a_duplicate_key_is_rejected(record: Path) -> None:
    """Even if its own hash is right: readers of JSON disagree on which value counts."""
    body = b'{\n  "files": {},\n  "words": "old",\n  "words": "new"'
    digest = hashlib.sha256(body + b"\n}\n").hexdigest().encode()
    record.write_bytes(body + b',\n  "sha256": "' + digest + b'"\n}\n')
    with pytest.raises(ImagicError, match="duplicate key"):
        read_manifest(record.parent, record.name, Note)
