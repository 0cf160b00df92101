"""The methods that CritterBench compares, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..core.config import EditConfig, Mode, RunConfig
from ..core.errors import ImagicError
from ..core.settings import RECIPES, read_yaml, resolve
from ..methods.bounds import Bounds
from ..methods.imagic import Imagic
from ..methods.method import Method
from ..methods.untuned import prompt_only, sdedit

RECIPE_FILES = Path(__file__).parent
STRENGTHS = (0.5, 0.65, 0.8, 0.9)


def defaults(mode: Mode, changes: Mapping[str, Any] | None = None) -> RunConfig:
    """The settings of a run on the embedded base, with the recipe of a mode and some changes."""
    return resolve({"base": "critters", "tune": {"mode": mode}}, changes or {}, RECIPES["critters"])


def budgeted(mode: Mode, times: float) -> RunConfig:
    """The defaults with so many times the steps of both stages, at rates divided by as many: as long a way by other steps."""
    config = defaults(mode)
    changes: dict[str, Any] = {}
    for stage in ("embed", "tune"):
        usual = getattr(config, stage)
        changes[stage] = {"steps": max(1, round(usual.steps * times)), "learning_rate": usual.learning_rate / times}
    return defaults(mode, changes)


def untuned() -> EditConfig:
    """The sampler of the defaults where nothing is fitted: it adds no noise, at a guidance at which the base follows a sentence well."""
    return defaults("lora").edit.model_copy(update={"ddim_eta": 0.0, "guidance_scale": 3.0})


def reference(name: str, file: str) -> Imagic:
    """A recipe from the YAML files beside this module as it is, on the embedded base at its own size."""
    return Imagic(name, resolve({"base": "critters", "resolution": None}, read_yaml(RECIPE_FILES / file), {}))


CATALOGUE: dict[str, Callable[[], Method]] = {
    "bounds": Bounds,
    "prompt-only": lambda: prompt_only(untuned()),
    "sdedit": lambda: sdedit(untuned(), STRENGTHS),
    "imagic-lora": lambda: Imagic("imagic-lora", defaults("lora"), embedding=True),
    "imagic-full": lambda: Imagic("imagic-full", defaults("full")),
    "reference": lambda: reference("reference", "reference-imagic.yaml"),
    "reference-retuned": lambda: reference("reference-retuned", "reference-imagic-retuned.yaml"),
}


def chosen(names: str | None) -> list[Method]:
    """The methods of a list with commas, in its order; all where there is none.

    Raises:
        ImagicError: a name that is not in the catalogue.
    """
    asked = list(CATALOGUE) if names is None else list(dict.fromkeys(name.strip() for name in names.split(",")))
    for name in asked:
        if name not in CATALOGUE:
            raise ImagicError(f"--methods {name}", f"some of {', '.join(CATALOGUE)}, with commas", "mend the list")
    return [CATALOGUE[name]() for name in asked]
