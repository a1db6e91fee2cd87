"""What the figures of a report show, before anything is drawn: alignment, learning curves, grids and throughput."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace

from dfl_experiments.ranges import Quantity
from dfl_experiments.report.cells import UNFIT, Entry, Point, Section, by_row
from dfl_experiments.report.findings import correlation_groups, interval
from dfl_experiments.report.intervals import rank_correlation
from dfl_experiments.report.looks import look_of
from dfl_experiments.report.panels import Bars, Curves, Figure, HeatMap, Points, Series
from dfl_experiments.report.setting import file_name
from dfl_experiments.report.tables import seeds_behind

MEASURED: dict[Quantity, str] = {
    "weight_cosine": "cosine of B with what backpropagation has in its place",
    "sign_agreement": "share of B's signs that are those of what backpropagation has in its place",
    "weight_ratio": "norm of B over that of what backpropagation has in its place",
    "gradient_cosine": "cosine of the weights' gradient with backpropagation's",
    "output_cosine": "cosine of the local module's prediction with the logits",
}
MOST_NAMES = 4  # that a panel's title has room for
SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def curves(entries: Iterable[Entry], column: str, scale: float = 1.0) -> list[Series]:
    """A column of epochs.csv as a curve for every cell that has it: mean and range over the chosen point's seeds.

    Epochs that not all seeds have are left out.
    """
    found = []
    for entry in entries:
        rows = zip(*(run.epochs.get(column, []) for run in entry.shown), strict=False)
        present = [[scale * value for value in row if value is not None] for row in rows]
        if any(present):
            y, low, high = ([of(row) if row else None for row in present] for of in (statistics.fmean, min, max))
            span = (low, high) if len(entry.shown) > 1 else ((), ())
            found.append(Series(look_of(entry.cell.method), range(1, len(present) + 1), y, *span))
    return found


def seeds_note(entries: Sequence[Entry]) -> str:
    """How many seeds a curve stands for, as a sentence."""
    seeds = seeds_behind(entries)
    return "One seed." if seeds == "1" else f"Mean over {seeds} seeds, their range shaded."


def layers_of(entries: Iterable[Entry], quantity: str) -> list[int]:
    """The layers for which epochs.csv has this quantity, in any of the runs."""
    columns = {name for entry in entries for run in entry.shown for name in run.epochs}
    return sorted(int(name.partition("/")[2]) for name in columns if name.startswith(f"{quantity}/"))


def alignment_panel(layer: int, entries: list[Entry]) -> Curves | None:
    """The cosines of a layer, and BP's own line; None where nothing was measured."""
    series = curves(entries, f"cosine/{layer}")
    if not series:
        return None
    exact = [one for one in entries if str(layer) in one.shown[0].result.get("cosine_by_construction", [])]
    names = ", ".join(look_of(entry.cell.method).name for entry in exact)
    if len(exact) > MOST_NAMES:
        names = f"{len(exact)} of {len(series)} methods"
    x = max((one.x for one in series), key=len)
    bp = Series(look_of("bp"), x, [1.0] * len(x))
    title = f"layer {layer}" + (f": 1 by construction for {names}" if names else "")
    least = min(value for one in series for value in (*one.y, *one.low) if value is not None)
    y_range = (min(0.5, math.floor(10 * least - 0.5) / 10), 1.05)
    return Curves(title, f"mean cosine of δ{str(layer).translate(SUBSCRIPTS)} with BP's", [bp, *series], y_range)


def alignment(entries: list[Entry]) -> Iterable[Figure]:
    """The paper's alignment figure, of layer 1; and one of all layers."""
    entries = [entry for entry in entries if entry.cell.method != "bp"]
    panels = {layer: panel for layer in layers_of(entries, "cosine") if (panel := alignment_panel(layer, entries))}
    note = (
        "Cosine of the applied error signal with BP's, same weights, same batch: mean over samples and iterations. "
        f"{seeds_note(entries)}"
    )
    if 1 in panels:
        yield Figure("alignment", "Alignment with BP, layer 1", note, [panels[1]])
    if set(panels) - {1}:
        yield Figure("alignment-all-layers", "Alignment with BP, every layer", note, [*panels.values()])


def quantities(entries: list[Entry]) -> Iterable[Figure]:
    """A figure, with a panel for each layer, of everything else that was measured."""
    for name, what in MEASURED.items():
        found = {layer: curves(entries, f"{name}_mean/{layer}") for layer in layers_of(entries, f"{name}_mean")}
        panels = [Curves(f"layer {layer}", name.replace("_", " "), series) for layer, series in found.items() if series]
        if panels:
            note = f"The {what}: mean over iterations. {seeds_note(entries)}"
            yield Figure(name.replace("_", "-"), name.replace("_", " ").capitalize(), note, panels)


