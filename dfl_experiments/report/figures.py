"""The figures of a report: curves, intervals, rates, and accuracy against alignment."""

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.optimize import isotonic_regression

from dfl_experiments.report import compare
from dfl_experiments.report.choose import choose
from dfl_experiments.report.frame import ENDED, ROW, distinct, layer_names
from dfl_experiments.report.lines import draw
from dfl_experiments.report.style import (
    FAMILY_COLOURS,
    family_of,
    look_of,
    method_name,
    method_order,
    row_title,
    styled,
)
from dfl_experiments.report.tables import sections

FEWEST_RULES = 8  # that accuracy is drawn against alignment for
MOST_LINES = 6  # with names of their own
LABEL_GAP = 0.05  # of the axis, between two names


class Drawing(NamedTuple):
    """A figure of a report."""

    section: str
    """The title of the section that it belongs to."""
    name: str
    """For its file."""
    figure: Figure


def figures(runs: pd.DataFrame) -> list[Drawing]:
    """Return the figures of every section, row by row; none of runs that have no epoch behind them."""
    drawings = []
    for section, part in sections(runs).items():
        for _, row in part.groupby(ROW, sort=True):
            if not row.done_epochs.any():
                continue
            title = row_title(row.iloc[0])
            for kind, figure in figures_of_row(row, title):
                lay_out(figure)
                name = re.sub(r"[^\w.]+", "-", f"{title}-{kind}".lower()).strip("-")
                drawings.append(Drawing(section, name[:150], figure))
    return drawings


def lay_out(figure: Figure) -> None:
    """Lay a figure out once, not again for each file that it is written to."""
    with styled():
        figure.draw_without_rendering()
    figure.set_layout_engine("none")


def figures_of_row(row: pd.DataFrame, title: str) -> Iterator[tuple[str, Figure]]:
    """Yield the figures of a row by kind; those that its runs say nothing for are left out."""
    with styled():
        figures = {"differences": differences(row, title), "rates": rates(row, title)}
    figures["learning"] = draw(shown_runs(row), what=["accuracy", "loss"], by="epoch")
    aligned = at_common_rate(row)
    if len(aligned):
        figures["alignment"] = draw(aligned, what=["alignment"], by="epoch")
    with styled():
        figures["alignment-accuracy"] = accuracy_against_alignment(row, title)
    for kind, figure in figures.items():
        if figure is not None:
            yield kind, figure


def shown_runs(row: pd.DataFrame) -> pd.DataFrame:
    """Return the runs at the chosen grid points, or all of them while none has ended."""
    chosen = choose(row)
    return chosen if len(chosen) else row


def at_common_rate(row: pd.DataFrame) -> pd.DataFrame:
    """Return the runs with an alignment at one grid point, because angles need equal rates.

    It is the point that the most methods have; of several, the one that the most methods are shown at.
    """
    measured = compare.cosines(row)
    names = layer_names(measured, "cosine")
    measured = measured[measured[names].notna().any(axis=1)]
    if measured.empty:
        return measured
    counts = measured.groupby(["lr", "weight_decay"]).method.nunique()
    point = ["lr", "weight_decay"]
    shown_at = shown_runs(row).groupby(point).method.nunique().reindex(counts.index, fill_value=0)
    lr, decay = shown_at[counts == counts.max()].idxmax()
    return measured[(measured.lr == lr) & (measured.weight_decay == decay)]


def differences(row: pd.DataFrame, title: str) -> Figure | None:
    """Draw every method's difference from BP with its interval; None where there is no interval."""
    frame = compare.against(choose(row), "bp").dropna(subset=["low"]).sort_values("difference")
    if frame.empty:
        return None
    figure = Figure(figsize=(6.4, 1.5 + 0.28 * len(frame)), layout="constrained")
    axes = figure.subplots()
    points = 100 * frame[["difference", "low", "high"]]
    for height, method in enumerate(frame.method):
        difference, low, high = points.iloc[height]
        color = look_of(method).colour
        axes.plot([low, high], [height, height], color=color, linewidth=2)
        axes.plot(difference, height, "o", color=color)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(frame)), frame.method.map(method_name))
    axes.set_ylim(-0.7, len(frame) - 0.3)
    axes.set(xlabel="test accuracy minus BP's, points (95 % intervals that hold together)", title=title)
    width = (points.high - points.low).median()
    lowest, *others = points.difference
    if lowest < 10 * min(*others, -width, 0):
        axes.set_xscale("symlog", linthresh=max(width, 1))  # one far outlier would squeeze all others
    return figure


