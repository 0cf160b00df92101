"""Untrusted adapters and checkpoints: pickles under every name, hostile JSON with correct hashes, pipes and links in place of files."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import pickle
import shutil
import struct
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import MODES
from huggingface_hub import constants
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from imagic_lora.adapters.full import WEIGHTS
from imagic_lora.adapters.lora import LORA_FILE
from imagic_lora.adapters.record import EMBEDDINGS, RECORD, SOURCE
from imagic_lora.adapters.store import Store
from imagic_lora.bases.loading import registry
from imagic_lora.cli import app as cli
from imagic_lora.core.errors import ImagicError, ImagicWarning
from imagic_lora.training.fit import result
from imagic_lora.training.resuming.checkpoints import CHECKPOINT, STATE

from .bases import Canary
from .fitted import Fitted, drawn, files, fitted, forged, in_time, verdict

Change = Callable[[Path], object]
NAME = "evil"
DEEP: Any = json.loads("[" * 400 + "]" * 400)


@dataclass(frozen=True)
class Case:
    """What is done to the folder of a good adapter, or of a good checkpoint.

    Args:
        of: the adapter's mode, or ``unfinished``.
        harmless: True if it must still be usable, False if it must be rejected, None if both are accepted.
    """

    name: str
    of: str
    change: Change
    harmless: bool | None = False


def pickles(marker: Path) -> dict[str, bytes]:
    """Pickles in three formats that make a folder."""
    zipped, plain = io.BytesIO(), io.BytesIO()
    torch.save({"weight": Canary(marker)}, zipped)
    torch.save({"weight": Canary(marker)}, plain, _use_new_zipfile_serialization=False)
    return {"a pickle": pickle.dumps(Canary(marker)), "a zip of pickles": zipped.getvalue(), "an old checkpoint": plain.getvalue()}


def torture(cases: int, seed: int, folder: Path) -> Iterator[str]:
    """So many of the cases, in an order of the seed."""
    made, work, marker = fitted(folder), folder / "strangers", folder / "marker"
    for content in pickles(marker).values():
        with contextlib.suppress(RuntimeError):  # of the plain pickle, once it is read
            torch.load(io.BytesIO(content), weights_only=False)
        marker.rmdir()  # so the canary sings
    outside = work / "outside"
    every = [*_pickles(made, marker), *_records(outside), *_weights(), *_layers(), *_nodes(outside), *_states(), *_progress()]
    _tried(made, work, marker, Case("", "lora", lambda adapter: None, True))  # what is imported late is not on any case's clock
    for _, work_on in drawn([(case.name, partial(_tried, made, work, marker, case)) for case in every], cases, seed):
        yield work_on()


def _tried(made: Fitted, work: Path, marker: Path, case: Case) -> str:
    shutil.rmtree(work, ignore_errors=True)
    store, outside = Store(work / "store"), work / "outside"
    outside.mkdir(parents=True)
    (outside / "victim").write_text("words")
    for content, name in zip(pickles(marker).values(), ("pytorch_lora_weights.bin", "model.bin", "model.ckpt"), strict=True):
        (outside / name).write_bytes(content)
    (outside / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline", "unet": ["own", "X"]}')
    (outside / "own.py").write_text(_code(marker))
    before = files(outside)
    unfinished = case.of == "unfinished"
    if unfinished:
        place = store.checkpoints(NAME)
        shutil.copytree(made.store.checkpoints(case.of), place)
        case.change(next(place.glob("tune-*")))
    else:
        place = shutil.copytree(made.store.root / case.of, store.root / NAME)
        case.change(place)
    with patch.object(constants, "HF_HUB_OFFLINE", True):
        wrong = [verdict((what, partial(in_time, work_on))) for what, work_on in _uses(made, store, work, case)]
    if marker.exists():
        marker.rmdir()
        wrong.append("something of it was run")
    if (now := files(outside)) != before or {path.name for path in work.iterdir()} > {"store", "outside", "out"}:
        wrong.append(f"something was written elsewhere: {sorted({*now} ^ {*before})}")
    found = "; ".join(filter(None, wrong))
    return f"{case.name} ({case.of}): {found}" if found else ""


def _uses(made: Fitted, store: Store, work: Path, case: Case) -> Iterator[tuple[str, Callable[[], object]]]:
    """Everything that reads it."""
    for tokens in (["list"], ["list", "--json"], ["show", NAME], ["show", NAME, "--json"], ["verify"]):
        yield " ".join(tokens), partial(_command, [*tokens, "--store", str(store.root)])
    yield "names", store.names
    if case.of == "unfinished":
        yield "resumed", partial(_resumed, made, store, case)
        return
    yield "read", partial(_read, store)
    picture = ["edit", NAME, "--store", str(store.root), "--out", str(work / "out"), "--eta", "0.5", "--steps", "1", "--device", "cpu"]
    known = patch.object(registry, "load_base", lambda *_: made.base)
    with contextlib.nullcontext() if "base" in case.name else known:
        yield "edit", partial(_command, picture, case.harmless)


def _command(tokens: list[str], harmless: bool | None = None) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        code = cli.main(tokens)
    assert code in ((0, 2) if harmless is None else (0,) if harmless else (2,)), f"exit code {code}: {errors.getvalue()}"


def _read(store: Store) -> None:
    with contextlib.suppress(ImagicError):
        store.read(NAME)


def _resumed(made: Fitted, store: Store, case: Case) -> None:
    """Resumes the fit, or raises an ImagicError; broken checkpoints are set aside with a warning."""
    with warnings.catch_warnings(), contextlib.nullcontext() if case.harmless else contextlib.suppress(ImagicError):
        warnings.simplefilter("ignore", ImagicWarning)
        result(made.fit(store, NAME, resume=True))


def _code(marker: Path) -> str:
    return f"import os\nos.mkdir({str(marker)!r})\nclass X:\n    pass\n"


def _put(file: str, content: bytes, write_manifest: bool = True) -> Change:
    """Writes a file and its correct hash."""

    def change(adapter: Path) -> None:
        path = adapter / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        if write_manifest:
            forged(adapter, RECORD if (adapter / RECORD).is_file() else CHECKPOINT)

    return change


def _record_with(record: str, change: dict[str, Any]) -> Change:
    return lambda folder: forged(folder, record, **change)


def _pickles(made: Fitted, marker: Path) -> Iterator[Case]:
    kinds = pickles(marker)
    for kind, content in kinds.items():
        for mode in MODES:
            for file in files(made.store.root / mode):
                harmless = None if file.endswith((".md", ".jsonl", "preview.png", "convergence.png", "photo.png", "config.json")) else False
                yield Case(f"{kind} as {file}", mode, _put(file, content, file != RECORD), harmless)
        for file in (STATE, CHECKPOINT):
            yield Case(f"{kind} as {file}", "unfinished", _put(file, content, file != CHECKPOINT), None)
    extra = {
        "lora": ("pytorch_lora_weights.bin", "pytorch_lora_weights.pt", "adapter_model.bin", "adapter_model.safetensors"),
        "full": ("unet/diffusion_pytorch_model.bin", "unet/pytorch_model.bin", "unet/model.ckpt", "unet/model.fp16.safetensors"),
        "unfinished": ("state.pt", "state.bin", "optimizer.bin", "random_states_0.pkl"),
    }
    for of, names in extra.items():
        for file, content in zip(names * 3, list(kinds.values()) * len(names), strict=True):
            yield Case(f"an extra pickle: {file}", of, _put(file, content), True)
    for file in ("unet/own.py", "pipeline.py", "__init__.py", "sitecustomize.py", "conftest.py", "unet/unet.py"):
        yield Case(f"code: {file}", "full", _put(file, _code(marker).encode()), True)
    index = json.dumps({"metadata": {}, "weight_map": {"conv_in.weight": "../../../outside/model.bin"}}).encode()
    yield Case("an index of shards", "full", _put(f"unet/{WEIGHTS}.index.json", index), True)
    names = {"_class_name": "X", "auto_map": {"AutoModel": "own.X"}, "base_model_name_or_path": "../../outside"}
    for of, file in (
        ("full", "unet/config.json"),
        ("full", "unet/adapter_config.json"),
        ("lora", "config.json"),
        ("lora", "adapter_config.json"),
    ):
        yield Case(f"names of code in {file}", of, _put(file, json.dumps(names).encode()), True)


def _records(outside: Path) -> Iterator[Case]:
    """Records with false values, and files that are not records."""
    victim, layers = hashlib.sha256(b"words").hexdigest(), {"component": "unet", "mode": "lora"}
    listed = ("../../outside/victim", str(outside / "victim"), "/etc/passwd", "..", "unet/../../x", "a\0b", "C:\\x", "~", "a/b/c", ".x", "")
    weights = ("../../outside/pytorch_lora_weights.bin", str(outside / "model.bin"), "pytorch_lora_weights.bin", RECORD, "", None, 3)
    bases = (
        str(outside),
        "../outside",
        "owner/..",
        "../../etc",
        "owner/name",
        "..",
        "/",
        "~",
        "",
        "https://x/y",
        "a\0b",
        "/dev/zero",
        None,
        5,
    )
    names = ("../evil", "/evil", "..", "", None, 5, "x" * 10_000, "a\nb", ["a"])
    false_values: dict[str, dict[str, Any]] = {
        **{f"files {name!r}": {"files": {name: victim}} for name in listed},
        **{f"weights {file!r}": {"parts": [layers | {"files": [file]}]} for file in weights},
        **{f"base {name!r}": {"base": {"name": name}} for name in bases},
        "base and revision": {"base": {"name": "owner/name", "revision": "../../.."}},
        "a component": {"parts": [layers | {"component": "transformer", "files": [LORA_FILE]}]},
        "the other mode": {"parts": [layers | {"mode": "full", "files": [f"unet/{WEIGHTS}"]}]},
        "the other mode in the settings": {"config": {"tune": {"mode": "full"}}},
        "no mode with weights in the settings": {"config": {"tune": {"mode": "embedding"}}},
        "no weights": {"parts": []},
        "many weights": {"parts": [layers | {"files": [LORA_FILE]}] * 1000},
        "the same weights twice": {"parts": [layers | {"files": [LORA_FILE] * 2}]},
        "no hash": {"files": {EMBEDDINGS: None}},
        "another version": {"version": 2},
        "a version as text": {"version": "1"},
        "an unknown key": {"surprise": 1},
        "deep": {"versions": {"torch": DEEP}},
        "deep settings": {"config": DEEP},
        "an eta of NaN": {"config": {"eta": math.nan}},
        "a huge seed": {"config": {"seed": 10**400}},
        "a huge photo": {"source": {"size": [10**9, 10**9]}},
        "a photo of nothing": {"source": {"size": [0, 0]}},
        "a negative photo": {"source": {"size": [-5, -5]}},
        "a box outside": {"source": {"box": [0, 0, 10**6, 10**6]}},
        "a box inside out": {"source": {"box": [9, 9, 0, 0]}},
        "a huge box": {"source": {"box": [-(10**30), 0, 10**30, 5]}},
        "no prompt": {"prompt": None},
        "a list": {"created": ["x"]},
    }
    odd: dict[str, dict[str, Any]] = {
        **{f"name {name!r}": {"name": name} for name in names},
        "another fingerprint": {"base": {"fingerprint": "f"}},
        "many files": {"files": {f"f{k}": victim for k in range(20_000)}},
        "version True": {"version": True},
        "version 1.0": {"version": 1.0},
        "NaN": {"seconds": {"embed": math.nan}},
        "infinity": {"losses": {"embed": [math.inf, -math.inf]}},
        "huge memory": {"peak_memory": 10**4000},
        "negative memory": {"peak_memory": -1},
        "a huge resolution": {"config": {"resolution": 4096}},
        "quantised": {"config": {"memory": {"quantize": "nf4"}}},
        "an empty prompt": {"prompt": " "},
        "a huge prompt": {"prompt": "x" * 900_000},
        "a lone surrogate": {"prompt": "\ud800"},
    }
    for name, change in (false_values | odd).items():
        yield Case(f"the record: {name}", "lora", _record_with(RECORD, change), None if name in odd else False)
    nothing = {"empty": "", "null": "null", "a list": "[]", "NUL": "\0" * 100, "deep": "[" * 100_000, "long": "[" + "1," * 2**20 + "1]"}
    for name, text in nothing.items():
        yield Case(f"the record: {name}", "lora", _put(RECORD, text.encode(), write_manifest=False))


def _rewritten(file: str, change: Callable[[dict[str, torch.Tensor], dict[str, str]], object], record: str = RECORD) -> Change:
    """Other tensors or metadata in a safetensors file, with a correct hash."""

    def rewrite(folder: Path) -> None:
        with safe_open(folder / file, "pt") as opened:
            metadata = dict(opened.metadata() or {})
        tensors = load_file(folder / file)
        change(tensors, metadata)
        save_file({name: value.clone() for name, value in tensors.items()}, folder / file, metadata or None)
        forged(folder, record)

    return rewrite


def _layers() -> Iterator[Case]:
    """Settings of PEFT that import, fetch, or change the base."""
    key = "lora_adapter_metadata"
    odd: dict[str, Any] = {
        "megatron_config": {"x": 1}, "megatron_core": "own", "init_lora_weights": "pissa", "auto_mapping": {"parent_library": "own"},
        "eva_config": {"rho": 2}, "loftq_config": {"bits": 4}, "layer_replication": [[0, 10**6]], "modules_to_save": ["conv_in"],
        "r": 10**9, "lora_alpha": math.nan, "target_modules": ".*", "base_model_name_or_path": "../../outside", "bias": "all",
        "rank_pattern": {".*": 10**9}, "alpha_pattern": {".*": 1e9}, "fan_in_fan_out": True, "exclude_modules": ".*",
        "trainable_token_indices": [10**9], "corda_config": {"x": 1}, "runtime_config": {"ephemeral_gpu_offload": True},
        "arrow_config": {"x": 1}, "layers_pattern": "(a+)+$", "layers_to_transform": [10**9], "revision": "../..", "peft_type": "IA3",
        "target_parameters": ["weight"], "use_dora": True, "use_rslora": True, "lora_dropout": 0.5,
    }  # fmt: skip
    for name, value in odd.items():

        def say(_: object, metadata: dict[str, str], name: str = name, value: Any = value) -> None:
            metadata[key] = json.dumps(json.loads(metadata[key]) | {f"unet.{name}": value})

        yield Case(f"PEFT's {name}", "lora", _rewritten(LORA_FILE, say))
    for text in ("", "null", "[]", "{", '{"unet.r": 2}', "[" * 100_000, json.dumps({"unet.r": 10**4000}), "\0"):
        yield Case(
            f"PEFT's settings: {text[:20]!r}", "lora", _rewritten(LORA_FILE, lambda _, metadata, text=text: metadata.update({key: text}))
        )


def _weights() -> Iterator[Case]:
    """Weight files with false headers or unexpected tensors."""
    for of, file, good in (("lora", LORA_FILE, False), ("full", f"unet/{WEIGHTS}", False), ("lora", EMBEDDINGS, False)):
        for dtype in (torch.int64, torch.bool, torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.complex64):
            cast = _rewritten(
                file, lambda tensors, _, dtype=dtype: tensors.update({name: value.to(dtype) for name, value in tensors.items()})
            )
            yield Case(f"{dtype} in {file}", of, cast, None)
        flat = _rewritten(file, lambda tensors, _: tensors.update({name: value.flatten() for name, value in tensors.items()}))
        yield Case(f"other shapes in {file}", of, flat, good)
        yield Case(f"no tensors in {file}", of, _rewritten(file, lambda tensors, _: tensors.clear()))
        yield Case(
            f"one more in {file}", of, _rewritten(file, lambda tensors, _: tensors.update({"unet.own.lora_A.weight": torch.ones(2, 2)}))
        )
        yield Case(f"nothing in {file}", of, _rewritten(file, lambda tensors, _: tensors.update(dict.fromkeys(tensors, torch.empty(0)))))
        for size in (0, 1, 2**31, 2**63, 2**64 - 1):
            yield Case(f"a header of {size} in {file}", of, _put(file, struct.pack("<Q", size) + b"{}"))
        for header in (
            {"x": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 2**64]}},
            {"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 0]}},
        ):
            text = json.dumps(header).encode()
            yield Case(f"a false header in {file}: {header}", of, _put(file, struct.pack("<Q", len(text)) + text))
    for size in ((256, 256), (1, 1), (4096, 8)):
        picture = io.BytesIO()
        Image.new("RGB", size).save(picture, "PNG")
        yield Case(f"a photo of {size}", "lora", _put(SOURCE, picture.getvalue()), False)
        box = {"source": {"box": [0, 0, *size]}}

        def grown(adapter: Path, content: bytes = picture.getvalue(), box: dict[str, Any] = box) -> None:
            (adapter / SOURCE).write_bytes(content)
            forged(adapter, **box)

        yield Case(f"a photo of {size}, all of it", "lora", grown)


def _replaced(file: str, make: Callable[[Path], object]) -> Change:
    def change(folder: Path) -> None:
        (folder / file).unlink()
        make(folder / file)

    return change


def _nodes(outside: Path) -> Iterator[Case]:
    """Files replaced by pipes, folders and links."""

    def link(target: str) -> Callable[[Path], object]:
        return lambda path: path.symlink_to(target)

    kinds: dict[str, Callable[[Path], object]] = {
        "a pipe": os.mkfifo, "a folder": Path.mkdir, "a link to /dev/zero": link("/dev/zero"), "a link to nothing": link("nothing"),
        "a link to itself": lambda path: path.symlink_to(path.name), "a link to a file outside": link(str(outside / "victim")),
        "a link to a terminal": link("/dev/tty"), "a hole of a terabyte": lambda path: (path.touch(), os.truncate(path, 2**40)),
    }  # fmt: skip
    places = {
        "lora": (RECORD, LORA_FILE, SOURCE, "README.md"),
        "full": (f"unet/{WEIGHTS}", "unet/config.json"),
        "unfinished": (STATE, CHECKPOINT),
    }
    for of, names in places.items():
        for file in names:
            for kind, make in kinds.items():
                yield Case(f"{kind} as {file}", of, _replaced(file, make), None if of == "unfinished" else False)

    def moved(adapter: Path) -> None:
        shutil.move(adapter / "unet", outside.parent / "store" / "elsewhere")
        (adapter / "unet").symlink_to("../elsewhere")

    yield Case("a link to a folder elsewhere", "full", moved, None)


def _progress() -> Iterator[Case]:
    """Records of checkpoints; invalid records are skipped in favour of the checkpoint before."""
    changes: dict[str, dict[str, Any]] = {
        f"{key} {str(value)[:40]!r}": {key: value}
        for key, values in {
            "stage": ("embed", "../x", None, 3),
            "step": (-1, 0, 2, 3, 10**9, 10**400, "1", None, 0.5),
            "steps": (-1, 0, 1, 10**9, None),
            "version": (2, None),
            "seconds": ({"tune": math.nan}, {"tune": -1e300}, {"tune": None}, {}, []),
            "threads": (0, -1, 10**9, 10**400, "x"),
            "inputs": ({"photo": "x"}, {"seed": 10**400}, {"embed": DEEP}, {"base": None}, [], None, {"x": "\x1b[2J"}),
            "files": ({"../../../outside/victim": "0" * 64}, {"/etc/passwd": "0" * 64}, {"x": None}, []),
        }.items()
        for value in values
    }
    for name, change in changes.items():
        yield Case(f"the checkpoint: {name}", "unfinished", _record_with(CHECKPOINT, change), None)


def _states() -> Iterator[Case]:
    """Invalid states of a stage."""
    kinds: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
        "nothing": lambda state: state.clear(),
        "flat tensors": lambda state: state.update({name: value.flatten() for name, value in state.items()}),
        "scalars": lambda state: state.update(dict.fromkeys(state, torch.tensor(1.0))),
        "whole numbers": lambda state: state.update({name: value.long() for name, value in state.items()}),
        "names of others": lambda state: [state.update({f"x{name}": state.pop(name)}) for name in list(state)],
    }
    for group in ("latents", "trainables", "optimizer", "losses", "optimised"):
        for kind, change in kinds.items():

            def only(state: dict[str, torch.Tensor], _: object, group: str = group, change: Callable[..., object] = change) -> None:
                part = {name: state.pop(name) for name in list(state) if name.startswith(group)}
                change(part)
                state.update(part)

            yield Case(f"a state with {kind} for {group}", "unfinished", _rewritten(STATE, only, CHECKPOINT), None)
