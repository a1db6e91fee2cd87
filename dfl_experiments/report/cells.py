"""From runs to the cells of a table: which grid point is chosen, and which cells and rows a table has."""

import math
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from dfl_experiments.configuration.grids import points_per_cell
from dfl_experiments.report.looks import FAMILIES
from dfl_experiments.report.paper import METHODS, PAPER, TITLES, table_of
from dfl_experiments.report.runs import Cell, Run
from dfl_experiments.report.setting import Setting
from dfl_experiments.running.result import DONE, made_with

UNFIT = ("diverged", "collapsed", "stopped", "failed")  # how a run can end that speaks against its grid point
SHOWN = ("status", "accuracy", "test_accuracy", "validation_accuracy")  # of a run's result


def mean(values: Sequence[float | None]) -> float | None:
    """None of nothing, and where one of them is."""
    present = [value for value in values if value is not None]
    return statistics.fmean(present) if present and len(present) == len(values) else None


@dataclass(frozen=True)
class Point:
    """A grid point of a cell: its runs, one per seed."""

    lr: float
    weight_decay: float
    runs: list[Run]

    @property
    def place(self) -> tuple[float, float]:
        """Learning rate and weight decay."""
        return self.lr, self.weight_decay

    @cached_property
    def finished(self) -> list[Run]:
        """The runs that came to their end with an accuracy, also where that was a collapse."""
        return [run for run in self.runs if run.status in ("finished", "collapsed")]

    @property
    def seeds(self) -> set[int]:
        """Those of the finished runs."""
        return {run.seed for run in self.finished}

    def score(self, seeds: set[int] | None = None) -> float:
        """The mean of what a point is chosen by, over these of its finished seeds, or over all of them."""
        return statistics.fmean(run.score for run in self.finished if seeds is None or run.seed in seeds)

    def loss(self, seeds: set[int]) -> float | None:
        """The mean validation loss over these seeds, None where it was not recorded of one."""
        return mean([run.held_out[1] for run in self.finished if run.seed in seeds])

    def ties(self, other: "Point") -> bool:
        """Whether both have the same score over the seeds that both have finished."""
        both = self.seeds & other.seeds
        return bool(both) and math.isclose(self.score(both), other.score(both), abs_tol=1e-9)

    def beats(self, other: "Point") -> bool:
        """Whether its score over the seeds that both have finished is higher; of a tie, its validation loss lower."""
        both = self.seeds & other.seeds
        if not both or not self.ties(other):
            return bool(both) and self.score(both) > other.score(both)
        mine, theirs = self.loss(both), other.loss(both)
        return mine is not None and theirs is not None and mine < theirs


@dataclass(frozen=True)
class Entry:
    """A cell of a table in one setting. paper: the accuracy that the paper has in this place."""

    cell: Cell
    points: list[Point]
    paper: float | None = None
    in_paper: bool = False

    @property
    def runs(self) -> list[Run]:
        """All of them, in whatever state."""
        return [run for point in self.points for run in point.runs]

    @cached_property
    def best(self) -> Point | None:
        """The grid point whose numbers are shown: the one that beats the most others.

        Two points are compared over the seeds that both have finished, so that a point with few of them decides nothing
        about the others.
        """
        wins = {id(point): sum(point.beats(other) for other in self.candidates) for point in self.candidates}
        return max(self.candidates, key=lambda point: (wins[id(point)], point.score()), default=None)

    @property
    def candidates(self) -> list[Point]:
        """The points with a finished run, without those of which a run failed, if that leaves any."""
        finished = [point for point in self.points if point.finished]
        return [point for point in finished if not any(run.status in UNFIT for run in point.runs)] or finished

    @property
    def tied(self) -> bool:
        """Whether another point has the same score as the one that is shown."""
        best = self.best
        return best is not None and any(other is not best and best.ties(other) for other in self.candidates)

    @property
    def shown(self) -> list[Run]:
        """The chosen point's finished runs; none if there is no such point."""
        return self.best.finished if self.best else []

    @cached_property
    def alive(self) -> list[Run]:
        """Those of them that did not collapse."""
        return [run for run in self.shown if not run.collapsed]

    @property
    def counted(self) -> list[Run]:
        """What the numbers are of: those that did not collapse, or all where all did."""
        return self.alive or self.shown

    @cached_property
    def mixed(self) -> set[str]:
        """The commits, torch versions and devices that some of those runs were made with and others not."""
        made = [{*made_with(run.result), f"device {run.result.get('device')}"} for run in self.counted]
        return {one for one in set().union(*made) if not all(one in those for those in made)}

    @property
    def lost(self) -> str:
        """How many of them collapsed: "2 of 3 collapsed"; empty if none did."""
        count = len(self.shown) - len(self.alive)
        return f"{count} of {len(self.shown)} collapsed" if count else ""

    def at(self, place: tuple[float, float]) -> "Entry | None":
        """The cell as if a grid point were its only one; None where that has no finished run."""
        points = [point for point in self.points if point.place == place and point.finished]
        return replace(self, points=points) if points else None

    @property
    def on_validation(self) -> bool:
        """Whether every finished run holds a validation split out to choose by."""
        return all(run.held_out[0] is not None for point in self.points for run in point.finished)

    @property
    def state(self) -> str:
        """How its runs stand: "missing", or "3 finished, 1 failed"."""
        counts = Counter(run.status for run in self.runs)
        return ", ".join(f"{count} {status}" for status, count in counts.most_common()) or "missing"

    @property
    def grid(self) -> str:
        """How many points of its grid have finished, of how many that conf/experiment/ has; ties marked."""
        finished = sum(bool(point.finished) for point in self.points)
        wanted = points_per_cell().get(tuple(self.cell)) if self.in_paper else None
        told = f"{finished} of {max(wanted, len(self.points))}" if wanted else str(finished)
        return told + ", tied" * self.tied