def rates(row: pd.DataFrame, title: str) -> Figure | None:
    """Draw accuracy over the learning rate, with the points at which runs fail; None of fewer than two rates."""
    ended = distinct(row[row.status.isin(ENDED) | row.fails])
    all_rates = sorted(ended.lr.unique())
    if len(all_rates) < 2:
        return None
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    groups = ended.groupby(["method", "lr"])
    accuracies = 100 * groups.accuracy.mean()
    fails = groups.fails.any()
    methods = sorted(ended.method.unique(), key=method_order)
    is_named = len(methods) <= MOST_LINES
    for method in methods:
        look = look_of(method)
        label = method_name(method) if is_named else None
        axes.plot(accuracies[method], "o", color=look.colour, linestyle=look.dash, label=label)
        axes.plot(accuracies[method][fails[method]], "x", color="black", markersize=9)
    if not is_named:
        add_families(axes, methods)
    axes.set(xscale="log", xlabel="learning rate (×: a run fails)", ylabel="test accuracy, %", title=title)
    axes.set_xticks(all_rates, [f"{lr:g}" for lr in all_rates])
    axes.minorticks_off()
    axes.set_ylim(*without_outliers(accuracies))
    figure.legend(loc="outside right upper")
    return figure


def without_outliers(values: pd.Series) -> tuple[float, float]:
    """Return the limits of an axis that shows all values but those far from the others; the tables name these."""
    low, high = values.quantile(0.25), values.quantile(0.75)
    reach = 5 * max(high - low, 0.1)
    shown = values[values.between(low - reach, high + reach)]
    margin = 0.08 * max(shown.max() - shown.min(), 0.1)
    return float(shown.min() - margin), float(shown.max() + margin)


def add_families(axes: Axes, methods: list[str]) -> None:
    """Name the families of the methods in the legend, by their colours."""
    for family in dict.fromkeys(map(family_of, methods)):
        axes.plot([], color=FAMILY_COLOURS[family], label=family.replace(", B ", ",\nB "))


def accuracy_against_alignment(row: pd.DataFrame, title: str) -> Figure | None:
    """Draw every rule's accuracy against layer 1's cosine, at the rate that the most rules have.

    Rules are near copies of one another, so a correlation over them is shown by its points and has no interval. None of
    fewer than 8 rules.
    """
    measured = at_common_rate(row)
    if measured.empty or "cosine/1" not in measured:
        return None
    means = measured.groupby("method")[["cosine/1", "accuracy"]].mean().dropna().sort_values("accuracy")
    if len(means) < FEWEST_RULES:
        return None
    correlation = means["cosine/1"].corr(means.accuracy, method="spearman")
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    accuracies = 100 * means.accuracy
    low, high = without_outliers(accuracies)
    axes.set_ylim(low, high)
    shares = ((accuracies - low) / (high - low)).clip(0, 1)
    heights = spread(shares.to_numpy(), LABEL_GAP)
    for method, height in zip(means.index, heights, strict=True):
        color = look_of(method).colour
        point = (means["cosine/1"][method], accuracies[method])
        line = {"arrowstyle": "-", "color": color, "linewidth": 0.5}
        axes.plot(*point, "o", color=color)
        axes.annotate(
            method_name(method),
            xy=point,
            xytext=(1.04, height),
            textcoords="axes fraction",
            fontsize=8,
            va="center",
            color=color,
            arrowprops=line,
            annotation_clip=True,
        )
    axes.set_title(f"{title}: Spearman's ρ {correlation:+.2f} over {len(means)} rules")
    axes.set_xlabel(f"cosine of layer 1 with BP, last epoch, lr {measured.lr.iloc[0]:g}")
    axes.set_ylabel("test accuracy, %")
    add_families(axes, list(means.index))
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def spread(heights: np.ndarray, gap: float) -> np.ndarray:
    """Return heights between 0 and 1, moved apart as little as it takes to be a gap from one another."""
    moved = np.array(heights, dtype=float)
    order = moved.argsort(kind="stable")
    stacked = gap * np.arange(len(moved))  # without these, neighbours need only keep their order
    moved[order] = isotonic_regression(moved[order] - stacked).x.clip(0, max(0, 1 - stacked[-1])) + stacked
    return moved
