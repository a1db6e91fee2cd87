"""Curves of runs as figures: loss, accuracy and what is measured of every layer, over iterations or epochs."""

import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from pandas.api.types import is_numeric_dtype

from dfl_experiments.configuration.refusals import did_you_mean
from dfl_experiments.errors import UserError
from dfl_experiments.report.choose import states
from dfl_experiments.report.frame import GROUPS, POINT, option_names, with_key
from dfl_experiments.report.series import WHAT, axis_of, measured, over_seeds, span
from dfl_experiments.report.style import (
    DASHES,
    PALETTE,
    TEXT_GREY,
    Look,
    add_text,
    family_of,
    gradient,
    look_of,
    styled,
    title_of,
    words,
)

DEFAULT = ("loss", "accuracy", "alignment")
RELATIVE = ("alignment", "norm")  # to BP: they say nothing of a layer that has BP's own signal
BOUNDED = ("accuracy", "alignment", "dead")  # no outlier leaves their range
MOST_PANELS = 60
MOST_LAYERS = 6  # that have a panel each
MOST_LABELS = 6  # in a legend of lines; else the legend names the colours
MOST_COLOURS = 12  # in a legend; of more, a few evenly spaced
MOST_DETAILED = 3  # curves of a panel that are also shown as measured and on the validation set
ALIASES = {
    "optimizer.lr": "lr",
    "optimizer.weight_decay": "weight_decay",
    "method.name": "rule",
    **{f"{group}.name": group for group in GROUPS},
}

# columns that can tell lines apart, in the order of a label; the options that differ stand in between
FIRST_NAMES = ("method", "model", "dataset", "augmentation")
LAST_NAMES = ("lr", "weight_decay", "epochs", "optimizer", "precision", "protocol", "smoke", "origin")


class Panel(NamedTuple):
    """One panel of a figure."""

    name: str
    """A quantity of `WHAT`."""
    layers: list[int]
    """One hidden layer, or 0 for a quantity that has none; all of them where each facet has one line."""
    lines: pd.DataFrame
    """The lines of the facet, as `lines_of` returns them."""


def draw(
    frame: pd.DataFrame,
    what: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    by: Literal["iteration", "epoch"] | None = None,
    color: str | None = None,
    facet: str | None = None,
    smooth: int | None = None,
    log: bool = False,
) -> Figure:
    """Draw the curves of the runs in a frame, as `frame.runs` gives it.

    Runs that differ only in their seed are one line, their mean, with the range over seeds as a band.

    Parameters:
        what: names out of `WHAT`; default loss, accuracy and alignment, as far as they were measured.
        layers: hidden layers, from 1; default all, or six of a deeper net.
        by: the x axis; default iteration where every run has iterations.csv.
        color: column or configuration key that has a colour for every value; default the method, or what differs.
        facet: column or configuration key that has a panel for every value.
        smooth: measured iterations of a running mean, 1 for none; default a fortieth of each line.
        log: draw loss, norm and rms over a logarithmic axis.

    Raises:
        UserError: a name, a layer or a key that no run has, or no row in any of the runs.
    """
    names = list(what or DEFAULT)
    for name in names:
        if name not in WHAT:
            raise UserError(f"what={name}: no such quantity; there are {', '.join(WHAT)}{did_you_mean(name, WHAT)}")
    color = color and ALIASES.get(color, color)
    facet = facet and ALIASES.get(facet, facet)
    keys = [key for key in (color, facet) if key]
    for key in keys:
        frame = with_key(frame, key)
    notes: list[str] = []
    frame = with_lines(frame, keys, notes)
    lines = lines_of(frame, color, facet, notes)
    x = axis_of(frame, names, by, notes)
    if x == "epoch" and smooth is not None:
        raise UserError(f"smooth={smooth}: averages iterations, but epochs are drawn")
    values = over_seeds(measured(frame, names, x, smooth, notes), frame)
    names = measured_names(names, values, is_asked=bool(what))
    panels = panels_of(names, values, lines, layers, notes)
    with styled():
        figure = with_axes(panels, columns=len(names) if facet else 0)
        for axes, panel in zip(figure.axes, panels, strict=True):
            axes.set_xlabel(x)
            draw_panel(axes, panel, values, notes)
        for axes, panel in zip(figure.axes, panels, strict=True):  # now that shared axes have all their curves
            if panel.name not in BOUNDED and axes.lines:
                set_scale(axes, panel.name, log, notes)
        add_legend(figure, notes)
        add_text(figure, title(lines), notes)
    return figure


