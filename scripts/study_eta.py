"""Fixed etas against the rules that choose one, on CritterBench: ``python scripts/study_eta.py --cases 100``.

Every case is fitted and edited over a grid of etas, and its images are scored as ``imagic-lora sweep`` scores them. A rule sees these
scores and nothing else; the judge only says whether the chosen image is a success. The best fixed eta and the best rule are chosen on the
cases of one seed (``--choose``), and both are claimed on the cases of another (``--claim``). Each rule is tried on the whole grid
(``sweep``) and as the search of ``edit --eta auto`` (``auto``), with three kinds of alignment:

- ``untuned``: the target prompt against the optimised embedding, on the base without the adapter; that of the product
- ``tuned``: the same with the adapter applied
- ``null``: the target prompt against the unconditional embedding, on the base without the adapter

``passes`` are samples through the denoiser before the edit itself: sampling, inversion and scores. The measurements of a seed are kept in a
file, so that another rule is tried in a second.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from study_critters import Fitted, Options, Variant, applied, edited, fitted, scale_of

from imagic_lora.bases.base import Base
from imagic_lora.bases.loading.known import CRITTERS
from imagic_lora.bases.loading.progress import hide_progress_bars
from imagic_lora.bases.loading.registry import load_base
from imagic_lora.bench.cases import case_at
from imagic_lora.bench.metrics import CritterAlignment
from imagic_lora.bench.scores import Scorer
from imagic_lora.bench.summary import bootstrapped
from imagic_lora.core.conditioning import Conditioning
from imagic_lora.core.config import EditConfig, MemoryConfig
from imagic_lora.core.runtime import resolve_runtime
from imagic_lora.critters import render
from imagic_lora.critters.judge import Judge
from imagic_lora.photos.canvas import to_image, to_pixels
from imagic_lora.sampling.sweeps.scores import PROBES, alignment, fidelity
from imagic_lora.sampling.sweeps.suggest import RULES, Curves, search

ETAS = [k / 10 for k in range(13)]
FIXED = (0.5, 0.6, 0.7, 0.8, 0.9)
KINDS = ("untuned", "tuned", "null")
Curve = dict[float, "Point"]
"""The images of a case by eta."""


@dataclass(frozen=True)
class Point:
    """What is known of an image: its eta, its scores, the alignment by its kind, and whether the judge calls it a success."""

    eta: float
    fidelity: float
    alignments: dict[str, float]
    success: bool
    alignment: float = 0.0
    """The alignment of the kind that a rule sees."""


def measured(base: Base, scorer: Scorer, seed: int, count: int, variant: Variant) -> list[Curve]:
    """Fits the cases of a seed as one batch, and measures their images over :data:`ETAS`."""
    cases = [case_at(seed, index) for index in range(count)]
    latents = torch.cat([base.encode_image(to_pixels(render(case.source))) for case in cases])
    fit, scale = fitted(base, latents, cases, variant), scale_of(variant.config.tune)
    curves: list[Curve] = [{} for _ in cases]
    references = torch.empty(0)
    for eta in ETAS:
        at = Variant(variant.name, variant.config.model_copy(update={"eta": eta}), variant.options)
        with applied(base, fit.layers, scale, Options(), sampling=True):
            images = [to_image(image) for image in base.decode(edited(base, latents, fit, cases, at))]
        found = base.encode_image(torch.cat([to_pixels(image) for image in images]))
        references = references if len(references) else found
        for k, case in enumerate(cases):
            aligned = alignments(base, found[k : k + 1], fit, k, scale)
            success = scorer.score(case, images[k]).success
            curves[k][eta] = Point(eta, fidelity(found[k], references[k]), aligned, success)
        print(f"seed {seed}: eta {eta:g} of {count} cases", flush=True)
    return curves


def alignments(base: Base, latents: torch.Tensor, fit: Fitted, k: int, scale: float) -> dict[str, float]:
    """The alignment of an image of case ``k``, by its kind."""
    target, optimised = (Conditioning(each.tokens[k : k + 1]) for each in (fit.target, fit.optimised))
    null, own = base.null(), {name: layer[k : k + 1] for name, layer in fit.layers.items()}
    assert null is not None
    (untuned,) = alignment(base, latents, target, optimised, PROBES)
    (against_null,) = alignment(base, latents, target, null, PROBES)
    with applied(base, own, scale, Options(), sampling=True):  # pyright: ignore[reportArgumentType]  # slices of parameters
        (tuned,) = alignment(base, latents, target, optimised, PROBES)
    return {"untuned": untuned, "tuned": tuned, "null": against_null}


def stored(path: Path, measure: Callable[[], list[Curve]]) -> list[Curve]:
    """The measurements of a file, which is written if it does not exist."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([[vars(point) for point in curve.values()] for curve in measure()]) + "\n")
    return [{row["eta"]: Point(**row) for row in curve} for curve in json.loads(path.read_text())]


