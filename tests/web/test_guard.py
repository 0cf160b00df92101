"""Who gets in: sign-in, forged sessions, other sites, paths through names, uploads, what a photo says about its owner."""

from __future__ import annotations

import base64
import http.client
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from common import slow_but
from conftest import REPO, Server
from PIL import Image

from imagic_lora.core.errors import ImagicError
from imagic_lora.photos.reading import read_mask
from imagic_lora.web.fields import arguments_of, field_of, settings_of
from imagic_lora.web.guard import MAX_UPLOAD, Access, Guard
from imagic_lora.web.jobs import Queue
from imagic_lora.web.uploads import Uploads

WEBSOCKET = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}
SOCKET = "/_nicegui_ws/socket.io/?EIO=4&transport=websocket"


def request(server: Server, path: str, method: str = "GET", body: bytes | None = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)) as connection:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        with connection.getresponse() as answer:
            content = b"" if answer.status == 101 else answer.read()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, content


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A studio behind a password."""
    folder = tmp_path_factory.mktemp("locked")
    (folder / "password").write_text("correct horse\nsecond line\n")
    one = Server(folder, "--auth", f"ada:{folder / 'password'}")
    yield one
    one.close()


@pytest.mark.web
def test_other_sites_get_nothing(server: Server):
    own, other = f"http://127.0.0.1:{server.port}", "http://evil.example"
    assert request(server, "/")[0] == 200
    assert request(server, "/", Host="evil.example")[0] == 403  # DNS rebinding
    assert request(server, "/adapters/rex-jumps/preview.png", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="no-cors")[0] == 403
    assert request(server, "/", "POST", b"", Origin=other)[0] == 403
    assert request(server, "/", "POST", b"", Origin="null")[0] == 403
    assert request(server, "/", "POST", b"", Sec_Fetch_Site="cross-site")[0] == 403
    assert request(server, SOCKET, Origin=other, **WEBSOCKET)[0] == 403
    assert request(server, SOCKET, Origin=own, **WEBSOCKET)[0] == 101
    headers = request(server, "/")[1]
    assert headers["x-frame-options"] == "DENY"
    assert "default-src 'self'" in headers["content-security-policy"]


@pytest.mark.web
@pytest.mark.parametrize(
    "path",
    [
        "/adapters/..%2f..%2fetc/preview.png",
        "/adapters/rex-jumps/adapter.json",
        "/adapters/rex-jumps/..%2f..%2fserver.log",
        "/adapters/.web/preview.png",
        "/uploads/..%2fqueue.lock",
        "/uploads/%00",
        "/jobs/1234567890-0123456789abcdef/job.json",
        "/jobs/..%2f..%2frex-jumps/adapter.json",
        "/jobs/1234567890-0123456789abcdef/out/..%2f..%2f..%2fqueue.lock",
        "/jobs/1234567890-0123456789abcdef/out/%2fetc%2fpasswd",
        "/jobs/1234567890-0123456789abcdef/out/link.png",
    ],
)
def test_names_are_no_paths(server: Server, path: str):
    folder = server.store / ".web/jobs/1234567890-0123456789abcdef/out"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "link.png").is_symlink():
        (folder / "link.png").symlink_to("/etc/hostname")
    assert request(server, path)[0] == 404


@pytest.mark.web
def test_a_body_is_limited_before_it_is_stored(server: Server):
    own = f"http://127.0.0.1:{server.port}"
    assert request(server, "/x/upload/y", "POST", Origin=own, Content_Length=str(200 * 2**20))[0] == 413
    assert request(server, "/", "POST", Origin=own, Content_Length=str(2**20 + 1))[0] == 413
    assert request(server, "/", "POST", Origin=own, Content_Length="-1")[0] in (400, 413)


@pytest.mark.web
def test_nobody_enters_without_the_password(locked: Server):
    own = f"http://127.0.0.1:{locked.port}"
    form = {"Origin": own, "Content_Type": "application/x-www-form-urlencoded"}
    for path in ("/", "/adapters/rex-jumps/preview.png", "/_nicegui/3.18.0/static/nicegui.js", "/?token=correct+horse"):
        status, _, body = request(locked, path)
        assert status == 401
        assert b"Password" in body
    for cookie in ("imagic-lora-session=", "imagic-lora-session=abc", 'imagic-lora-session="', "imagic-lora-session=" + "A" * 43):
        assert request(locked, "/", Cookie=cookie)[0] == 401
        assert request(locked, SOCKET, Origin=own, Cookie=cookie, **WEBSOCKET)[0] == 403
    for body in (b"user=ada&secret=wrong", b"user=eve&secret=correct+horse", b"secret=correct+horse", b"user=ada&secret=", b"\xff" * 99):
        assert request(locked, "/login", "POST", body, **form)[0] == 401
    assert request(locked, "/login", "POST", b"user=ada&secret=correct+horse", Origin="http://evil.example")[0] == 403
    status, headers, _ = request(locked, "/login", "POST", b"user=ada&secret=correct+horse", **form)
    assert status == 303
    assert "HttpOnly" in headers["set-cookie"]
    assert "SameSite=Strict" in headers["set-cookie"]
    session = headers["set-cookie"].split(";")[0]
    assert request(locked, "/", Cookie=session)[0] == 200
    assert request(locked, SOCKET, Origin=own, Cookie=session, **WEBSOCKET)[0] == 101


WRONG = [
    ["--host", "0.0.0.0"],
    ["--auth", "ada:/nowhere"],
    ["--auth", "ada"],
    ["--token", "--auth", "ada:x"],
    ["--port", "0"],
    ["--host", "x.invalid", "--token"],
]


@pytest.mark.parametrize("flags", slow_but(WRONG[:2], WRONG))
def test_other_addresses_need_a_secret(flags: list[str], tmp_path: Path):
    command = [sys.executable, "-m", "imagic_lora", "web", "--store", str(tmp_path), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(REPO)})
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert flags[0] in done.stderr


def test_a_token_admits_by_its_address_only_where_tokens_are_used():
    access = Access("0.0.0.0", None, "secret")
    assert access.login({"secret": ["secre"]}) is None
    session = access.login({"secret": ["secret"]})
    assert session is not None
    assert access.admits(f"imagic-lora-session={session}")
    assert not Access("0.0.0.0", None, "secret").admits(f"imagic-lora-session={session}")
    assert Access("127.0.0.1").login({"secret": [""]}) is None


@pytest.mark.parametrize("host", ["127.0.0.1:80", "localhost:7860", "[::1]:7860"])
def test_names_of_this_machine_are_its_own(host: str):
    assert Access("127.0.0.1").host_allowed(host)
    assert not Access("127.0.0.1").host_allowed(f"{host}.evil.example")


def test_a_body_without_a_length_is_counted():
    import asyncio

    async def app(scope, receive, send):
        while (await receive()).get("more_body"):
            pass
        raise AssertionError

    sent = []

    async def receive():
        return {"type": "http.request", "body": b"0" * 2**19, "more_body": True}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": [(b"host", b"localhost")]}
    asyncio.run(Guard(app, Access("127.0.0.1"))(scope, receive, send))
    assert sent[0]["status"] == 413


def photo(size: tuple[int, int] = (64, 32), **options) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, options.pop("format", "JPEG"), **options)
    return file.getvalue()


def test_a_preview_is_upright_and_says_nothing_of_its_owner(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x8298] = 6, "Secret camera", "Ada Lovelace"
    uploads = Uploads(Queue(tmp_path))
    stored = uploads.add("../../holiday/<b>.JPG", photo(exif=exif))
    assert stored.startswith("uploads/")
    assert stored.endswith(".jpg")
    assert "/" not in stored.removeprefix("uploads/")
    data = uploads.preview(stored).read_bytes()
    assert b"Secret" not in data
    assert b"Ada" not in data
    with Image.open(io.BytesIO(data)) as preview:
        assert preview.size == uploads.size(stored) == (32, 64)
        assert not preview.getexif()


@pytest.mark.parametrize(
    "data", [b"", b"no photo", b"<svg onload=alert(1)>", b"\x89PNG\r\n\x1a\n" + b"0" * 100, photo()[:300], b"0" * (MAX_UPLOAD + 1)]
)
def test_what_is_no_photo_is_not_kept(tmp_path: Path, data: bytes):
    uploads = Uploads(Queue(tmp_path))
    with pytest.raises(ImagicError) as caught:
        uploads.add("<img src=x>.png", data)
    assert str(tmp_path) not in str(caught.value)
    assert not uploads.folder.is_dir() or not list(uploads.folder.iterdir())


@pytest.mark.parametrize("name", ["../queue.lock", "uploads/../queue.lock", "/etc/passwd", "", "a" * 32, "a" * 31 + "/"])
def test_uploads_are_no_paths(tmp_path: Path, name: str):
    with pytest.raises(ImagicError, match="no upload"):
        Uploads(Queue(tmp_path)).path(name)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (png(Image.new("L", (9, 9), 255)), "has 9x9 pixels"),
        (png(Image.new("L", (64, 32))), "is black everywhere"),
        (png(Image.new("RGB", (64, 32), "red")), "has colours"),
        (b"<svg onload=alert(1)>", "<svg"),
        (b"", "0 bytes"),
    ],
)
def test_what_is_no_mask_is_not_kept(tmp_path: Path, data: bytes, message: str):
    """With the messages of the command line, and without the paths of this machine."""
    uploads = Uploads(Queue(tmp_path))
    with pytest.raises(ImagicError) as caught:
        uploads.add_mask("mask.png", data, (64, 32))
    assert message in str(caught.value) or message == "<svg"
    assert str(tmp_path) not in str(caught.value)
    assert not uploads.folder.is_dir() or not list(uploads.folder.iterdir())


def test_a_painted_mask_gets_the_size_of_the_photo(tmp_path: Path):
    """It is sharp: white or black. Its file is found again by its hash as long as a job names it."""
    queue, small = Queue(tmp_path), Image.new("L", (20, 10))
    small.paste(255, (0, 0, 10, 10))
    uploads = Uploads(queue)
    stored = uploads.add_painted(f"data:image/png;base64,{base64.b64encode(png(small)).decode()}", (2000, 1000))
    mask = read_mask(uploads.path(stored), (2000, 1000))
    assert set(mask.image.get_flattened_data()) == {0, 255}
    assert mask.image.getbbox() == pytest.approx((0, 0, 1000, 1000), abs=4)
    assert uploads.mask_of(mask.sha256) is None
    queue.submit("edit", {"name": "rex", "keep": stored})
    assert uploads.mask_of(mask.sha256) == stored


@pytest.mark.parametrize(
    "url", ["", "data:image/png;base64,", "data:image/png;base64,!", "data:text/html;base64,AAAA", "file:///etc/passwd"]
)
def test_what_is_not_painted_is_no_mask(tmp_path: Path, url: str):
    with pytest.raises(ImagicError):
        Uploads(Queue(tmp_path)).add_painted(url, (64, 32))


def test_arguments_have_fields_with_their_flags_and_help():
    from imagic_lora.cli.commands.compare import compare

    names = ("settings", "seed", "budget", "offline", "clip")
    fields = {one.path: one for one in arguments_of(compare, names)}
    assert [(fields[name].flag, fields[name].kind) for name in names] == [
        ("--set", "lines"), ("--seed", "int"), ("--budget", "float"), ("--offline", "bool"), ("--clip", "text"),
    ]  # fmt: skip
    assert fields["seed"].default == 0
    assert fields["settings"].help.startswith("A setting of the one method")


def test_every_setting_has_a_field_with_its_limits_and_help():
    from imagic_lora.core.config import RunConfig

    settings = {one.path: one for one in settings_of(RunConfig)}
    rank = settings["tune.rank"]
    assert (rank.flag, rank.kind, rank.low, rank.high, rank.default) == ("--rank", "int", 1, 1024, 16)
    assert settings["tune.mode"].choices == ("lora", "full", "embedding")
    assert settings["edit.scheduler"].choices[0] == "base"
    assert settings["tune.alpha"].kind == "float"
    assert all(one.help for one in settings.values())


@pytest.mark.parametrize(
    ("message", "field"),
    [("--rank 0", "tune.rank"), ("tune.rank = 0", "tune.rank"), ("--rankle 0", None), ("edit.steps = 0", "edit.steps"), ("nothing", None)],
)
def test_an_error_finds_its_field(message: str, field: str | None):
    assert field_of(message, {"tune.rank": "--rank", "edit.steps": "--edit.steps", "embed.steps": "--embed.steps"}) == field
