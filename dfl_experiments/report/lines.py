"""Figures of curves: loss, accuracy and the quantities of each layer, over iterations or epochs."""

import math
from collections.abc import Iterable, Sequence
from textwrap import fill
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from dfl_experiments.configuration.refusals import did_you_mean
from dfl_experiments.errors import UserError
from dfl_experiments.report.frame import ALIASES, with_key
from dfl_experiments.report.line_labels import lines_of, title, with_lines
from dfl_experiments.report.series import COLUMNS, WHAT, axis_of, measured, over_seeds, span
from dfl_experiments.report.style import TEXT_GREY, Look, add_text, method_name, styled

DEFAULT = ("loss", "accuracy", "alignment")
RELATIVE = ("alignment", "norm")  # relative to BP: constant in a layer whose signal equals BP's
BOUNDED = ("accuracy", "alignment", "dead")  # quantities with a fixed range
MOST_COLUMNS = 6  # largest number of panels in a row, if every facet begins a new row
MOST_LAYERS = 6  # largest number of layers that have a panel
MOST_COLOURS = 12  # largest number of colours in the legend; of more colours, only some are shown
MOST_DETAILED = 3  # a panel with more curves shows neither measured values nor validation curves


class Panel(NamedTuple):
    """One panel of a figure."""

    name: str
    """A quantity of `WHAT`."""
    layer: int
    """A hidden layer, or 0 for a quantity of the whole net."""
    lines: pd.DataFrame
    """The lines of the panel's facet, see `lines_of`."""


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
    """Draw the curves of the runs.

    Runs that differ only in the seed become one line, which shows the mean over the seeds. A band around the line
    reaches from the lowest to the highest value.

    Parameters:
        frame: the runs, as `frame.runs` returns them.
        what: names of quantities in `WHAT`, or their columns in epochs.csv, such as cosine for alignment. Default:
            those of loss, accuracy and alignment that were measured.
        layers: hidden layers, counted from 1. Default: all, or six evenly spaced ones if there are more.
        by: the x axis. Default: iteration if every run has iterations.csv, else epoch.
        color: column or configuration key. Each of its values gets a colour. Default: the first column that differs.
        facet: column or configuration key. Each of its values gets a panel for each quantity and layer.
        smooth: window of the running mean, in measured iterations. 1: no smoothing. Default: 1/40 of each curve.
        log: use a logarithmic y axis for loss, norm and rms.

    Raises:
        UserError: the frame is empty; no run has a requested quantity, layer or key; no run has values; or `smooth` is
            set and the x axis shows epochs.
    """
    if frame.empty:
        raise UserError("frame: has no runs to draw")
    names = quantities([what] if isinstance(what, str) else what or DEFAULT)
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
        raise UserError(
            f"smooth={smooth}: needs iterations on the x axis, but the axis shows epochs"
        )
    values = over_seeds(measured(frame, names, x, smooth, notes), frame)
    seeds = values.groupby(["line", "what"]).runs.max()
    if seeds.max() > 1:
        notes.append(f"Mean over {span(seeds)} seeds, their range shaded.")
    elif len(lines) > 1:
        notes.append("Each line is one run.")
    for name in names if what else ():
        if not (values.what == name).any():
            raise UserError(f"what={name}: not measured in any of these runs")
    names = [name for name in names if (values.what == name).any()]
    panels = panels_of(names, values, lines, layers, notes)
    with styled():
        figure = with_axes(panels, facets=lines.facet.nunique())
        for axes, panel in zip(figure.axes, panels, strict=True):
            axes.set_xlabel(x)
            draw_panel(axes, panel, values, notes)
        # now all curves are drawn, also on shared axes
        for axes, panel in zip(figure.axes, panels, strict=True):
            if panel.name not in BOUNDED and axes.lines:
                set_scale(axes, panel.name, log, notes)
        add_legend(figure, lines.legend, notes)
        add_text(figure, title(lines), notes)
    return figure


