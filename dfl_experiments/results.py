"""The run directory: the local files that are the source of truth, and the records they are made of."""

import csv
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from dfl_experiments import __version__

EPOCH_COLUMNS = (
    "epoch", "lr", "train_loss", "train_accuracy", "validation_accuracy", "test_loss", "test_accuracy", "seconds",
)  # fmt: skip
LAYER_COLUMNS = ("cosine_sample", "cosine_batch", "norm", "norm_bp")


def iteration_columns(layers: int) -> list[str]:
    """`iteration, epoch, loss`, then for every layer i its cosines and norms."""
    return ["iteration", "epoch", "loss"] + [f"{name}/{i}" for i in range(1, layers + 1) for name in LAYER_COLUMNS]


def cell(value: float | int | None) -> str:
    """A number as it stands in a CSV file: nine significant digits, which hold a float32; empty where not measured."""
    if value is None or math.isnan(value):
        return ""
    return str(value) if isinstance(value, int) else f"{value:.9g}"


class Table:
    """A CSV file that only grows. Rows reach the file at every `extend`."""

    def __init__(self, path: Path, columns: Iterable[str]) -> None:
        self.columns = list(columns)
        self._file = path.open("w", newline="")
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._writer.writerow(self.columns)
        self._file.flush()

    def extend(self, rows: Iterable[Mapping[str, float | int | None]]) -> None:
        """Append rows; a column that a row lacks stays empty."""
        self._writer.writerows([cell(row.get(column)) for column in self.columns] for row in rows)
        self._file.flush()

    def __enter__(self) -> "Table":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def replace_atomically(path: Path, write: Any) -> None:
    """Call write(temporary path) and move the outcome to `path`: a reader sees the old file or the new, never half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_result(run_dir: Path, result: Mapping[str, Any]) -> None:
    """Write `result.json`, atomically. NaN and Inf become null, as JSON has no word for them."""
    text = json.dumps(_finite(result), indent=2, ensure_ascii=False) + "\n"
    replace_atomically(run_dir / "result.json", lambda path: path.write_text(text))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_config(run_dir: Path, cfg: DictConfig) -> None:
    """Write the resolved configuration to `config.yaml`."""
    replace_atomically(run_dir / "config.yaml", lambda path: OmegaConf.save(cfg, path, resolve=True))


def versions() -> dict[str, str]:
    """Of this package and of what its numbers depend on."""
    packages = {name: version(name) for name in ("torch", "torchvision", "numpy", "hydra-core")}
    return {"dfl-experiments": __version__, "python": platform.python_version(), **packages}


def git_commit() -> str | None:
    """The commit of the checkout this package runs from, with "+changes" where it differs; None if it is installed."""
    here = Path(__file__).resolve().parent
    if not (here.parent / ".git").exists():
        return None
    try:
        commands = (["rev-parse", "HEAD"], ["status", "--porcelain", "--", str(here), str(here.parent / "conf")])
        commit, changes = (
            subprocess.run(["git", "-C", str(here), *c], capture_output=True, text=True, check=True, timeout=10).stdout
            for c in commands
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.strip() + ("+changes" if changes.strip() else "")


def device_name(device: torch.device) -> str:
    """What a person calls the device."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"{device.type} ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"


class Accuracies:
    """The accuracies of the epochs so far, and the ones worth reporting."""

    def __init__(self) -> None:
        self.epochs: list[tuple[float | None, float]] = []

    def add(self, validation: float | None, test: float) -> None:
        """Record one epoch."""
        self.epochs.append((validation, test))

    @property
    def best_test(self) -> float:
        """The best accuracy on the test set so far."""
        return max(test for _, test in self.epochs)

    def summary(self) -> dict[str, float | int | None]:
        """`test_accuracy` of result.json; the first of equally good epochs counts."""
        if not self.epochs:
            return {"last": None, "at_best_validation": None, "best": None, "best_epoch": None}
        chosen = max(self.epochs, key=lambda pair: pair[0] if pair[0] is not None else -1.0)
        tests = [test for _, test in self.epochs]
        return {
            "last": tests[-1],
            "at_best_validation": chosen[1] if chosen[0] is not None else None,
            "best": max(tests),
            "best_epoch": tests.index(max(tests)) + 1,
        }
