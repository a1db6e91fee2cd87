"""The run directory: the local files that are the source of truth, and the records they are made of."""

import contextlib
import csv
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from omegaconf import OmegaConf

from dfl_experiments import __version__
from dfl_experiments.config import UserError

if TYPE_CHECKING:
    import torch

EPOCH_COLUMNS = (
    "epoch", "lr", "train_loss", "train_accuracy", "validation_accuracy", "test_loss", "test_accuracy", "seconds",
)  # fmt: skip
RESULT, LAST, PREVIOUS = "result.json", "last.pt", "previous.pt"
DONE = ("finished", "diverged", "stopped")  # statuses that running it again would end in again
LAYER_COLUMNS = ("cosine_sample", "cosine_batch", "norm", "norm_bp")


def iteration_columns(layers: int) -> list[str]:
    """`iteration, epoch, loss`, then for every layer i its cosines and norms."""
    return ["iteration", "epoch", "loss"] + [f"{name}/{i}" for i in range(1, layers + 1) for name in LAYER_COLUMNS]


def epoch_columns(layers: int) -> list[str]:
    """`EPOCH_COLUMNS`, then for every layer i the mean of its `cosine_sample/i` over the epoch, `cosine/i`."""
    return [*EPOCH_COLUMNS, *(f"cosine/{i}" for i in range(1, layers + 1))]


def cell(value: float | int | None) -> str:
    """A number as it stands in a CSV file: nine significant digits, which hold a float32; empty where not measured."""
    if value is None or math.isnan(value):
        return ""
    return str(value) if isinstance(value, int) else f"{value:.9g}"


class Table:
    """A CSV file that only grows. Rows reach the file at every `extend`."""

    def __init__(self, path: Path, columns: Iterable[str], length: int | None = None) -> None:
        """length: bytes of an existing file to go on after, what is behind them being cut off; None starts anew.

        Raises `UserError` for a file that is missing or shorter.
        """
        self.columns = list(columns)
        self._path = path
        if length is not None and (not path.is_file() or path.stat().st_size < length):
            raise UserError(
                f"{path}: missing, or shorter than the checkpoint says; remove {LAST} and {PREVIOUS} to start anew"
            )
        self._file = path.open("w" if length is None else "a", newline="")
        self._writer = csv.writer(self._file, lineterminator="\n")
        if length is None:
            self._writer.writerow(self.columns)
            self._file.flush()
        else:
            self._file.truncate(length)

    def sync(self) -> int:
        """Have the rows on the disk, and return the length of the file in bytes."""
        with naming(self._path):
            return synced(self._file)

    def extend(self, rows: Iterable[Mapping[str, float | int | None]]) -> None:
        """Append rows; a column that a row lacks stays empty."""
        with naming(self._path):
            self._writer.writerows([cell(row.get(column)) for column in self.columns] for row in rows)
            self._file.flush()

    def __enter__(self) -> "Table":
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(OSError):  # rows that a full disk did not take: `extend` has said so
            self._file.close()


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have an error in writing name the file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def synced(file: IO[Any]) -> int:
    """Have everything written to an open file on the disk, and return its length in bytes."""
    file.flush()
    os.fsync(file.fileno())
    return os.fstat(file.fileno()).st_size


def fsync_folder(folder: Path) -> None:
    """Have the names of a folder's files on the disk, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Write a text to a file: a reader sees the old one or the new, never half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")  # two commands of one sweep write its summary
    try:
        with naming(path), temporary.open("w") as file:
            file.write(text)
            synced(file)
        temporary.replace(path)
        fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def read_result(run_dir: Path) -> dict[str, Any] | None:
    """The content of `result.json`; None where there is none that can be read."""
    try:
        result = json.loads((run_dir / RESULT).read_text())
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) and {"status", "config"} <= result.keys() else None


def status_left(run_dir: Path) -> str | None:
    """The status that a run left here, "interrupted" if it was killed; None where there is nothing to go on from."""
    result = read_result(run_dir)
    if result is not None and result["status"] in DONE:
        return result["status"]
    if any(os.path.lexists(run_dir / name) for name in (LAST, PREVIOUS)):
        return "interrupted" if result is None else result["status"]
    return None


def write_result(run_dir: Path, result: Mapping[str, Any]) -> None:
    """Write `result.json`, atomically. NaN and Inf become null, as JSON has no word for them."""
    write_atomically(run_dir / RESULT, json.dumps(_finite(result), indent=2, ensure_ascii=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_config(run_dir: Path, config: Mapping[str, Any]) -> None:
    """Write the resolved configuration to `config.yaml`."""
    write_atomically(run_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(dict(config))))


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


def device_name(device: "torch.device") -> str:
    """What a person calls the device."""
    import torch  # slow, and what else is here is needed before a refusal too

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