def quantities(names: Sequence[str]) -> list[str]:
    """Return the names of quantities, each once. A column of epochs.csv is replaced by the name of its quantity.

    Raises:
        UserError: there is no such quantity.
    """
    for name in names:
        if name not in WHAT and name not in COLUMNS:
            hint = did_you_mean(name, [*WHAT, *COLUMNS])
            raise UserError(f"what={name}: no such quantity; there are {', '.join(WHAT)}{hint}")
    return list(dict.fromkeys(COLUMNS.get(name, name) for name in names))


def evenly(count: int, most: int) -> list[int]:
    """Return at most `most` evenly spaced indices from 0 … count-1. The first and the last index are among them."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()


def panels_of(
    names: Sequence[str],
    values: pd.DataFrame,
    lines: pd.DataFrame,
    layers: Sequence[int] | None,
    notes: list[str],
) -> list[Panel]:
    """Return a panel for each combination of facet, quantity and layer."""
    panels = []
    for _, part in lines.groupby("facet"):
        for name in names:
            shown = layers_of(name, values[values.what == name], lines, layers, notes)
            panels += [Panel(name, layer, part) for layer in shown]
    return panels


def layers_of(
    name: str,
    values: pd.DataFrame,
    lines: pd.DataFrame,
    asked: Sequence[int] | None,
    notes: list[str],
) -> list[int]:
    """Return the layers for which a quantity is drawn. Raises `UserError` if a requested layer was not measured."""
    layers = sorted(int(layer) for layer in values.layer.unique())
    if layers == [0]:
        return layers
    for layer in asked or ():
        if layer not in layers:
            choices = ", ".join(map(str, layers))
            raise UserError(
                f"layer={layer}: {name} was not measured in this layer, only in layers {choices}"
            )
    if asked:
        return list(asked)
    exact = set.intersection(*map(set, lines.exact_layers)) if name in RELATIVE else set()
    shown = [layer for layer in layers if str(layer) not in exact]
    if shown and len(shown) < len(layers):
        notes.append(
            f"Layer {', '.join(sorted(exact, key=int))}: BP's own signal in every run, not shown."
        )
    shown = shown or layers
    if len(shown) > MOST_LAYERS:
        notes.append(f"Shown are {MOST_LAYERS} of {len(shown)} layers.")
    return [shown[index] for index in evenly(len(shown), MOST_LAYERS)]


def with_axes(panels: Sequence[Panel], facets: int) -> Figure:
    """Return a figure with axes for each panel.

    If there are several facets with several panels each, every facet begins a new row.

    If all runs use one data set, all panels that show the same quantity and layer share one y axis. For alignment and
    dead units, the panels of all layers share one y axis.

    facets: number of facets. All have the same number of panels.
    """
    number = len(panels)
    block = number // facets  # number of panels that begin on a new row
    if 1 < block < number:
        rows_of_block = math.ceil(block / MOST_COLUMNS)
        columns = math.ceil(block / rows_of_block)
    else:
        block = number
        columns = 2 if number == 4 else min(3, number)
        rows_of_block = math.ceil(number / columns)
    rows = rows_of_block * number // block
    figure = Figure(figsize=(2.3 + 4.2 * columns, 0.9 + 2.9 * rows), layout="constrained")
    datasets = {dataset for panel in panels for dataset in panel.lines.dataset}
    first: dict[Any, Axes] = {}
    for index, panel in enumerate(panels):
        layer = 0 if panel.name in BOUNDED else panel.layer
        key = (panel.name, layer) if len(datasets) == 1 else index
        facet, place = divmod(index, block)
        place += facet * rows_of_block * columns
        first[key] = figure.add_subplot(rows, columns, place + 1, sharey=first.get(key))
    return figure


def draw_panel(axes: Axes, panel: Panel, values: pd.DataFrame, notes: list[str]) -> None:
    """Draw a panel: one curve for each line."""
    quantity = WHAT[panel.name]
    heading = panel.lines.heading.iloc[0]
    title = f"{quantity.title}, layer {panel.layer}" if panel.layer else quantity.title
    axes.set_title(f"{heading} · {title}" if heading else title)
    axes.set_ylabel(quantity.axis)
    axes.xaxis.set_major_locator(
        MaxNLocator(nbins=6, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10])
    )
    is_here = (
        (values.what == panel.name)
        & (values.layer == panel.layer)
        & values.line.isin(panel.lines.index)
    )
    values = without_exact(panel, values[is_here], notes)
    curves = values.groupby("line")
    is_detailed = curves.ngroups <= MOST_DETAILED
    for number, rows in curves:
        line = panel.lines.loc[number]
        draw_curve(axes, rows, line["legend"], line["look"], is_detailed, notes)
    if not axes.lines:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=TEXT_GREY)


def without_exact(panel: Panel, values: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """Return the values of a panel without the lines of rules whose signal equals BP's in this layer.

    Their values are 1 by construction, and they would compress the other curves. Nothing changes if the quantity is not
    relative to BP, or if all lines of the panel are of this kind.
    """
    layer = str(panel.layer)
    has_exact = [
        rule == "bp" or layer in exact_layers
        for rule, exact_layers in zip(panel.lines.rule, panel.lines.exact_layers, strict=True)
    ]
    exact = panel.lines[has_exact]
    is_exact = values.line.isin(exact.index)
    if panel.name not in RELATIVE or is_exact.all() or not is_exact.any():
        return values
    names = ", ".join(dict.fromkeys(method_name(rule) for rule in exact.rule))
    notes.append(f"Layer {layer}, {names}: equal to BP by construction, not shown.")
    return values[~is_exact]


def draw_curve(
    axes: Axes, rows: pd.DataFrame, label: str, look: Look, is_detailed: bool, notes: list[str]
) -> None:
    """Draw a curve with its band. If `is_detailed`, also draw the measured values and the validation curve."""
    color = look.colour
    values = rows[~rows.is_validation]
    validation = rows[rows.is_validation]
    marker = "o" if len(values) == 1 else None
    if values.runs.max() > 1:
        axes.fill_between(values.x, values.low, values.high, color=color, alpha=0.15, linewidth=0)
    is_smoothed = values.raw.notna().any() and not values.raw.equals(values["mean"])
    if is_detailed and is_smoothed:
        axes.plot(values.x, values.raw, color=color, alpha=0.25, linewidth=0.6)
        notes.append("Faint: measured values.")
    if is_detailed and len(validation):
        axes.plot(validation.x, validation["mean"], ":", color=color, marker=marker, linewidth=1.2)
        notes.append("Dotted: validation set.")
    axes.plot(
        values.x, values["mean"], color=color, linestyle=look.dash, marker=marker, label=label
    )


def set_scale(axes: Axes, name: str, log: bool, notes: list[str]) -> None:
    """Set the scale and the limits of a y axis so that outliers do not compress the curves.

    The axis is logarithmic if `log` is set. Outliers also make it logarithmic, but not for the loss.
    """
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
    """Return the largest drawn value that is not an outlier.

    The height of a curve is its first value or its 98 % quantile, whichever is larger. The usual height is the upper
    quartile of the heights of all curves. A value is an outlier if it exceeds `times` × the usual height.
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


def add_legend(figure: Figure, order: Iterable[str], notes: list[str]) -> None:
    """Add one legend for all panels. If there are more than `MOST_COLOURS` entries, show only some of them.

    order: the texts of the legend in their order. Texts without a curve are left out.
    """
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    labels = [label for label in dict.fromkeys(order) if label in handles]
    shown = [labels[index] for index in evenly(len(labels), MOST_COLOURS)]
    if len(shown) < len(labels):
        notes.append(f"The legend has {len(shown)} of {len(labels)} colours.")
    texts = [fill(label, 24) for label in shown]
    if shown:
        figure.legend([handles[label] for label in shown], texts, loc="outside right center")
