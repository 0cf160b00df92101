"""Adapters on disk: complete and unchanged, or rejected; one writer per name."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from time import perf_counter, sleep

import pytest
import torch
from common import MODES
from files import failing, forbid, interrupted_removal, manifest_bytes, rival

from imagic_lora.adapters.adapter import Adapter
from imagic_lora.adapters.atomic import AtomicWriter
from imagic_lora.adapters.record import RECORD, BaseRecord, EtaRecord, Record, SourceRecord
from imagic_lora.adapters.store import Store
from imagic_lora.core.config import Mode, RunConfig
from imagic_lora.core.errors import ImagicError, ImagicWarning, NotFinite
from imagic_lora.core.tensors import safetensors_pieces

BAD_NAMES = ["", ".", "..", ".hidden", "a/b", "../a", "/a", "a\\b", "a b", "-a", "a\n", "a" * 101, "é"]


def record(name: str = "one", **changes) -> Record:
    """A record of nothing in particular."""
    given = Record(
        name="one",
        created="2030-01-01T00:00:00+00:00",
        base=BaseRecord(name="tiny", revision=None, fingerprint="f"),
        parts=[],
        prompt="a cat",
        config=RunConfig(base="tiny", eta=0.3),
        source=SourceRecord(sha256="0" * 64, size=(3, 2), box=(0, 0, 3, 2)),
        losses={"embed": (1.5, 0.25)},
        seconds={"embed": 0.1},
        runtime={"device": "cpu"},
        peak_memory=7,
        versions={"torch": "2"},
    )
    return given.model_copy(update={"name": name, **changes})


def fill(text: str = "words") -> Callable[[AtomicWriter], None]:
    """Writes a file, and another in a folder."""

    def write(writer: AtomicWriter) -> None:
        writer.write("card.md", [text.encode()])
        writer.write("unet/config.json", [b"{}"])

    return write


def hidden(root: Path) -> list[str]:
    """Names beginning with a dot in a folder."""
    return sorted(path.name for path in root.iterdir() if path.name.startswith("."))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with one adapter."""
    store = Store(tmp_path / "adapters")
    store.write(record(), fill())
    return store


@pytest.fixture
def copied(tmp_path: Path, fitted: Callable[..., Adapter]) -> Callable[[Mode], Store]:
    """Gives a store with a copy of a fitted adapter, named ``copy``."""

    def make(mode: Mode) -> Store:
        shutil.copytree(fitted(mode).folder, tmp_path / "copy")
        return Store(tmp_path)

    return make


def test_what_is_written_is_read(store: Store) -> None:
    """The record as it was given, with a hash of every other file; no trace of the way it was written."""
    found = store.read("one").record
    assert found.model_copy(update={"files": {}}) == record()
    assert sorted(found.files) == ["card.md", "unet/config.json"]
    assert store.names() == ["one"]
    assert hidden(store.root) == []


@pytest.mark.parametrize("mode", MODES)
def test_one_changed_bit_in_any_file_is_refused(copied: Callable[[Mode], Store], mode: Mode) -> None:
    """And named; put back, the adapter is good again."""
    store = copied(mode)
    files = store.read("copy").record.files
    assert {str(p.relative_to(store.root / "copy")) for p in (store.root / "copy").rglob("*") if p.is_file()} == {*files, RECORD}
    for file in files:
        path = store.root / "copy" / file
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(ImagicError, match=f"{file} is missing or has changed"):
            store.read("copy")
        store.read("copy", verify=False)
        path.write_bytes(good)
    store.read("copy")


@pytest.mark.parametrize("mode", MODES)
def test_a_missing_file_is_refused(copied: Callable[[Mode], Store], mode: Mode) -> None:
    """Whichever it is."""
    store = copied(mode)
    for file in store.read("copy").record.files:
        path = store.root / "copy" / file
        path.rename(store.root / "away")
        with pytest.raises(ImagicError, match=f"{file} is missing or has changed"):
            store.read("copy")
        (store.root / "away").rename(path)


