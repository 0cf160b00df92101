"""The demo: fits and edits one critter image on the embedded base, and compares the edits with the true edit."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path

from PIL import Image

from ..adapters.adapter import Adapter
from ..adapters.contents import read_canvas, read_embeddings
from ..adapters.store import Store
from ..adapters.writing import check_outputs
from ..core.config import EditConfig, RunConfig
from ..core.settings.recipes import RECIPES
from ..core.settings.resolve import resolve
from ..core.text import exact
from ..critters import render, scene_at
from ..photos.png import write_png
from ..photos.sheet import sheet
from ..sampling.editor import Edit, Editor
from ..sampling.generate import generate
from ..sampling.pipelines import negative
from ..training.fit import fit, open_base
from ..training.stage import StepReport

SCENE = 105
CHANGE = {"pose": "jumping"}
ETAS = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def run_demo(out: Path, run_fit: Callable[[Generator[StepReport, None, Adapter | None], RunConfig], Adapter | None]) -> Path:
    """Fits the image, edits it at several etas, and writes the images and ``sheet.png``.

    Args:
        out: folder for the images and the adapter; created if it does not exist.
        run_fit: runs a fit with its settings to its end and returns the adapter.

    Returns:
        The path of the sheet.
    """
    check_outputs(out, ["photo.png", "sheet.png", *(_file_name(eta) for eta in ETAS)])
    scene = scene_at("demo", SCENE)
    prompt = f"a {scene.animal} {CHANGE['pose']}"
    photo = render(scene)
    photo_path = out / "photo.png"
    photo.save(photo_path)
    config = resolve({"base": "critters"}, {}, RECIPES["critters"])
    base = open_base(config)
    adapter = run_fit(fit(photo_path, prompt, config, Store(out / "adapters"), "demo", base=base, overwrite=True), config)
    assert adapter is not None
    editor = Editor(base)
    untuned = _sample_untuned(editor, adapter, config.edit, config.seed)
    edits = list(editor.edit(adapter, ETAS, [config.seed], config.edit))
    for result in edits:
        write_png(result.image, out / _file_name(result.eta), {"prompt": prompt, "eta": result.eta, "seed": result.seed})
    truth = render(scene.edited(**CHANGE))
    write_png(_demo_sheet(photo, untuned, edits, truth, prompt), out / "sheet.png", {"prompt": prompt})
    return out / "sheet.png"


def _file_name(eta: float) -> str:
    return f"eta{exact(eta)}.png"


def _sample_untuned(editor: Editor, adapter: Adapter, config: EditConfig, seed: int) -> Image.Image:
    """Samples from the untuned base with ``e_opt``: the reconstruction after stage 1 alone."""
    editor.close()
    stored = read_embeddings(adapter)
    e_opt = stored["optimised"]
    null = negative(editor.base, config, stored.get("null"))
    return next(generate(editor.base, [e_opt], [seed], config, read_canvas(adapter), null, [e_opt]))


def _demo_sheet(photo: Image.Image, untuned: Image.Image, edits: list[Edit], truth: Image.Image, prompt: str) -> Image.Image:
    labelled = [(f"eta {result.eta:g}" + (" (reconstruction)" if result.eta == 0 else ""), result.image) for result in edits]
    cells = [("photo", photo), ("e_opt, before tuning", untuned), *labelled, ("true edit", truth)]
    half = (len(cells) + 1) // 2
    return sheet([cells[:half], cells[half:]], f'"{prompt}"')
