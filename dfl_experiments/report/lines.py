"""Figures of curves: loss, accuracy and the quantities of each layer, over iterations or epochs."""

import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from pandas import DataFrame, Series

from dfl_experiments.errors import UserError
from dfl_experiments.report.frame import refuse_no_table, with_key
from dfl_experiments.report.labels import layers_sentence
from dfl_experiments.report.line_labels import lines_of, title, with_lines
from dfl_experiments.report.run_record import ALIASES
from dfl_experiments.report.series import known, measured, over_seeds, quantity_of, recorded
from dfl_experiments.report.style import TEXT_GREY, Look, styled

logger = logging.getLogger(__name__)
DEFAULT = ("loss", "accuracy", "alignment")
# relative to BP: constant in a layer whose signal equals BP's
RELATIVE = ("alignment", "cosine_batch", "norm")
BOUNDED = ("accuracy", "alignment", "dead")  # endings of the names of quantities with a fixed range
MOST_ROWS = 3  # largest number of panels in a figure of one column
MOST_COLUMNS = 5  # largest number of panels in a row
# smallest width and height in inches of a panel in a figure of a given size
NARROWEST, LOWEST = 1.6, 1.5
MOST_LAYERS = 6  # largest number of layers that have a panel
MOST_POINTS = 500  # largest number of points in a curve
OUTLIER = 4  # a curve is an outlier if it exceeds this multiple of the curves' median height


class Panel(NamedTuple):
    """One panel of a figure."""

    name: str
    """Name of a quantity, see `series.quantity_of`."""
    layer: int
    """A hidden layer, or 0 for a quantity of the whole net."""
    lines: DataFrame
    """The lines of the panel's facet, see `lines_of`."""


def draw(
    frame: DataFrame,
    what: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    by: Literal["iteration", "epoch"] | None = None,
    color: str | None = None,
    facet: str | None = None,
    smooth: int | None = None,
    log: bool = False,
    size: tuple[float, float] | None = None,
) -> Figure:
    """Draw the curves of the runs.

    Runs that differ only in the seed become one line, which shows the mean over the seeds. A band around the line
    reaches from the lowest to the highest value.

    Parameters:
        frame: the runs, as `dfl.runs` returns them.
        what: names of quantities: loss, accuracy, alignment, norm, rms, dead, and columns of epochs.csv or
            iterations.csv without the ending /i, such as validation_loss. Default: those of loss, accuracy and
            alignment that were measured.
        layers: hidden layers, counted from 1. Default: all, or six evenly spaced ones if there are more.
        by: the x axis. Default: iteration if every run with curves has iterations.csv, else epoch.
        color: column or configuration key. Each of its values gets a colour. Default: the first column that differs.
        facet: column or configuration key. Each of its values gets a panel for each quantity and layer.
        smooth: window of the running mean, in measured values. Default: 1/40 of the iterations; by epoch, none.
        log: use a logarithmic y axis, except for accuracy, alignment and dead.
        size: width and height in inches of a figure for a paper, without title and caption. The caption is logged.

    Raises:
        UserError: the frame is empty; no run has a requested quantity, layer or key; no run has values; or the size is
            too small for the panels.
    """
    refuse_no_table(frame, "draw")
    if frame.empty:
        raise UserError("frame: has no runs to draw")
    if isinstance(what, str):
        what = [what]
    of_epochs = recorded(frame, "epochs")
    of_iterations = recorded(frame, "iterations")
    names = known(what or DEFAULT, of_epochs + of_iterations)
    color = ALIASES.get(str(color), color)
    facet = ALIASES.get(str(facet), facet)
    keys = [key for key in (color, facet) if key]
    for key in keys:
        frame = with_key(frame, key)
    notes: list[str] = []
    frame = with_curves(with_lines(frame, keys, notes))
    lines = lines_of(frame, color, facet, notes)
    x = "epoch"
    has_iterations = all(Path(folder, "iterations.csv").exists() for folder in frame.folder)
    if by != "epoch" and has_iterations and set(names) & set(of_iterations):
        x = "iteration"
    values = over_seeds(measured(frame, names, x, smooth, notes), frame)
    refuse_unmeasured(layers or (), values)
    values = without_constants(values, lines, notes)
    for name in names:
        if what and name not in set(values.what):
            raise UserError(f"what={name}: not measured by {x}, or equal to BP's by construction")
    note_seeds(values.runs, len(lines), notes)
    panels = []
    for _, part in lines.groupby("facet"):
        for name in names:
            of_quantity = values[values.what == name]
            shown = layers_of(of_quantity, layers, notes)
            panels += [Panel(name, layer, part) for layer in shown]
    names_of_layers = layers_sentence(frame, {panel.layer for panel in panels})
    if names_of_layers:
        notes.append(names_of_layers)
    with styled(is_small=size is not None):
        figure = with_axes(panels, lines, size)
        for axes, panel in zip(figure.axes, panels, strict=True):
            axes.set_xlabel(x)
            draw_panel(axes, panel, values, 4 if size else 6)
        # now all curves are drawn, also on shared axes
        for axes, panel in zip(figure.axes, panels, strict=True):
            if not panel.name.endswith(BOUNDED) and axes.lines:
                set_scale(axes, log)
        if size:
            add_text(figure, order=lines.legend.tolist())
            logger.info("title and caption: %s", " ".join([f"{title(lines)}.", *notes]))
        else:
            add_text(figure, title(lines), notes, lines.legend.tolist())
    return figure


