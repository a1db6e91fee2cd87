"""From runs to the numbers of a table: which grid point of a cell is chosen, mean and deviation over its seeds."""

import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from dfl_experiments.grids import points_per_cell
from dfl_experiments.report.paper import METHODS, PAPER, table_of
from dfl_experiments.report.runs import Cell, Run
from dfl_experiments.report.settings import Setting, setting_of

UNFIT = ("diverged", "stopped", "failed")  # how a run can end that speaks against its grid point


@dataclass(frozen=True)
class Point:
    """A grid point of a cell: its runs, one per seed."""

    lr: float
    weight_decay: float
    runs: list[Run]

    @cached_property
    def finished(self) -> list[Run]:
        """The runs that came to their end with an accuracy."""
        return [run for run in self.runs if run.status == "finished"]

    @property
    def seeds(self) -> set[int]:
        """Those of the finished runs."""
        return {run.seed for run in self.finished}

    @property
    def accuracies(self) -> list[float]:
        """What the protocol reports of every finished run: a fraction, on the test set."""
        return [run.accuracy for run in self.finished]

    @property
    def unfit(self) -> bool:
        """Whether one of its runs did not get to its end by itself."""
        return any(run.status in UNFIT for run in self.runs)

    def score(self, seeds: set[int]) -> float:
        """The mean of what a point is chosen by, over these seeds."""
        return statistics.fmean(run.score for run in self.finished if run.seed in seeds)


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
        """The grid point whose numbers are shown: the one that is better than the most others.

        Two points are compared by their mean scores over the seeds that both have finished, so that a point with few
        of them decides nothing about the others. Candidates are the points with a finished run, without those of which
        a run failed, if that leaves any.
        """
        finished = [point for point in self.points if point.finished]
        candidates = [point for point in finished if not point.unfit] or finished
        if not candidates:
            return None

        def wins(point: Point) -> int:
            pairs = [(point.seeds & other.seeds, other) for other in candidates if other is not point]
            return sum(point.score(both) > other.score(both) for both, other in pairs if both)

        return max(candidates, key=lambda point: (wins(point), point.score(point.seeds)))

    @property
    def on_validation(self) -> bool:
        """Whether every finished run holds a validation split out to choose by."""
        return all(run.validation is not None for point in self.points for run in point.finished)

    @property
    def mean(self) -> float | None:
        """Of the chosen point's accuracies over seeds."""
        return statistics.fmean(self.best.accuracies) if self.best else None

    @property
    def at_best_validation(self) -> float | None:
        """Mean test accuracy of the chosen point's runs, each at its epoch with the best validation accuracy."""
        values = [run.at_best_validation for run in self.best.finished] if self.best else []
        present = [value for value in values if value is not None]
        return statistics.fmean(present) if present and len(present) == len(values) else None

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation over seeds; None for fewer than two."""
        return statistics.stdev(self.best.accuracies) if self.best and len(self.best.accuracies) > 1 else None

    @property
    def state(self) -> str:
        """How its runs stand: "missing", or "3 finished, 1 failed"."""
        counts = Counter(run.status for run in self.runs)
        return ", ".join(f"{count} {status}" for status, count in counts.most_common()) or "missing"

    @property
    def grid(self) -> str:
        """How many points of its grid have finished, of how many that conf/experiment/ has for the cell."""
        finished = sum(bool(point.finished) for point in self.points)
        wanted = points_per_cell().get(tuple(self.cell)) if self.in_paper else None
        return f"{finished} of {max(wanted, len(self.points))}" if wanted else str(finished)


@dataclass(frozen=True)
class Section:
    """All runs of one setting."""

    setting: Setting
    points: dict[Cell, list[Point]]

    def _mine(self, name: str) -> list[Cell]:
        # with another optimizer than the tables' a run is in no place of theirs
        elsewhere = any(difference.startswith("optimizer=") for difference in self.setting.differences)
        return [cell for cell in self.points if ("other" if elsewhere else table_of(cell)) == name]

    def table(self, name: str) -> list[Entry]:
        """The entries of a table, missing cells among them.

        The paper's whole table where the runs are as the paper's are, otherwise the rows that have been begun.
        """
        mine = self._mine(name)
        if not mine:
            return []
        whole = not self.setting.differences
        begun = {cell[:3] for cell in mine}
        published = {cell: value for cell, value in PAPER.get(name, {}).items() if whole or cell[:3] in begun}
        rows = list(dict.fromkeys(cell[:3] for cell in [*published, *sorted(mine)]))
        cells = sorted({*published, *mine}, key=lambda cell: (rows.index(cell[:3]), place(cell.method)))
        in_paper = name in PAPER and not self.setting.smoke
        return [Entry(cell, self.points.get(cell, []), published.get(cell), in_paper) for cell in cells]

    def not_begun(self, name: str) -> list[tuple[str, ...]]:
        """The rows of a table of the paper that have no run yet in this setting, where one of its tables has."""
        if not (self._mine("fc") or self._mine("cnn")):
            return []
        begun = {cell[:3] for cell in self._mine(name)}
        shown = {entry.cell[:3] for entry in self.table(name)}
        return list(dict.fromkeys(cell[:3] for cell in PAPER.get(name, {}) if cell[:3] not in begun | shown))

    @property
    def chosen(self) -> list[Entry]:
        """The entries that have a number, in the order of tables."""
        entries = [entry for name in ("fc", "cnn", "other") for entry in self.table(name)]
        return [entry for entry in entries if entry.best]


def place(method: str) -> tuple[int, str]:
    """Where a method stands among others: the paper's first, in its order."""
    return (METHODS.index(method) if method in METHODS else len(METHODS), method)


def sections(runs: Iterable[Run]) -> list[Section]:
    """The runs, put in order. Runs of different settings never share a section, so smoke runs stay by themselves."""
    grouped: dict[Setting, dict[Cell, dict[tuple[float, float], dict[int, Run]]]] = {}
    for run in runs:
        seeds = grouped.setdefault(setting_of(run), {}).setdefault(run.cell, {}).setdefault(run.axes, {})
        # a seed counts once, however often alignment was measured
        if run.seed not in seeds or run.rank > seeds[run.seed].rank:
            seeds[run.seed] = run
    return [
        Section(
            setting,
            {
                cell: [Point(*axes, [seeds[seed] for seed in sorted(seeds)]) for axes, seeds in sorted(points.items())]
                for cell, points in cells.items()
            },
        )
        for setting, cells in sorted(grouped.items(), key=lambda item: (item[0][0], len(item[0][2]), item[0]))
    ]
