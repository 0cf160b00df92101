"""Hostile prompts, names and file names in every output of text: escaped, equal when read back, never interpreted."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from huggingface_hub import constants
from PIL import Image

from imagic_lora.adapters.store import Store
from imagic_lora.bases.loading import registry
from imagic_lora.bases.loading.configs import architecture
from imagic_lora.bench import page
from imagic_lora.bench.critters import Bench
from imagic_lora.cli import app as cli
from imagic_lora.cli import console
from imagic_lora.core.config import RunConfig
from imagic_lora.core.errors import ImagicError, ImagicWarning
from imagic_lora.memory.plan import assume
from imagic_lora.memory.prediction import predict
from imagic_lora.photos.png import png
from imagic_lora.photos.reading import read_metadata
from imagic_lora.photos.sheet import sheet
from imagic_lora.training import run

from .fitted import Fitted, drawn, files, fitted, forged, in_time, verdict

FITTED = (  # each of them by a whole fit too
    "[bold red]x[/] [link=http://e]y[/link] [@click=z]w[/]", "\x1b[31mred\x1b[0m", "a\nb\r\nc\n\n  d", "a\0b", "\u202egpj.exe\u202c",
    "a\ud800b", b"a\xff\xfe\x80b".decode("utf-8", "surrogateescape"), "<script>alert(1)</script>",
    "# h\n![x](http://e/x.png) [l](javascript:x)", "dog " * 5_000,
)  # fmt: skip
TEXTS = (
    *FITTED,
    "[/]", "[b", "\\[b]x\\\\[/b]", "x\\", "[[[]]][1, 2]", ":smile: \U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\x1b[2J\x1b[H\x1bc", "\x1b]0;owned\x07", "\x1b]8;;http://e\x1b\\x\x1b]8;;\x1b\\", "\x1b]52;c;ZXZpbA==\x07",
    "\x9b31mx\x9d0;y\x9c\x90z", "safe\b\b\b\bevil\x7f", "safe\revil", "a\x85b\u2028c\u2029d\ve\ff", "\ta\t\tb\t", "\x07" * 50,
    "\u2066a\u2067b\u2068c\u2069", "\u200ea\u200fb\u061c", "a\u200b\u200c\u2060\ufeffb", "\U000e0041\U000e007f", "\ufffe\uffff\U0010ffff",
    "\ue000\U000f0000", "e" + "\u0301" * 400, "שלום", "\ude00\ud83d", "<img src=x onerror=alert(1)>", '" onload="x" \' onload=\'y',
    "&lt;b&gt; &#60; &", "</pre></td></table></html><h1>x", "<!-- x --> ]]> <?x ?>", "```\n<b>x</b>\n```\n---\n| a | b |",
    "    x\n\ty\n> z", "---\nlicense: x\n---", "\"'`´“”", "\\x1b \\n \\", "%s%n%d {} {0.__class__} {x!r}",
    "{{ 7 * 7 }}{% include '/etc/passwd' %}{# x #}", "$(touch x); `id` | rm -rf x & > y", '"}], "x": {"y": 1',
    "!!python/object/apply:os.system ['touch x']", "&a [*a, *a]", "../../etc/passwd", "/etc/passwd", "file:///etc/passwd",
    "owner/na\x1b[1mme", "~/x", "..", "NUL", "COM1.txt", "C:\\x\\CON", "rex.", "-x", "--help", "--", "--json", " \t ", "", "猫が跳ぶ" * 20,
    "x" * 100_000, "a\n" * 2_000, "\x1b[31m" * 2_000,
)  # fmt: skip
NAME = "evil"
Sink = Callable[[Fitted, Path, str], None]


def torture(cases: int, seed: int, folder: Path) -> Iterator[str]:
    """At most ``cases`` of the cases, in a random order."""
    made, work = fitted(folder), folder / "texts"
    pairs = [*product(SINKS.items(), TEXTS), *product([("a fit", _of_a_fit)], FITTED)]
    every = [(f"{name}: {ascii(text)[:60]}", partial(_tried, sink, made, work, text)) for (name, sink), text in pairs]
    for case in drawn(every, cases, seed):
        shutil.rmtree(work, ignore_errors=True)
        yield verdict(case)


def _tried(sink: Sink, made: Fitted, work: Path, text: str) -> None:
    """Runs in a folder so deep that relative paths do not leave it."""
    deep = work / "a/b/c"
    deep.mkdir(parents=True)
    with (
        contextlib.chdir(deep),
        patch.object(constants, "HF_HUB_OFFLINE", True),
        patch.object(registry, "load_base", lambda *_, **__: made.base),
    ):
        in_time(lambda: sink(made, deep, text))


def escaped(text: str) -> str:
    """The escaped form of a text, without spaces."""
    names = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}

    def one(c: str) -> str:
        code = ord(c)
        return (
            c
            if c.isprintable()
            else names.get(c) or (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}")
        )

    return "".join("".join(map(one, text)).split())


class Printed:
    """Captures the output on a very wide terminal and fails on control characters."""

    def __init__(self) -> None:
        self.out, self.err = io.StringIO(), io.StringIO()

    def __enter__(self) -> Printed:
        self._stack = contextlib.ExitStack()
        for one in (console.out, console.err):
            self._stack.enter_context(patch.object(one, "_width", 50_000))
        self._stack.enter_context(contextlib.redirect_stdout(self.out))
        self._stack.enter_context(contextlib.redirect_stderr(self.err))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        bad = {c for c in self.out.getvalue() + self.err.getvalue() if c != "\n" and not c.isprintable()}
        assert not bad, f"{sorted(map(ascii, bad))[:5]} printed"

    def shows(self, text: str, times: int = 1) -> None:
        """Fails unless the text is there, escaped, so many times; the beginning of a long one will do."""
        shown = "".join((self.out.getvalue() + self.err.getvalue()).split())
        assert shown.count(escaped(text[:1000])) >= times, f"shown as {shown[:200]!a}"

    def json(self) -> Any:
        """The JSON on stdout."""
        return json.loads(self.out.getvalue())


def _command(*tokens: object) -> tuple[int, Printed]:
    with Printed() as printed:
        code = cli.main([str(token) for token in tokens])
    assert code in (0, 2), f"exit code {code}"
    return code, printed


def _card(made: Fitted, work: Path, text: str) -> None:
    """The Markdown card has foreign text only in indented blocks."""
    card, plain = run.card(text, text, made.config(), text), run.card("a cat", "tiny", made.config(), "MIT" if text else None)
    quoted = [json.loads(line) for line in card.split("\n") if line.startswith("    ")]
    assert quoted == [text, text, *([text] if text else [])], f"reads {quoted}"
    assert [line for line in card.split("\n") if not line.startswith("    ")] == [
        line for line in plain.split("\n") if not line.startswith("    ")
    ]
    assert card.isascii()
    assert all(c.isprintable() or c == "\n" for c in card)


def _picture(made: Fitted, work: Path, text: str) -> None:
    (work / "x.png").write_bytes(png(Image.new("RGB", (2, 2)), {"prompt": text, text: [text]}))
    assert read_metadata(work / "x.png") == {"prompt": text, text: [text]}


def _sheet(made: Fitted, work: Path, text: str) -> None:
    cell = Image.new("RGB", (8, 8))
    size = sheet([[("photo", cell)] * 2], "a cat").size
    assert sheet([[(text, cell)] * 2], text or "a cat").size == size


def _listed(made: Fitted, work: Path, text: str) -> None:
    """A record in which every text is this one, listed and printed."""
    store = Store(work / "store")
    shutil.copytree(made.store.root / "lora", store.root / NAME)
    forged(
        store.root / NAME, prompt=text, **({} if len(text) > 10_000 else {"base": {"name": text}, "created": text, "seconds": {text: 1.0}})
    )
    for command in (["list"], ["show", NAME]):
        code, printed = _command(*command, "--store", store.root)
        assert code == 0, printed.err.getvalue()
        printed.shows(text)
        code, printed = _command(*command, "--store", store.root, "--json")
        printed_json = printed.json()
        assert (printed_json["adapters"][0] if command == ["list"] else printed_json)["prompt"] == text
    assert _command("verify", "--store", store.root)[0] == 0
    picture = ["edit", NAME, "--store", store.root, "--out", work / "out", "--eta", "1", "--steps", "1", "--device", "cpu"]
    code, _ = _command(*picture, "--start", "noise")
    assert code == (0 if text.strip() else 2)
    if code == 0:
        assert read_metadata(work / "out" / "eta1-seed0.png")["prompt"] == text


def _planted(made: Fitted, work: Path, text: str) -> None:
    """Folders in the store with the text as their name."""
    store = work / "store"
    store.mkdir()
    for name in (f".{text}.checkpoints", f".{text}.part", f".{text}.old", text):
        with contextlib.suppress(OSError, ValueError):  # no name for a file
            (store / name).mkdir()
            (store / name / "adapter.json").write_text("{}")
            (store / name / "embed-000001").mkdir()
    for command in (["list"], ["list", "--json"], ["verify"], ["show", text], ["rm", text]):
        _command(*command, "--store", store)


def _as_photo(made: Fitted, work: Path, text: str) -> None:
    """A file of that name that is not an image."""
    with contextlib.suppress(OSError, ValueError):
        (work / text).write_text("words")
    assert _command("fit", "--base", made.folder, "--device", "cpu", "--", work / text, "a cat")[0] == 2


def _as_settings(made: Fitted, work: Path, text: str) -> None:
    """A YAML file that consists of the text, or has it as a key or as a value."""
    for k, content in enumerate((text, f"{json.dumps(text)}: 3", f"base: {json.dumps(text)}", f"embed: {{steps: {json.dumps(text)}}}")):
        path = work / f"{k}.yaml"
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
        _command("plan", "--config", path)
        if k:
            assert _command("fit", made.photo, "a cat", "--config", path)[0] == 2


def _refused(made: Fitted, work: Path, text: str) -> None:
    for tokens in ([], ["--json"]):
        with Printed() as printed:
            assert console.print_error(ImagicError(text, text, text), tokens) == 2
        printed.shows(text, 3)
    assert printed.json() == {"error": {"got": text, "expected": text, "remedy": text}}


def _interrupted(made: Fitted, work: Path, text: str) -> None:
    for tokens in ([], ["--json"]):
        with Printed() as printed:
            assert console.print_interrupted(text, f"imagic-lora {text}", tokens) == 130
        printed.shows(text, 2)
    assert printed.json() == {"interrupted": text, "resume": f"imagic-lora {text}"}


def _warned(made: Fitted, work: Path, text: str) -> None:
    with warnings.catch_warnings(), Printed() as printed:
        warnings.simplefilter("always")
        console.print_warnings()
        warnings.warn(text, ImagicWarning, stacklevel=1)
        warnings.warn("of another kind", UserWarning, stacklevel=1)
    printed.shows(text)
    assert "another kind" not in printed.err.getvalue()


def _active(made: Fitted, work: Path, text: str) -> None:
    settings = made.config().model_copy(update={"base": text})
    with Printed() as printed:
        console.print_active_settings(made.base.runtime, settings, text, 1, 1)
    printed.shows(text, 2)


def _plan(made: Fitted, work: Path, text: str) -> None:
    settings = RunConfig(base="sd15").model_copy(update={"base": text})
    with Printed() as printed:
        console.print_plan(predict(architecture("critters"), settings, assume(settings)), settings, text)
    printed.shows(text, 2)


def _table(made: Fitted, work: Path, text: str) -> None:
    with Printed() as printed:
        console.out.print(console.cells_table("title", page.Table(("method", "share"), [[text, text]])))
    printed.shows(text, 2)


class Parsed(HTMLParser):
    """The elements of a page, with their attributes' names, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, ...]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, *(name for name, _ in attrs)))

    def handle_endtag(self, tag: str) -> None:
        self.tags.append((f"/{tag}",))

    def handle_comment(self, data: str) -> None:
        self.tags.append(("comment",))

    def handle_pi(self, data: str) -> None:
        self.tags.append(("instruction",))

    def handle_data(self, data: str) -> None:
        self.text += data


