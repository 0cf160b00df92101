"""The study of eta: fixed etas against the rules that choose one."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from study_batch import Variant, applied, edited, encoded, fitted
from study_store import Study, interval, paired

from imagic_lora.bench.cases import Case, case_at
from imagic_lora.bench.catalogue import kind_of
from imagic_lora.cli.console import progress
from imagic_lora.core.config import EditConfig
from imagic_lora.core.errors import ImagicError
from imagic_lora.photos.canvas import to_image, to_pixels
from imagic_lora.sampling.sweeps.scores import PROBES, alignment, fidelity
from imagic_lora.sampling.sweeps.suggest import RULES, Curves, search

ETAS = [k / 10 for k in range(13)]
FIXED = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)
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


def measured(study: Study, seed: int, cases: Sequence[Case], variant: Variant) -> list[list[dict[str, Any]]]:
    """Fits the cases of a seed as one batch, and measures their images over :data:`ETAS`: the points of every case, as JSON values."""
    base, null = study.base, study.base.null()
    assert null is not None
    latents = encoded(base, cases)
    fit = fitted(base, latents, cases, variant)
    curves: list[list[dict[str, Any]]] = [[] for _ in cases]
    references = torch.empty(0)
    for eta in progress(iter(ETAS), len(ETAS), f"seed {seed}: etas of {len(cases)} cases"):
        at = replace(variant, config=variant.config.model_copy(update={"eta": eta}))
        images = [to_image(image) for image in edited(base, latents, fit, cases, at)]
        found = base.encode_image(torch.cat([to_pixels(image) for image in images]))
        references = references if len(references) else found
        for k, case in enumerate(cases):
            target, optimised, own = fit.targets[k], fit.optimised[k], fit.layers[k : k + 1]
            aligned = {"untuned": alignment(base, found[k : k + 1], target, optimised, PROBES)[0]}
            with applied(base, own, variant):
                (aligned["tuned"],) = alignment(base, found[k : k + 1], target, optimised, PROBES)
            (aligned["null"],) = alignment(base, found[k : k + 1], target, null, PROBES)
            kept, success = fidelity(found[k], references[k]), study.scorer.score(case, images[k]).success
            curves[k].append(vars(Point(eta, kept, aligned, success)))
    return curves


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
    guided = (2 if config.guidance_scale > 1 else 1) * (2 if config.start == "flow" else 1)
    steps = int(config.steps * config.strength) if config.start in ("image", "flow") else config.steps
    inversions = len({min(eta, config.source_eta) for eta in etas}) if config.start == "inverted" else 0
    return steps * guided * len(etas) + config.steps * inversions + 2 * PROBES * len(etas)


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
        print(f"{name:28} {shares(found[name])}  {sum(point.eta for point in points) / len(curves):.2f}  {cost:,.0f}")
    best = [any(point.success for point in curve.values()) for curve in curves]
    print(f"{'best of the grid (judge)':28} {shares(best)}  an upper bound, not a rule")
    return found


def best_of(found: dict[str, list[bool]], prefix: str) -> str:
    """The name of the way with the highest success among those whose name begins with a prefix; the first of equals."""
    return max((name for name in found if name.startswith(prefix)), key=lambda name: sum(found[name]))


def study_eta(args: argparse.Namespace) -> None:
    """Fixed etas against the rules that choose one.

    Every case is fitted and edited over a grid of etas, and its images are scored as ``imagic-lora sweep`` scores them. A rule sees these
    scores and nothing else; the judge only says whether the chosen image is a success. The best fixed eta and the best rule are chosen on
    the cases of one seed (``--choose``), and both are claimed on those of another (``--claim``). Each rule is tried on the whole grid
    (``sweep``) and as the search of ``edit --eta auto`` (``auto``), with three kinds of alignment: ``tuned``, the target prompt against
    the optimised embedding, with the adapter applied, as in the product; ``untuned``, without the adapter; ``null``, against the
    unconditional embedding, without the adapter. ``passes`` are samples through the denoiser before the edit itself.
    """
    if args.choose == args.claim:
        raise ImagicError("--choose and --claim with the same seed", "two seeds", "change one of them")
    study, variant = Study(args.base, args.store), Variant.parse(args.changes, kind_of(args.base))
    variant.check_batched()
    results: dict[int, dict[str, list[bool]]] = {}
    for seed in (args.choose, args.claim):
        cases, key = [case_at(seed, index) for index in range(args.cases)], ["eta", *variant.key(args.cases, ETAS, PROBES)]
        rows = study.stored(seed, key, lambda seed=seed, cases=cases: measured(study, seed, cases, variant))
        print(f"\nseed {seed}, {args.cases} cases, {'chosen on' if seed == args.choose else 'claimed on'}")
        results[seed] = table([{row["eta"]: Point(**row) for row in curve} for curve in rows], variant.config.edit)
    chosen_on, claimed = results[args.choose], results[args.claim]
    fixed = best_of(chosen_on, "fixed")
    print(f"\nchosen on seed {args.choose}, on the cases of seed {args.claim}, success in %:\n{fixed}: {shares(claimed[fixed])}")
    for prefix in ("sweep", "auto"):
        best = best_of(chosen_on, prefix)
        difference = paired(*([100.0 * value for value in claimed[name]] for name in (best, fixed)))
        print(f"{best}: {shares(claimed[best])} against {fixed}, case by case: {difference}")


def shares(found: Sequence[bool]) -> str:
    """A share of cases in percent, and its interval."""
    return interval([100.0 * value for value in found]).ljust(20)
