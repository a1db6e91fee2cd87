"""Judge the paper's claims on the runs in a folder: a table, and one picture of claims × settings.

    python scripts/claims.py outputs/reference [--figure claims.svg]

A claim is a difference that should be positive. It is supported or contradicted where the 95 % interval of Welch's t
excludes zero, and undecided otherwise. Where a run of either side fails, the verdict is that. Where BP is not more
accurate than Shallow, the setting cannot rank rules by accuracy.
"""

import argparse
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dfl_experiments.report import compare
from dfl_experiments.report.choose import choose
from dfl_experiments.report.compare import Estimate
from dfl_experiments.report.frame import ROW, runs
from dfl_experiments.report.style import method_name, row_title, save
from dfl_experiments.report.tables import interval_text

SUPPORTED, CONTRADICTED, UNDECIDED = "supported", "contradicted", "undecided"
FAILS, CANNOT_RANK, TOO_FEW = "fails at this rate", "cannot rank", "too few seeds"
MARKS = {SUPPORTED: "✓", CONTRADICTED: "✗", UNDECIDED: "?", FAILS: "fails", CANNOT_RANK: "=", TOO_FEW: ""}
MODEL_OPTION = re.compile(r", model\.\w+=\[[^]]*\]")  # the tables have it
COLORS = {SUPPORTED: "#009E73", CONTRADICTED: "#D55E00", UNDECIDED: "#999999", FAILS: "#7b3294", CANNOT_RANK: "#666666"}

# Pairs of methods that a claim compares: the first should have the larger value.
ALIGNMENT = (("las", "dfa"), ("ltas", "dfa"))
CLASSES = ALIGNMENT
OVER_SHALLOW = (("dfa", "shallow"), ("las", "shallow"), ("ltas", "shallow"))
UNDER_BP = (("bp", "dfa"), ("bp", "las"), ("bp", "ltas"))
ACCURACY = (*ALIGNMENT, *OVER_SHALLOW, *UNDER_BP)


