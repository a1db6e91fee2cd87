"""What the figures of a report show of finished runs: grids, accuracy against alignment, throughput; all figures."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from dfl_experiments.report.cells import UNFIT, Entry, Point, Section, by_row
from dfl_experiments.report.correlation import correlation_groups, rule_means
from dfl_experiments.report.curves import alignment, learning, quantities
from dfl_experiments.report.findings import interval
from dfl_experiments.report.intervals import rank_correlation
from dfl_experiments.report.looks import look_of
from dfl_experiments.report.panels import Bars, Figure, HeatMap, Points, Series
from dfl_experiments.report.setting import file_name

Lines = Sequence[tuple[str, Mapping[float, Point | None]]]  # a row's name, and its points by their column
AXES = ("learning rate", "weight decay")


def grid_label(point: Point) -> str:
    """A field's text: the number, and how runs ended that ended otherwise."""
    score = [f"{100 * point.score():.2f}"] if point.finished else []
    others = {run.status: None for run in point.runs if run.status in UNFIT or not point.finished}
    return ", ".join([*score, *others])


def grids(entries: list[Entry]) -> Iterable[Figure]:
    """Accuracy over learning rate and weight decay, a panel for each method with more than one grid point.

    Where only one of the two was swept, all methods are in one panel.
    """
    shown = [(entry, entry.best) for entry in entries if entry.best and len(entry.points) > 1]
    if not shown:
        return
    scores = [100 * point.score() for entry, _ in shown for point in entry.points if point.finished]
    # colours tell the good from the best: what is far below has the lowest
    scale = (float(np.quantile(scores, 0.1)), max(scores))
    rates, decays = ({point.place[axis] for entry, _ in shown for point in entry.points} for axis in (0, 1))
    axes = (sorted(rates, reverse=True), sorted(decays))
    panels = []
    if min(len(rates), len(decays)) == 1:
        axis = int(len(rates) == 1)
        lines: Lines = [(look_of(e.cell.method).name, {p.place[axis]: p for p in e.points}) for e, _ in shown]
        chosen = [(i, axes[axis].index(best.place[axis])) for i, (_, best) in enumerate(shown)]
        panels.append(heat_map("", lines, axes[axis], ("", AXES[axis]), chosen, scale))
    else:
        for entry, best in shown:
            points = {point.place: point for point in entry.points}
            lines = [(f"{lr:g}", {decay: points.get((lr, decay)) for decay in axes[1]}) for lr in axes[0]]
            chosen = [(axes[0].index(best.lr), axes[1].index(best.weight_decay))]
            panels.append(heat_map(look_of(entry.cell.method).name, lines, axes[1], AXES, chosen, scale))
    what = "Validation" if all(entry.on_validation for entry, _ in shown) else "Test"
    note = (
        "Mean over each point's finished seeds. The chosen point is framed: two are compared over the seeds of both, "
        "and one with a run that failed comes last. An empty field has no run."
    )
    yield Figure("grid", f"{what} accuracy over the grid, %", note, panels)


def heat_map(
    title: str,
    lines: Lines,
    columns: Sequence[float],
    axes: tuple[str, str],
    chosen: Sequence[tuple[int, int]],
    scale: tuple[float, float],
) -> HeatMap:
    """A panel of what points are chosen by. axes: names of y and x."""
    fields = [[line.get(column) for column in columns] for _, line in lines]
    return HeatMap(
        title,
        (axes[0], [name for name, _ in lines]),
        (axes[1], [f"{column:g}" for column in columns]),
        [[100 * point.score() if point and point.finished else None for point in line] for line in fields],
        [[grid_label(point) if point else "" for point in line] for line in fields],
        chosen,
        scale,
    )


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
            if estimate := rank_correlation([*rule_means(groups).values()]):
                told.append(f"{of}, lr {lr:g}: {interval(estimate)}")
    if panels:
        note = (
            f"Spearman's ρ of the rules' means, with intervals of 95 % by a bootstrap over them: {'; '.join(told)}. "
            "Without layers whose signal is BP's by construction, rules on another net, such as DRTP's with tanh, and "
            "runs that collapsed."
        )
        yield Figure("alignment-accuracy", "Accuracy against alignment", note, panels)


def throughput(section: Section) -> Iterable[Figure]:
    """Samples per second of training, a panel for each model and data set; none of runs on different devices."""
    devices = {str(run.result.get("device")) for entry in section.chosen for run in entry.shown}
    if len(devices) != 1:
        return
    panels = []
    for row, cells in by_row(section.chosen).items():
        looks = [look_of(method) for method in cells]
        speeds = [statistics.median(run.result["samples_per_second"] for run in one.shown) for one in cells.values()]
        panels.append(Bars(", ".join(row), [look.name for look in looks], [look.colour for look in looks], speeds))
    note = (
        f"Median over each chosen grid point's runs, measuring included, on {devices.pop()}. "
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
