"""Helpers of several rooms' tests: bases on the CPU, tiny settings, bit-exact comparison."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from imagic_lora.adapters.adapter import Adapter
from imagic_lora.adapters.contents import read_canvas
from imagic_lora.bases.base import Base
from imagic_lora.bases.loading.registry import load_base
from imagic_lora.core.config import EditConfig, Mode, RunConfig, TunedMode
from imagic_lora.core.device_config import MemoryConfig
from imagic_lora.core.runtime import Processes, resolve_runtime
from imagic_lora.core.settings.merging import merged
from imagic_lora.core.settings.reading import validated
from imagic_lora.sampling.edit_pipeline import EditPipeline

KINDS: list[Literal["epsilon", "v_prediction"]] = ["epsilon", "v_prediction"]
MODES: list[Mode] = ["lora", "full", "embedding"]
TUNED: list[TunedMode] = ["lora", "full"]
PROMPT = "a cat"
Run = Callable[..., tuple[int, str, str]]
"""Runs a command: its exit code, stdout and stderr."""


def each(names: str, cases: Iterable[Any] | Mapping[str, Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Runs a test's body for every case within one test, for many cheap cases of one behaviour; a failure is noted with its case.

    A case has a tmp_path and a monkeypatch of its own; all cases share the other fixtures of the test.

    Args:
        names: the arguments that a case fills, separated by commas, as for pytest.mark.parametrize.
        cases: a value or a tuple of values for each case; the keys of a mapping are the names that failures give.
    """
    arguments = [name.strip() for name in names.split(",")]
    named = list(cases.items()) if isinstance(cases, Mapping) else [(repr(case), case) for case in cases]

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @wraps(test)
        def run(**fixtures: Any) -> None:
            for k, (name, case) in enumerate(named):
                given = fixtures | dict(zip(arguments, case if len(arguments) > 1 else (case,), strict=True))
                if "tmp_path" in given:
                    given["tmp_path"] = given["tmp_path"] / str(k)
                    given["tmp_path"].mkdir()
                try:
                    with pytest.MonkeyPatch.context() as patch:
                        test(**(given | ({"monkeypatch": patch} if "monkeypatch" in given else {})))
                except BaseException as error:
                    error.add_note(f"in the case {names} = {name}")
                    raise

        signature = inspect.signature(test)
        fixtures = [parameter for name, parameter in signature.parameters.items() if name not in arguments]
        run.__signature__ = signature.replace(parameters=fixtures)  # pyright: ignore[reportAttributeAccessIssue]
        return run

    assert named, "no cases"
    return decorate


def slow_but(fast: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """The cases of pytest.mark.parametrize, of which ``make test`` runs some and ``make test-slow`` the others.

    Args:
        fast: the cases that ``make test`` runs.
        cases: all cases; a tuple is the values of several arguments.
    """
    fast, cases = list(fast), list(cases)
    assert all(case in cases for case in fast), "a fast case is none"
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*one, marks=() if case in fast else pytest.mark.slow) for case, one in zip(cases, values, strict=True)]


def loaded(folder: Path | str, mode: Mode = "lora", **memory) -> Base:
    """A newly loaded base on the CPU, for a fit in that mode. Its weights are mapped from its files, as those of a command are."""
    return load_base(str(folder), resolve_runtime(MemoryConfig(device="cpu", **memory)), master_weights=mode == "full")


def opened(folder: Path, mode: Mode = "lora", **memory) -> Base:
    """A base like that of :func:`loaded`: a copy, which takes a third of the time, where no file has changed since it was loaded.

    Its weights are in memory, at other alignments, so the last bits of what it computes may be others.
    """
    files = sorted(path for path in (folder.rglob("*") if folder.is_dir() else (folder,)) if path.is_file())
    state = tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    if not state:  # a name, or nothing
        return loaded(folder, mode, **memory)
    base = _kept(folder, state, mode, tuple(memory.items()))
    return deepcopy(base, {id(tokenizer): tokenizer for tokenizer in getattr(base, "_tokenizers", {}).values()})


