"""The demo: one picture of the embedded world, edited, beside its true edit."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path

from PIL import Image

from ..adapters.adapter import Adapter
from ..adapters.contents import read_canvas, read_embeddings
from ..adapters.store import Store
from ..core.config import EditConfig, RunConfig
from ..core.settings import RECIPES, resolve
from ..critters import render, scene_at
from ..photos.png import write_png
from ..photos.sheet import sheet
from ..sampling.editor import Edit, Editor
from ..sampling.generate import generate
from ..training.fit import fit, open_base
from ..training.stage import StepReport

SCENE = 45
CHANGE = {"pose": "jumping"}
ETAS = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def run_demo(out: Path, shown: Callable[[Generator[StepReport, None, Adapter | None], RunConfig], Adapter | None]) -> Path:
    """Fits, edits over eta, and writes ``sheet.png`` and every picture of it into ``out``.

    Args:
        shown: runs a fit to its end, as its user wants to see it.
    """
    out.mkdir(parents=True, exist_ok=True)
    scene = scene_at("demo", SCENE)
    prompt = f"a {scene.animal} {CHANGE['pose']}"
    photo = out / "photo.png"
    picture = render(scene)
    picture.save(photo)
    config = resolve({"base": "critters"}, {}, RECIPES["critters"])
    base = open_base(config)
    adapter = shown(fit(photo, prompt, config, Store(out / "adapters"), "demo", base=base, overwrite=True), config)
    assert adapter is not None
    editor = Editor(base)
    before = embedding_alone(editor, adapter, config.edit, config.seed)
    edits = list(editor.edit(adapter, ETAS, [config.seed], config.edit))
    for one in edits:
        write_png(one.image, out / f"eta{one.eta:g}.png", {"prompt": prompt, "eta": one.eta, "seed": one.seed})
    truth = render(scene.edited(**CHANGE))
    page = _page(picture, before, edits, truth, prompt)
    write_png(page, out / "sheet.png", {"prompt": prompt})
    return out / "sheet.png"


def embedding_alone(editor: Editor, adapter: Adapter, config: EditConfig, seed: int) -> Image.Image:
    """The reconstruction from ``e_opt`` on the untuned base."""
    editor.close()
    stored = read_embeddings(adapter)
    e_opt = stored["optimised"]
    return next(generate(editor.base, [e_opt], [seed], config, read_canvas(adapter), stored.get("null"), [e_opt]))


def _page(photo: Image.Image, before: Image.Image, edits: list[Edit], truth: Image.Image, prompt: str) -> Image.Image:
    named = [(f"eta {one.eta:g}" + (" (reconstruction)" if one.eta == 0 else ""), one.image) for one in edits]
    cells = [("photo", photo), ("e_opt, before tuning", before), *named, ("true edit", truth)]
    half = (len(cells) + 1) // 2
    return sheet([cells[:half], cells[half:]], f'"{prompt}"')