def test_a_record_changed_by_hand_is_refused(copied: Callable[[Mode], Store]) -> None:
    """Every one of its lines, were it only a figure in it, whether or not the other files are looked at."""
    store = copied("lora")
    path = store.root / "copy" / RECORD
    lines = path.read_text().splitlines(keepends=True)
    for k in range(len(lines)):
        path.write_text("".join(lines[:k] + lines[k + 1 :]))
        with pytest.raises(ImagicError, match=f"{RECORD} is not a valid manifest"):
            store.read("copy", verify=False)
    path.write_text("".join(lines).replace('"peak_memory": ', '"peak_memory": 1'))
    with pytest.raises(ImagicError, match=f"{RECORD} is not a valid manifest"):
        store.read("copy")
    path.write_text("".join(lines))
    store.read("copy")


ODD = {
    "version": 2,
    "prompt": None,
    "surprise": 1,
    "files": ["card.md"],
    "name": "../one",
    "config": {"surprise": 1},
    "parts": [{"component": "vae", "mode": "lora", "files": []}],
    "source": {"sha256": "0", "size": [3, 2], "box": [0, 0, 3, 2]},
    "losses": {"embed": ["1", None]},
}


@pytest.mark.parametrize(("key", "value"), ODD.items())
def test_a_record_of_another_shape_is_refused(store: Store, key: str, value: object) -> None:
    """Another version, another type, an unknown field, though its hash is right."""
    path = store.root / "one" / RECORD
    fields = json.loads(path.read_text())
    del fields["sha256"]
    path.write_bytes(manifest_bytes(fields))
    store.read("one")
    path.write_bytes(manifest_bytes(fields | {key: value}))
    with pytest.raises(ImagicError, match=rf"is not a valid manifest \({key}"):
        store.read("one")
    if key == "prompt":
        path.write_bytes(manifest_bytes({name: one for name, one in fields.items() if name != key}))
        with pytest.raises(ImagicError, match=r"is not a valid manifest \(prompt is missing"):
            store.read("one")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"é'])
def test_a_broken_record_is_refused(store: Store, text: str) -> None:
    """Nothing but a JSON object will do."""
    (store.root / "one" / RECORD).write_text(text, encoding="latin-1")
    with pytest.raises(ImagicError, match="is not a valid manifest"):
        store.read("one")


def test_an_adapter_is_called_as_its_folder(store: Store) -> None:
    """Whatever its record says: a copy is another adapter."""
    shutil.copytree(store.root / "one", store.root / "two")
    assert (store.read("two").name, store.read("two").record.name) == ("two", "one")


def test_an_unknown_name_says_which_there_are(store: Store) -> None:
    """So that a misspelling is seen at once."""
    with pytest.raises(ImagicError, match=r"no adapter 'two'.*\(one\)"):
        store.read("two")
    with pytest.raises(ImagicError, match=r"no adapter 'two'.*\(none\)"):
        Store(store.root / "none").read("two")


def test_an_existing_name_is_refused(store: Store) -> None:
    """What is there stays."""
    with pytest.raises(ImagicError, match="exists"):
        store.write(record(), fill("other words"))
    assert (store.read("one").folder / "card.md").read_text() == "words"


def test_overwrite_replaces_the_whole_folder(store: Store) -> None:
    """Files of the old adapter do not linger."""
    store.write(record(prompt="a dog"), lambda writer: writer.write("new.md", []), overwrite=True)
    assert store.read("one").record.prompt == "a dog"
    assert {path.name for path in (store.root / "one").iterdir()} == {"new.md", RECORD}
    assert hidden(store.root) == []


def not_finite(writer: AtomicWriter) -> None:
    """A file that stops on its way."""
    writer.write("weights", safetensors_pieces({"a": torch.tensor(torch.nan)}))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, NotFinite])