def with_curves(frame: DataFrame) -> DataFrame:
    """Return the runs that have curves. A run whose net could not be built has none."""
    has_curves = [
        Path(folder, "epochs.csv").exists() or Path(folder, "iterations.csv").exists()
        for folder in frame.folder
    ]
    if not any(has_curves):
        raise UserError("nothing to draw: no run has rows in epochs.csv")
    return frame[has_curves]


def refuse_unmeasured(layers: Iterable[int], values: DataFrame) -> None:
    """Raise `UserError` if one of the layers has no values."""
    measured_layers = sorted(set(values.layer) - {0})
    for layer in layers:
        if layer not in measured_layers:
            choices = ", ".join(map(str, measured_layers))
            raise UserError(f"layer={layer}: not measured; there are {choices}")


def note_seeds(counts: Series, number_of_lines: int, notes: list[str]) -> None:
    """Add a note that says how many runs a line shows. counts: number of averaged runs of each value."""
    most = counts.max()
    if most > 1:
        up_to = "up to " if counts.min() < most else ""
        notes.append(f"Mean over {up_to}{most} seeds, their range shaded.")
    elif number_of_lines > 1:
        notes.append("Each line is one run.")


def without_constants(values: DataFrame, lines: DataFrame, notes: list[str]) -> DataFrame:
    """Leave out values relative to BP in runs of BP itself, and in the layers of the column `exact_layers`."""
    about = lines.loc[values.line]
    layers = values.layer.astype(str)
    pairs = zip(layers, about.exact_layers, strict=True)
    is_exact = np.array([layer in exact for layer, exact in pairs], dtype=bool)
    is_bp = about.rule.to_numpy() == "bp"
    is_relative = values.what.isin(RELATIVE)
    is_constant = is_relative & (is_exact | is_bp)
    if is_constant.any():
        notes.append("Not shown: signals that equal BP's by construction, or that are mostly zero.")
    return values[~is_constant]


def layers_of(values: DataFrame, asked: Sequence[int] | None, notes: list[str]) -> list[int]:
    """Return the layers for which a quantity is drawn. values: those of the quantity."""
    layers = np.unique(values.layer)
    if asked and layers.any():
        return [layer for layer in asked if layer in layers]
    if len(layers) > MOST_LAYERS:
        notes.append(f"{MOST_LAYERS} of {len(layers)} layers are shown.")
    indices = evenly(len(layers), MOST_LAYERS)
    return layers[indices].tolist()


def evenly(count: int, most: int) -> list[int]:
    """Return at most `most` evenly spaced indices from 0 … count-1. The first and the last index are among them."""
    indices = np.linspace(0, count - 1, min(count, most))
    return indices.round().astype(int).tolist()


