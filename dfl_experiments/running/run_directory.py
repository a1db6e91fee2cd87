"""The run directory: the local files that are the source of truth, and the records they are made of."""

import contextlib
import csv
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf

from dfl_experiments.errors import UserError

EPOCH_COLUMNS = (
    "epoch", "lr", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy",
    "test_loss", "test_accuracy", "seconds",
)  # fmt: skip
CONFIG, RESULT, LAST, PREVIOUS = "config.yaml", "result.json", "last.pt", "previous.pt"
Row = dict[str, float | int | None]


def iteration_columns(numbers: Iterable[str]) -> list[str]:
    """`iteration, epoch`, then what is told of every iteration among the numbers of a step."""
    return ["iteration", "epoch", *(name for name in numbers if name != "correct" and not name.startswith("zeros/"))]


def epoch_columns(depth: int, more: Sequence[str] = ()) -> list[str]:
    """`EPOCH_COLUMNS`, then for every hidden layer i the mean of its `cosine_sample/i` over the epoch, `cosine/i`, and
    of more quantities, `weight_cosine_mean/i` for one: W&B keeps no two series of one name apart."""
    return [*EPOCH_COLUMNS, *(f"{name}/{i}" for name in ("cosine", *map(mean_of, more)) for i in range(1, depth))]


def mean_of(quantity: str) -> str:
    """What the mean over an epoch is called."""
    return f"{quantity}_mean"


def cell(value: float | int | None) -> str:
    """A number as it stands in a CSV file: nine significant digits, which hold a float32; empty where not measured."""
    if value is None or math.isnan(value):
        return ""
    return str(value) if isinstance(value, int) else f"{value:.9g}"


class Table:
    """A CSV file that only grows. Rows reach the file at every `extend`."""

    def __init__(self, path: Path, columns: Iterable[str], length: int | None = None) -> None:
        """length: bytes of an existing file to go on after, what is behind them being cut off; None starts anew.

        Raises `UserError` for a file that is missing or shorter, or whose columns are others, as an earlier version's.
        """
        self.columns = list(columns)
        self._path = path
        if length is not None and (not path.is_file() or path.stat().st_size < length):
            raise UserError(
                f"{path}: missing, or shorter than the checkpoint says; remove {LAST} and {PREVIOUS} to start anew"
            )
        if length is not None and header(path) != self.columns:
            raise UserError(f"{path}: has other columns than this version writes; force=true runs anew")
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

    def extend(self, rows: Iterable[Row]) -> None:
        """Append rows; a column that a row lacks stays empty."""
        with naming(self._path):
            self._writer.writerows([cell(row.get(column)) for column in self.columns] for row in rows)
            self._file.flush()

    def __enter__(self) -> "Table":
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(OSError):  # rows that a full disk did not take: `extend` has said so
            self._file.close()


def header(path: Path) -> list[str]:
    """The names of a CSV file's columns."""
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        return next(csv.reader(file), [])


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
        with naming(path), temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            synced(file)
        temporary.replace(path)
        fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def record_overrides(run_dir: Path, overrides: Sequence[str]) -> None:
    """What the command line said, beside the run; Hydra would write it before the directory is locked."""
    (run_dir / ".hydra").mkdir(exist_ok=True)
    write_atomically(run_dir / ".hydra" / "overrides.yaml", OmegaConf.to_yaml(list(overrides)))
