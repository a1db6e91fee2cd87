"""What the figures of a report show, before anything is drawn: panels of curves, heat maps and bars."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from dfl_experiments.report.cells import UNFIT, Entry, Point, Section, place
from dfl_experiments.report.runs import Run
from dfl_experiments.report.tables import percent

# Okabe and Ito's palette, which colour-blind readers can tell apart; a grey that shows on white and on black
COLOURS = {"bp": "#808080", "shallow": "#CC79A7", "dfa": "#D55E00", "las": "#0072B2", "ltas": "#009E73"}
MORE_COLOURS = ("#E69F00", "#56B4E9", "#B0A000")
SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
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
    """A panel of numbers over two axes; values[i][j] belongs to rows[i] and columns[j], chosen is such a pair.

    labels: what stands in each field; scale: least and greatest value of the whole figure.
    """

    title: str
    x: str
    y: str
    columns: list[str]
    rows: list[str]
    values: list[Values]
    labels: list[list[str]]
    chosen: tuple[int, int]
    scale: tuple[float, float]


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


def seeds_of(entries: Iterable[Entry]) -> str:
    """How many seeds a curve stands for, as a sentence."""
    counts = sorted({len(entry.best.finished) for entry in entries if entry.best})
    if counts == [1]:
        return "One seed."
    some = " to ".join(map(str, [counts[0], counts[-1]][: len(counts)]))
    return f"Mean over {some} seeds, their range shaded."


def by_row(section: Section) -> dict[tuple[str, str, str], list[Entry]]:
    """The entries with a number, by data, augmentation and model, methods in their order."""
    rows: dict[tuple[str, str, str], list[Entry]] = {}
    for entry in section.chosen:
        cell = entry.cell
        rows.setdefault((cell.dataset, cell.augmentation, cell.model), []).append(entry)
    return {key: sorted(entries, key=lambda entry: place(entry.cell.method)) for key, entries in rows.items()}


def alignment(key: tuple[str, ...], entries: list[Entry]) -> Iterable[Figure]:
    """The paper's alignment figure, of layer 1; and one of all layers."""
    runs = [run for entry in entries if entry.best for run in entry.best.finished]
    columns = {name for run in runs for name in run.epochs if name.startswith("cosine/")}
    shown = [entry for entry in entries if entry.cell.method != "bp"]
    if not shown:
        return
    panels: dict[int, Curves] = {}
    for layer in sorted(int(name.partition("/")[2]) for name in columns):
        series = [one for entry in shown if (one := curve(entry, f"cosine/{layer}"))]
        if not series:
            continue
        exact = [
            label_of(entry.cell.method)
            for entry in shown
            if entry.best and str(layer) in entry.best.finished[0].result.get("cosine_by_construction", [])
        ]
        x = max((one.x for one in series), key=len)
        bp = Series(label_of("bp"), colour_of("bp"), x, [1.0] * len(x), dashed=True)
        by_construction = f": 1 by construction for {', '.join(exact)}" if exact else ""
        least = min(value for one in series for value in (*one.y, *one.low) if value is not None)
        y_range = (min(0.5, math.floor(10 * least - 0.5) / 10), 1.05)
        label = f"mean cosine of δ{str(layer).translate(SUBSCRIPTS)} with BP's"
        panels[layer] = Curves(f"layer {layer}{by_construction}", "epoch", label, [bp, *series], y_range)
    name, words = "-".join(key), ", ".join(key)
    note = (
        "Cosine of the applied error signal with BP's, same weights, same batch: mean over samples and iterations. "
        f"{seeds_of(shown)}"
    )
    if 1 in panels:
        yield Figure(f"alignment-{name}", f"Alignment with BP, layer 1: {words}", note, [panels[1]])
    if set(panels) - {1}:
        title = f"Alignment with BP, every layer: {words}"
        yield Figure(f"alignment-all-layers-{name}", title, note, [*panels.values()])


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
        note = f"Of each method's chosen grid point. {seeds_of(entries)}"
        yield Figure(f"learning-{'-'.join(key)}", title, note, panels)


def grids(key: tuple[str, ...], entries: list[Entry]) -> Iterable[Figure]:
    """Accuracy over learning rate and weight decay, a panel for each method with more than one grid point."""
    shown = [entry for entry in entries if entry.best and len(entry.points) > 1]
    if not shown:
        return
    scores = {
        (entry.cell.method, point.lr, point.weight_decay): 100 * point.score(point.seeds)
        for entry in shown
        for point in entry.points
        if point.finished
    }
    panels = []
    for entry in shown:
        assert entry.best
        rates = sorted({point.lr for point in entry.points}, reverse=True)
        decays = sorted({point.weight_decay for point in entry.points})
        labelled = {(point.lr, point.weight_decay): heat_label(point) for point in entry.points}
        values = [[scores.get((entry.cell.method, rate, decay)) for decay in decays] for rate in rates]
        labels = [[labelled.get((rate, decay), "") for decay in decays] for rate in rates]
        panels.append(
            HeatMap(
                label_of(entry.cell.method),
                "weight decay",
                "learning rate",
                [f"{decay:g}" for decay in decays],
                [f"{rate:g}" for rate in rates],
                values,
                labels,
                (rates.index(entry.best.lr), decays.index(entry.best.weight_decay)),
                (min(scores.values()), max(scores.values())),
            )
        )
    what = "Validation" if all(entry.on_validation for entry in shown) else "Test"
    title = f"{what} accuracy over the grid, %: {', '.join(key)}"
    note = (
        "Mean over each point's finished seeds. The chosen point is framed: two are compared over the seeds of both, "
        "and one with a run that failed comes last. An empty field has no run."
    )
    yield Figure(f"grid-{'-'.join(key)}", title, note, panels)


def throughput(section: Section) -> Iterable[Figure]:
    """Samples per second of training, a panel for each model and data set."""
    runs = [run for entry in section.chosen if entry.best for run in entry.best.finished]
    devices = sorted({str(run.result.get("device")) for run in runs})
    panels = []
    for key, entries in by_row(section).items():
        speeds: dict[tuple[str, str], list[float]] = {}
        for entry in entries:
            for run in entry.best.finished if entry.best else []:
                name = label_of(entry.cell.method)
                if len(devices) > 1:
                    name += f", {run.result.get('device')}"
                speeds.setdefault((entry.cell.method, name), []).append(float(run.result["samples_per_second"]))
        colours = [colour_of(method) for method, _ in speeds]
        values = [statistics.median(those) for those in speeds.values()]
        panels.append(
            Bars(", ".join(key), "training samples per second", [name for _, name in speeds], colours, values)
        )
    if panels:
        note = (
            f"Median over each chosen grid point's runs, measuring included, on {'; '.join(devices)}. "
            "A run beside others is slower: scripts/benchmark.py compares the methods by themselves."
        )
        yield Figure("throughput", "Throughput", note, panels)


def figures(section: Section) -> list[Figure]:
    """Every figure that a section's finished runs give."""
    found: list[Figure] = []
    for key, entries in by_row(section).items():
        for kind in (alignment, learning, grids):
            found += kind(key, entries)
    return [*found, *throughput(section)]


def heat_label(point: Point) -> str:
    """A field's text: the number, and how runs ended that ended otherwise."""
    score = [percent(point.score(point.seeds), 1)] if point.finished else []
    others = {run.status: None for run in point.runs if run.status in UNFIT or not point.finished}
    return ", ".join([*score, *others])
