"""Adapters on disk: whole and unchanged, or refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from common import MODES, opened, output
from safetensors.torch import load_file

from imagic_lora.conditioning import Conditioning
from imagic_lora.config import Mode, RunConfig
from imagic_lora.errors import ImagicError
from imagic_lora.images import read_photo, to_canvas
from imagic_lora.store import EMBEDDINGS, RECORD, Adapter, BaseRecord, Record, SourceRecord, Store, save_embeddings

BAD_NAMES = ["", ".", "..", ".hidden", "a/b", "../a", "/a", "a\\b", "a b", "-a", "a\n", "a" * 101, "é"]


def record(name: str = "one", **changes) -> Record:
    """A record of nothing in particular."""
    given = Record(
        name=name,
        created="2030-01-01T00:00:00+00:00",
        base=BaseRecord(name="tiny", revision=None, fingerprint="f"),
        parts=[],
        prompt="a cat",
        config=RunConfig(base="tiny", eta=0.3),
        source=SourceRecord(sha256="0", size=(3, 2), box=(0, 0, 3, 2)),
        losses={"embed": (1.5, 0.25)},
        seconds={"embed": 0.1},
        runtime={"device": "cpu"},
        peak_memory=7,
        versions={"torch": "2"},
    )
    return given.model_copy(update=changes)


def fill(text: str = "words") -> Callable[[Path], None]:
    """Writes a file, and another in a folder."""

    def write(folder: Path) -> None:
        (folder / "card.md").write_text(text)
        (folder / "unet").mkdir()
        (folder / "unet/config.json").write_text("{}")

    return write


def hidden(root: Path) -> list[str]:
    """Names beginning with a dot in a folder."""
    return [path.name for path in root.iterdir() if path.name.startswith(".")]


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


@pytest.mark.parametrize(("key", "value"), [("version", 2), ("prompt", None), ("surprise", 1), ("files", ["card.md"])])
def test_a_record_of_another_shape_is_refused(store: Store, key: str, value: object) -> None:
    """Another version, a missing or an unknown field."""
    path = store.root / "one" / RECORD
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ImagicError, match="cannot be read"):
        store.read("one")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"é'])
def test_a_broken_record_is_refused(store: Store, text: str) -> None:
    """Nothing but a JSON object will do."""
    (store.root / "one" / RECORD).write_text(text, encoding="latin-1")
    with pytest.raises(ImagicError, match="cannot be read"):
        store.read("one")


def test_an_unknown_name_says_which_there_are(store: Store) -> None:
    """So that a misspelling is seen at once."""
    with pytest.raises(ImagicError, match=r"no adapter 'two'.*\(one\)"):
        store.read("two")


def test_an_existing_name_is_refused(store: Store) -> None:
    """What is there stays."""
    with pytest.raises(ImagicError, match="exists"):
        store.write(record(), fill("other words"))
    assert (store.read("one").folder / "card.md").read_text() == "words"


def test_overwrite_replaces_the_whole_folder(store: Store) -> None:
    """Files of the old adapter do not linger."""
    store.write(record(prompt="a dog"), lambda folder: (folder / "new.md").touch(), overwrite=True)
    assert store.read("one").record.prompt == "a dog"
    assert {path.name for path in (store.root / "one").iterdir()} == {"new.md", RECORD}
    assert hidden(store.root) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failing_write_leaves_the_old_adapter(store: Store, error: type[BaseException]) -> None:
    """And nothing of its own."""

    def fail(folder: Path) -> None:
        fill("other words")(folder)
        raise error

    for name in ("one", "two"):
        with pytest.raises(error):
            store.write(record(name), fail, overwrite=True)
    assert (store.read("one").folder / "card.md").read_text() == "words"
    assert [path.name for path in store.root.iterdir()] == ["one"]


def test_everything_is_flushed_before_it_has_its_name(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file and folder of an adapter while it is hidden, and then the folder that names it."""
    flushed, sync = [], os.fsync

    def spy(handle: int) -> None:
        flushed.append((os.fstat(handle).st_ino, (store.root / "two").exists()))
        sync(handle)

    monkeypatch.setattr(os, "fsync", spy)
    folder = store.write(record("two"), fill()).folder
    assert {(path.stat().st_ino, False) for path in [*folder.rglob("*"), folder]} == set(flushed[:-1])
    assert flushed[-1] == (store.root.stat().st_ino, True)