@lru_cache(32)
def _kept(folder: Path, files: tuple[tuple[Path, int, int], ...], mode: Mode, memory: tuple[tuple[str, Any], ...]) -> Base:
    return loaded(folder, mode, **dict(memory))


def tiny_config(folder: Path, mode: Mode = "lora", **changes) -> RunConfig:
    """A run of 3 + 4 steps, or 3 in mode embedding, whose edits visibly differ from the photo; alpha differs from the rank.

    It measures no convergence, which takes a third of its time.
    """
    lora = {"rank": 4, "alpha": 2.0, "targets": "attention+conv"} if mode == "lora" else {}
    steps = {} if mode == "embedding" else {"steps": 4, "learning_rate": 0.01, "batch_size": 2}
    settings = {
        "base": str(folder),
        "embed": {"steps": 3, "learning_rate": 0.05, "batch_size": 2},
        "tune": {"mode": mode} | steps | lora,
        "edit": {"steps": 2, "guidance_scale": 3.0},
        "memory": {"device": "cpu"},
        "monitoring": {"convergence_every": 0},
    }
    return validated(merged(settings, changes))


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of a module's state."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two states have the same names in the same order, and bit-equal values."""
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def output(base: Base) -> Tensor:
    """The denoiser's output for fixed inputs."""
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return base.predict(noise, torch.tensor([10, 700]), base.encode_prompt(PROMPT))


def by_diffusers(pipe: Any, adapter: Adapter, eta: float, seed: int, config: EditConfig) -> Image.Image:
    """The edit by diffusers alone, from the files of an adapter.

    Args:
        pipe: diffusers' pipeline of the base; its weights are changed.
    """
    mode = adapter.record.config.tune.mode
    if mode == "lora":
        pipe.load_lora_weights(adapter.folder)
    elif mode == "full":
        component = adapter.record.parts[0].component
        setattr(pipe, component, type(getattr(pipe, component)).from_pretrained(adapter.folder / component))
    stored = load_file(adapter.folder / "embeddings.safetensors")
    names = [name for name in ("tokens", "pooled") if f"target.{name}" in stored]
    mixed = {name: eta * stored[f"target.{name}"] + (1 - eta) * stored[f"optimised.{name}"] for name in names}
    height, width = read_canvas(adapter).pixels.shape[2:]
    kwargs: dict[str, Any] = {"prompt_embeds": mixed["tokens"], "height": height, "width": width}
    if "null.tokens" in stored:
        kwargs["negative_prompt_embeds"] = stored["null.tokens"]
    if "pooled" in mixed:
        kwargs |= {"pooled_prompt_embeds": mixed["pooled"], "negative_pooled_prompt_embeds": stored["null.pooled"]}
    kwargs |= {"guidance_scale": config.guidance_scale, "num_inference_steps": config.steps}
    image = pipe(**kwargs, generator=torch.Generator().manual_seed(seed)).images[0]
    return read_canvas(adapter).restored(image)


def by_pipeline(edit: EditPipeline, seed: int) -> Image.Image:
    """The edit by the pipeline of ``Editor.pipeline``, at the size of the photo."""
    generator = torch.Generator().manual_seed(seed)
    return edit.restored(edit.pipe(**edit.prompt_kwargs, **edit.sampling_kwargs, generator=generator).images[0])


def array(image: Image.Image) -> np.ndarray:
    """Pixels as signed integers."""
    return np.asarray(image).astype(int)


def read_comparison(folder: str) -> dict[str, dict[str, Any]]:
    """The methods in the results of a comparison, by name."""
    return {method["name"]: method for method in json.loads(Path(folder, "results.json").read_text(encoding="utf-8"))["methods"]}


class SimulatedProcess(Processes):
    """One of several processes without the others: averaging leaves its tensors unchanged."""

    def __init__(self, rank: int, count: int) -> None:
        super().__init__()
        self.rank, self.count = rank, count
