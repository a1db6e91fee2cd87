"""Define the files of a run directory and the columns of its tables, and write files safely."""

import contextlib
import csv
import hashlib
import io
import math
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf

from dfl_experiments.configuration.composition import quoted
from dfl_experiments.errors import UserError, printable
from dfl_experiments.measured import STABILITY
from dfl_experiments.seal import opened, sha256_of

EPOCH_COLUMNS = (
    "epoch", "lr", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy",
    "test_loss", "test_accuracy", "seconds",
)  # fmt: skip
# The value of protocol.accuracy decides which entry of `test_accuracy` in result.json is reported.
HEADLINES = {"last": "last", "best_test": "best", "best_validation": "at_best_validation"}
CONFIG, RESULT, LAST, PREVIOUS = "config.yaml", "result.json", "last.pt", "previous.pt"
RUN_FILES = (RESULT, LAST, "epochs.csv")  # a folder with one of these files is a run directory
Row = dict[str, float | int | None]


def iteration_columns(metric_names: Iterable[str]) -> list[str]:
    """Return the columns of iterations.csv: `iteration`, `epoch`, and a step's metrics except `correct` and `zeros`."""
    metrics = [name for name in metric_names if name != "correct" and not name.startswith("zeros/")]
    return ["iteration", "epoch", *metrics]


def epoch_columns(depth: int, extra_quantities: Sequence[str] = ()) -> list[str]:
    """Return the columns of epochs.csv: `EPOCH_COLUMNS`, then several columns for every hidden layer i.

    - `cosine/i` is the mean of `cosine_sample/i` over the epoch.
    - Each name in `STABILITY` has one column, such as `dead/i`.
    - Each extra quantity has a column with its mean over the epoch, such as `weight_cosine_mean/i`. The name ends in
      `_mean`, because iterations.csv has a column `weight_cosine/i`, and W&B joins columns with equal names.
    """
    names = ("cosine", *STABILITY, *(f"{quantity}_mean" for quantity in extra_quantities))
    return [*EPOCH_COLUMNS, *(f"{name}/{i}" for name in names for i in range(1, depth))]


def cell(value: float | int | None) -> str:
    """Format a number for a CSV file. Nine significant digits are enough for float32. None and NaN become empty."""
    if value is None or math.isnan(value):
        return ""
    return str(value) if isinstance(value, int) else f"{value:.9g}"


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    """Format rows as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


class Table:
    """A CSV file to which rows are appended. `sha256` is the digest of the whole file."""

    def __init__(self, path: Path, columns: Iterable[str], length: int | None = None) -> None:
        """Start a new file, or continue an existing one.

        length: number of bytes of the existing file to keep; None starts a new file.
        Raises `UserError` if the existing file has other columns, for example from an earlier version.
        """
        self.path, self.columns = path, list(columns)
        if length is None:
            path.unlink(missing_ok=True)
            self.sha256 = hashlib.sha256()
            self._append([self.columns])
        elif header(path) != self.columns:
            raise UserError(
                f"{path}: has other columns than this version writes; force=true starts a new run"
            )
        else:
            os.truncate(path, length)
            self.sha256 = sha256_of(path)

    def _append(self, rows: Iterable[Sequence[str]]) -> None:
        content = csv_text(rows).encode()
        with naming(self.path), self.path.open("ab") as file:
            file.write(content)
        self.sha256.update(content)

    def sync(self) -> int:
        """Flush the rows to the disk, and return the length of the file in bytes."""
        with naming(self.path), self.path.open("ab") as file:
            return synced(file)

    def extend(self, rows: Iterable[Row]) -> None:
        """Append rows. If a row has no value for a column, the cell stays empty."""
        self._append([cell(row.get(column)) for column in self.columns] for row in rows)


def header(path: Path) -> list[str]:
    """Return the column names of a CSV file."""
    with opened(path) as file:
        return next(csv.reader([file.readline().decode(errors="replace")]), [])


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the file's name to an OSError that the block raises."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def synced(file: IO[Any]) -> int:
    """Flush an open file to the disk, and return its length in bytes."""
    file.flush()
    os.fsync(file.fileno())
    return os.fstat(file.fileno()).st_size


def fsync_folder(folder: Path) -> None:
    """Flush the names of a folder's files to the disk, if the system supports it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Write a text to a file. A reader sees either the old text or the new text, never a part of it."""
    # the temporary name has the process ID, because two commands may write a sweep's summary at the same time
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    # A folder's name may not be UTF-8. Python reads such a byte as a character that UTF-8 lacks. It is written as an
    # escape such as \udce9, which is the same character in JSON.
    escaped = "backslashreplace"
    try:
        with naming(path), temporary.open("w", encoding="utf-8", errors=escaped) as file:
            file.write(text)
            synced(file)
        temporary.replace(path)
        fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def record_overrides(run_dir: Path, overrides: Sequence[str]) -> None:
    """Write the overrides of the command line. Hydra would write them too early, before the directory is locked."""
    (run_dir / ".hydra").mkdir(exist_ok=True)
    write_atomically(run_dir / ".hydra" / "overrides.yaml", OmegaConf.to_yaml(list(overrides)))


def is_run(folder: Path) -> bool:
    """Return whether a folder is the directory of a run that has begun."""
    return any((folder / name).exists() for name in RUN_FILES)


def run_folders(folder: Path) -> Iterator[Path]:
    """Yield the run directories in and below a folder, each once. Symbolic links are followed."""
    seen = set()
    for path, below, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(path)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if name not in ("wandb", ".hydra"))
        # The walk goes on below a run, because a run may have been written into a folder of runs.
        if {CONFIG, *RUN_FILES} & {*files, *below}:
            yield Path(path)


def run_below(folder: Path) -> str | None:
    """Return the name of a run directory directly below a folder; None if there is none.

    The first one is enough, so this is fast in a folder of many runs.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir() and is_run(Path(entry)):
                return entry.name
    return None


def refuse_folder_of_runs(folder: Path) -> None:
    """Raise `UserError` if a new run in this folder would hide runs in the folders directly below it."""
    if folder.is_dir() and not is_run(folder) and (name := run_below(folder)):
        raise UserError(
            f"{folder}: is a folder of runs, such as {name}, and a run would hide them; choose another folder "
            "(dfl-train: hydra.run.dir=)"
        )


def relative(folder: Path) -> str:
    """Return the path of a folder; inside the current folder, the relative path."""
    path = folder.absolute()
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return str(path)


def as_argument(folder: Path) -> str:
    """Return a folder as an argument of a shell command. Inside the current folder, the path is relative."""
    return shlex.quote(relative(folder))


def rerun_arguments(key: str, folder: str, plugins: Sequence[str]) -> str:
    """Return the arguments of `dfl-train` that resume or repeat a run, as a shell needs them.

    key: `resume` or `repeat`.
    plugins: the run's plugins. The command has to name them, because the recorded ones are not loaded.
    """
    # without a slash, Hydra could read the name as a number or as another value
    is_plain = "/" in folder and re.fullmatch(r"[\w./:-]+", folder, re.ASCII)
    words = [f"{key}={folder if is_plain else quoted(folder)}"]
    if plugins:
        words.append(f"plugins=[{','.join(plugins)}]")
    return printable(shlex.join(words))


def plot_line(folder: Path) -> str:
    """Return the line that says how to plot a run or a sweep."""
    return printable(f"plot it: dfl-plot {as_argument(folder)}")
