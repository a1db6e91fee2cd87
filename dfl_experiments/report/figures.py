"""The figures of a report: learning curves, alignment, differences from BP, and accuracy over the learning rate."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dfl_experiments.report import compare
from dfl_experiments.report.choose import POINT_IN_CELL, counted
from dfl_experiments.report.frame import ROW, distinct, layer_names
from dfl_experiments.report.lines import draw
from dfl_experiments.report.run_record import ENDED
from dfl_experiments.report.style import (
    FAMILY_COLOURS,
    add_text,
    family_of,
    look_of,
    method_name,
    method_order,
    row_title,
    styled,
)
from dfl_experiments.report.tables import Section, among

LONGEST_NAME = 130  # characters of a figure's file name, without its kind
RANGE = (
    "Mean over the runs at each rate, their range as a bar. Methods at one rate stand side by side."
)
MOST_LINES = 6  # if there are more methods, the legend names their families instead


@dataclass
class Drawing:
    """A figure of a report."""

    section: str
    """The title of the section that the figure belongs to."""
    name: str
    """The name of the figure's file, without the ending."""
    figure: Figure


def figures(sections: list[Section]) -> list[Drawing]:
    """Return the figures of each section, setting by setting. A setting without a finished epoch has no figures."""
    drawings = []
    names: set[str] = set()
    for section in sections:
        for _, row in section.runs.groupby(ROW, sort=True):
            if not row.done_epochs.any():
                continue
            title = row_title(row.iloc[0])
            name = unused_name(title, names)
            names.add(name)
            for kind, figure in figures_of_row(row, among(section.chosen, row), title).items():
                lay_out(figure)
                drawings.append(Drawing(section.title, f"{name}-{kind}", figure))
    return drawings


def unused_name(title: str, used: set[str]) -> str:
    """Return a title as a short name for files. It is not among the used names."""
    short = re.sub(r"[^\w.]+", "-", title.lower())[:LONGEST_NAME].strip("-")
    name, number = short, 1
    while name in used:
        number += 1
        name = f"{short}-{number}"
    return name


def lay_out(figure: Figure) -> None:
    """Compute the layout, then remove the layout engine.

    With the engine, matplotlib would compute the layout again for every format in which the figure is saved.
    """
    with styled():
        engine = figure.get_layout_engine()
        if engine:
            engine.execute(figure)
        figure.set_layout_engine(None)


def figures_of_row(row: pd.DataFrame, chosen: pd.DataFrame, title: str) -> dict[str, Figure]:
    """Return the figures of one setting by kind. A figure without values is left out.

    row: all runs of the setting. chosen: its runs at the best grid points.
    """
    shown = chosen if len(chosen) else row
    aligned = at_common_rate(row, shown)
    with styled():
        figures = {"differences": differences(chosen, title), "rates": rates(row, title)}
    figures["learning"] = draw(shown, what=["accuracy", "loss"], by="epoch")
    if len(aligned):
        figures["alignment"] = draw(aligned, what=["alignment"], by="epoch")
    return {kind: figure for kind, figure in figures.items() if figure is not None}


def at_common_rate(row: pd.DataFrame, shown: pd.DataFrame) -> pd.DataFrame:
    """Return the runs with cosines at one common grid point. Cosines at different learning rates are not comparable.

    The common grid point is the one with cosines of the largest number of methods. If several points have this number,
    the point with the most methods in `shown` is taken.
    """
    measured = compare.cosines(row)
    names = layer_names(measured, "cosine")
    measured = measured[measured[names].notna().any(axis=1)]
    if measured.empty:
        return measured
    counts = measured.groupby(POINT_IN_CELL).method.nunique()
    shown_at = shown.groupby(POINT_IN_CELL).method.nunique().reindex(counts.index, fill_value=0)
    lr, decay = shown_at[counts == counts.max()].idxmax()
    return measured[(measured.lr == lr) & (measured.weight_decay == decay)]


