"""The run directory: the local files that are the source of truth, and the records they are made of."""

import contextlib
import csv
import hashlib
import io
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf

from dfl_experiments.errors import UserError
from dfl_experiments.measured import STABILITY
from dfl_experiments.seal import opened, sha256_of

EPOCH_COLUMNS = (
    "epoch", "lr", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy",
    "test_loss", "test_accuracy", "seconds",
)  # fmt: skip
HEADLINES = {"last": "last", "best_test": "best", "best_validation": "at_best_validation"}  # of `test_accuracy`
CONFIG, RESULT, LAST, PREVIOUS = "config.yaml", "result.json", "last.pt", "previous.pt"
FORMULA = re.compile(r"[=@]|[+-](?!\d*\.?\d+(e[+-]?\d+)?$)")  # -0.3 is none
Row = dict[str, float | int | None]


def iteration_columns(numbers: Iterable[str]) -> list[str]:
    """`iteration, epoch`, then what is told of every iteration among the numbers of a step."""
    return ["iteration", "epoch", *(name for name in numbers if name != "correct" and not name.startswith("zeros/"))]


def epoch_columns(depth: int, more: Sequence[str] = ()) -> list[str]:
    """`EPOCH_COLUMNS`, then for every hidden layer i the mean of its `cosine_sample/i` over the epoch, `cosine/i`, what
    `STABILITY` names, and the means of more quantities, `weight_cosine_mean/i` for one: W&B keeps no two series of one
    name apart."""
    names = ("cosine", *STABILITY, *(f"{quantity}_mean" for quantity in more))
    return [*EPOCH_COLUMNS, *(f"{name}/{i}" for name in names for i in range(1, depth))]


def cell(value: float | int | None) -> str:
    """A number as it stands in a CSV file: nine significant digits, which hold a float32; empty where not measured."""
    if value is None or math.isnan(value):
        return ""
    return str(value) if isinstance(value, int) else f"{value:.9g}"


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    """Write rows as CSV, with a ' before each text that a spreadsheet would take for a formula."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in rows:
        writer.writerow(f"'{cell}" if isinstance(cell, str) and FORMULA.match(cell) else cell for cell in row)
    return text.getvalue()


class Table:
    """A CSV file that only grows. Rows reach the file, and its `sha256`, at every `extend`."""

    def __init__(self, path: Path, columns: Iterable[str], length: int | None = None) -> None:
        """length: bytes of an existing file to go on after, what is behind them being cut off; None starts anew.

        Raises `UserError` for a file whose columns are others, as an earlier version's.
        """
        self.path, self.columns = path, list(columns)
        if length is None:
            path.unlink(missing_ok=True)
            self.sha256 = hashlib.sha256()
            self._append([self.columns])
        elif header(path) != self.columns:
            raise UserError(f"{path}: has other columns than this version writes; force=true runs anew")
        else:
            os.truncate(path, length)
            self.sha256 = sha256_of(path)

    def _append(self, rows: Iterable[Sequence[str]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        content = text.getvalue().encode()
        with naming(self.path), self.path.open("ab") as file:
            file.write(content)
        self.sha256.update(content)

    def sync(self) -> int:
        """Have the rows on the disk, and return the length of the file in bytes."""
        with naming(self.path), self.path.open("ab") as file:
            return synced(file)

    def extend(self, rows: Iterable[Row]) -> None:
        """Append rows; a column that a row lacks stays empty."""
        self._append([cell(row.get(column)) for column in self.columns] for row in rows)


def header(path: Path) -> list[str]:
    """The names of a CSV file's columns."""
    with opened(path) as file:
        return next(csv.reader([file.readline().decode(errors="replace")]), [])


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