def _page(made: Fitted, work: Path, text: str) -> None:
    """The page of a benchmark has the same elements whatever its methods, texts and failures are called."""
    one, other = (_parsed(work, given) for given in ("a cat", text))
    assert other.tags == one.tags, f"other elements: {[tag for tag in other.tags if tag not in one.tags][:5]}"
    shown = "".join(text.encode("utf-8", "backslashreplace").decode().split())
    assert "".join(other.text.split()).count(shown.replace("\0", "\ufffd")) >= 6, "not all of it is there"


def _parsed(work: Path, text: str) -> Parsed:
    means = dict.fromkeys((*page.SHARES, "identity", "background", "psnr", "ssim", "clip"))
    summary = {
        "seed": text, "cases": 1, "failed": 1, "methods": {text: {**means, "kinds": {}, "curve": [], "cost": None}},
        "errors": [{"case": text, "method": text, "error": text}],
    }  # fmt: skip
    bench = Bench(1, 1, [], work)
    bench.folder(0).mkdir(parents=True, exist_ok=True)
    for name in ("source", "truth"):
        Image.new("RGB", (2, 2)).save(bench.folder(0) / f"{name}.png")
    with patch.object(page, "case_at", lambda *_: SimpleNamespace(kind=text, prompt=text)):
        return Parsed(page.write_page(bench, [], summary).read_text(encoding="utf-8"))


