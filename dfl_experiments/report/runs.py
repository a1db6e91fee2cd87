"""Run directories as a report reads them: whatever state they are in, and nothing but them."""

import csv
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dfl_experiments.config import UserError
from dfl_experiments.results import DONE, RESULT, read_result
from dfl_experiments.settings import science
from dfl_experiments.sweep import status_of

CONFIG = "config.yaml"
GROUPS = ("dataset", "augmentation", "model", "method", "optimizer", "protocol")


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
    def smoke(self) -> int | None:
        """How many images of each kind a trial of the pipeline saw; None for a run that means its numbers."""
        return self.config.get("smoke")

    @cached_property
    def science(self) -> str:
        """A digest of everything that decides what it computes."""
        return science(self.config)

    @cached_property
    def epochs(self) -> dict[str, list[float | None]]:
        """The columns of `epochs.csv`, None for an empty or infinite cell; a last row that is not whole is left out."""
        try:
            with (self.folder / "epochs.csv").open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if None not in row.values()]
        except OSError:
            return {}
        return {name: [finite(row[name]) for row in rows] for name in (rows[0] if rows else ())}


def finite(text: str) -> float | None:
    """The number that a cell of a table holds; None for an empty one and for NaN and Inf."""
    number = float(text or "nan")
    return number if math.isfinite(number) else None


def run_folders(folder: Path) -> Iterator[Path]:
    """The run directories in and below a folder."""
    for place, below, files in os.walk(folder):
        below[:] = sorted(name for name in below if name not in ("wandb", ".hydra"))
        if CONFIG in files or RESULT in files:
            below.clear()
            yield Path(place)


def read_run(folder: Path) -> Run | None:
    """The run in a directory; None where what lies there is something else."""
    result = read_result(folder) or {}
    try:
        config = OmegaConf.create(result["config"]) if result else OmegaConf.load(folder / CONFIG)
    except (OSError, YAMLError, OmegaConfBaseException, UnicodeDecodeError):
        return None
    if not isinstance(config, DictConfig) or not all("name" in (config.get(group) or {}) for group in GROUPS):
        return None
    if "seed" not in config or "accuracy" not in config.protocol:
        return None
    if result.get("status") in DONE:
        return Run(folder, result["status"], result.get("reason") or "", config, result)
    status, _, reason = status_of(folder)
    return Run(folder, status, reason, config, result)


def read_runs(folders: Iterable[Path]) -> list[Run]:
    """Every run in and below the folders, once: of two with the same configuration the finished one, or the newer.

    Raises `UserError` for a folder that is not there, or where no run is found in any.
    """
    folders = list(folders)
    found: dict[str, Run] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
        for place in run_folders(folder):
            run = read_run(place)
            if run is None:
                continue
            other = found.get(run.science)
            if other is None or _rank(run) > _rank(other):
                found[run.science] = run
    if not found:
        raise UserError(f"{', '.join(map(str, folders))}: no run directory there (they hold a {CONFIG})")
    return list(found.values())


def _rank(run: Run) -> tuple[bool, float]:
    return run.status in DONE, (run.folder / CONFIG).stat().st_mtime if (run.folder / CONFIG).exists() else 0.0