def claims(frame: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each claim in each setting: claim, setting, n, found (a text), verdict, estimate."""
    real = frame[~frame.smoke]
    chosen = choose(real)
    rows: list[dict[str, Any]] = []
    for key, row in chosen.groupby(ROW, sort=True):
        all_points = real[(real[ROW] == list(key)).all(axis="columns")]
        suffixes = {method.removeprefix(rule) for method, rule in zip(row.method, row.rule, strict=True)}
        for suffix in sorted(suffixes):  # of methods, such as ", init=default"; the plain ones first
            variant = {"": "", ", init=default": ", B drawn anew"}.get(suffix, suffix)
            setting = row_title(row.iloc[0]) + variant
            rows += alignment_claims(row, all_points, suffix, setting)
            rows += accuracy_claims(row, suffix, setting)
    rows += class_claims(chosen)
    return pd.DataFrame(rows)


def judged(claim: str, setting: str, estimate: Estimate, n: int, unit: str, failing: str) -> dict[str, Any]:
    """Return a claim's row. failing: which side fails, see `failures`."""
    verdict = {1: SUPPORTED, -1: CONTRADICTED, 0: UNDECIDED, None: TOO_FEW}[estimate.verdict]
    scale = 0.01 if unit == "cosine" else 1  # `interval_text` shows percent
    shown = Estimate(*(scale * number for number in estimate))
    return {
        "claim": claim,
        "setting": setting,
        "n": n,
        "found": failing or f"{interval_text(*shown)} {unit}",
        "verdict": FAILS if failing else verdict,
        **estimate._asdict(),
    }


def failures(runs_of: pd.DataFrame, methods: Iterable[str]) -> str:
    """Return which side of a claim fails: "DFA fails: 3 of 3"; single runs decide nothing."""
    texts = []
    for method in methods:
        side = runs_of[runs_of.method == method]
        if side.fails.any() and len(side) > 1:
            texts.append(f"{method_name(side.rule.iloc[0])} fails: {side.fails.sum()} of {len(side)}")
    return ", ".join(texts)


def accuracy_claims(row: pd.DataFrame, suffix: str, setting: str) -> Iterator[dict[str, Any]]:
    """Yield the claims on accuracy in a setting, each method at the grid point that it shows."""
    samples = compare.samples_of(row)
    has_span = {"bp", "shallow"} <= samples.keys()
    ranks = not has_span or compare.can_rank(samples, compare.TEST_IMAGES.get(row.dataset.iloc[0]))
    for first, second in ACCURACY:
        methods = [first + suffix, second + suffix]
        accuracies = [row.accuracy[row.method == method].to_numpy() for method in methods]
        n = min(map(len, accuracies))
        if n == 0:
            continue
        claim = f"{method_name(first)} is more accurate than {method_name(second)}"
        verdict = judged(claim, setting, compare.welch(*accuracies), n, "points", failures(row, methods))
        if not ranks and verdict["verdict"] not in (FAILS, TOO_FEW):
            verdict["verdict"] = CANNOT_RANK
        yield verdict


def alignment_claims(
    row: pd.DataFrame, all_points: pd.DataFrame, suffix: str, setting: str
) -> Iterator[dict[str, Any]]:
    """Yield the claims on layer 1's cosine in a setting, means over the learning rates that both methods have.

    row: the runs at the chosen grid points; all_points: those at all points.
    """
    measured = compare.cosines(all_points)
    if "cosine/1" not in measured:
        return
    by_rate = measured.pivot_table("cosine/1", ["method", "seed"], ["lr", "weight_decay"], dropna=False)
    for first, second in ALIGNMENT:
        methods = [first + suffix, second + suffix]
        if not set(methods) <= set(all_points.method):
            continue
        sides = [by_rate.query("method == @method").dropna(axis="columns", how="all") for method in methods]
        common = sides[0].columns.intersection(sides[1].columns)
        means = [side[common].mean(axis="columns", skipna=False).dropna().to_numpy() for side in sides]
        n = min(map(len, means))
        failing = failures(row, methods)
        if n or failing:
            claim = f"{method_name(first)} aligns better with BP than {method_name(second)}"
            estimate = compare.welch(*means) if n else Estimate(math.nan)
            yield judged(claim, setting, estimate, n, "cosine", failing)


def class_claims(chosen: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Yield whether a lead over DFA is larger on CIFAR-100 than on CIFAR-10, in settings alike but for the data."""
    others = [name for name in ROW if name != "dataset"]
    cifar = chosen[chosen.dataset.isin(["cifar10", "cifar100"])]
    for _, rows in cifar.groupby(others, sort=True):
        accuracies = rows.groupby(["dataset", "method"]).accuracy.apply(np.array)
        for first, second in CLASSES:
            sides = [("cifar100", first), ("cifar100", second), ("cifar10", first), ("cifar10", second)]
            if accuracies.index.isin(sides).sum() < len(sides):
                continue
            samples = list(accuracies[sides])
            claim = f"{method_name(first)}'s lead over {method_name(second)} grows with the classes"
            setting = row_title(rows.iloc[0]).replace("CIFAR-100", "CIFAR").replace("CIFAR-10", "CIFAR")
            on_cifar100 = rows[rows.dataset == "cifar100"]
            failing = failures(on_cifar100, [first, second]) or failures(rows, [first, second])
            estimate = compare.contrast(samples, [1, -1, -1, 1])
            yield judged(claim, setting, estimate, min(map(len, samples)), "points", failing)


def counts(verdicts: pd.DataFrame) -> pd.DataFrame:
    """Return how often each verdict was given on each claim."""
    order = [verdict for verdict in MARKS if verdict in set(verdicts.verdict)]
    table = pd.crosstab(verdicts.claim, verdicts.verdict)
    return table.loc[verdicts.claim.unique(), order]


def picture(verdicts: pd.DataFrame) -> Figure:
    """Draw claims × settings: a mark for each verdict."""
    shown = verdicts[verdicts.verdict != TOO_FEW]
    names, settings = list(shown.claim.unique()), list(shown.setting.unique())
    figure = Figure(figsize=(4.7 + 0.62 * len(settings), 1.9 + 0.34 * len(names)), layout="constrained")
    axes = figure.subplots()
    for row in shown.itertuples():
        x, y = settings.index(row.setting), names.index(row.claim)
        mark = MARKS[row.verdict]
        axes.fill_between([x - 0.46, x + 0.46], y - 0.42, y + 0.42, color=COLORS[row.verdict], alpha=0.22, linewidth=0)
        axes.text(x, y, mark, ha="center", va="center", fontsize=11 if len(mark) == 1 else 8)
    axes.set(xlim=(-0.5, len(settings) - 0.5), ylim=(len(names) - 0.5, -0.5))
    labels = [MODEL_OPTION.sub("", setting) for setting in settings]
    is_clear = len(set(labels)) == len(labels)
    axes.set_xticks(range(len(settings)), labels if is_clear else settings, rotation=35, ha="left", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    legend = [f"{mark} {verdict}" for verdict, mark in MARKS.items() if verdict not in (FAILS, TOO_FEW)]
    axes.set_xlabel("   ".join([*legend, "fails: a run of one side fails"]), fontsize=8)
    return figure


def main() -> None:
    """Read the command line, print the claims and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="write the picture there (png, pdf, svg)")
    asked = parser.parse_args()
    verdicts = claims(runs(*asked.folders))
    print(verdicts[["claim", "setting", "n", "found", "verdict"]].to_markdown(index=False))
    print()
    print(counts(verdicts).to_markdown())
    if asked.figure:
        save(picture(verdicts), asked.figure)
        print(asked.figure)


if __name__ == "__main__":
    main()
