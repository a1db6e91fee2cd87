"""Run directories as a report reads them: whatever state they are in, and nothing but them."""

import csv
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig

from dfl_experiments.configuration.components import NAME
from dfl_experiments.configuration.composition import as_values
from dfl_experiments.configuration.recorded import read_recorded
from dfl_experiments.configuration.refusals import one_line
from dfl_experiments.errors import UserError
from dfl_experiments.report.setting import NAMED, Setting, of_method, own_options, setting_of
from dfl_experiments.running.result import DONE, parsed, status_of
from dfl_experiments.running.run_directory import CONFIG, RESULT

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
    alignment, or the newer.
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
    rank: tuple[bool, bool, bool, float]

    @property
    def accuracy(self) -> float:
        """What the protocol reports, of a finished run: a fraction, on the test set."""
        return float(self.result["accuracy"])

    @cached_property
    def collapsed(self) -> bool:
        """Whether a finished run ends a fifth under its best test accuracy, or at chance: 1/K, ± half or 2 points.

        A smoke run has not begun to learn.
        """
        if self.setting.smoke:
            return False
        classes = float(self.result.get("num_classes") or math.inf)
        best = (self.result.get("test_accuracy") or {}).get("best") or 0.0
        return self.accuracy < max(0.8 * best, min(1.5 / classes, 1 / classes + 0.02))

    @cached_property
    def validation(self) -> float | None:
        """The validation accuracy of the epoch that the protocol reports; None without such a split."""
        if self.config.protocol.accuracy == "best_validation":
            values = self.epochs.get("validation_accuracy", [])
            return max((value for value in values if value is not None), default=None)
        return self.result.get("validation_accuracy")

    @cached_property
    def validation_loss(self) -> float | None:
        """The validation loss of that epoch; None where it was not recorded."""
        if self.config.protocol.accuracy == "best_validation":
            both = zip(*(self.epochs.get(f"validation_{name}", []) for name in ("accuracy", "loss")), strict=False)
            told = [(accuracy, loss) for accuracy, loss in both if accuracy is not None]
            return max(told, key=lambda pair: pair[0], default=(0.0, None))[1]
        return self.result.get("validation_loss")

    @property
    def score(self) -> float:
        """What a grid point is chosen by: validation accuracy, or the reported one where nothing is held out."""
        return self.accuracy if self.validation is None else self.validation

    @cached_property
    def epochs(self) -> dict[str, list[float | None]]:
        """The columns of `epochs.csv`, None for what is no finite number; a last row that is not whole is left out."""
        try:
            with (self.folder / "epochs.csv").open(newline="", encoding="utf-8", errors="replace") as file:
                lines = csv.DictReader(line.replace("\0", "") for line in file)
                rows = [row for row in lines if None not in row.values()]
        except (OSError, csv.Error):
            return {}
        return {name: [finite(row[name]) for row in rows] for name in (rows[0] if rows else ())}


def finite(text: str) -> float | None:
    """The number that a cell of a table holds; None for an empty one, NaN and Inf, and what is no number."""
    try:
        number = float(text or "nan")
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def run_folders(folder: Path) -> Iterator[Path]:
    """The run directories in and below a folder, behind symbolic links too, each place once."""
    seen = set()
    for place, below, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if name not in ("wandb", ".hydra"))
        if CONFIG in files or RESULT in files:
            below.clear()
            yield Path(place)


def read_run(folder: Path) -> Run:
    """The run in a directory. Raises an error of any kind where what lies there is something else."""
    result = parsed(folder / RESULT) or {}
    config = as_values(result["config"] if result else read_recorded(folder / CONFIG, str(folder)))
    for group in NAMED:
        NAME.validate_python(config[group].name, strict=True)
    status, reason = result.get("status", ""), result.get("reason") or ""
    if status not in DONE:
        status, _, reason = status_of(folder)
    setting, method = of_method(setting_of(config), str(config.method.name))
    written = next(path for name in (CONFIG, RESULT) if (path := folder / name).exists()).stat().st_mtime
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
        rank=(status == "finished", status in DONE, bool(config.alignment.every), written),
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
                print(f"dfl-report: left out: {place} ({type(error).__name__}: {one_line(error)})", file=sys.stderr)
    if not found:
        raise UserError(f"{', '.join(map(str, folders))}: no run directory there (they hold a {CONFIG})")
    return by_options(by_data(list(found.values())))


def by_options(runs: Sequence[Run]) -> list[Run]:
    """The runs, those of a method, say, that conf/ does not have told apart where their options differ."""
    options = [own_options(run.config) for run in runs]
    values: dict[tuple[str, str], set[str]] = {}
    for run, own in zip(runs, options, strict=True):
        for key, value in own.items():
            values.setdefault((str(run.config[key.partition(".")[0]].name), key), set()).add(value)

    def told(run: Run, own: Mapping[str, str]) -> Run:
        names = {key: str(run.config[key.partition(".")[0]].name) for key in own}
        apart = [f"{key}={value}" for key, value in own.items() if len(values[names[key], key]) > 1]
        all_of_it = run.setting._replace(differences=(*run.setting.differences, *apart))
        setting, method = of_method(all_of_it, run.cell.method)
        return replace(run, setting=setting, cell=run.cell._replace(method=method))

    return [told(run, own) for run, own in zip(runs, options, strict=True)]


def by_data(runs: Sequence[Run]) -> list[Run]:
    """The runs, those on data sets of one name but other images in settings of their own."""
    digests: dict[str, set[str]] = {}
    for run in runs:
        if digest := run.result.get("data"):  # an older one did not note it
            digests.setdefault(run.cell.dataset, set()).add(digest)

    def told(run: Run) -> Setting:
        digest = run.result.get("data")
        if digest is None or len(digests[run.cell.dataset]) == 1:
            return run.setting
        return run.setting._replace(differences=(*run.setting.differences, f"data={digest}"))

    return [replace(run, setting=told(run)) for run in runs]
