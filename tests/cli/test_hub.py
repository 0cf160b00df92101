"""push and pull against a fake of the client of the Hub, and against the real client without a network."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from common import Run, opened
from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import httpx
from PIL import Image

import imagic_lora.adapters.hub as hub
import imagic_lora.cli.console as console
from imagic_lora.adapters.compress import compress
from imagic_lora.adapters.contents import read_canvas, with_photo
from imagic_lora.adapters.export import export
from imagic_lora.adapters.hub import push_files
from imagic_lora.adapters.store import Store
from imagic_lora.core.errors import ImagicError, ImagicWarning
from imagic_lora.sampling.kept import KeptEditor

REPO = "ann/rex-jumps"
SHOWS = {"source.png", "preview.png", "photo.png"}
"""The files of the example that show its photo."""
EXAMPLES = Path(__file__).parents[2] / "adapters"


class FakeHub:
    """Repositories as lists of commits, each the files by path: the calls of HfApi that push and pull make, with its errors."""

    def __init__(self) -> None:
        self.repos: dict[str, list[dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.token: str | None = "hf_fake"
        self.fails: Callable[[str], None] = lambda call: None
        self.downloaded: list[str] = []

    @staticmethod
    def error(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
        return kind("refused", response=httpx.Response(status, request=httpx.Request("GET", "https://hub.test")))

    def files(self, repo: str, revision: str | None = None) -> dict[str, bytes]:
        if repo not in self.repos:
            raise self.error(RepositoryNotFoundError, 404)
        if revision is not None and not (revision.isdigit() and int(revision) < len(self.repos[repo])):
            raise self.error(RevisionNotFoundError, 404)
        return self.repos[repo][-1 if revision is None else int(revision)]

    def model_info(self, repo: str, revision: str | None = None, files_metadata: bool = False) -> Any:
        self.fails("model_info")
        files = self.files(repo, revision)
        siblings = [SimpleNamespace(rfilename=path, size=len(files[path]) if files_metadata else None) for path in files]
        return SimpleNamespace(siblings=siblings, sha=revision or str(len(self.repos[repo]) - 1), private=self.private[repo])

    def create_repo(self, repo: str, private: bool) -> None:
        assert repo not in self.repos
        self.repos[repo], self.private[repo] = [{".gitattributes": b"* lfs"}], private

    def delete_repo(self, repo: str, missing_ok: bool) -> None:
        del self.repos[repo]

    def create_commit(self, repo: str, operations: list[Any], commit_message: str, parent_commit: str | None) -> Any:
        self.fails("create_commit")
        assert parent_commit in (None, str(len(self.repos[repo]) - 1))
        files = dict(self.files(repo))
        for operation in operations:
            if isinstance(operation, CommitOperationAdd):
                with operation.as_file() as file:
                    files[operation.path_in_repo] = file.read()
            else:
                del files[operation.path_in_repo]
        self.repos[repo].append(files)
        return SimpleNamespace(commit_url=f"https://hub.test/{repo}/commit/1")

    def hf_hub_download(self, repo: str, file: str, revision: str, local_dir: Path) -> str:
        self.fails("hf_hub_download")
        self.downloaded.append(file)
        path = Path(local_dir, file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.files(repo, revision)[file])
        return str(path)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """The Hub, in place of the client."""
    there = FakeHub()
    monkeypatch.setattr(hub, "HfApi", lambda **_: there)
    monkeypatch.setattr(hub, "get_token", lambda: None)
    monkeypatch.setattr(console.err, "width", 400)
    return there


@pytest.fixture
def store(run: Run, tmp_path: Path) -> Path:
    """A store with the example rex-jumps, whose record is written by this version."""
    assert run("import", EXAMPLES / "rex-jumps", "--store", tmp_path / "store")[0] == 0
    return tmp_path / "store"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sent(run: Run, store: Path, *flags: str) -> None:
    code, _, err = run("push", "rex-jumps", REPO, "--with-photo", "--yes", "--store", store, *flags)
    assert code == 0, err


def test_a_push_and_a_pull_give_the_same_bytes(run: Run, fake: FakeHub, store: Path) -> None:
    """Every file, in one commit; the card has what the Hub searches, and ends with the adapter's own page."""
    sent(run, store, "--private")
    assert (fake.private[REPO], len(fake.repos[REPO])) == (True, 2)
    code, out, err = run("pull", REPO, "--store", "mine", "--json")
    assert code == 0, err
    assert contents(Path("mine/rex-jumps")) == contents(store / "rex-jumps")
    assert json.loads(out)["name"] == "rex-jumps"
    assert [path.name for path in Path("mine").iterdir()] == ["rex-jumps"]
    card = fake.files(REPO)["README.md"].decode()
    front = yaml.safe_load(card.split("---\n")[1])
    assert {"lora", "imagic", "imagic-lora"} <= set(front["tags"])
    assert (front["license"], front["widget"][0]["output"]["url"]) == ("apache-2.0", "preview.png")
    assert "base_model" not in front  # critters is in the package, not on the Hub
    assert card.encode().endswith((store / "rex-jumps/README.md").read_bytes())