def differences(chosen: pd.DataFrame, title: str) -> Figure | None:
    """Draw every method's difference from BP with its interval. Return None if no method has an interval."""
    frame = compare.against(chosen, "bp").dropna(subset=["low"]).sort_values("difference")
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
    axes.set(xlabel="test accuracy minus BP's, points (simultaneous 95 % intervals)")
    add_text(figure, title, [])
    width = (points.high - points.low).median()
    lowest, *others = points.difference
    if lowest < 10 * min(*others, -width, 0):
        # on a linear axis, one outlier would compress all others
        axes.set_xscale("symlog", linthresh=max(width, 1))
    return figure


def rates(row: pd.DataFrame, title: str) -> Figure | None:
    """Draw accuracy against the learning rate. A cross marks a rate with a failing run.

    A dot is the mean over the runs at this rate. A bar reaches from the lowest to the highest of them.

    Return None if there are fewer than two rates, or if no run has an accuracy.
    """
    ended = distinct(row[row.status.isin(ENDED) | row.fails])
    all_rates = sorted(ended.lr.unique())
    if len(all_rates) < 2 or ended.accuracy.isna().all():
        return None
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    point = ["method", "lr"]
    fails = ended.groupby(point).fails.any()
    runs = counted(ended, point).groupby(point).accuracy
    accuracies = 100 * runs.agg(["mean", "min", "max"]).reindex(fails.index)
    methods = sorted(ended.method.unique(), key=method_order)
    is_named = len(methods) <= MOST_LINES
    has_ranges = runs.size().max() > 1
    factors = side_by_side(all_rates, len(methods)) if has_ranges else np.ones(len(methods))
    for method, factor in zip(methods, factors, strict=True):
        look = look_of(method)
        label = method_name(method) if is_named else None
        values = accuracies.loc[method]
        is_failing = fails[method]
        x = factor * values.index
        axes.plot(
            x,
            values["mean"],
            "o",
            color=look.colour,
            linestyle=look.dash,
            label=label,
            markersize=5,
        )
        axes.vlines(x, values["min"], values["max"], color=look.colour)
        axes.plot(x[is_failing], values["mean"][is_failing], "x", color="black", markersize=9)
    if not is_named:
        add_families(axes, methods)
    axes.set(xscale="log", xlabel="learning rate (×: a run fails)", ylabel="test accuracy, %")
    axes.set_xticks(all_rates, [f"{lr:g}" for lr in all_rates])
    axes.minorticks_off()
    axes.set_ylim(*limits_without_outliers(accuracies.stack()))
    figure.legend(loc="outside right center")
    add_text(figure, title, [RANGE] if has_ranges else [])
    return figure


def side_by_side(rates: Sequence[float], count: int) -> np.ndarray:
    """Return a factor for each of `count` methods. Its rates are multiplied by it, so that no bar covers another.

    On the logarithmic axis, the distance between two methods is 1.5 % of the length of the grid. It is smaller if the
    methods would take more than 7.5 % of this length, or more than a quarter of the distance between two rates.

    rates: the rates of the grid, sorted.
    """
    places = np.log(rates)
    length = places[-1] - places[0]
    width = min(0.015 * (count - 1) * length, 0.075 * length, 0.25 * np.diff(places).min())
    return np.exp(width * np.linspace(-0.5, 0.5, count))


def limits_without_outliers(values: pd.Series) -> tuple[float, float]:
    """Return axis limits that leave out outliers. The tables still show the outliers.

    An outlier is more than 5 interquartile ranges below the lower quartile or above the upper quartile.
    """
    low, high = values.quantile(0.25), values.quantile(0.75)
    reach = 5 * max(high - low, 0.1)
    shown = values[values.between(low - reach, high + reach)]
    margin = 0.08 * max(shown.max() - shown.min(), 0.1)
    return float(shown.min() - margin), float(shown.max() + margin)


def add_families(axes: Axes, methods: list[str]) -> None:
    """Add the colour of each family to the legend."""
    for family in dict.fromkeys(map(family_of, methods)):
        axes.plot([], color=FAMILY_COLOURS[family], label=family.replace(", B ", ",\nB "))
