"""The run directory: the local files that are the source of truth, and the records they are made of."""

import contextlib
import csv
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf

from dfl_experiments.errors import UserError
from dfl_experiments.running.locks import holder_of

EPOCH_COLUMNS = (
    "epoch", "lr", "train_loss", "train_accuracy", "validation_accuracy", "test_loss", "test_accuracy", "seconds",
)  # fmt: skip
CONFIG, RESULT, LAST, PREVIOUS = "config.yaml", "result.json", "last.pt", "previous.pt"
Row = dict[str, float | int | None]
DONE = ("finished", "diverged", "stopped")  # statuses that running it again would end in again


def iteration_columns(numbers: Iterable[str]) -> list[str]:
    """`iteration, epoch`, then what is told of every iteration among the numbers of a step."""
    return ["iteration", "epoch", *(name for name in numbers if name != "correct" and not name.startswith("zeros/"))]


def epoch_columns(depth: int) -> list[str]:
    """`EPOCH_COLUMNS`, then for every hidden layer i the mean of its `cosine_sample/i` over the epoch, `cosine/i`."""
    return [*EPOCH_COLUMNS, *(f"cosine/{i}" for i in range(1, depth))]


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


def status_of(run_dir: Path) -> tuple[str, float | None, str]:
    """Status, accuracy and reason of a run as its directory tells them, which is only looked at."""
    if not run_dir.is_dir():
        return "not started", None, ""
    result = read_result(run_dir)
    if result is None or result["status"] not in DONE:
        if holder := holder_of(run_dir):
            return "running", None, holder
        result = read_result(run_dir)  # it may have ended between the two looks
    if result is None:
        return "interrupted", None, "its process ended without a word"
    return result["status"], result.get("accuracy"), result.get("reason") or ""


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
    write_atomically(run_dir / CONFIG, OmegaConf.to_yaml(OmegaConf.create(dict(config))))


def record_overrides(run_dir: Path, overrides: Sequence[str]) -> None:
    """What the command line said, beside the run; Hydra would write it before the directory is locked."""
    (run_dir / ".hydra").mkdir(exist_ok=True)
    write_atomically(run_dir / ".hydra" / "overrides.yaml", OmegaConf.to_yaml(list(overrides)))