def with_lines(frame: pd.DataFrame, keys: Sequence[str], notes: list[str]) -> pd.DataFrame:
    """Return the runs to draw with two more columns: the number of their `line`, and its `origin`.

    origin: a folder's name where nothing else tells two runs of one seed apart.
    """
    point = list(dict.fromkeys([*POINT, *keys, "origin"]))
    frame = frame.reset_index(drop=True).assign(origin="")
    paths = [Path(folder).absolute() for folder in frame.folder]
    parents, names = [path.parent.name for path in paths], [path.name for path in paths]
    for origins in (parents, names, frame.folder):
        line = frame.groupby(point, dropna=False).ngroup()
        is_repeated = frame.duplicated([*point, "seed"], keep=False)
        is_ambiguous = is_repeated.groupby(line).transform("any")
        frame["origin"] = frame.origin.mask(is_ambiguous, origins)
    frame["line"] = frame.groupby(point, dropna=False).ngroup()
    is_finished = frame.status == "finished"
    has_finished = is_finished.groupby(frame.line).transform("any")
    rest = frame[has_finished & ~is_finished]
    unfinished = frame[~has_finished]
    if len(rest):
        notes.append(f"Left out of the means: {states(rest.status)}.")
    if len(unfinished):
        notes.append(f"Not finished: {states(unfinished.status)}.")
    return frame.drop(rest.index)


def lines_of(frame: pd.DataFrame, color: str | None, facet: str | None, notes: list[str]) -> pd.DataFrame:
    """Return one row per line, by its number, with more columns.

    facet, heading: what its panels stand for, as a value and in words.
    label: what differs between the lines, in words.
    look: colour and dash.
    legend: the line's entry in the legend: its label, or what its colour stands for where lines are many.
    """
    lines = frame.drop_duplicates("line").set_index("line").sort_index()
    lines["facet"] = lines[facet] if facet else ""
    lines["heading"] = in_words(lines, facet) if facet else ""
    columns = differing_columns(lines, color)
    texts = [in_words(lines, column) for column in columns]
    lines["label"] = [", ".join(filter(None, row)) for row in zip(*texts, strict=True)] if texts else ""
    key = color or next(iter(columns), "label")
    lines["look"] = looks(lines, key)
    lines["legend"] = lines.label
    if lines.label.nunique() > MOST_LABELS:
        lines["legend"] = in_words(lines, key)
        notes.append(f"Lines of one colour differ in {', '.join(columns)}.")
    if lines.legend.nunique() > MOST_LABELS and key == "method":
        lines["legend"] = lines.method.map(family_of)
        lines["look"] = [Look(look.colour) for look in lines["look"]]
    seeds = frame.line.value_counts()
    if seeds.max() > 1:
        notes.append(f"Mean over {span(seeds)} seeds, their range shaded.")
    elif len(lines) > 1:
        notes.append("Each line is one run.")
    return lines


def differing_columns(lines: pd.DataFrame, color: str | None) -> list[str]:
    """Return the columns whose values differ between the lines of one facet."""
    names = [*FIRST_NAMES, *option_names(lines), *LAST_NAMES]
    if color and color not in names:
        names.append(color)
    counts = lines.groupby("facet")[names].nunique()
    return counts.columns[counts.max() > 1].tolist()


def in_words(lines: pd.DataFrame, column: str) -> list[str]:
    """Return a column as labels."""
    return [words(column, value) for value in lines[column]]


def looks(lines: pd.DataFrame, key: str) -> list[Look]:
    """Return each line's look: a colour for each value of a column, and a dash of its own while lines are few."""
    values = sorted(lines[key].unique())
    is_number = is_numeric_dtype(lines[key])
    by_value = {}
    for index, value in enumerate(values):
        if key == "method":
            by_value[value] = look_of(value)
        elif is_number:
            by_value[value] = gradient(index, len(values))
        else:
            by_value[value] = Look(PALETTE[index % len(PALETTE)])
    by_label = dict(zip(lines.label, lines[key].map(by_value), strict=True))
    is_ambiguous = len(set(by_label.values())) < len(by_label)
    if is_ambiguous and len(by_label) <= MOST_LABELS:
        colours = [look.colour for look in by_label.values()]
        for index, label in enumerate(by_label):
            colour = colours[index]
            dash = colours[:index].count(colour)
            by_label[label] = Look(colour, DASHES[dash % len(DASHES)])
    return [by_label[label] for label in lines.label]