def test_the_card_names_a_base_of_the_hub_and_its_licence(store: Path) -> None:
    """base_model with the relation adapter is what the Hub's search term base_model:adapter:... reads."""
    from imagic_lora.adapters.hub_card import card_data

    adapter = Store(store).read("rex-jumps")
    for name, base, licence in (
        ("sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5", "creativeml-openrail-m"),
        ("sd35-medium", None, "other"),
    ):
        adapter.record = adapter.record.model_copy(update={"base": adapter.record.base.model_copy(update={"name": name})})
        data = card_data(adapter).to_dict()
        assert data["base_model"] == (base or "stabilityai/stable-diffusion-3.5-medium")
        assert (data["base_model_relation"], data["license"]) == ("adapter", licence)
    assert data["license_name"] == "Stability-AI-Community-License"


def test_nothing_is_sent_without_yes(run: Run, fake: FakeHub, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of a dry run has every file: those that would be sent, and those that show the photo. A row is one line, however narrow."""
    monkeypatch.setattr(console.out, "width", 40)
    rows: dict[str, list[str]] = {}
    for flags in ((), ("--with-photo",)):
        code, out, _ = run("push", "rex-jumps", REPO, "--store", store, *flags)
        assert (code, "EXIF" in out, "Nothing was sent" in out, "nearly the photo" in out) == (0, True, True, True)
        lines = out.splitlines()
        rows[" ".join(flags)] = lines
        for file, content in contents(store / "rex-jumps").items():
            if file not in ("README.md", "adapter.json"):
                assert any(file in line and f"{len(content):,}" in line for line in lines)
    end = next(k for k, line in enumerate(rows[""]) if line.startswith("Not sent"))
    assert [line.split()[0] for line in rows[""][end + 1 : -2]] == ["source.png", "preview.png", "photo.png"]
    assert not any(line.startswith("Not sent") for line in rows["--with-photo"])
    for flags, sent, withheld in (((), set(), SHOWS), (("--with-photo",), SHOWS, set())):
        code, out, _ = run("push", "rex-jumps", REPO, "--store", store, "--json", *flags)
        found = json.loads(out)
        assert (code, found["sent"], set(found["shows_photo"]), set(found["withheld"])) == (0, False, sent, withheld)
        assert SHOWS & set(found["files"]) == sent
    assert fake.repos == {}


def test_a_base_that_only_this_machine_has_is_named(run: Run, fake: FakeHub, fitted: Callable[..., Any], tmp_path: Path) -> None:
    """A path of this machine; those of the package and of the Hub are not."""
    adapter = fitted("embedding")
    code, _, err = run("push", adapter.name, "ann/x", "--store", adapter.folder.parent)
    assert (code, f"the base {adapter.record.base.name} is a path of this machine" in err) == (0, True), err
    code, _, err = run("push", "rex-jumps", REPO, "--store", EXAMPLES)
    assert (code, "is a path" in err) == (0, False)


@pytest.fixture
def pulled(run: Run, fake: FakeHub, store: Path) -> Path:
    """A store with rex-jumps as somebody else has it after a push without the photo."""
    code, _, err = run("push", "rex-jumps", REPO, "--yes", "--store", store)
    assert (code, "without the photo" in err) == (0, True), err
    code, _, err = run("pull", REPO, "--store", "mine")
    photo = hashlib.sha256((store / "rex-jumps/photo.png").read_bytes()).hexdigest()
    assert (code, f"SHA-256 {photo}" in err, "--photo PHOTO" in err) == (0, True, True), err
    return Path("mine").resolve()


def test_a_push_without_the_photo_sends_nothing_that_shows_it(run: Run, fake: FakeHub, store: Path, pulled: Path) -> None:
    """Not its pixels, not its file, no preview; the record has its hash and that of the canvas. Every other file has the same bytes."""
    before, after = contents(store / "rex-jumps"), contents(pulled / "rex-jumps")
    assert before.keys() - after.keys() == SHOWS
    assert {file for file in after if after[file] != before[file]} == {"adapter.json"}
    assert not SHOWS & fake.files(REPO).keys()
    card = fake.files(REPO)["README.md"].decode()
    assert ("widget" in card, "<Gallery />" in card, "--photo FILE" in card) == (False, False, True)
    source = json.loads(after["adapter.json"])["source"]
    assert "file" not in source
    assert source["sha256"] == hashlib.sha256(before["photo.png"]).hexdigest()
    with Image.open(store / "rex-jumps/source.png") as image:
        canvas = {"canvas": list(image.size), "pixels": hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()}
    assert source["withheld"] == canvas | {"sha256": hashlib.sha256(before["source.png"]).hexdigest()}
    code, out, _ = run("push", "rex-jumps", "ann/again", "--yes", "--store", pulled, "--json")
    assert (code, json.loads(out)["sent"], json.loads(out)["withheld"]) == (0, True, {})
    code, _, err = run("push", "rex-jumps", "ann/more", "--yes", "--with-photo", "--store", pulled)
    assert (code, "was sent without its photo" in err, "ann/more" in fake.repos) == (2, True, False)


def test_an_adapter_without_its_photo_edits_with_the_photo_as_before(run: Run, store: Path, pulled: Path) -> None:
    """Start noise works without it. Start inverted needs its file, and then makes the same pixels; another photo is refused."""
    with KeptEditor().reused():  # one load of the base, as in the worker of the studio
        photo, few = store / "rex-jumps/photo.png", ("--steps", "2", "--eta", "0.8")
        noise = (*few, "--start", "noise", "--ddim-eta", "0")
        for name, folder, flags in (
            ("whole", store, few), ("with", pulled, (*few, "--photo", photo)), ("noise", store, noise), ("without", pulled, noise),
        ):  # fmt: skip
            code, _, err = run("edit", "rex-jumps", "--store", folder, "--out", name, *flags)
            assert code == 0, err
        file = "eta0.8-seed0.png"
        assert pixels("whole", file) == pixels("with", file) != pixels("noise", file) == pixels("without", file)
        assert pixels("whole", "sheet.png") == pixels("with", "sheet.png")
        with Image.open("noise/sheet.png") as two, Image.open("without/sheet.png") as one:
            assert one.width < two.width  # it has no photo to show
        (Path("other.png")).write_bytes(photo.read_bytes() + b"0")
        for flags, expected in (
            (few, "--start inverted needs the photo"),
            ((*few, "--photo", "other.png"), "other.png is not the photo"),
            ((*noise, "--keep", "auto"), "does not hold its photo"),
            (("--steps", "2", "--eta", "auto", "--start", "noise", "--ddim-eta", "0"), "--eta auto compares images with the photo"),
        ):
            code, _, err = run("edit", "rex-jumps", "--store", pulled, "--out", "refused", *flags)
            assert (code, expected in err, "Traceback" in err, Path("refused/sheet.png").exists()) == (2, True, False, False), err
        code, _, err = run("edit", "rex-jumps", "--store", pulled, "--out", "kept", *few, "--keep", "auto", "--photo", photo)
        assert code == 0, err
        code, _, err = run("reproduce", f"whole/{file}", "--store", pulled)
        assert (code, "--start inverted needs the photo" in err) == (2, True), err
        code, _, err = run("reproduce", f"whole/{file}", "--store", pulled, "--photo", photo)
        assert (code, "Identical" in err) == (0, True), err


def test_other_commands_on_an_adapter_without_its_photo(run: Run, store: Path, pulled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """list, show, verify, rename, import, export, a sweep; a record that contradicts itself; a canvas that another Pillow makes."""
    assert run("verify", "--store", pulled)[0] == 0
    code, out, _ = run("show", "rex-jumps", "--store", pulled)
    assert (code, "withheld_photo" in out) == (0, True)
    assert run("list", "--store", pulled)[0] == 0
    assert run("rename", "rex-jumps", "rex", "--store", pulled)[0] == 0
    assert run("import", pulled / "rex", "--store", "third")[0] == 0
    for kind in ("kohya", "diffusers"):
        assert run("export", "rex", "--format", kind, "--store", pulled, "--out", kind)[0] == 0
    photo = store / "rex-jumps/photo.png"
    code, _, err = run("export", "rex", "--format", "kohya", "--store", pulled, "--out", "again", "--photo", photo)
    assert (code, "needs no photo from elsewhere" in err) == (2, True)
    code, _, err = run("sweep", "rex", "--store", pulled)
    assert (code, "a sweep compares images with the photo" in err) == (2, True)
    record = pulled / "rex/adapter.json"
    fields = json.loads(record.read_bytes())
    fields["source"]["file"] = "photo.png"
    forge(record, fields)
    code, _, err = run("import", pulled / "rex", "--store", "fourth")
    assert (code, "the photo is withheld" in err) == (2, True), err
    del fields["source"]["file"]
    fields["source"]["withheld"]["pixels"] = "0" * 64
    forge(record, fields)
    adapter = with_photo(Store(pulled).read("rex"), photo)
    with pytest.warns(ImagicWarning, match="has other pixels than in the fit"):
        canvas = read_canvas(adapter)
    assert torch.equal(canvas.pixels, read_canvas(Store(store).read("rex-jumps")).pixels)
    fields["source"]["withheld"]["canvas"] = [8, 8]
    forge(record, fields)
    with pytest.raises(ImagicError, match="of a canvas of 8x8 pixels"):
        read_canvas(Store(pulled).read("rex"))


def test_what_is_made_of_an_adapter_without_its_photo(fitted: Callable[..., Any], folder: Path, photo_file: Path, tmp_path: Path) -> None:
    """A compressed one has no photo either; ComfyUI's workflow that starts from the photo gets the canvas of the photo's file."""
    full = bare(fitted("full"), tmp_path / "bare", start="noise")
    small = compress(full, opened(folder), 2, Store(tmp_path / "small"), "small")
    assert small.withheld
    assert not {"source.png", "preview.png"} & small.record.files.keys()
    lora, whole = bare(fitted("lora"), tmp_path / "bare", start="image"), fitted("lora")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImagicWarning)  # of the sampler
        with pytest.raises(ImagicError, match=r"the workflow loads the photo.*--photo FILE"):
            export(lora, "comfyui", tmp_path / "out")
        export(with_photo(lora, photo_file), "comfyui", tmp_path / "out")
    assert pixels(str(tmp_path / "out" / lora.name / "input"), f"{lora.name}.png") == pixels(str(whole.folder), "source.png")


def bare(adapter: Any, store: Path, start: str) -> Any:
    """A copy of an adapter without its photo, with another start of its edits."""
    target = store / adapter.name
    for file, content in push_files(adapter, photo=False).items():
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        (target / file).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    (target / "README.md").write_bytes((adapter.folder / "README.md").read_bytes())
    fields = json.loads((target / "adapter.json").read_bytes())
    fields["config"]["edit"]["start"] = start
    forge(target / "adapter.json", fields)
    return Store(store).read(adapter.name)


def forge(path: Path, fields: dict[str, Any]) -> None:
    """Writes a record with the right hash of its own."""
    fields.pop("sha256", None)
    digest = hashlib.sha256((json.dumps(fields, indent=2) + "\n").encode()).hexdigest()
    path.write_text(json.dumps(fields | {"sha256": digest}, indent=2) + "\n")


def pixels(folder: str, file: str) -> bytes:
    with Image.open(Path(folder, file)) as image:
        return image.tobytes()


def test_a_push_that_fails_leaves_nothing(run: Run, fake: FakeHub, store: Path) -> None:
    """No token, a wrong name, another kind of repository, an adapter that is there, a lost connection in the middle."""

    def refused(expected: str, repo: str = REPO, *flags: str) -> None:
        before = {name: list(commits) for name, commits in fake.repos.items()}
        code, _, err = run("push", "rex-jumps", repo, "--with-photo", "--yes", "--store", store, *flags)
        assert (code, expected in err, "Traceback" in err, fake.repos) == (2, True, False, before), err

    refused("not the name of a repository", "rex")
    fake.token = None
    refused("no token")
    fake.token = "hf_fake"

    def lost(call: str) -> None:
        if call == "create_commit":
            raise httpx.ConnectError("gone")

    def forbidden(call: str) -> None:
        if call == "create_commit":
            raise fake.error(HfHubHTTPError, 403)

    for fake.fails, expected in ((lost, "cannot be reached"), (forbidden, "status 403")):
        refused(expected)
    fake.fails = lambda call: None
    fake.repos["ann/model"], fake.private["ann/model"] = [{"config.json": b"{}"}], False
    refused("is not an adapter", "ann/model", "--overwrite")
    sent(run, store)
    refused("holds an adapter")
    refused("is public", REPO, "--private", "--overwrite")
    fake.repos[REPO][-1] = fake.repos[REPO][-1] | {"old.safetensors": b"0"}
    sent(run, store, "--overwrite")
    assert "old.safetensors" not in fake.files(REPO)


def test_a_pull_that_is_refused_stores_nothing(run: Run, fake: FakeHub, store: Path) -> None:
    """A changed file, a pickle, another kind of repository, no such repository or revision, no network."""
    sent(run, store)
    good = fake.files(REPO)

    def refused(expected: str, files: dict[str, bytes] | None = None, *flags: str) -> None:
        fake.repos[REPO] = [files or good]
        code, _, err = run("pull", REPO, "--store", "mine", *flags)
        assert (code, expected in err, "Traceback" in err, ".pull-" in err) == (2, True, False, False), err
        assert not list(Path("mine").iterdir())

    weights = good["pytorch_lora_weights.safetensors"]
    refused(
        f"{REPO}/pytorch_lora_weights.safetensors is missing or has changed",
        good | {"pytorch_lora_weights.safetensors": weights[:-1] + b"x"},
    )
    refused("has changed", good | {"README.md": good["README.md"] + b"more"})
    refused("not a valid manifest", good | {"adapter.json": good["adapter.json"].replace(b"jumping", b"running")})
    refused("has no source.png", {file: content for file, content in good.items() if file != "source.png"})
    refused("at most", good | {"adapter.json": b" " * (2**20 + 1)})
    fake.downloaded.clear()
    refused("pickle", good | {"weights/unet.BIN": b"0"})
    refused("is not an adapter", {"config.json": b"{}"})
    assert fake.downloaded == []
    refused("no revision v9", None, "--revision", "v9")

    def lost(call: str) -> None:
        if call == "hf_hub_download" and len(fake.downloaded) == 3:
            raise httpx.ReadTimeout("gone")

    fake.fails = lost
    fake.downloaded.clear()
    refused("cannot be reached")
    fake.fails = lambda call: None
    fake.repos = {}
    code, _, err = run("pull", REPO, "--store", "mine")
    assert (code, "shows no repository" in err) == (2, True)


def test_a_revision_and_a_name(run: Run, fake: FakeHub, store: Path) -> None:
    """The files are those of that commit; unlisted ones are not downloaded; a taken name is refused before any request."""
    sent(run, store)
    fake.repos[REPO][1]["evil.py"] = b"raise SystemExit"
    fake.repos[REPO].append({"config.json": b"{}"})
    assert run("pull", REPO, "--revision", "1", "--name", "rex", "--store", "mine")[0] == 0
    assert "evil.py" not in fake.downloaded
    assert not Path("mine/rex/evil.py").exists()
    digest = [hashlib.sha256((folder / "source.png").read_bytes()).digest() for folder in (Path("mine/rex"), store / "rex-jumps")]
    assert digest[0] == digest[1]
    fake.fails = lambda call: pytest.fail(call)
    code, _, err = run("pull", REPO, "--name", "rex", "--store", "mine")
    assert (code, "exists" in err) == (2, True)


def test_the_real_client_without_a_network(run: Run, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed port, then HF_HUB_OFFLINE."""
    monkeypatch.setattr(console.err, "width", 400)
    monkeypatch.setattr(hub, "HfApi", lambda **_: HfApi(endpoint="http://127.0.0.1:9", token="hf_fake"))
    push = ("push", "rex-jumps", REPO, "--with-photo", "--yes", "--store", store)
    pull = ("pull", REPO, "--store", "mine")
    for expected in ("cannot be reached", "HF_HUB_OFFLINE"):
        for command in (push, pull):
            code, _, err = run(*command)
            assert (code, expected in err) == (2, True), err
        assert not list(Path("mine").iterdir())
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
