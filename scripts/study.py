"""Studies on CritterBench: ``python scripts/study.py settings "embed.steps=30" "edit.start=noise"``, and others, see ``--help``.

Choose on other seeds than those of the reported results. Differences are paired, with 95% intervals over cases. Results are appended to a
file of the base and the seed in the folder ``--store``, from which a later run continues.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from diffusers.utils import logging
from study_batch import Fitted, Options, Variant, edited, encoded, fitted
from study_cases import study_keep, study_ranks
from study_eta import study_eta
from study_figures import study_null_text, study_reweight
from study_store import Study, paired, values

from imagic_lora.bases.loading.progress import hide_progress_bars
from imagic_lora.bench.cases import Case, case_at
from imagic_lora.bench.catalogue import kind_of
from imagic_lora.bench.critters import Bench
from imagic_lora.bench.scores import Score
from imagic_lora.cli.console import progress
from imagic_lora.core.errors import ImagicError
from imagic_lora.methods.imagic import Imagic
from imagic_lora.photos.canvas import to_image

COLUMNS = ("success", "attributes", "aligned", "kept", "psnr")


def study_settings(args: argparse.Namespace) -> None:
    """Changes of the settings, on the same cases.

    A variant is a list of changes ``key=value``, separated by spaces; the first variant is always the defaults, and every other is compared
    with it case by case. Keys are those of the settings (``embed.steps``, ``tune.rank``, ``edit.guidance_scale``, ``eta``) and the options
    of the study. All cases are fitted as one batch, which has no early stopping and no mode full: with ``--fit`` each is fitted and edited
    as the command line does it, and the training steps and passes through the denoiser are printed as well.
    """
    cases, kind = [case_at(args.seed, index) for index in range(args.cases)], kind_of(args.base)
    variants = [Variant.parse(text, kind) for text in ("", *args.variants)]
    print(f"{'':44} {' '.join(f'{measure[:5]:>5}' for measure in COLUMNS)}{'':27}against the defaults: success, aligned, dB")
    usual: list[Score] = []
    for name, scores, cost in (one_by_one if args.fit else batched)(args, cases, variants):
        usual = usual or scores
        print(line(name, scores, usual, cases) + cost, flush=True)


def batched(args: argparse.Namespace, cases: Sequence[Case], variants: Sequence[Variant]) -> Iterator[tuple[str, list[Score], str]]:
    """Name and scores of every variant; the cases are fitted as one batch, and variants with the same fit share it."""
    for variant in variants:
        variant.check_batched()
    study, fits = Study(args.base, args.store), dict[str, Fitted]()

    def measure(variant: Variant) -> list[dict[str, object]]:
        nonlocal fits
        latents = encoded(study.base, cases)
        if variant.fit_key() not in fits:
            fits = {variant.fit_key(): fitted(study.base, latents, cases, variant)}
        images = edited(study.base, latents, fits[variant.fit_key()], cases, variant)
        return [asdict(study.scorer.score(case, to_image(image))) for case, image in zip(cases, images, strict=True)]

    for variant in variants:
        found = study.stored(args.seed, variant.key(len(cases)), lambda variant=variant: measure(variant))
        yield variant.name, [Score(**score) for score in found], ""


def one_by_one(args: argparse.Namespace, cases: Sequence[Case], variants: Sequence[Variant]) -> Iterator[tuple[str, list[Score], str]]:
    """Name, scores and cost of every variant, by the benchmark."""
    if any(variant.options != Options() for variant in variants):
        raise ImagicError("an option of the study with --fit", "settings of the product", "leave out --fit")
    methods = [Imagic(re.sub(r"[^A-Za-z0-9.=_]+", ",", variant.name), variant.config) for variant in variants]  # the name of a file
    bench = Bench(args.seed, len(cases), methods, args.store / "fit", args.base)
    results = list(progress(bench.results(args.workers), len(cases) * len(methods), "cases x variants"))
    for result in results:
        if result.error:
            raise RuntimeError(f"{result.method}, case {result.case}: {result.error}")
    for method in methods:
        found = [result.rows[method.name] for result in sorted(results, key=lambda result: result.case) if result.method == method.name]
        steps, passes = (sum(f(cost) for _, cost in found) / len(found) for f in (lambda c: c.backward, lambda c: c.forward + c.backward))
        yield method.name, [score for score, _ in found], f"  {steps:.0f} training steps, {passes:.0f} passes"


def line(name: str, scores: Sequence[Score], usual: Sequence[Score], cases: Sequence[Case]) -> str:
    """One line: the measures for all cases, success on pose edits, the median identity, and the paired difference to the defaults."""
    parts = [f"{sum(values(scores, measure)) / len(scores):5.1f}" for measure in COLUMNS]
    pose = [score.success for case, score in zip(cases, scores, strict=True) if case.kind == "pose"]
    half = sorted(9.0 if score.identity is None else score.identity for score in scores)[len(scores) // 2]
    against = [paired(values(scores, measure), values(usual, measure)) for measure in ("success", "aligned", "psnr")]
    return f"{name:44} {' '.join(parts)}  pose {100 * sum(pose) / len(pose):3.0f}  identity {half:.2f}   {'  '.join(against)}"


STUDIES: dict[str, tuple[Callable[[argparse.Namespace], None], int]] = {
    "settings": (study_settings, 48),
    "eta": (study_eta, 100),
    "keep": (study_keep, 60),
    "ranks": (study_ranks, 3),
    "null-text": (study_null_text, 8),
    "reweight": (study_reweight, 0),
}
"""Each study with its number of cases."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parsers = parser.add_subparsers(required=True, metavar="STUDY")
    for name, (run, cases) in STUDIES.items():
        about = run.__doc__ or ""
        one = parsers.add_parser(name, help=about.splitlines()[0], description=about)
        one.set_defaults(run=run)
        one.add_argument("--cases", type=int, default=cases)
        one.add_argument("--store", "--out", type=Path, default=Path("outputs/study"), help="folder of the results")
        if name != "ranks":
            one.add_argument("--base", default="critters", help="name or folder of the base, such as critters-dit")
        if name != "eta":
            one.add_argument("--seed", type=int, default=7 if name == "ranks" else 1, help="seed of the cases")
    parsers.choices["ranks"].set_defaults(base="critters")
    options = ", ".join(Options.model_fields)
    parsers.choices["settings"].add_argument("variants", nargs="*", help=f"changes of the defaults; options of the study: {options}")
    parsers.choices["settings"].add_argument("--fit", action="store_true", help="fit each case by itself")
    parsers.choices["settings"].add_argument("--workers", type=int, default=1, help="number of processes, with --fit")
    eta = parsers.choices["eta"]
    eta.add_argument("changes", nargs="?", default="", help="changes of the defaults, as for settings")
    eta.add_argument("--choose", type=int, default=1, help="seed of the cases that eta and rule are chosen on")
    eta.add_argument("--claim", type=int, default=7, help="seed of the cases that they are claimed on")
    for name, steps, scale in (("null-text", 50, 7.5), ("reweight", 23, 3.0)):
        parsers.choices[name].add_argument("--steps", type=int, default=steps, help="number of sampling steps")
        parsers.choices[name].add_argument("--guidance-scale", type=float, default=scale)
    parsers.choices["reweight"].add_argument("--factors", type=float, nargs="+", default=[-8, -4, -2, 0, 1, 2, 4, 8])
    parsers.choices["null-text"].add_argument(
        "--inner", type=int, nargs="+", default=[1, 2, 5, 10, 20], help="optimisation steps at each sampling step"
    )
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hide_progress_bars()
    try:
        args.run(args)
    except ImagicError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
