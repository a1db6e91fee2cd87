"""From runs to the numbers of a table: which runs belong together, which grid point is chosen, mean and deviation."""

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from dfl_experiments.config import compose
from dfl_experiments.report.paper import METHODS, PAPER, table_of
from dfl_experiments.report.runs import Cell, Run
from dfl_experiments.settings import scientific

# what a cell's runs may differ in: the axes of its grid, what its place in the table says, and what changes no number
AXES = ("optimizer.lr", "optimizer.weight_decay")
NOT_A_DIFFERENCE = (*AXES, "seed", "smoke", "alignment.every", "dataset.name", "augmentation.name", "model.name")


class Setting(NamedTuple):
    """What the runs of one report section share. differences: from what the configuration has for such a run."""

    smoke: bool
    protocol: str
    differences: tuple[str, ...]

    @property
    def title(self) -> str:
        """For a heading."""
        words = ["SMOKE (a trial of the pipeline, no results)"] if self.smoke else []
        return ", ".join([*words, f"protocol {self.protocol}", *self.differences])


def flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    values: dict[str, Any] = {}
    for key, value in node.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return values


@cache
def expected(choices: tuple[str, ...]) -> dict[str, Any]:
    """The flat configuration of these choices, protocol options included; empty where there are no such ones."""
    try:
        cfg = compose(list(choices))
        return flat(scientific(cfg)) | {f"protocol.{key}": value for key, value in cfg.protocol.items()}
    except (HydraException, OmegaConfBaseException):
        return {}


def setting_of(run: Run) -> Setting:
    """The section a run belongs to."""
    config = run.config
    names = [f"{group}={config[group].name}" for group in (*Cell._fields, "optimizer", "protocol")]
    usual = expected(tuple(names))
    found = flat(scientific(config)) | {f"protocol.{key}": value for key, value in config.protocol.items()}
    protocol = [
        f"{key}={json.dumps(value)}"
        for key, value in found.items()
        if key.startswith("protocol.") and not isinstance(value, Mapping) and key in usual and usual[key] != value
    ]
    if protocol:  # other options follow from a protocol's: those are no differences of their own
        usual = expected((*names, *protocol)) or usual
    rest = [
        f"{key}={value}"
        for key, value in found.items()
        if usual and key not in NOT_A_DIFFERENCE and not key.startswith("protocol.") and usual.get(key, "") != value
    ]
    if config.optimizer.name != "adam":
        rest.append(f"optimizer={config.optimizer.name}")
    return Setting(run.smoke is not None, str(config.protocol.name), tuple(sorted([*protocol, *rest])))


@dataclass(frozen=True)
class Point:
    """A grid point of a cell: its runs, one per seed."""

    lr: float
    weight_decay: float
    runs: list[Run]

    @cached_property
    def finished(self) -> list[Run]:
        """The runs that came to their end with an accuracy."""
        return [run for run in self.runs if run.status == "finished" and run.result.get("accuracy") is not None]

    @property
    def accuracies(self) -> list[float]:
        """What the protocol reports of every finished run: a fraction, on the test set."""
        return [run.result["accuracy"] for run in self.finished]

    @property
    def on_validation(self) -> bool:
        """Whether there is a validation split to choose by."""
        return all(run.result.get("validation_accuracy") is not None for run in self.finished)

    @property
    def score(self) -> tuple[int, float]:
        """What it is chosen by: finished seeds, then the mean accuracy, on the validation split if there is one."""
        key = "validation_accuracy" if self.on_validation else "accuracy"
        return len(self.finished), statistics.fmean(run.result[key] for run in self.finished)


@dataclass(frozen=True)
class Entry:
    """A cell of a table in one setting."""

    cell: Cell
    points: list[Point]
    paper: float | None = None  # the accuracy that the paper has in this place

    @property
    def runs(self) -> list[Run]:
        """All of them, in whatever state."""
        return [run for point in self.points for run in point.runs]

    @cached_property
    def best(self) -> Point | None:
        """Of the points with the most finished seeds the one with the best mean score."""
        finished = [point for point in self.points if point.finished]
        return max(finished, key=lambda point: point.score) if finished else None

    @property
    def mean(self) -> float | None:
        """Of the chosen point's accuracies over seeds."""
        return statistics.fmean(self.best.accuracies) if self.best else None

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation over seeds; None for fewer than two."""
        return statistics.stdev(self.best.accuracies) if self.best and len(self.best.accuracies) > 1 else None

    @property
    def state(self) -> str:
        """How its runs stand: "missing", or "3 finished, 1 failed"."""
        counts = Counter(run.status for run in self.runs)
        return ", ".join(f"{count} {status}" for status, count in counts.most_common()) or "missing"


@dataclass(frozen=True)
class Section:
    """All runs of one setting."""

    setting: Setting
    points: dict[Cell, list[Point]]

    def table(self, name: str) -> list[Entry]:
        """The entries of a table, missing cells among them.

        The paper's whole table where the runs are as the paper's are, otherwise the rows that have been begun.
        """
        # with another optimizer than the tables' a run is in no place of theirs
        elsewhere = any(difference.startswith("optimizer=") for difference in self.setting.differences)
        mine = [cell for cell in self.points if ("other" if elsewhere else table_of(cell)) == name]
        if not mine:
            return []
        whole = not self.setting.differences
        begun = {cell[:3] for cell in mine}
        published = {cell: value for cell, value in PAPER.get(name, {}).items() if whole or cell[:3] in begun}
        rows = list(dict.fromkeys(cell[:3] for cell in [*published, *sorted(mine)]))
        cells = sorted({*published, *mine}, key=lambda cell: (rows.index(cell[:3]), place(cell.method)))
        return [Entry(cell, self.points.get(cell, []), published.get(cell)) for cell in cells]

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
    grouped: dict[Setting, dict[Cell, dict[tuple[float, float], list[Run]]]] = {}
    for run in runs:
        optimizer = run.config.optimizer
        axes = (float(optimizer.lr), float(optimizer.get("weight_decay", 0.0)))
        cells = grouped.setdefault(setting_of(run), {})
        cells.setdefault(run.cell, {}).setdefault(axes, []).append(run)
    found = []
    for setting, cells in sorted(grouped.items(), key=lambda item: (item[0].smoke, len(item[0].differences), item[0])):
        ordered = {
            cell: [Point(*axes, sorted(runs, key=lambda run: run.config.seed)) for axes, runs in sorted(points.items())]
            for cell, points in cells.items()
        }
        found.append(Section(setting, ordered))
    return found