def with_axes(
    panels: Sequence[Panel], lines: DataFrame, size: tuple[float, float] | None
) -> Figure:
    """Return a figure with axes for each panel: few panels in one column, several panels of each facet in one row.

    If all runs use one data set, panels of the same quantity and layer share one y axis. For bounded quantities, the
    panels of all layers share one.
    """
    facets = lines.facet.nunique()
    columns = math.ceil(len(panels) / MOST_ROWS)
    if size:
        fitting = max(int(size[0] / NARROWEST), 1)
        of_facet = len(panels) // facets
        # whole facets in a row, if one fits
        columns = fitting - fitting % of_facet if of_facet <= fitting else fitting
    elif 1 < facets < len(panels):
        columns = len(panels) // facets
    columns = min(max(columns, 1), MOST_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    if size and (size[0] < NARROWEST or size[1] < rows * LOWEST):
        raise UserError(
            f"size: {len(panels)} panels in {rows} rows need {NARROWEST}x{rows * LOWEST:g} inches or more; draw fewer "
            "panels, or choose a larger size"
        )
    width = 0.6 + 4.8 * columns
    height = 1.2 + 2.7 * rows + 0.05 * lines.legend.nunique()
    figure = Figure(figsize=size or (width, height), layout="constrained")
    is_shared = lines.dataset.nunique() == 1
    first: dict[Any, Axes] = {}
    for index, panel in enumerate(panels):
        layer = 0 if panel.name.endswith(BOUNDED) else panel.layer
        key = (panel.name, layer) if is_shared else index
        first[key] = figure.add_subplot(rows, columns, index + 1, sharey=first.get(key))
    return figure


def draw_panel(axes: Axes, panel: Panel, values: DataFrame, most_ticks: int) -> None:
    """Draw a panel: one curve for each line. most_ticks: largest number of ticks of the x axis."""
    quantity = quantity_of(panel.name)
    title = quantity.title
    heading = panel.lines.heading.iloc[0]
    if heading:
        title = f"{heading} · {title}"
    if panel.layer:
        title += f", layer {panel.layer}"
    axes.set_title(title)
    axes.set_ylabel(quantity.axis)
    ticks = MaxNLocator(most_ticks, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10])
    axes.xaxis.set_major_locator(ticks)
    is_quantity = values.what == panel.name
    is_layer = values.layer == panel.layer
    is_line = values.line.isin(panel.lines.index)
    curves = values[is_quantity & is_layer & is_line].groupby("line")
    for number, rows in curves:
        line = panel.lines.loc[number]
        draw_curve(axes, rows, line["legend"], line["look"])
    if not axes.lines:
        axes.text(0.5, 0.5, "not shown", transform=axes.transAxes, ha="center", color=TEXT_GREY)


def draw_curve(axes: Axes, rows: DataFrame, label: str, look: Look) -> None:
    """Draw a curve with its band."""
    indices = evenly(len(rows), MOST_POINTS)
    rows = rows.iloc[indices]
    colour, dash = look
    if rows.runs.max() > 1:
        axes.fill_between(rows.x, rows.low, rows.high, color=colour, alpha=0.15, linewidth=0)
    marker = "o" if len(rows) == 1 else None
    axes.plot(rows.x, rows["mean"], color=colour, linestyle=dash, marker=marker, label=label)


def set_scale(axes: Axes, log: bool) -> None:
    """Make a y axis logarithmic on request, or if an outlier would compress the other curves on a linear axis.

    Ticks are also between the powers of ten if the values span less than three of them.
    """
    siblings = axes.get_shared_y_axes().get_siblings(axes)
    curves = []
    for sibling in siblings:
        curves += [np.asarray(line.get_ydata()) for line in sibling.lines]
    heights = [curve.max() for curve in curves]
    if not log and max(heights) <= OUTLIER * np.median(heights):
        return
    axes.set_yscale("log")
    values = np.concatenate(curves)
    values = values[values > 0]
    multiples = [1]
    if len(values) and values.max() < 1e3 * values.min():
        multiples = [1, 2, 5]
    axes.yaxis.set_major_locator(LogLocator(subs=multiples))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def add_text(
    figure: Figure, title: str = "", notes: Iterable[str] = (), order: Iterable[str] = ()
) -> None:
    """Add a title above all panels, and below them a caption and one legend in which every text occurs once.

    notes: the sentences of the caption.
    order: the order of the texts in the legend. Default: the order in which they were drawn.
    """
    width = figure.get_figwidth()
    if title:
        figure.suptitle(fill(title, int(9 * width)))
    caption = fill(" ".join(dict.fromkeys(notes)), int(14 * width))
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        drawn, names = axes.get_legend_handles_labels()
        handles |= dict(zip(names, drawn, strict=True))
    labels = [label for label in dict.fromkeys(order or handles) if label in handles]
    texts = [fill(label, 24) for label in labels]
    longest = max((len(line) for text in texts for line in text.splitlines()), default=0)
    widest = 0.06 * longest + 0.6  # inches
    legend = figure.legend(
        [handles[label] for label in labels],
        texts,
        loc="outside lower center",
        ncols=max(1, int(width / widest)),
        title=caption,
        title_fontsize=8,
    )
    legend.get_title().set_color(TEXT_GREY)
