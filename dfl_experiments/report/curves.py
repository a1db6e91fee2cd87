"""What the figures of a report show, before anything is drawn: panels of curves, heat maps and bars."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from dfl_experiments.report.cells import Entry, Section, place
from dfl_experiments.report.runs import Run
from dfl_experiments.report.tables import percent

# Okabe and Ito's palette, which colour-blind readers can tell apart; a grey that shows on white and on black
COLOURS = {"bp": "#808080", "shallow": "#CC79A7", "dfa": "#D55E00", "las": "#0072B2", "ltas": "#009E73"}
MORE_COLOURS = ("#E69F00", "#56B4E9", "#B0A000")
Values = list[float | None]


@dataclass(frozen=True)
class Series:
    """A curve: x, y, and the range over seeds where there are several."""

    name: str
    colour: str
    x: list[float]
    y: Values
    low: Values = field(default_factory=list)
    high: Values = field(default_factory=list)
    dashed: bool = False


@dataclass(frozen=True)
class Curves:
    """A panel of curves. y_range: of the axis, where the values alone would not choose it well."""

    title: str
    x: str
    y: str
    series: list[Series]
    y_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class HeatMap:
    """A panel of numbers over two axes; values[i][j] belongs to rows[i] and columns[j], chosen is such a pair."""

    title: str
    x: str
    y: str
    columns: list[str]
    rows: list[str]
    values: list[Values]
    chosen: tuple[int, int]


@dataclass(frozen=True)
class Bars:
    """A panel of named numbers."""

    title: str
    x: str
    names: list[str]
    colours: list[str]
    values: list[float]


Panel = Curves | HeatMap | Bars


@dataclass(frozen=True)
class Figure:
    """Panels that belong together. name: of a file."""

    name: str
    title: str
    note: str
    panels: Sequence[Panel]


def label_of(method: str) -> str:
    """What a method is called in a figure."""
    return {"shallow": "Shallow"}.get(method, method.upper())


def colour_of(method: str) -> str:
    """A method's colour, the same in every figure."""
    return COLOURS.get(method) or MORE_COLOURS[sum(method.encode()) % len(MORE_COLOURS)]


def over_seeds(runs: Iterable[Run], column: str, scale: float = 1.0) -> tuple[list[float], Values, Values, Values]:
    """Epochs, and mean, least and greatest value over the runs; epochs that not all of them have are left out."""
    columns = [run.epochs.get(column, []) for run in runs]
    length = min(map(len, columns), default=0)
    rows = [[values[i] for values in columns] for i in range(length)]
    present = [[scale * value for value in row if value is not None] for row in rows]
    mean = [statistics.fmean(row) if row else None for row in present]
    return (
        [float(epoch) for epoch in range(1, length + 1)],
        mean,
        [min(row, default=None) for row in present],
        [max(row, default=None) for row in present],
    )


def curve(entry: Entry, column: str, scale: float = 1.0) -> Series | None:
    """A column of epochs.csv for the chosen grid point of a cell; None where it holds nothing."""
    runs = entry.best.finished if entry.best else []
    x, mean, low, high = over_seeds(runs, column, scale)
    if all(value is None for value in mean):
        return None
    several = len(runs) > 1
    return Series(label_of(entry.cell.method), colour_of(entry.cell.method), x, mean, low * several, high * several)


def by_row(section: Section) -> dict[tuple[str, str, str], list[Entry]]:
    """The entries with a number, by data, augmentation and model, methods in their order."""
    rows: dict[tuple[str, str, str], list[Entry]] = {}
    for entry in section.chosen:
        cell = entry.cell
        rows.setdefault((cell.dataset, cell.augmentation, cell.model), []).append(entry)
    return {key: sorted(entries, key=lambda entry: place(entry.cell.method)) for key, entries in rows.items()}