def test_a_failing_write_leaves_the_old_adapter(store: Store, error: type[BaseException]) -> None:
    """And nothing of its own."""

    def fail(writer: AtomicWriter) -> None:
        fill("other words")(writer)
        not_finite(writer) if error is NotFinite else None
        raise error

    for name in ("one", "two"):
        with pytest.raises(error):
            store.write(record(name), fail, overwrite=True)
    assert (store.read("one").folder / "card.md").read_text() == "words"
    assert [path.name for path in store.root.iterdir()] == ["one"]


def test_a_folder_that_cannot_be_written_to_is_refused_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a file stands where the folder should be; there the disk may only be read."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ImagicError, match="cannot be written to"):
        Store(tmp_path / "file").check_free("one", overwrite=False)
    monkeypatch.setattr(os, "open", failing(errno.EROFS))
    with pytest.raises(ImagicError, match="cannot be written to"):
        Store(tmp_path).check_free("one", overwrite=False)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_is_no_name_is_refused(store: Store, name: str) -> None:
    """To read, to write, to remove, to claim and to check."""

    def claim(name: str) -> None:
        with store.locked(name):
            pytest.fail("claimed")

    def write(name: str) -> None:
        store.write(record(name), fill(), overwrite=True)

    for refused in (store.read, lambda name: store.check_free(name, False), write, store.remove, claim, store.checkpoints):
        with pytest.raises(ImagicError, match="is not a valid name"):
            refused(name)
    assert store.names() == ["one"]


@pytest.mark.parametrize("name", ["a", "A-1", "rex.v2_b", "0", "a" * 100, "x.part", "x.old", "x.checkpoints", "x.lock"])
def test_a_good_name_is_taken(store: Store, name: str) -> None:
    """Letters, digits, dot, underscore and hyphen, though a hidden file may end so too."""
    assert store.write(record(name), fill()).record.name == name
    assert store.names() == sorted(["one", name])


@pytest.mark.parametrize("twin", ["ONE", "One", "one."])
def test_a_name_that_is_another_where_case_is_ignored_is_refused(store: Store, twin: str) -> None:
    """A store copied to such a disk would lose one of them; two that are there already stay as they are and may be written again."""
    for refused in (lambda: store.check_free(twin, overwrite=True), lambda: store.write(record(twin), fill())):
        with pytest.raises(
            ImagicError, match=f"adapters/one exists, and {re.escape(twin)} is the same name on file systems that ignore case"
        ):
            refused()
    (store.root / "one").rename(store.root / ".two.checkpoints")
    with pytest.raises(ImagicError, match="adapters/two exists, and TWO is the same name"):
        store.check_free("TWO", overwrite=False)
    store.check_free(twin, overwrite=False)
    for there in ("three", "THREE"):
        shutil.copytree(store.root / ".two.checkpoints", store.root / there)
        store.write(record(there), fill(), overwrite=True)
    assert store.names() == ["THREE", "three"]


def test_names_are_those_of_whole_adapters(store: Store) -> None:
    """In order; not the hidden, the half-written, loose files, or folders that cannot be named."""
    store.write(record("B"), fill())
    for name in (".two.hidden", "three", "fo ur"):
        (store.root / name).mkdir()
    shutil.copy(store.root / "one" / RECORD, store.root / ".two.hidden")
    shutil.copy(store.root / "one" / RECORD, store.root / "fo ur")
    (store.root / "loose.txt").write_text("")
    assert store.names() == ["B", "one"]