def evenly(count: int, most: int) -> list[int]:
    """Return at most `most` indices out of `count`, evenly spaced, the first and the last among them."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()


def measured_names(names: list[str], values: pd.DataFrame, is_asked: bool) -> list[str]:
    """Return the quantities that were measured. Raises `UserError` for one that was asked for and was not."""
    for name in names:
        if is_asked and not (values.what == name).any():
            raise UserError(f"what={name}: not measured in any of these runs")
    return [name for name in names if (values.what == name).any()]


def panels_of(
    names: Sequence[str],
    values: pd.DataFrame,
    lines: pd.DataFrame,
    layers: Sequence[int] | None,
    notes: list[str],
) -> list[Panel]:
    """Return a panel for each facet, quantity and layer; all layers are in one panel where each facet has one line."""
    if layers and not values.layer.any():
        raise UserError(f"layer={layers[0]}: what is drawn has no layers")
    facets = lines.groupby("facet")
    is_single = facets.size().max() == 1
    groups: list[tuple[str, list[int]]] = []
    for name in names:
        shown = layers_of(name, values[values.what == name], lines, layers, is_single, notes)
        groups += [(name, shown)] if is_single else [(name, [layer]) for layer in shown]
    number = len(facets) * len(groups)
    if number > MOST_PANELS:
        raise UserError(f"a figure has at most {MOST_PANELS} panels, and these would be {number}")
    panels = []
    for _, part in facets:
        panels += [Panel(name, shown, part) for name, shown in groups]
    return panels


def layers_of(
    name: str,
    values: pd.DataFrame,
    lines: pd.DataFrame,
    asked: Sequence[int] | None,
    is_single: bool,
    notes: list[str],
) -> list[int]:
    """Return the layers to show of a quantity. Raises `UserError` for one that was asked for and not measured."""
    layers = sorted(int(layer) for layer in values.layer.unique())
    if layers == [0]:
        return layers
    for layer in asked or ():
        if layer not in layers:
            raise UserError(f"layer={layer}: {name} was not measured there; there are {', '.join(map(str, layers))}")
    if asked or is_single:
        return list(asked or layers)
    exact = set.intersection(*map(set, lines.exact_layers)) if name in RELATIVE else set()
    shown = [layer for layer in layers if str(layer) not in exact]
    if shown and len(shown) < len(layers):
        notes.append(f"Layer {', '.join(sorted(exact, key=int))}: BP's own signal in every run, not shown.")
    shown = shown or layers
    if len(shown) > MOST_LAYERS:
        notes.append(f"Shown are {MOST_LAYERS} of {len(shown)} layers.")
    return [shown[index] for index in evenly(len(shown), MOST_LAYERS)]


def with_axes(panels: Sequence[Panel], columns: int) -> Figure:
    """Return a figure with axes for each panel. Facets of one data set share their y axis.

    columns: how many stand side by side, 0 where it does not matter.
    """
    number = len(panels)
    if not 1 < columns < 5:
        columns = 2 if number == 4 else min(3, number)
    rows = math.ceil(number / columns)
    figure = Figure(figsize=(2.3 + 4.2 * columns, 0.9 + 2.9 * rows), layout="constrained")
    datasets = {dataset for panel in panels for dataset in panel.lines.dataset}
    first: dict[Any, Axes] = {}
    for index, panel in enumerate(panels):
        key = (panel.name, *panel.layers) if len(datasets) == 1 else index
        first[key] = figure.add_subplot(rows, columns, index + 1, sharey=first.get(key))
    return figure


def draw_panel(axes: Axes, panel: Panel, values: pd.DataFrame, notes: list[str]) -> None:
    """Draw a panel: a curve for each line, or for each layer where there are several."""
    quantity = WHAT[panel.name]
    heading = panel.lines.heading.iloc[0]
    layers = panel.layers
    title = quantity.title
    if len(layers) == 1 and layers[0]:
        title += f", layer {layers[0]}"
    axes.set_title(f"{heading} · {title}" if heading else title)
    axes.set_ylabel(quantity.axis)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    values = values[(values.what == panel.name) & values.layer.isin(layers)]
    groups = values[values.line.isin(panel.lines.index)].groupby(["line", "layer"])
    is_detailed = groups.ngroups <= MOST_DETAILED
    for (number, layer), rows in groups:
        line = panel.lines.loc[number]
        label, look = line["legend"], line["look"]
        if len(layers) > 1:
            label, look = f"layer {layer}", gradient(layers.index(layer), len(layers))
        draw_curve(axes, rows, label, look, is_detailed, notes)
    if not axes.lines:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=TEXT_GREY)


def draw_curve(axes: Axes, rows: pd.DataFrame, label: str, look: Look, is_detailed: bool, notes: list[str]) -> None:
    """Draw a curve: mean and band; where it is detailed also the values as measured and on the validation set."""
    color = look.colour
    values = rows[~rows.is_validation]
    validation = rows[rows.is_validation]
    marker = "o" if len(values) == 1 else None
    if values.runs.max() > 1:
        axes.fill_between(values.x, values.low, values.high, color=color, alpha=0.15, linewidth=0)
    is_smoothed = values.raw.notna().any() and not values.raw.equals(values["mean"])
    if is_detailed and is_smoothed:
        axes.plot(values.x, values.raw, color=color, alpha=0.25, linewidth=0.6)
        notes.append("Faint: as measured.")
    if is_detailed and len(validation):
        axes.plot(validation.x, validation["mean"], ":", color=color, marker=marker, linewidth=1.2)
        notes.append("Dotted: validation set.")
    axes.plot(values.x, values["mean"], color=color, linestyle=look.dash, marker=marker, label=label)


def set_scale(axes: Axes, name: str, log: bool, notes: list[str]) -> None:
    """Set the height of an axis by what most curves need. Sizes of layers that are far apart get a logarithmic one."""
    siblings = axes.get_shared_y_axes().get_siblings(axes)
    drawn = [np.asarray(line.get_ydata()) for sibling in siblings for line in sibling.lines]
    values = np.concatenate(drawn)
    is_log = log or (name != "loss" and ceiling(drawn, 4) < values.max())
    if is_log:
        axes.set_yscale("log")
        plain_ticks(axes)
    top = ceiling(drawn, 100 if is_log else 4)
    if top < values.max():
        margin = 0.05 * (top - values.min())
        bottom = values[values > 0].min() / 1.2 if is_log else values.min() - margin
        axes.set_ylim(bottom, 1.2 * top if is_log else top + margin)
        notes.append(f"{WHAT[name].title}: the axis cuts off the highest values.")


def ceiling(drawn: Sequence[np.ndarray], times: float) -> float:
    """Return the highest value that an axis has to show, so that no outlier sets it.

    Left out is what lies above so many times the height of most curves: what they start at, or their 98 % quantile.
    """
    heights = [max(curve[0], np.quantile(curve, 0.98)) for curve in drawn]
    usual = np.quantile(heights, 0.75, method="lower") or max(heights)
    values = np.concatenate(drawn)
    return float(values[values <= times * usual].max(initial=0))


def plain_ticks(axes: Axes) -> None:
    """Label a logarithmic y axis with plain numbers, such as 0.01, 0.02, 0.05 and 500."""
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def add_legend(figure: Figure, notes: list[str]) -> None:
    """Add one legend for all panels; of many entries it names a few, evenly chosen."""
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    labels = list(handles)
    shown = [labels[index] for index in evenly(len(labels), MOST_COLOURS)]
    if len(shown) < len(labels):
        notes.append(f"The legend names {len(shown)} of {len(labels)} colours.")
    texts = [fill(label, 24) for label in shown]
    if shown:
        figure.legend([handles[label] for label in shown], texts, loc="outside right center")


def title(lines: pd.DataFrame) -> str:
    """Return what all the lines share: net and data set, or how many there are, then method and rate."""
    titles = list(dict.fromkeys(title_of(row) for row in lines.to_dict("records")))
    if len(titles) > 3:
        titles = [f"{len(titles)} nets and data sets"]
    for column in ("method", "lr"):
        if lines[column].nunique() == 1:
            titles.append(words(column, lines[column].iloc[0]))
    return " · ".join(titles)