def alignment(key: tuple[str, ...], entries: list[Entry]) -> Iterable[Figure]:
    """The paper's alignment figure, of layer 1; and one of all layers."""
    shown = [entry for entry in entries if entry.cell.method != "bp"]
    panels = []
    for layer in range(1, 1000):
        column = f"cosine/{layer}"
        if not any(run.epochs.get(column) for entry in entries if entry.best for run in entry.best.finished):
            break
        series = [one for entry in shown if (one := curve(entry, column))]
        exact = [
            label_of(entry.cell.method)
            for entry in shown
            if entry.best and str(layer) in entry.best.finished[0].result.get("cosine_by_construction", [])
        ]
        if series:
            x = max((one.x for one in series), key=len)
            bp = Series(label_of("bp"), colour_of("bp"), x, [1.0] * len(x), dashed=True)
            by_construction = f": 1 by construction for {', '.join(exact)}" if exact else ""
            label = f"mean cosine of δ_{layer} with BP's"
            least = min(value for one in series for value in (*one.y, *one.low) if value is not None)
            y_range = (min(0.5, math.floor(10 * least - 0.5) / 10), 1.05)
            panels.append(Curves(f"layer {layer}{by_construction}", "epoch", label, [bp, *series], y_range))
    name, words = "-".join(key), ", ".join(key)
    note = (
        "Cosine of the applied error signal with BP's on the same weights and batch: mean over samples and iterations"
    )
    if panels:
        yield Figure(f"alignment-{name}", f"Alignment with BP, layer 1: {words}", f"{note}.", panels[:1])
    if len(panels) > 1:
        yield Figure(f"alignment-all-layers-{name}", f"Alignment with BP, every layer: {words}", f"{note}.", panels)


def learning(key: tuple[str, ...], entries: list[Entry]) -> Iterable[Figure]:
    """Accuracy and loss over the epochs."""
    columns = {
        "test_accuracy": ("test accuracy", "test accuracy, %", 100.0),
        "train_loss": ("training loss", "training loss, mean of the epoch", 1.0),
    }
    panels = []
    for column, (title, label, scale) in columns.items():
        series = [one for entry in entries if (one := curve(entry, column, scale))]
        if series:
            panels.append(Curves(title, "epoch", label, series))
    if panels:
        title = f"Learning curves: {', '.join(key)}"
        yield Figure(f"learning-{'-'.join(key)}", title, "Of each method's chosen grid point.", panels)


def grids(key: tuple[str, ...], entries: list[Entry]) -> Iterable[Figure]:
    """Accuracy over learning rate and weight decay, a panel for each method with more than one finished grid point."""
    panels = []
    held_out = True
    for entry in entries:
        points = [point for point in entry.points if point.finished]
        if len(points) < 2 or entry.best is None:
            continue
        held_out = held_out and entry.best.on_validation
        rates = sorted({point.lr for point in entry.points}, reverse=True)
        decays = sorted({point.weight_decay for point in entry.points})
        values = {(point.lr, point.weight_decay): 100 * point.score[1] for point in points}
        panels.append(
            HeatMap(
                label_of(entry.cell.method),
                "weight decay",
                "learning rate",
                [f"{decay:g}" for decay in decays],
                [f"{rate:g}" for rate in rates],
                [[values.get((rate, decay)) for decay in decays] for rate in rates],
                (rates.index(entry.best.lr), decays.index(entry.best.weight_decay)),
            )
        )
    if panels:
        what = "Validation" if held_out else "Test"
        title = f"{what} accuracy over the grid, %: {', '.join(key)}"
        note = "The chosen point is framed; an empty field has not finished."
        yield Figure(f"grid-{'-'.join(key)}", title, note, panels)


def throughput(section: Section) -> Iterable[Figure]:
    """Samples per second of training, a panel for each model and data set."""
    panels = []
    for key, entries in by_row(section).items():
        speeds = {
            entry.cell.method: statistics.median(run.result["samples_per_second"] for run in entry.best.finished)
            for entry in entries
            if entry.best
        }
        names, colours = map(label_of, speeds), map(colour_of, speeds)
        label = "training samples per second"
        panels.append(Bars(", ".join(key), label, [*names], [*colours], [*speeds.values()]))
    devices = {str(run.result.get("device")) for entry in section.chosen if entry.best for run in entry.best.finished}
    if panels:
        note = (
            f"Median over the chosen grid point's runs, alignment and augmentation included, on {'; '.join(devices)}."
        )
        yield Figure("throughput", "Throughput", note, panels)


def figures(section: Section) -> list[Figure]:
    """Every figure that a section's finished runs give."""
    found: list[Figure] = []
    for key, entries in by_row(section).items():
        for kind in (alignment, learning, grids):
            found += kind(key, entries)
    return [*found, *throughput(section)]


def heat_label(value: float | None) -> str:
    """A field's text."""
    return "" if value is None else percent(value / 100, 1)