def test_what_may_not_be_read_is_named(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter of another user is among the names, and reading it says why not; an unfinished fit of theirs is unfinished."""
    store.write(record("two"), fill())
    store.checkpoints("three").mkdir()
    forbid(monkeypatch, store.root / "one", store.checkpoints("three"))
    assert (store.names(), store.unfinished()) == (["one", "two"], ["three"])
    assert store.read("two").name == "two"
    with pytest.raises(ImagicError, match=r"one/adapter\.json cannot be read \(Permission denied\)"):
        store.read("one")


@pytest.mark.parametrize("look", [Store.names, Store.unfinished])
def test_a_store_that_may_not_be_read_is_not_called_empty(
    store: Store, look: Callable[[Store], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither is a file in place of a store."""
    with pytest.raises(ImagicError, match=r"adapter\.json cannot be read \(Not a directory\)"):
        look(Store(store.root / "one" / RECORD))
    forbid(monkeypatch, store.root)
    with pytest.raises(ImagicError, match=r"adapters cannot be read \(Permission denied\)"):
        look(store)


def test_a_store_that_is_not_there_is_empty(tmp_path: Path) -> None:
    """Asking does not make it."""
    store = Store(tmp_path / "none")
    assert store.names() == store.unfinished() == []
    with pytest.raises(ImagicError, match="no adapter"):
        store.read("one")
    with pytest.raises(ImagicError, match="no adapter"):
        store.remove("one")
    assert not store.root.exists()


def left_behind(store: Store) -> None:
    """As a writer leaves it that was cut off between two names, and another before it had any."""
    (store.root / "one").rename(store.root / ".one.old")
    (store.root / ".one.part").mkdir()
    (store.root / ".two.part").mkdir()


@pytest.mark.parametrize("look", [Store.names, lambda store: store.read("one"), lambda store: store.check_free("one", True)])
def test_what_a_writer_that_was_cut_off_has_left_is_undone(store: Store, look: Callable[[Store], object]) -> None:
    """By whoever looks next: the old adapter is there again."""
    left_behind(store)
    look(store)
    assert (store.root / "one" / "card.md").read_text() == "words"
    assert not {".one.old", ".one.part"} & set(hidden(store.root))
    assert store.names() == ["one"]
    assert hidden(store.root) == []


def test_a_writer_at_work_is_let_be(store: Store) -> None:
    """Whoever looks meanwhile sees the old adapter, and removes nothing that is being written."""
    seen: list[str] = []

    def watched(writer: AtomicWriter) -> None:
        fill("other words")(writer)
        thread = Thread(target=lambda: seen.extend(store.names()))
        thread.start()
        thread.join()

    store.write(record(), watched, overwrite=True)
    assert seen == ["one"]
    assert (store.read("one").folder / "card.md").read_text() == "other words"


ALL_WRITERS: list[Callable[[Store], object]] = [
    lambda store: store.check_free("one", True),
    lambda store: store.write(record(), fill("other words"), overwrite=True),
    lambda store: store.remove("one"),
]


def test_a_name_that_another_process_writes_is_refused(store: Store) -> None:
    """By its number; reading goes on, other names are free, and what it has half written stays."""
    (store.root / ".two.part").mkdir()
    with rival(store, "one") as process, rival(store, "two"):
        for refused in ALL_WRITERS:
            with pytest.raises(ImagicError, match=rf"one is being written by process {process.pid}"):
                refused(store)
        (store.root / ".one.lock").write_text("")
        with pytest.raises(ImagicError, match="one is being written by another process"):
            store.check_free("one", True)
        assert store.names() == ["one"]
        assert (store.read("one").folder / "card.md").read_text() == "words"
        store.write(record("three"), fill())
        assert hidden(store.root) == [".one.lock", ".two.lock", ".two.part"]


def test_a_writer_waits_for_whoever_only_looks(store: Store) -> None:
    """Looking mends what was cut off, which takes a moment; a look itself waits for nobody."""
    held = Event()

    def look() -> None:
        with store.locked("one"):
            held.set()
            sleep(0.2)

    looker = Thread(target=look)
    looker.start()
    held.wait()
    left_behind(store)
    start = perf_counter()
    store.names()
    assert perf_counter() - start < 0.15
    store.write(record("one"), fill("other words"), overwrite=True)
    looker.join()
    assert (store.read("one").folder / "card.md").read_text() == "other words"


def test_a_name_whose_writer_was_killed_is_free(store: Store) -> None:
    """What it left is undone."""
    with rival(store, "one") as process:
        left_behind(store)
        process.kill()
        process.wait()
        assert hidden(store.root) == [".one.lock", ".one.old", ".one.part", ".two.part"]
        assert store.names() == ["one"]
        store.write(record(), fill("other words"), overwrite=True)
    assert (store.read("one").folder / "card.md").read_text() == "other words"
    assert hidden(store.root) == []


@pytest.mark.parametrize("text", ["", "47", "4711\nanother.machine\n", "\0" * 9], ids=["nothing", "a number", "a machine", "zeros"])
def test_what_a_power_cut_left_of_a_claim_stops_nobody(store: Store, text: str) -> None:
    """The claim itself went with the process that had it."""
    (store.root / ".one.lock").write_text(text)
    store.write(record(), fill("other words"), overwrite=True)
    assert hidden(store.root) == []


def test_a_claim_may_be_claimed_again_by_who_has_it(store: Store) -> None:
    """A fit claims a name for as long as it takes, and writes under that claim; only then it is free."""
    with store.locked("one") as held:
        (store.root / ".one.part").mkdir()
        with held.locked("one"):
            pass
        assert hidden(store.root) == [".one.lock", ".one.part"]
        held.write(record(), fill("other words"), overwrite=True)
        assert hidden(store.root) == [".one.lock"]
    assert hidden(store.root) == []
    assert (store.read("one").folder / "card.md").read_text() == "other words"


@pytest.mark.parametrize("held", [True, False], ids=["of another name", "none"])
def test_a_claim_is_of_no_use_to_another_writer_of_the_process(store: Store, held: bool) -> None:
    """Whoever has none, or that of another name, is refused in the same thread too, as by another process, and touches nothing."""
    (store.checkpoints("one") / "embed-000003").mkdir(parents=True)
    with store.locked("one"), store.locked("two") as two:
        for refused in ALL_WRITERS:
            with pytest.raises(ImagicError, match=f"one is being written by process {os.getpid()}"):
                refused(two if held else Store(store.root))
        assert hidden(store.root) == [".one.checkpoints", ".one.lock", ".two.lock"]
        assert (store.read("one").folder / "card.md").read_text() == "words"
        assert store.unfinished() == ["one"]
    store.remove("one")


def test_a_claim_that_has_ended_is_of_no_use(store: Store) -> None:
    """Though somebody has kept what it gave."""
    with store.locked("one") as held:
        pass
    with store.locked("one"), pytest.raises(ImagicError, match="one is being written by"):
        held.check_free("one", True)


def test_a_claim_belongs_to_no_thread(store: Store) -> None:
    """Begun in one and ended in another, the name is free."""
    claim = store.locked("one")
    thread = Thread(target=claim.__enter__)
    thread.start()
    thread.join()
    assert hidden(store.root) == [".one.lock"]
    claim.__exit__(None, None, None)
    assert hidden(store.root) == []
    store.check_free("one", True)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_a_claim_ends_with_its_block(store: Store, error: type[BaseException]) -> None:
    """However that ends."""
    with pytest.raises(error), store.locked("one"):
        raise error
    assert hidden(store.root) == []


def test_a_suggested_eta_changes_the_record_alone(store: Store) -> None:
    """Of the folder that was read, whatever name its record has; a record that was read before is then no longer that of the folder."""
    plain = store.read("one")
    shutil.copytree(plain.folder, store.root / "copy")
    before = store.read("copy")
    assert (before.record.eta, before.record.suggested) == (0.3, None)
    suggested = EtaRecord(eta=0.6, rule="product", seeds=2)
    after = store.suggest_eta(before, suggested)
    assert (after.folder, after.record.eta) == (store.root / "copy", 0.6)
    assert after.record == before.record.model_copy(update={"name": "copy", "suggested": suggested})
    assert store.read("one").record == plain.record
    assert store.suggest_eta(after, suggested.model_copy(update={"eta": 0.5})).record.eta == 0.5
    with pytest.raises(ImagicError, match="another adapter"):
        store.suggest_eta(before, suggested)
    assert store.read("copy").record.eta == 0.5


def test_what_is_removed_is_gone(store: Store) -> None:
    """With the checkpoints of an unfinished fit of that name, and nothing else."""
    store.write(record("two"), fill())
    for name in ("one", "two", "three"):
        (store.checkpoints(name) / "embed-000003").mkdir(parents=True)
    store.remove("one")
    assert (store.names(), store.unfinished()) == (["two"], ["three", "two"])
    store.remove("three")
    assert store.unfinished() == ["two"]
    assert sorted(path.name for path in store.root.iterdir()) == [".two.checkpoints", "two"]
    with pytest.raises(ImagicError, match=r"no adapter 'one'.*\(two\)"):
        store.remove("one")


def test_an_adapter_with_an_invalid_record_can_be_removed(store: Store) -> None:
    """So can a folder that is none."""
    (store.root / "one" / RECORD).write_text("{")
    store.remove("one")
    (store.root / "two").mkdir()
    store.remove("two")
    assert not list(store.root.iterdir())


def test_a_link_is_removed_and_not_what_it_leads_to(store: Store, tmp_path: Path) -> None:
    """Even one that leads nowhere; a plain file of that name goes too, and the name is free again."""
    elsewhere = tmp_path / "elsewhere"
    shutil.move(store.root / "one", elsewhere)
    for target in (elsewhere, tmp_path / "nowhere"):
        (store.root / "one").symlink_to(target)
        with pytest.raises(ImagicError, match="one exists"):
            store.check_free("one", overwrite=False)
        store.remove("one")
        assert hidden(store.root) == []
    (store.root / "one").write_text("")
    store.remove("one")
    assert list(store.root.iterdir()) == []
    assert (elsewhere / "card.md").read_text() == "words"
    (store.root / "one").symlink_to(elsewhere)
    store.write(record(), fill("new"), overwrite=True)
    assert ((store.root / "one" / "card.md").read_text(), (elsewhere / "card.md").read_text()) == ("new", "words")
    assert hidden(store.root) == []


def undeletable(folder: Path) -> Callable[..., None]:
    """A replacement for shutil.rmtree that cannot delete one folder, which another user has written into."""
    real = shutil.rmtree

    def rmtree(path: Path) -> None:
        if path == folder:
            raise PermissionError(errno.EACCES, "Permission denied", str(path / "card.md"))
        real(path)

    return rmtree


def test_what_cannot_be_removed_is_said(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a fit of that name is refused before it trains, as long as the rest is there."""
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", undeletable(store.root / ".one.part"))
        for look in (lambda: store.remove("one"), lambda: store.check_free("one", overwrite=True)):
            with pytest.raises(ImagicError, match=r"card\.md cannot be deleted \(Permission denied\)"):
                look()
        assert store.names() == []
    store.check_free("one", overwrite=False)
    assert hidden(store.root) == []


def test_an_adapter_whose_former_self_cannot_be_removed_is_stored(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a warning that names what remains: nothing that was trained is lost."""
    monkeypatch.setattr(shutil, "rmtree", undeletable(store.root / ".one.old"))
    with pytest.warns(ImagicWarning, match=r"the folder that was replaced remains: .*card\.md cannot be deleted"):
        store.write(record(), fill("new"), overwrite=True)
    assert (store.root / "one" / "card.md").read_text() == "new"


def test_a_removal_that_is_cut_off_leaves_no_half(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is gone first; the next look clears up."""

    with interrupted_removal(monkeypatch):
        store.remove("one")
    assert hidden(store.root) == [".one.part"]
    assert store.names() == []
    assert hidden(store.root) == []


def test_unfinished_fits_are_those_with_checkpoints(store: Store) -> None:
    """In order, whatever dots a name has; they are no adapters."""
    for name in ("b", "a", "rex.v2", "x.checkpoints"):
        (store.checkpoints(name) / "embed-000003").mkdir(parents=True)
    assert store.unfinished() == ["a", "b", "rex.v2", "x.checkpoints"]
    assert store.names() == ["one"]
