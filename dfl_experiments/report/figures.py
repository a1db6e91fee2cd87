"""The figures of a report as PNG and PDF files, and the numbers they show as CSV."""

import csv
import math
import textwrap
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from dfl_experiments.report.curves import Bars, Curves, Figure, HeatMap, Panel

PANELS_A_ROW = 3
LABEL_GAP = 0.05  # of an axis' height, between two labels at the ends of curves
CHARACTERS_AN_INCH, OF_A_NOTE = 11, 15
STYLE: Any = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e4e4e4",
    "axes.axisbelow": True, "font.size": 10, "axes.titlesize": 11, "figure.titlesize": 13, "pdf.fonttype": 42,
}  # fmt: skip


def spread(positions: Sequence[float], gap: float, bottom: float, top: float) -> list[float]:
    """The positions, moved apart as little as it takes for neighbours to be a gap from one another.

    All lie between bottom and top, unless there are more than fit: then they reach above it.
    """

    def lowest(group: list[int]) -> float:
        height = gap * (len(group) - 1)
        middle = sum(positions[index] for index in group) / len(group)
        return max(min(middle - height / 2, top - height), bottom)

    groups: list[list[int]] = []  # of labels that touch: each is laid out evenly around its mean
    for index in sorted(range(len(positions)), key=lambda index: positions[index]):
        groups.append([index])
        while len(groups) > 1 and lowest(groups[-1]) < lowest(groups[-2]) + gap * len(groups[-2]):
            groups[-2:] = [groups[-2] + groups[-1]]
    moved = list(positions)
    for group in groups:
        for offset, index in enumerate(group):
            moved[index] = lowest(group) + offset * gap
    return moved


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def draw_curves(axes: Axes, panel: Curves) -> None:
    """Lines with their names at their right ends, and the range over seeds as a shade."""
    ends = []
    for one in panel.series:
        style = "--" if one.dashed else "-"
        marker = "o" if len(one.x) == 1 else None
        axes.plot(one.x, _numbers(one.y), style, color=one.colour, linewidth=1.8, marker=marker)
        if one.low:
            axes.fill_between(one.x, _numbers(one.low), _numbers(one.high), color=one.colour, alpha=0.2, linewidth=0)
        last = next((i for i in reversed(range(len(one.y))) if one.y[i] is not None), None)
        if last is not None:
            ends.append((one, one.x[last], one.y[last] or 0.0))
    if panel.y_range:
        axes.set_ylim(*panel.y_range)
    bottom, top = axes.get_ylim()
    gap = LABEL_GAP * (top - bottom)
    places = spread([y for _, _, y in ends], gap, bottom + gap / 2, top - gap / 2)
    for (one, x, _), place in zip(ends, places, strict=True):
        look: Any = {"color": one.colour, "va": "center", "fontweight": "bold", "annotation_clip": False}
        axes.annotate(one.name, (x, place), (6, 0), textcoords="offset points", **look)
    if max((len(one.x) for one in panel.series), default=0) == 1:
        axes.set_xlim(0.5, 1.5)
    axes.set(xlabel=panel.x, ylabel=panel.y)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))


def draw_heat_map(axes: Axes, panel: HeatMap) -> None:
    """A coloured field for every grid point, with its number; the chosen one framed."""
    low, high = panel.scale
    colours = Normalize(low - 0.01, high + 0.01)
    image = axes.imshow([_numbers(row) for row in panel.values], cmap="cividis", norm=colours, aspect="auto")
    axes.grid(False)
    for i, row in enumerate(panel.values):
        for j, value in enumerate(row):
            red, green, blue, _ = image.cmap(colours(value)) if value is not None else (1, 1, 1, 1)
            dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
            axes.text(j, i, panel.labels[i][j], ha="center", va="center", color="white" if dark else "black")
    axes.figure.colorbar(image, ax=axes, shrink=0.8)
    row_index, column = panel.chosen
    axes.add_patch(Rectangle((column - 0.48, row_index - 0.46), 0.96, 0.92, fill=False, color="#D55E00", linewidth=3))
    axes.set_xticks(range(len(panel.columns)), panel.columns)
    axes.set_yticks(range(len(panel.rows)), panel.rows)
    axes.set(xlabel=panel.x, ylabel=panel.y)


def draw_bars(axes: Axes, panel: Bars) -> None:
    """A bar a name, the number at its end."""
    bars = axes.barh(panel.names, panel.values, color=panel.colours)
    axes.bar_label(bars, [f"{value:,.0f}" for value in panel.values], padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.grid(False)
    axes.set(xlabel=panel.x)


def draw(axes: Axes, panel: Panel) -> None:
    """Any panel."""
    if isinstance(panel, Curves):
        draw_curves(axes, panel)
    elif isinstance(panel, HeatMap):
        draw_heat_map(axes, panel)
    else:
        draw_bars(axes, panel)


def canvas_of(figure: Figure, heading: str) -> Canvas:
    """The figure on a canvas of its own, which no window shows."""
    count = len(figure.panels)
    columns = min(count, PANELS_A_ROW)
    rows = math.ceil(count / columns)
    bars = isinstance(figure.panels[0], Bars)
    width, height = (7.5, 4.6) if count == 1 else (4.6 * columns, (2.6 if bars else 3.6) * rows + 0.9)
    canvas = Canvas(figsize=(width, height), dpi=150, layout="constrained")
    lines = textwrap.wrap(figure.title, int(CHARACTERS_AN_INCH * width))
    canvas.suptitle("\n".join([*lines, *textwrap.wrap(heading, int(CHARACTERS_AN_INCH * width))]), fontsize=11)
    for place, panel in enumerate(figure.panels, start=1):
        axes = canvas.add_subplot(rows, columns, place)
        if count > 1 or isinstance(panel, Bars | HeatMap):
            axes.set_title(textwrap.fill(panel.title, int(CHARACTERS_AN_INCH * 0.9 * width / columns)))
        draw(axes, panel)
    canvas.supxlabel(textwrap.fill(figure.note, int(OF_A_NOTE * width)), fontsize=8, color="#606060")
    return canvas


def write_numbers(figure: Figure, path: Path) -> None:
    """What the figure's panels show, a number a row."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["panel", "series", "x", "y", "low", "high"])
        for panel in figure.panels:
            if isinstance(panel, Curves):
                for one in panel.series:
                    for values in zip_longest(one.x, one.y, one.low, one.high):
                        writer.writerow([panel.title, one.name, *map(_short, values)])
            elif isinstance(panel, HeatMap):
                for rate, row in zip(panel.rows, panel.values, strict=True):
                    for decay, value in zip(panel.columns, row, strict=True):
                        writer.writerow([panel.title, f"{panel.y} {rate}", f"{panel.x} {decay}", _short(value)])
            else:
                for name, value in zip(panel.names, panel.values, strict=True):
                    writer.writerow([panel.title, name, "", _short(value)])


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def write_figures(figures: Sequence[Figure], heading: str, folder: Path, prefix: str = "") -> list[Path]:
    """Every figure as PNG, PDF and CSV in a folder, and the files' paths. heading: stands under every title."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(STYLE):
        for figure in figures:
            canvas = canvas_of(figure, heading)
            for ending in ("png", "pdf"):
                path = folder / f"{prefix}{figure.name}.{ending}"
                # no date within: the same runs give the same file
                metadata = {"CreationDate": None} if ending == "pdf" else None
                canvas.savefig(path, metadata=metadata)
                written.append(path)
            written.append(folder / f"{prefix}{figure.name}.csv")
            write_numbers(figure, written[-1])
    return written