def _argument(*tokens: str) -> Sink:
    """A command with the text as one of its arguments: it succeeds or exits with 2, with and without --json."""

    def sink(made: Fitted, work: Path, text: str) -> None:
        store = Store(work / "store")
        shutil.copytree(made.store.root / "lora", store.root / "lora")
        for more in ([], ["--json"]):
            filled = [token.replace("PHOTO", str(made.photo)).replace("TEXT", text) for token in tokens]
            where = (
                ["--store", str(store.root)]
                if tokens[0] in ("fit", "edit", "list", "show", "verify", "rm") and "--store" not in tokens
                else []
            )
            code, printed = _command(*filled, *where, *more)
            if code == 2 and more and "--" not in filled:
                assert set(printed.json()["error"]) == {"got", "expected", "remedy"}

    return sink


def _of_a_fit(made: Fitted, work: Path, text: str) -> None:
    """A fit and an edit with the text as prompt: it is stored unchanged, or the prompt is rejected."""
    quick = ["--embed.steps", "1", "--tune.steps", "1", "--edit.steps", "1", "--rank", "1", "--device", "cpu", "--base", made.folder]
    code, printed = _command("fit", made.photo, text, *quick, "--store", work / "store", "--name", NAME)
    if code == 2:
        return
    adapter = Store(work / "store").read(NAME)
    assert adapter.record.prompt == text
    assert read_metadata(adapter.folder / "preview.png")["prompt"] == text
    lines = [json.loads(line) for line in (adapter.folder / "steps.jsonl").read_text().splitlines()]
    assert [set(line) - {"relative_loss"} for line in lines] == [{"stage", "step", "loss"}] * 2
    assert files(adapter.folder).keys() == files(made.store.root / "lora").keys()
    picture = ["edit", NAME, "--store", work / "store", "--eta", "1", "--steps", "1", "--device", "cpu", "--prompt", text]
    code, printed = _command(*picture, "--json")
    assert code == 0
    assert read_metadata(Path(printed.json()["pictures"][0]["file"]))["prompt"] == text


