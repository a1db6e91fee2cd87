"""Run directories as a report reads them: whatever state they are in, and nothing but them."""

import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig

from dfl_experiments.configuration.components import KINDS, NAME
from dfl_experiments.configuration.composition import as_values, harmless
from dfl_experiments.configuration.recorded import read_recorded
from dfl_experiments.configuration.refusals import one_line
from dfl_experiments.errors import UserError, printable
from dfl_experiments.report.setting import NAMED, Setting, of_method, own_options, setting_of
from dfl_experiments.running.result import DONE, read_epochs, read_result, status_of
from dfl_experiments.running.run_directory import CONFIG, LAST, RESULT

REPORTED = {
    "last": "after the last epoch",
    "best_test": "of the epoch that is best on the test set",
    "best_validation": "of the epoch with the best validation accuracy",
}


class Cell(NamedTuple):
    """A place in a table. method: its name, and those of its options that are not as conf/ has them."""

    dataset: str
    augmentation: str
    model: str
    method: str


@dataclass(frozen=True)
class Run:
    """A run directory.

    status: of `result.json`, or "interrupted" where its process ended without one, or "running"; config: resolved;
    result: empty where there is none yet; reported: which epoch its protocol reports, in words; planned: epochs that it
    is to have; rank: of two runs of the same the greater counts, the one that has finished or is done, that measured
    alignment, that finished later by its own word, or whose folder comes last; epochs: the columns of `epochs.csv`, see
    `read_epochs`.
    """

    folder: Path
    status: str
    reason: str
    config: DictConfig
    result: Mapping[str, Any]
    setting: Setting
    cell: Cell
    lr: float
    weight_decay: float
    seed: int
    reported: str
    planned: int
    rank: tuple[bool, bool, bool, str, str]
    epochs: Mapping[str, Sequence[float | None]]

    @property
    def accuracy(self) -> float:
        """What the protocol reports, of a finished run: a fraction, on the test set."""
        return float(self.result["accuracy"])

    @cached_property
    def collapsed(self) -> bool:
        """Whether a run's status says so, or it ends a fifth under its best test accuracy, or at chance: 1/K, ± half or
        2 points.

        A smoke run has not begun to learn.
        """
        if self.status == "collapsed" or self.setting.smoke:
            return self.status == "collapsed"
        classes = float(self.result.get("num_classes") or math.inf)
        best = (self.result.get("test_accuracy") or {}).get("best") or 0.0
        return self.accuracy < max(0.8 * best, min(1.5 / classes, 1 / classes + 0.02))

    @cached_property
    def held_out(self) -> tuple[float | None, float | None]:
        """Validation accuracy and loss of the epoch that the protocol reports; None where they were not recorded."""
        accuracy, loss = "validation_accuracy", "validation_loss"
        if self.config.protocol.accuracy != "best_validation":
            return self.result.get(accuracy), self.result.get(loss)
        both = zip_longest(self.epochs.get(accuracy, []), self.epochs.get(loss, []))
        told = [(value, its_loss) for value, its_loss in both if value is not None]
        return max(told, key=lambda pair: pair[0], default=(None, None))

    @property
    def score(self) -> float:
        """What a grid point is chosen by: validation accuracy, or the reported one where nothing is held out."""
        validation, _ = self.held_out
        return self.accuracy if validation is None else validation


def run_folders(folder: Path) -> Iterator[Path]:
    """The run directories in and below a folder, behind symbolic links too, each place once."""
    seen = set()
    for place, below, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if name not in ("wandb", ".hydra"))
        if {CONFIG, RESULT, LAST, "epochs.csv"} & {
            *files,
            *below,
        }:  # of a part of a run the reader says what is missing
            below.clear()
            yield Path(place)


def read_run(folder: Path) -> Run:
    """The run in a directory. Raises an error of any kind where what lies there is something else."""
    result = harmless(read_result(folder) or {})
    config = as_values(result["config"] if result else harmless(read_recorded(folder / CONFIG, str(folder))))
    for group in NAMED:
        NAME.validate_python(config[group].name, strict=True)
    status, reason = result.get("status", ""), result.get("reason") or ""
    if status not in DONE:
        status, _, reason = harmless(status_of(folder))
    if status == "damaged":
        raise UserError(reason)
    epochs = read_epochs(folder, result)
    if status == "finished" and config.protocol.accuracy == "best_validation" and not epochs:
        raise UserError(
            "there is no epochs.csv, by which a grid point is chosen under protocol.accuracy=best_validation"
        )
    setting, method = of_method(setting_of(config), str(config.method.name))
    return Run(
        folder,
        status,
        reason,
        config,
        result,
        setting,
        Cell(*(str(config[group].name) for group in Cell._fields))._replace(method=method),
        lr=float(config.optimizer.lr),
        weight_decay=float(config.optimizer.get("weight_decay") or 0.0),
        seed=int(config.seed),
        reported=REPORTED[config.protocol.accuracy],
        planned=int(config.epochs),
        rank=(
            status == "finished",
            status in DONE,
            bool(config.alignment.every),
            result.get("finished_at") or "",
            str(folder.absolute()),
        ),
        epochs=epochs,
    )


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Every run in and below the folders.

    What cannot be read is named on stderr and left out. Raises `UserError` for a folder that is not there, or where no
    run is found in any.
    """
    found: dict[Path, Run] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
        for place in run_folders(folder):
            try:
                found[place.resolve()] = read_run(place)
            except Exception as error:  # a stranger's files can be wrong in any way
                said = f"{place} ({type(error).__name__}: {one_line(error)})"
                print(f"dfl-report: left out: {printable(said)}", file=sys.stderr)
    if not found:
        raise UserError(f"{', '.join(map(str, folders))}: no run directory there (they hold a {CONFIG})")
    return told_apart(list(found.values()))


def own_parts(run: Run) -> dict[str, tuple[str, str]]:
    """What runs of one name may differ in beside their setting, by key: that name, of a method say, and the value."""
    code = {f"{place}.code": value for place, value in run.result.get("code", {}).items() if place in KINDS}
    options = own_options(run.config) | code
    found = {key: (str(run.config[key.partition(".")[0]].name), value) for key, value in options.items()}
    data = run.result.get("data")  # an older one did not note it
    return ({"data": (run.cell.dataset, data)} if data else {}) | found


def told_apart(runs: Sequence[Run]) -> list[Run]:
    """The runs, those of one name told apart where their data, their code or their own options differ."""
    parts = [own_parts(run) for run in runs]
    values: dict[tuple[str, str], set[str]] = {}
    for own in parts:
        for key, (name, value) in own.items():
            values.setdefault((key, name), set()).add(value)

    def told(run: Run, own: Mapping[str, tuple[str, str]]) -> Run:
        apart = [f"{key}={value}" for key, (name, value) in own.items() if len(values[key, name]) > 1]
        all_of_it = run.setting._replace(differences=(*run.setting.differences, *apart))
        setting, method = of_method(all_of_it, run.cell.method)
        return replace(run, setting=setting, cell=run.cell._replace(method=method))

    return [told(run, own) for run, own in zip(runs, parts, strict=True)]