def learning(entries: list[Entry]) -> Iterable[Figure]:
    """Accuracy and loss over the epochs."""
    panels = [
        Curves("test accuracy", "test accuracy, %", curves(entries, "test_accuracy", 100.0)),
        Curves("training loss", "training loss, mean of the epoch", curves(entries, "train_loss")),
    ]
    if panels := [panel for panel in panels if panel.series]:
        note = f"Of each method's chosen grid point. {seeds_note(entries)}"
        yield Figure("learning", "Learning curves", note, panels)


def grid_label(point: Point) -> str:
    """A field's text: the number, and how runs ended that ended otherwise."""
    score = [f"{100 * point.score():.1f}"] if point.finished else []
    others = {run.status: None for run in point.runs if run.status in UNFIT or not point.finished}
    return ", ".join([*score, *others])


def grids(entries: list[Entry]) -> Iterable[Figure]:
    """Accuracy over learning rate and weight decay, a panel for each method with more than one grid point."""
    shown = [(entry, entry.best) for entry in entries if entry.best and len(entry.points) > 1]
    if not shown:
        return
    scores = [100 * point.score() for entry, _ in shown for point in entry.points if point.finished]
    panels = []
    for entry, best in shown:
        points = {(point.lr, point.weight_decay): point for point in entry.points}
        rates = sorted({rate for rate, _ in points}, reverse=True)
        decays = sorted({decay for _, decay in points})
        fields = [[points.get((rate, decay)) for decay in decays] for rate in rates]
        panels.append(
            HeatMap(
                look_of(entry.cell.method).name,
                [f"{rate:g}" for rate in rates],
                [f"{decay:g}" for decay in decays],
                [[100 * point.score() if point and point.finished else None for point in line] for line in fields],
                [[grid_label(point) if point else "" for point in line] for line in fields],
                chosen=(rates.index(best.lr), decays.index(best.weight_decay)),
                scale=(min(scores), max(scores)),
            )
        )
    what = "Validation" if all(entry.on_validation for entry, _ in shown) else "Test"
    note = (
        "Mean over each point's finished seeds. The chosen point is framed: two are compared over the seeds of both, "
        "and one with a run that failed comes last. An empty field has no run."
    )
    yield Figure("grid", f"{what} accuracy over the grid, %", note, panels)


def prediction(entries: list[Entry]) -> Iterable[Figure]:
    """Final accuracy against alignment, a point for every finished run of every rule whose signals are not BP's."""
    cells = {entry.cell.method: entry for entry in entries}
    panels, told, known = [], [], []
    for of in ("layer 1", "all layers"):
        found = correlation_groups(cells, of)
        if not found or found in known:  # with one layer to tell of, all layers are that one
            continue
        known.append(found)
        for lr, groups in found.items():
            series = [Series(look_of(method), *zip(*points, strict=True)) for method, points in groups.items()]
            title, x = f"{of}, lr {lr:g}", "mean cosine with BP's signal, last epoch"
            panels.append(Points(title, x, "test accuracy, %", series))
            if estimate := rank_correlation([*groups.values()]):
                told.append(f"{of}, lr {lr:g}: {interval(estimate)}")
    if panels:
        note = (
            f"Spearman's ρ, with intervals of 95 % by a bootstrap over the rules: {'; '.join(told)}. Layers whose "
            "signal is BP's by construction are left out, rules on another net, such as DRTP's with tanh, and runs "
            "that collapsed."
        )
        yield Figure("alignment-accuracy", "Accuracy against alignment", note, panels)


def throughput(section: Section) -> Iterable[Figure]:
    """Samples per second of training, a panel for each model and data set."""
    devices = sorted({str(run.result.get("device")) for entry in section.chosen for run in entry.shown})
    panels = []
    for row, cells in by_row(section.chosen).items():
        speeds: dict[tuple[str, str], list[float]] = {}
        for method, entry in cells.items():
            for run in entry.shown:
                name, colour, *_ = look_of(method)
                name += f", {run.result.get('device')}" if len(devices) > 1 else ""
                speeds.setdefault((name, colour), []).append(float(run.result["samples_per_second"]))
        names, colours = zip(*speeds, strict=True)
        panels.append(Bars(", ".join(row), [*names], [*colours], [*map(statistics.median, speeds.values())]))
    if panels:
        note = (
            f"Median over each chosen grid point's runs, measuring included, on {'; '.join(devices)}. "
            "A run beside others is slower: scripts/benchmark.py compares the methods by themselves."
        )
        yield Figure("throughput", "Throughput", note, panels)


def figures(section: Section) -> list[Figure]:
    """Every figure that a section's finished runs give: for each row of its tables, and one for all of them."""
    found = [
        replace(figure, name=file_name([*place, figure.name]), title=f"{figure.title}: {', '.join(place)}")
        for (dataset, augmentation, model), cells in by_row(section.chosen).items()
        for place in [[dataset, model, *[augmentation] * (augmentation != "none")]]
        for kind in (alignment, quantities, learning, grids, prediction)
        for figure in kind(list(cells.values()))
    ]
    return [*found, *throughput(section)]