@dataclass(frozen=True)
class Section:
    """All runs of one setting. tables: the entries of every table, by its name in `TITLES`."""

    setting: Setting
    tables: dict[str, list[Entry]]

    @property
    def chosen(self) -> list[Entry]:
        """The entries that have a number, in the order of tables."""
        return [entry for entries in self.tables.values() for entry in entries if entry.best]


def place(method: str) -> tuple[int, str]:
    """Where a method stands among others: the paper's first, in its order, then by families."""
    order = [*METHODS, *(one for _, members in FAMILIES.values() for one in members if one not in METHODS)]
    return (order.index(method) if method in order else len(order), method)


def methods_of(entries: Iterable[Entry]) -> list[str]:
    """The methods that a table has columns for."""
    return sorted({entry.cell.method for entry in entries}, key=place)


def by_row(entries: Iterable[Entry]) -> dict[tuple[str, ...], dict[str, Entry]]:
    """The entries by data set, augmentation and model, then by method."""
    rows: dict[tuple[str, ...], dict[str, Entry]] = {}
    for entry in entries:
        rows.setdefault(entry.cell[:3], {})[entry.cell.method] = entry
    return rows


def table_entries(name: str, setting: Setting, points: Mapping[Cell, list[Point]]) -> list[Entry]:
    """The entries of a table, missing cells among them.

    The paper's whole table where the runs are as the paper's are, otherwise the rows that have been begun.
    """
    # with another optimizer than the tables' a run is in no place of theirs
    elsewhere = any(difference.startswith("optimizer=") for difference in setting.differences)
    mine = sorted(cell for cell in points if ("other" if elsewhere else table_of(cell)) == name)
    begun = {cell[:3] for cell in mine}
    whole = mine and not setting.differences
    published = {cell: value for cell, value in PAPER.get(name, {}).items() if whole or cell[:3] in begun}
    rows = list(dict.fromkeys(cell[:3] for cell in [*published, *mine]))
    cells = sorted({*published, *mine}, key=lambda cell: (rows.index(cell[:3]), place(cell.method)))
    in_paper = name in PAPER and not setting.smoke
    return [Entry(cell, points.get(cell, []), published.get(cell), in_paper) for cell in cells]


def sections(runs: Iterable[Run]) -> list[Section]:
    """The runs, put in order. Runs of different settings never share a section, so smoke runs stay by themselves."""
    grids: dict[tuple[Setting, Cell, float, float], dict[int, Run]] = {}
    for run in sorted(runs, key=lambda run: run.rank, reverse=True):
        seeds = grids.setdefault((run.setting, run.cell, run.lr, run.weight_decay), {})
        shown = seeds.setdefault(run.seed, run)  # a seed counts once, however often alignment was measured
        if run.status in DONE and any(run.result.get(key) != shown.result.get(key) for key in SHOWN):
            when = " and ".join(one.result.get("finished_at") or "at an unknown time" for one in (shown, run))
            told = f"{shown.folder} is shown, not {run.folder} (finished {when})"
            print(f"dfl-report: one configuration and seed, other numbers: {told}", file=sys.stderr)
    points: dict[Setting, dict[Cell, list[Point]]] = {}
    for (setting, cell, lr, decay), seeds in sorted(grids.items()):
        point = Point(lr, decay, [seeds[seed] for seed in sorted(seeds)])
        points.setdefault(setting, {}).setdefault(cell, []).append(point)
    return [
        Section(setting, {name: table_entries(name, setting, points[setting]) for name in TITLES})
        for setting in sorted(points, key=lambda setting: (setting.smoke, len(setting.differences), setting))
    ]