SINKS: dict[str, Sink] = {
    "the card": _card,
    "a picture": _picture,
    "a sheet": _sheet,
    "a listed record": _listed,
    "names in the store": _planted,
    "a photo's name": _as_photo,
    "settings": _as_settings,
    "an error": _refused,
    "an interruption": _interrupted,
    "a warning": _warned,
    "what is active": _active,
    "a plan": _plan,
    "a table": _table,
    "a page": _page,
    "fit NAME": _argument("fit", "PHOTO", "a cat", "--base", "nobody", "--name", "TEXT"),
    "fit --base": _argument("fit", "PHOTO", "a cat", "--base", "TEXT"),
    "fit --config": _argument("fit", "PHOTO", "a cat", "--config", "TEXT"),
    "fit --rank": _argument("fit", "PHOTO", "a cat", "--rank", "TEXT"),
    "edit NAME": _argument("edit", "TEXT"),
    "edit --eta": _argument("edit", "lora", "--eta", "TEXT"),
    "edit --seed": _argument("edit", "lora", "--seed", "TEXT"),
    "edit --preset": _argument("edit", "lora", "--preset", "TEXT"),
    "edit --out": _argument("edit", "lora", "--steps", "1", "--eta", "1", "--out", "TEXT"),
    "list --store": _argument("list", "--store", "TEXT"),
    "show NAME": _argument("show", "TEXT"),
    "verify NAME": _argument("verify", "TEXT"),
    "rm NAME": _argument("rm", "TEXT"),
    "plan --base": _argument("plan", "--base", "TEXT"),
    "plan --mode": _argument("plan", "--mode", "TEXT"),
    "bench --methods": _argument("bench", "critters", "--methods", "TEXT", "--cases", "0"),
    "a command": _argument("TEXT"),
    "a flag": _argument("list", "--TEXT", "TEXT"),
}