def test_a_folder_that_cannot_be_written_to_is_refused_beforehand(tmp_path: Path) -> None:
    """Here a file stands where the folder should be."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ImagicError, match="cannot be written to"):
        Store(tmp_path / "file").prepare("one", overwrite=False)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_is_no_name_is_refused(store: Store, name: str) -> None:
    """To read, to write and to check."""
    for refused in (store.read, lambda name: store.prepare(name, False), lambda name: store.write(record(name), fill(), overwrite=True)):
        with pytest.raises(ImagicError, match="as a name"):
            refused(name)
    assert store.names() == ["one"]


@pytest.mark.parametrize("name", ["a", "A-1", "rex.v2_b", "0", "a" * 100])
def test_a_good_name_is_taken(store: Store, name: str) -> None:
    """Letters, digits, dot, underscore and hyphen."""
    assert store.write(record(name), fill()).record.name == name


def test_names_are_those_of_whole_adapters(store: Store) -> None:
    """In order; not the hidden, the half-written, or loose files."""
    store.write(record("B"), fill())
    for name in (".two.1.part", "three"):
        (store.root / name).mkdir()
    shutil.copy(store.root / "one" / RECORD, store.root / ".two.1.part")
    (store.root / "loose.txt").write_text("")
    assert store.names() == ["B", "one"]


def test_a_store_that_is_not_there_is_empty(tmp_path: Path) -> None:
    """Asking does not make it."""
    store = Store(tmp_path / "none")
    assert store.names() == []
    assert not store.root.exists()


@pytest.mark.parametrize("mode", MODES)
def test_an_adapter_holds_no_pickle(fitted: Callable[..., Adapter], mode: Mode) -> None:
    """Only formats that cannot run code, and every one as the design lists it."""
    files = {path.relative_to(fitted(mode).folder).as_posix() for path in fitted(mode).folder.rglob("*") if path.is_file()}
    lora, full = {"pytorch_lora_weights.safetensors"}, {"unet/config.json", "unet/diffusion_pytorch_model.safetensors"}
    common = {"adapter.json", "embeddings.safetensors", "source.png", "preview.png", "steps.jsonl", "README.md"}
    assert files == common | (lora if mode == "lora" else full)


def test_embeddings_come_back_as_they_were(tmp_path: Path) -> None:
    """Tokens, pooled and extra inputs of each kind, under the names of the design."""
    extra = {"sizes": torch.tensor([[64.0, 48.0]])}
    named = {kind: Conditioning(torch.rand(1, 3, 4), torch.rand(1, 5), extra) for kind in ("target", "optimised", "null")}
    save_embeddings(tmp_path, named)
    assert sorted(load_file(tmp_path / EMBEDDINGS)) == sorted(f"{kind}.{part}" for kind in named for part in ("tokens", "pooled", "sizes"))
    found = Adapter(tmp_path, record()).embeddings()
    assert found.keys() == named.keys()
    for kind, value in named.items():
        assert found[kind].tensors().keys() == value.tensors().keys()
        assert all(torch.equal(found[kind].tensors()[name], tensor) for name, tensor in value.tensors().items())


def test_the_canvas_is_the_one_trained_on(fitted: Callable[..., Adapter], photo_file: Path) -> None:
    """Bit-equal pixels, the same box and size, from the adapter alone."""
    expected, found = to_canvas(read_photo(photo_file).image, 32, 8), fitted("lora").canvas()
    assert torch.equal(found.pixels, expected.pixels)
    assert (found.box, found.size) == (expected.box, expected.size)


@pytest.mark.parametrize("mode", MODES)
def test_size_counts_weights_and_embeddings(fitted: Callable[..., Adapter], mode: Mode) -> None:
    """What a user has to keep, not the pictures."""
    adapter = fitted(mode)
    kept = [*adapter.folder.rglob("*.safetensors"), *adapter.folder.rglob("config.json")]
    assert adapter.size == sum(path.stat().st_size for path in kept)


@pytest.mark.parametrize("mode", MODES)
def test_a_worn_adapter_is_taken_off(folder: Path, fitted: Callable[..., Adapter], mode: Mode) -> None:
    """The output differs while it is worn, and is bit-equal afterwards."""
    base = opened(folder)
    before = output(base)
    with fitted(mode).worn_by(base):
        assert not torch.equal(output(base), before)
    assert torch.equal(output(base), before)
