"""The figures of a report: learning curves, alignment, differences from BP, and accuracy over the learning rate."""

import re
from dataclasses import dataclass

from matplotlib.figure import Figure
from pandas import DataFrame

from dfl_experiments.report import compare
from dfl_experiments.report.choose import POINT_IN_CELL, counted
from dfl_experiments.report.frame import ROW, curves, distinct, layer_names
from dfl_experiments.report.lines import add_text, draw
from dfl_experiments.report.series import long
from dfl_experiments.report.style import (
    look_of,
    looks_of,
    method_name,
    row_title,
    styled,
)
from dfl_experiments.report.tables import Section, among

LONGEST_NAME = 130  # characters of a figure's file name, without its kind


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
    names: list[str] = []
    for section in sections:
        for _, row in section.runs.groupby(ROW, sort=True):
            if row.done_epochs.any():
                title = row_title(row.iloc[0])
                name = unused_name(title, names)
                names.append(name)
                chosen = among(section.chosen, row)
                for kind, figure in figures_of_row(row, chosen, title).items():
                    drawings.append(Drawing(section.title, f"{name}-{kind}", figure))
    return drawings


def unused_name(title: str, used: list[str]) -> str:
    """Return a title as a short name for files. It is not among the used names."""
    short = re.sub(r"[^\w.]+", "-", title.lower())[:LONGEST_NAME].strip("-")
    name = short
    while name in used:
        name = f"{short}-{used.index(name) + 2}"
    return name


def figures_of_row(row: DataFrame, chosen: DataFrame, title: str) -> dict[str, Figure]:
    """Return the figures of one setting by kind. A figure without values is left out.

    row: all runs of the setting. chosen: its runs at the best grid points.
    """
    shown = chosen if len(chosen) else row
    aligned = at_common_rate(row, shown)
    with styled():
        figures = {
            "differences": differences(chosen, title),
            "rates": rates(row, title),
            "learning": by_epoch(shown, ["accuracy", "loss"]),
            "alignment": by_epoch(aligned, ["alignment"]),
        }
    return {kind: figure for kind, figure in figures.items() if figure}


def by_epoch(runs: DataFrame, names: list[str]) -> Figure | None:
    """Draw those of the named quantities that have values, by epoch. Return None if none has.

    A run that diverges in its first epoch has no loss, and a run may have lost its epochs.csv.
    """
    table = curves(runs)
    if "epoch" not in table:
        return None
    with_values = set(long(table, "epoch", names).what)
    drawn = [name for name in names if name in with_values]
    return draw(runs, what=drawn, by="epoch") if drawn else None


def at_common_rate(row: DataFrame, shown: DataFrame) -> DataFrame:
    """Return the runs with cosines at one common grid point, because cosines depend on the learning rate.

    It is the grid point at which the most methods have cosines. If there are several such points, it is the one with
    the most methods of `shown`.
    """
    measured = compare.cosines(row)
    cosines = measured[layer_names(measured, "cosine")]
    has_cosine = cosines.notna().any(axis="columns")
    measured = measured[has_cosine]
    if measured.empty:
        return measured
    counts = measured.groupby(POINT_IN_CELL).method.nunique().to_frame("measured")
    counts["shown"] = shown.groupby(POINT_IN_CELL).method.nunique()
    counts = counts.sort_values(["measured", "shown"], ascending=False)
    lr, decay = counts.index[0]
    # a layer without a signal is not drawn, like a layer whose signal equals BP's
    silent = measured.no_signal.str.split(", ").map(tuple)
    measured = measured.assign(exact_layers=measured.exact_layers + silent)
    has_lr = measured.lr == lr
    has_decay = measured.weight_decay == decay
    return measured[has_lr & has_decay]


def differences(chosen: DataFrame, title: str) -> Figure | None:
    """Draw every method's difference from BP with its interval. Return None if no method has an interval."""
    frame = compare.against(chosen, "bp")
    frame = frame.dropna(subset="low").sort_values("difference")
    if frame.empty:
        return None
    figure = Figure(figsize=(5.4, 1.5 + 0.28 * len(frame)), layout="constrained")
    axes = figure.subplots()
    points = 100 * frame[["difference", "low", "high"]]
    heights = range(len(frame))
    colours = [look_of(method).colour for method in frame.method]
    axes.hlines(heights, points.low, points.high, colours, linewidth=2)
    axes.scatter(points.difference, heights, color=colours)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(heights, frame.method.map(method_name))
    axes.set_ylim(-0.7, len(frame) - 0.3)
    axes.set(xlabel="test accuracy minus BP's, points")
    kind = "Simultaneous 95" if (frame.test == "Dunnett").all() else "95"
    add_text(figure, title, [f"{kind} % intervals."])
    return figure


def rates(row: DataFrame, title: str) -> Figure | None:
    """Draw accuracy against the learning rate, with a cross where a run fails. Return None for fewer than two rates."""
    ended = distinct(row[row.has_ended])
    all_rates = sorted(ended.lr.unique())
    if len(all_rates) < 2 or ended.accuracy.isna().all():
        return None
    figure = Figure(figsize=(5.4, 4.6), layout="constrained")
    axes = figure.subplots()
    keys = ["method", "lr"]
    accuracies = counted(ended, keys).groupby(keys).accuracy
    points = 100 * accuracies.agg(mean="mean", low="min", high="max")
    # with NaN at a rate at which all runs diverged; there may be a method with no other rate
    points = ended.groupby(keys).agg(fails=("fails", "any")).join(points)
    for method, (colour, dash) in looks_of(ended.method).items():
        curve = points.loc[method]
        label = method_name(method)
        axes.plot(curve["mean"], marker="o", color=colour, linestyle=dash, label=label)
        axes.fill_between(curve.index, curve.low, curve.high, color=colour, alpha=0.15)
        axes.vlines(curve.index, curve.low, curve.high, color=colour)
    failing = points[points.fails].reset_index()
    axes.plot(failing.lr, failing["mean"], "x", color="black", markersize=9)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate (×: a run fails)")
    axes.set_ylabel("test accuracy, %")
    axes.set_xticks(all_rates, [f"{lr:g}" for lr in all_rates])
    axes.minorticks_off()
    add_text(figure, title, ["Mean over the runs at each rate, their range shaded."])
    return figure
