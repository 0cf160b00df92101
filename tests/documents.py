"""The code blocks of the README and the guide: what each of them is, and which of its commands can run on any machine.

The rules, which CONTRIBUTING.md states for authors:

- An indented block, or one marked ``bash``, is commands, one a line. A block marked ``console`` shows a session: its commands follow ``$``.
- A block marked ``python`` is run. The blocks of a page run one after the other, and what README.md's block defines is there.
- ``yaml`` is parsed. ``text`` and ``csv`` are shown output and contents of files; they hold no commands.
- Any other mark is an error.
- Every ``imagic-lora`` command is parsed by the command line itself. It is also run, unless one of :data:`REASONS` applies to its words.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

from imagic_lora.cli.app import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "guide").glob("*.md"))]
KINDS = ("bash", "console", "csv", "python", "text", "yaml")
OTHER_PROGRAMS = {"hf", "tensorboard"}
"""Programs of others that the guide names, whose arguments are not checked."""


@dataclass(frozen=True)
class Block:
    """A block of code of a page.

    Args:
        page: the page.
        line: number of its first line of code.
        kind: one of :data:`KINDS`.
        code: its text.
    """

    page: Path
    line: int
    kind: str
    code: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """The command lines of the block, without comments."""
        lines = self.code.replace("\\\n", " ").splitlines()
        if self.kind == "console":
            return [line.lstrip()[2:] for line in lines if line.lstrip().startswith("$ ")]
        return [line for line in lines if line.strip() and not line.lstrip().startswith("#")] if self.kind == "bash" else []


def blocks(page: Path) -> list[Block]:
    """The blocks of a page in order, also those in lists."""
    tokens = MarkdownIt().parse(page.read_text(encoding="utf-8"))
    found = []
    for token in tokens:
        if token.type in ("fence", "code_block") and token.map:
            kind = token.info.strip() if token.type == "fence" else "bash"
            found.append(Block(page, token.map[0] + (2 if token.type == "fence" else 1), kind, token.content))
    return found


def words(command: str) -> list[str]:
    """The words of a command line, without variables of the environment before it."""
    found = shlex.split(command, comments=True)
    while found and re.fullmatch(r"[A-Z_]+=\S*", found[0]):
        del found[0]
    return found


def arguments(command: str) -> list[str] | None:
    """The arguments of an ``imagic-lora`` command, also one that a launcher starts; None for another program."""
    found = words(command)
    if found and Path(found[0]).name == "imagic-lora":
        return found[1:]
    return found[found.index("imagic_lora") + 1 :] if "imagic_lora" in found else None


def wrong_program(command: str) -> str | None:
    """Why the command of another program is wrong: an unknown program, target of make, or extra of the package. None if it is right."""
    program, *rest = words(command)
    if program == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        return next((f"no target {target}" for target in rest if target not in targets), None)
    if program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        asked = [extra for word in rest for extra in re.findall(r"imagic-lora\[(\w+)\]", word)]
        return None if asked and set(asked) <= extras.keys() else f"no such extra: {asked}"
    return None if program in OTHER_PROGRAMS else f"unknown program {program}"


def _value(tokens: list[str], flag: str) -> str | None:
    return tokens[tokens.index(flag) + 1] if flag in tokens[:-1] else None


def _other_base(tokens: list[str]) -> bool:
    opens = tokens[0] in ("fit", "batch", "compare") or tokens[:2] in (["bench", "tedbench"], ["bench", "pie"])
    base = _value(tokens, "--base")
    return tokens[0] != "plan" and (base not in (None, "critters") or (opens and base is None) or "--twin" in tokens)


REASONS: dict[str, Callable[[list[str]], bool]] = {
    "the weights of a base that the package does not hold": _other_base,
    "a server on the network, or one that runs until it is stopped": lambda tokens: tokens[0] in ("push", "pull", "web"),
    "an adapter that was pulled from the network": lambda tokens: "rex2" in tokens,
    "models or data from the network": lambda tokens: bool({"--clip", "--dino", "--model"} & {*tokens}) or tokens[:2] == ["bench", "score"],
    "minutes of training": lambda tokens: tokens[0] == "demo" or tokens[:2] == ["bench", "critters"] or "--measure" in tokens,
    "what people answered, or the results of a benchmark": lambda tokens: tokens[0] == "study",
}
"""Why a command is parsed and not run, with what tells such a command by its words."""


def why_not_run(tokens: list[str]) -> str | None:
    """The reason why a command cannot run on any machine, offline and in seconds; None if it can."""
    assert tokens[0] in COMMANDS, tokens
    return next((reason for reason, applies in REASONS.items() if applies(tokens)), None)