def chosen(curve: Curve, rule: str, kind: str, auto: bool) -> tuple[Point, list[float]]:
    """The image that a rule chooses, and the etas that it has looked at."""
    points = {eta: replace(point, alignment=point.alignments[kind]) for eta, point in curve.items()}
    if not auto:
        return points[RULES[rule](Curves.of(points.values()))], list(points)
    steps, seen = search(lambda etas: [points[round(eta, 6)] for eta in etas], RULES[rule]), list[float]()
    while True:
        try:
            seen.append(next(steps).eta)
        except StopIteration as done:
            return points[round(done.value, 6)], seen


def passes(etas: Sequence[float], config: EditConfig) -> int:
    """Samples through the denoiser for the images of some etas and one seed, and for their scores."""
    guided = 2 if config.guidance_scale > 1 else 1
    inversions = len({min(eta, config.source_eta) for eta in etas}) if config.start == "inverted" else 0
    return config.steps * (guided * len(etas) + inversions) + 2 * PROBES * len(etas)


def ways() -> dict[str, Callable[[Curve], tuple[Point, list[float]]]]:
    """Every way to choose an eta, by its name."""
    found: dict[str, Callable[[Curve], tuple[Point, list[float]]]] = {
        f"fixed {eta:g}": lambda curve, eta=eta: (curve[eta], []) for eta in FIXED
    }
    for auto in (False, True):
        for kind in KINDS:
            for rule in RULES:
                name = f"{'auto' if auto else 'sweep'} {rule} {kind}"
                found[name] = lambda curve, rule=rule, kind=kind, auto=auto: chosen(curve, rule, kind, auto)
    return found


def table(curves: Sequence[Curve], config: EditConfig) -> dict[str, list[bool]]:
    """Prints success, mean eta and passes of every way; returns the success of each case by way."""
    found: dict[str, list[bool]] = {}
    print(f"{'':28} success %            eta  passes")
    for name, way in ways().items():
        points, looked = zip(*(way(curve) for curve in curves), strict=True)
        found[name] = [point.success for point in points]
        cost = sum(passes(etas, config) for etas in looked) / len(curves)
        print(f"{name:28} {interval(found[name])}  {sum(point.eta for point in points) / len(curves):.2f}  {cost:,.0f}")
    best = [any(point.success for point in curve.values()) for curve in curves]
    print(f"{'best of the grid (judge)':28} {interval(best)}  an upper bound, not a rule")
    return found


def interval(values: Sequence[float], sign: str = "") -> str:
    """A mean in percent and its 95% interval over cases."""
    mean = bootstrapped([100.0 * value for value in values])
    assert mean is not None
    return f"{format(mean.mean, sign + '5.1f')} [{format(mean.low, sign + '.1f')}, {format(mean.high, sign + '.1f')}]".ljust(20)


def best_of(found: dict[str, list[bool]], prefix: str) -> str:
    """The name of the way with the highest success among those whose name begins with a prefix; the first of equals."""
    return max((name for name in found if name.startswith(prefix)), key=lambda name: sum(found[name]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("changes", nargs="?", default="", help="changes of the defaults, as for study_critters.py")
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--choose", type=int, default=1, help="seed of the cases that eta and rule are chosen on")
    parser.add_argument("--claim", type=int, default=7, help="seed of the cases that they are claimed on")
    parser.add_argument("--base", type=Path, default=CRITTERS, help="folder of the base")
    parser.add_argument("--store", type=Path, default=Path("outputs/study"), help="folder of the measurements")
    args = parser.parse_args()
    if args.choose == args.claim:
        parser.error("--choose and --claim are the same seed")
    logging.set_verbosity_error()
    hide_progress_bars()
    base = load_base(str(args.base), resolve_runtime(MemoryConfig(device="cpu", dtype="fp32", optimizer="adam")))
    variant, scorer = Variant.parse(args.changes), Scorer(Judge.load(), CritterAlignment.load())
    results: dict[int, dict[str, list[bool]]] = {}
    for seed in (args.choose, args.claim):
        name = f"eta-{base.fingerprint[:12]}-{seed}-{args.cases}-{digest(variant)}.json"
        curves = stored(args.store / name, lambda seed=seed: measured(base, scorer, seed, args.cases, variant))
        print(f"\nseed {seed}, {args.cases} cases, {'chosen on' if seed == args.choose else 'claimed on'}")
        results[seed] = table(curves, variant.config.edit)
    fixed = best_of(results[args.choose], "fixed")
    print(
        f"\nchosen on seed {args.choose}, on the cases of seed {args.claim}, success in %:\n{fixed}: {interval(results[args.claim][fixed])}"
    )
    for prefix in ("sweep", "auto"):
        best = best_of(results[args.choose], prefix)
        claimed = results[args.claim]
        difference = [a - b for a, b in zip(claimed[best], claimed[fixed], strict=True)]
        print(f"{best}: {interval(claimed[best])} against {fixed}, case by case: {interval(difference, '+')}")


def digest(variant: Variant) -> str:
    """A short name for the settings of the measurements."""
    settings: list[Any] = [variant.config.model_dump(mode="json"), variant.options.model_dump(), ETAS, PROBES]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


if __name__ == "__main__":
    main()
