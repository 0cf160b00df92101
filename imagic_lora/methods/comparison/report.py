"""The files of a comparison: the images, a labelled sheet, an HTML page, and the results as JSON."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ...core.text import json_text
from ...photos.page import page_template
from ...photos.png import png
from ...photos.sheet import sheet
from ..method import EditRequest
from .candidates import NAMES
from .running import Outcome

SHEET, PAGE, RESULTS = "sheet.png", "index.html", "results.json"
_COLUMNS = 5  # images in a row of the sheet
_SIDE = 640  # longest side of an image on the page, in pixels
_FORMS = {"alignment": "+.2f", "fidelity": ".2f", "ssim": ".2f", "outside": ".1f"}
_MEANINGS = {
    "alignment": "how much better the target prompt explains the image than the source prompt, or the empty one; 0 is equal",
    "fidelity": "how near the image is to the photo in latents: 1 is equal",
    "ssim": "structural similarity to the photo: 1 is equal",
    "outside": "change outside the mask, in levels of 255",
    "clip": "similarity to the target prompt by CLIP",
    "clip_direction": "similarity of the change to that of the prompts by CLIP",
    "dino": "similarity to the photo by DINOv2",
}


def ordered(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Sorts outcomes as the catalogue lists the methods: Imagic first."""
    return sorted(outcomes, key=lambda outcome: NAMES.index(outcome.candidate.name))


def results(request: EditRequest, about: Mapping[str, Any], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Returns the content of ``results.json``.

    Args:
        request: the request that all methods got.
        about: what else the comparison depends on.
        outcomes: what came of each method.
    """
    prompts = {"target_prompt": request.target_prompt, "source_prompt": request.source_prompt, "seed": request.seed}
    prompts |= {"subject": request.subject} if request.subject else {}
    return {"version": 1, **about, **prompts, "methods": [_flat(outcome) for outcome in ordered(outcomes)]}


def _flat(outcome: Outcome) -> dict[str, Any]:
    one, result = outcome.candidate, outcome.result
    found: dict[str, Any] = {"name": one.name, "settings": dict(one.settings), "left_out": outcome.left_out}
    passes = one.passes
    found["predicted"] = {"passes": passes._asdict() if passes else None, "peak_bytes": one.peak}
    found["predicted"] |= {"once": one.once} if one.once else {}
    if result is None:
        return found
    images, values = _extras(outcome), {name: value for name, value in result.extras.items() if not isinstance(value, Image.Image)}
    files = {"file": f"{one.name}.png", "images": {name: f"{one.name}.{name}.png" for name in images}}
    return found | files | {"extras": values, "scores": dict(outcome.scores), "cost": vars(result.cost)}


def _extras(outcome: Outcome) -> dict[str, Image.Image]:
    extras = outcome.result.extras if outcome.result else {}
    return {name: value for name, value in extras.items() if isinstance(value, Image.Image)}


def files(request: EditRequest, summary: Mapping[str, Any], outcomes: Sequence[Outcome]) -> Iterator[tuple[str, bytes]]:
    """Yields name and content of every file of a comparison; the results come last.

    Args:
        request: the request that all methods got.
        summary: from :func:`results`.
        outcomes: what came of each method.
    """
    common = {name: summary[name] for name in ("base", "seed", "target_prompt", "source_prompt")}
    for outcome in ordered(outcomes):
        if outcome.result is None:
            continue
        name = outcome.candidate.name
        metadata = common | {"method": name, "settings": dict(outcome.candidate.settings)}
        yield f"{name}.png", png(outcome.result.image, metadata)
        for extra, image in _extras(outcome).items():
            yield f"{name}.{extra}.png", png(image, metadata)
    yield "photo.png", png(request.photo, None)
    yield SHEET, png(drawn_sheet(request, outcomes), common)
    yield PAGE, page(request, summary, outcomes).encode("utf-8", "backslashreplace")
    yield RESULTS, json_text(summary).encode()


def drawn_sheet(request: EditRequest, outcomes: Sequence[Outcome]) -> Image.Image:
    """Arranges the photo, the mask and the edits, each below the name of its method."""
    cells = [("photo", request.photo)] + ([("mask", request.mask)] if request.mask else [])
    cells += [(outcome.candidate.name, outcome.result.image) for outcome in ordered(outcomes) if outcome.result]
    return sheet([cells[start : start + _COLUMNS] for start in range(0, len(cells), _COLUMNS)], f'"{request.target_prompt}"')


def page(request: EditRequest, summary: Mapping[str, Any], outcomes: Sequence[Outcome]) -> str:
    """Returns the HTML page. All text is escaped; images are data URLs, so that the page loads nothing, and it runs no script."""
    made = [outcome for outcome in ordered(outcomes) if outcome.result]
    names = list(dict.fromkeys(name for outcome in made for name in outcome.scores))
    return page_template(Path(__file__).parent).render(
        summary=summary,
        pixelated=max(request.photo.size) < 256,
        photo=_data_url(request.photo),
        mask=_data_url(request.mask) if request.mask else None,
        scores={name: _MEANINGS.get(name, "") for name in names},
        cards=[_card(outcome, names) for outcome in made],
        left_out=[(outcome.candidate.name, outcome.left_out) for outcome in ordered(outcomes) if outcome.result is None],
    )


def _card(outcome: Outcome, names: Sequence[str]) -> dict[str, Any]:
    one, result = outcome.candidate, outcome.result
    assert result is not None
    scores = [format(outcome.scores[name], _FORMS.get(name, ".3f")) if name in outcome.scores else "-" for name in names]
    cost = result.cost
    return {
        "name": one.name,
        "image": _data_url(result.image),
        "extras": {name: _data_url(image) for name, image in _extras(outcome).items()},
        "scores": dict(zip(names, scores, strict=True)),
        "passes": f"{cost.forward:,}" + (f" + {cost.backward:,} backward" if cost.backward else ""),
        "seconds": f"{cost.seconds:,.1f}",
        "peak": f"{one.peak / 2**30:.1f}" if one.peak else "-",
        "settings": json.dumps(dict(one.settings), indent=1, ensure_ascii=False),
    }


def _data_url(image: Image.Image) -> str:
    small = image.copy()
    small.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    return "data:image/png;base64," + base64.b64encode(png(small, None)).decode("ascii")
