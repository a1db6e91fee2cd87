"""The figures of a report as PNG and PDF files, and the numbers they show as CSV."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import offset_copy
from scipy.optimize import isotonic_regression

from dfl_experiments.report.cells import Section
from dfl_experiments.report.outcomes import figures
from dfl_experiments.report.panels import Bars, Curves, Figure, HeatMap, Points
from dfl_experiments.report.setting import file_name
from dfl_experiments.running.run_directory import csv_text, naming

PANELS_A_ROW = 3
LABEL_GAP = 0.05  # of an axis' height, between two labels at the ends of curves
LABELS_A_PANEL = 12  # that have room in one of the usual height
CHARACTERS_AN_INCH, OF_A_NOTE = 11, 15
DASHES: dict[str, Any] = {
    "solid": "-", "dash": "--", "dot": ":", "dashdot": "-.", "longdash": (0, (9, 2)),
}  # fmt: skip
MARKERS = {"circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "x": "x"}
STYLE: Any = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e4e4e4",
    "axes.axisbelow": True, "font.size": 10, "axes.titlesize": 11, "figure.titlesize": 13, "pdf.fonttype": 42,
    "text.parse_math": False,  # a $ in a name is a $
}  # fmt: skip


def spread(positions: Sequence[float] | np.ndarray, gap: float, bottom: float, top: float) -> np.ndarray:
    """The positions, moved apart as little as it takes for neighbours to be a gap from one another.

    All lie between bottom and top, unless there are more than fit: then they reach above it.
    """
    moved = np.array(positions, dtype=float)
    order = moved.argsort(kind="stable")
    stacked = gap * np.arange(len(moved))  # without these heights neighbours need only keep their order
    highest = max(bottom, top - stacked[-1])
    moved[order] = isotonic_regression(moved[order] - stacked).x.clip(bottom, highest) + stacked
    return moved


def draw_curves(axes: Axes, panel: Curves) -> None:
    """Lines with their names at their right ends, and the range over seeds as a shade."""
    ends = []
    for one in panel.series:
        y, colour = np.array(one.y, dtype=float), one.look.colour
        marker = MARKERS[one.look.marker] if len(one.x) == 1 else None
        axes.plot(one.x, y, color=colour, linestyle=DASHES[one.look.dash], linewidth=1.8, marker=marker)
        if one.low:
            low, high = np.array(one.low, dtype=float), np.array(one.high, dtype=float)
            axes.fill_between(one.x, low, high, color=colour, alpha=0.2, linewidth=0)
        last = np.flatnonzero(~np.isnan(y))[-1]
        ends.append((one.x[last], y[last]))
    if panel.y_range:
        axes.set_ylim(*panel.y_range)
    if panel.log:
        axes.set_yscale("log")
    heights = axes.transScale.transform(ends)[:, 1]
    bottom, top = axes.transScale.transform([(1, y) for y in axes.get_ylim()])[:, 1]
    gap = min(LABEL_GAP, 1 / len(ends)) * (top - bottom)
    places = spread(heights, gap, bottom + gap / 2, top - gap / 2)
    scaled = axes.transLimits + axes.transAxes  # what takes heights to the paper
    beside = offset_copy(scaled, axes.get_figure(root=True), x=16, units="points")
    for one, end, place in zip(panel.series, ends, places, strict=True):
        line = {"arrowstyle": "-", "color": one.look.colour, "linewidth": 0.6, "shrinkA": 0, "relpos": (0, 0.5)}
        look: Any = {"color": one.look.colour, "va": "center", "fontweight": "bold", "annotation_clip": False}
        axes.annotate(one.look.name, end, (end[0], place), textcoords=beside, arrowprops=line, **look)
    axes.set(xlabel=panel.x, ylabel=panel.y)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))


def draw_points(axes: Axes, panel: Points) -> None:
    """Runs as points, and which are whose beside them."""
    for one in panel.series:
        look: Any = {"color": one.look.colour, "marker": MARKERS[one.look.marker], "label": one.look.name}
        axes.scatter(one.x, np.array(one.y, dtype=float), s=22, alpha=0.8, **look)
    axes.set(xlabel=panel.x, ylabel=panel.y)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)


def draw_heat_map(axes: Axes, panel: HeatMap) -> None:
    """A coloured field for every grid point, with its number; the chosen one framed."""
    low, high = panel.scale
    colours = Normalize(low - 0.01, high + 0.01)
    values = np.array(panel.values, dtype=float)
    image = axes.imshow(values, cmap="cividis", norm=colours, aspect="auto")
    axes.grid(False)
    for (i, j), value in np.ndenumerate(values):
        red, green, blue, _ = (1, 1, 1, 1) if math.isnan(value) else image.cmap(colours(value))
        dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
        axes.text(j, i, panel.labels[i][j], ha="center", va="center", color="white" if dark else "black")
    axes.figure.colorbar(image, ax=axes, shrink=0.8)
    for i, j in panel.chosen:
        axes.add_patch(Rectangle((j - 0.48, i - 0.46), 0.96, 0.92, fill=False, color="#D55E00", linewidth=3))
    for axis, (name, ticks) in ((axes.xaxis, panel.across), (axes.yaxis, panel.down)):
        axis.set_ticks(range(len(ticks)), ticks)
        axis.set_label_text(name)


def draw_bars(axes: Axes, panel: Bars) -> None:
    """A bar a name, the number at its end."""
    bars = axes.barh(panel.names, panel.values, color=panel.colours)
    axes.bar_label(bars, fmt="{:,.0f}", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.grid(False)
    axes.set(xlabel=panel.x)


DRAW: dict[type, Any] = {Curves: draw_curves, Points: draw_points, HeatMap: draw_heat_map, Bars: draw_bars}


def canvas_of(figure: Figure, heading: str) -> Canvas:
    """The figure on a canvas of its own, which no window shows. heading: stands under its title."""
    count = len(figure.panels)
    columns = 2 if count == 4 else min(count, PANELS_A_ROW)
    rows = math.ceil(count / columns)
    bars = isinstance(figure.panels[0], Bars)
    width, height = (7.5, 4.6) if count == 1 else (4.6 * columns, (2.6 if bars else 3.6) * rows + 0.9)
    most = max(len(panel.series) if isinstance(panel, Curves | Points) else 0 for panel in figure.panels)
    most = max(most, *(len(panel.down[1]) if isinstance(panel, HeatMap) else 0 for panel in figure.panels))
    height += 0.25 * rows * max(0, most - LABELS_A_PANEL)
    canvas = Canvas(figsize=(width, height), dpi=150, layout="constrained")
    lines = [textwrap.fill(text, int(CHARACTERS_AN_INCH * width)) for text in (figure.title, heading)]
    canvas.suptitle("\n".join(lines), fontsize=11)
    for place, panel in enumerate(figure.panels, start=1):
        axes = canvas.add_subplot(rows, columns, place)
        if count > 1 or not isinstance(panel, Curves | Points):
            axes.set_title(textwrap.fill(panel.title, int(CHARACTERS_AN_INCH * 0.9 * width / columns)))
        DRAW[type(panel)](axes, panel)
    canvas.supxlabel(textwrap.fill(figure.note, int(OF_A_NOTE * width)), fontsize=8, color="#606060")
    return canvas


def write_numbers(figure: Figure, path: str) -> None:
    """What the figure's panels show, a number a row."""
    rows: list[list[str | None]] = [["panel", "series", "x", "y", "low", "high"]]
    for panel in figure.panels:
        for row in panel.rows():
            texts = [f"{value:.6g}" if isinstance(value, int | float) else value for value in row]
            rows.append([panel.title, *texts])
    Path(path).write_text(csv_text(rows), encoding="utf-8", newline="")


def write_figures(section: Section, folder: Path, words: str) -> list[Path]:
    """Every figure of a section as PNG, PDF and CSV in a folder, words in their names; the paths of the PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    # a user's matplotlibrc has no say
    with style.context(STYLE, after_reset=True):
        for figure in figures(section):
            path = folder / file_name([figure.name, *filter(None, [words])])
            canvas = canvas_of(figure, section.setting.title)
            with naming(path):
                canvas.savefig(f"{path}.png")
                canvas.savefig(f"{path}.pdf", metadata={"CreationDate": None})  # the same runs give the same file
                write_numbers(figure, f"{path}.csv")
            written.append(Path(f"{path}.png"))
    return written
