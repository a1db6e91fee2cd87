"""Run directories as a report reads them: whatever state they are in, and nothing but them."""

import csv
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dfl_experiments.config import UserError, one_line
from dfl_experiments.results import DONE, RESULT, read_result
from dfl_experiments.settings import science
from dfl_experiments.sweep import status_of

CONFIG = "config.yaml"
GROUPS = ("dataset", "augmentation", "model", "method", "optimizer", "protocol")
HEADLINES = {
    "last": "after the last epoch",
    "best_test": "of the epoch that is best on the test set",
    "best_validation": "of the epoch with the best validation accuracy",
}


class Cell(NamedTuple):
    """A place in a table."""

    dataset: str
    augmentation: str
    model: str
    method: str


@dataclass(frozen=True)
class Run:
    """A run directory.

    status: of `result.json`, or "interrupted" where its process ended without one, or "running"; config: resolved;
    result: empty where there is none yet.
    """

    folder: Path
    status: str
    reason: str
    config: DictConfig
    result: Mapping[str, Any]

    @property
    def cell(self) -> Cell:
        """The place of its accuracy in a table."""
        return Cell(*(str(self.config[group].name) for group in Cell._fields))

    @property
    def axes(self) -> tuple[float, float]:
        """Learning rate and weight decay."""
        return float(self.config.optimizer.lr), float(self.config.optimizer.get("weight_decay") or 0.0)

    @property
    def seed(self) -> int:
        """What its random numbers began with."""
        return int(self.config.seed)

    @property
    def smoke(self) -> int | None:
        """How many images of each kind a trial of the pipeline saw; None for a run that means its numbers."""
        return self.config.get("smoke")

    @property
    def accuracy(self) -> float:
        """What the protocol reports, of a finished run."""
        return float(self.result["accuracy"])

    @cached_property
    def validation(self) -> float | None:
        """The validation accuracy of the epoch that the protocol reports; None without such a split."""
        if self.config.protocol.accuracy == "best_validation":
            return max(
                (value for value in self.epochs.get("validation_accuracy", []) if value is not None), default=None
            )
        return self.result.get("validation_accuracy")

    @property
    def at_best_validation(self) -> float | None:
        """Test accuracy of the epoch with the best validation accuracy; None without such a split."""
        return (self.result.get("test_accuracy") or {}).get("at_best_validation")

    @property
    def score(self) -> float:
        """What a grid point is chosen by: validation accuracy, or the reported one where nothing is held out."""
        return self.accuracy if self.validation is None else self.validation

    @property
    def rank(self) -> tuple[bool, bool, float]:
        """Of two runs of the same, the greater counts: the one that is done, that measured alignment, or the newer."""
        path = next((self.folder / name for name in (CONFIG, RESULT) if (self.folder / name).exists()), self.folder)
        return self.status in DONE, bool(self.config.alignment.every), path.stat().st_mtime

    @cached_property
    def epochs(self) -> dict[str, list[float | None]]:
        """The columns of `epochs.csv`, None for what is no finite number; a last row that is not whole is left out."""
        try:
            with (self.folder / "epochs.csv").open(newline="", encoding="utf-8", errors="replace") as file:
                rows = [
                    row for row in csv.DictReader(line.replace("\0", "") for line in file) if None not in row.values()
                ]
        except (OSError, csv.Error):
            return {}
        return {name: [finite(row[name]) for row in rows] for name in (rows[0] if rows else ())}

    def check(self) -> None:
        """Look at everything that a report reads; raises what it would raise."""
        if self.config.protocol.accuracy not in HEADLINES:
            raise ValueError(f"protocol.accuracy={self.config.protocol.accuracy}")
        if self.status == "finished":
            float(self.result["samples_per_second"]), float(self.result["seconds"]), self.accuracy, self.score
        int(self.config.epochs), int(self.config.alignment.every), self.cell, self.axes, self.seed, science(self.config)


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
    """The run in a directory. Raises one of several errors where what lies there is something else."""
    result = read_result(folder) or {}
    config = OmegaConf.create(result["config"]) if result else OmegaConf.load(folder / CONFIG)
    if not isinstance(config, DictConfig) or not all("name" in (config.get(group) or {}) for group in GROUPS):
        raise ValueError("no configuration of a run")
    status, reason = result.get("status"), result.get("reason") or ""
    if status not in DONE:
        status, _, reason = status_of(folder)
    run = Run(folder, status, reason, config, result)
    run.check()
    return run


def read_runs(folders: Iterable[Path]) -> list[Run]:
    """Every run in and below the folders.

    What cannot be read is named on stderr and left out. Raises `UserError` for a folder that is not there, or where no
    run is found in any.
    """
    folders = list(folders)
    found: dict[Path, Run] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
        for place in run_folders(folder):
            try:
                found[place.resolve()] = read_run(place)
            except (OSError, YAMLError, OmegaConfBaseException, ValueError, TypeError, KeyError) as error:
                print(f"dfl-report: left out: {place} ({type(error).__name__}: {one_line(error)})", file=sys.stderr)
    if not found:
        raise UserError(f"{', '.join(map(str, folders))}: no run directory there (they hold a {CONFIG})")
    return list(found.values())
