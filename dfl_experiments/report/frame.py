"""Read run directories into the table of runs, which has one row for each run. Also read the curves of the runs."""

import logging
import os
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd

from dfl_experiments.configuration.refusals import did_you_mean, one_line
from dfl_experiments.errors import UserError, printable
from dfl_experiments.report.labels import labelled
from dfl_experiments.report.run_record import GROUPS, as_text, flat, read_config, record_of
from dfl_experiments.running.result import DONE
from dfl_experiments.running.run_directory import CONFIG, LAST, RESULT
from dfl_experiments.seal import opened

log = logging.getLogger(__name__)

# Columns that together identify a setting. The last one, `setting`, is a text with all other options that differ.
ROW = [
    "smoke", "dataset", "model", "augmentation", "epochs", "limit", "optimizer", "schedule", "precision", "protocol",
    "setting",
]  # fmt: skip
CELL = [*ROW, "method"]  # columns that identify a cell: one method in a setting
# columns that identify a grid point of a cell; it has a run for each seed
POINT = [*CELL, "lr", "weight_decay"]
# configuration keys whose column has another name
ALIASES = {
    "optimizer.lr": "lr",
    "optimizer.weight_decay": "weight_decay",
    "method.name": "rule",
    **{f"{group}.name": group for group in GROUPS},
}
MOST_VALUES = 12  # largest number of values that an error message lists


def runs(*folders: str | Path) -> pd.DataFrame:
    """Return a table with one row for each run in and below the folders.

    Columns:
        `folder`, `status`, `reason`: the run directory, how the run ended, and why.
        `ROW`, `method`, `rule`, `lr`, `weight_decay`, `seed`: the settings. There is also a column for every other
            configuration key that differs between runs of one net and data set.
        `accuracy`, `validation_accuracy`, `score`, `seconds`, `cosine/1`, `dead/1`, …: the results. Accuracies are
            fractions of 1.
        `unstable`, `failed_to_learn`, `fails`: whether and how the run went wrong.

    A run that cannot be read is left out, and a warning names it.

    Raises:
        UserError: a folder does not exist, or there is no run in any folder.
    """
    records: dict[str, dict[str, Any]] = {}
    is_any_left_out = False
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
        for run_dir in run_folders(folder):
            try:
                records[os.path.realpath(run_dir)] = record_of(run_dir)
            except Exception as error:  # reading another user's files can raise any error
                is_any_left_out = True
                kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
                log.warning("left out: %s", printable(f"{run_dir} ({kind}{one_line(error)})"))
    if not records:
        problem = "no run that can be shown" if is_any_left_out else "no run directory there"
        raise UserError(
            f"{', '.join(map(str, folders))}: {problem} (a run directory contains {CONFIG})"
        )
    frame = labelled(pd.DataFrame(list(records.values())))
    warn_of_repeats(frame)
    return frame


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
        # A directory with one of these files is a run. If it lacks other files, `record_of` reports a damaged run.
        if {CONFIG, RESULT, LAST, "epochs.csv"} & {*files, *below}:
            below.clear()
            yield Path(path)


def by_precedence(frame: pd.DataFrame) -> pd.DataFrame:
    """Sort the runs by preference. Of several runs with the same configuration and seed, the first one is used.

    Finished runs come first, then runs that ended in another way, then all others. Each of these groups begins with the
    runs that measured alignment. Runs that are still equal are sorted by the time they ended, the latest first.
    """
    order = frame.assign(
        is_finished=frame.status == "finished",
        is_done=frame.status.isin(DONE),
        measured=frame.measured_every > 0,
        path=frame.folder.map(os.path.abspath),
    )
    keys = ["is_finished", "is_done", "measured", "finished_at", "path"]
    index = order[keys].sort_values(keys, ascending=False, kind="stable").index
    return frame.loc[index]


def distinct(frame: pd.DataFrame) -> pd.DataFrame:
    """Return one run for each grid point and seed: the run that `by_precedence` puts first."""
    if not frame.duplicated([*POINT, "seed"]).any():
        return frame
    return by_precedence(frame).drop_duplicates([*POINT, "seed"]).sort_index()


def warn_of_repeats(frame: pd.DataFrame) -> None:
    """Log a warning about runs with the same configuration and seed but different results."""
    done = by_precedence(frame[frame.status.isin(DONE)])
    repeated = done[done.duplicated([*POINT, "seed"], keep=False)]
    for _, same in repeated.groupby([*POINT, "seed"], sort=False):
        results = same[["status", "accuracy", "validation_accuracy"]].agg(tuple, axis="columns")
        shown = same.folder.iloc[0]
        for other in same.folder[results != results.iloc[0]]:
            text = "same configuration and seed, different results: %s is shown, not %s"
            log.warning(text, shown, other)


def layer_names(frame: pd.DataFrame, quantity: str) -> list[str]:
    """Return the names of a quantity's columns in the order of layers: `cosine/1`, `cosine/2`, …"""
    names = [name for name in frame if name.startswith(f"{quantity}/")]
    return sorted(names, key=lambda name: int(name.partition("/")[2]))


def curves(frame: pd.DataFrame, table: str = "epochs") -> pd.DataFrame:
    """Return the rows of `epochs.csv` or `iterations.csv` of all runs, with a column for the run's `folder`.

    An incomplete last line is left out, because a run that still trains may be writing it. A run without the file has
    no rows.
    """
    tables = []
    for folder in frame.folder:
        path = Path(folder) / f"{table}.csv"
        if not path.exists():
            continue
        with opened(path) as file:
            content = file.read()
        lines = content[: content.rfind(b"\n") + 1]
        if not lines:
            continue
        try:
            rows = pd.read_csv(BytesIO(lines), dtype=float)
        except ValueError as error:  # another user's file can hold anything
            log.warning("left out: %s", printable(f"{path} ({one_line(error)})"))
            continue
        # the copy is one block of memory, so adding a column is fast
        tables.append(rows.copy().assign(folder=folder))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame({"folder": []})


def with_value(frame: pd.DataFrame, key: str, value: str) -> pd.DataFrame:
    """Return the runs with this value of a column or a configuration key.

    Raises:
        UserError: no run has the key, or no run has the value.
    """
    name = ALIASES.get(key, key)
    column = with_key(frame, name)[name]
    is_equal = column.map(comparable) == comparable(value)
    if not is_equal.any():
        choices = column[column != ""].dropna().drop_duplicates().sort_values()
        texts = [f"{choice:g}" if isinstance(choice, float) else str(choice) for choice in choices]
        if len(texts) > MOST_VALUES:
            texts[MOST_VALUES:] = ["…"]
        there_are = f"; there are {', '.join(texts)}" if texts else ""
        raise UserError(printable(f"{key}={value}: no run has this value{there_are}"))
    return frame[is_equal]


def comparable(value: Any) -> float | str:
    """Return a value in a form in which equal values are equal: 0.001 for "1e-3", "[8,8]" for "[8, 8]".

    A text is returned without spaces, without quotes around it, and in lower case.
    """
    text = str(value).strip("'\"").replace(" ", "").lower()
    try:
        return float(text)
    except ValueError:
        return text


def with_key(frame: pd.DataFrame, key: str) -> pd.DataFrame:
    """Return the frame with a column for a configuration key.

    The column holds numbers if the key has a number in every run. Otherwise it holds texts. The text is empty for a run
    without the key. If the frame already has the column, only its empty texts are replaced: `runs` leaves them empty if
    the option does not differ between the runs of one net and data set.

    Raises:
        UserError: no run has the key.
    """
    if key in frame and not (frame[key] == "").any():
        return frame
    configs = [flat(read_config(Path(folder))) for folder in frame.folder]
    keys = set().union(*configs)
    if key in frame:
        texts = [as_text(config[key]) if key in config else "" for config in configs]
        return frame.assign(**{key: frame[key].mask(frame[key] == "", texts)})
    if key not in keys:
        names = sorted(keys.union(frame.columns))
        raise UserError(f"{printable(key)}: no run has this key{did_you_mean(key, names)}")
    values = [config.get(key, "") for config in configs]
    is_numeric = all(type(value) in (int, float) for value in values)
    if not is_numeric:
        values = [value if value == "" else as_text(value) for value in values]
    return frame.assign(**{key: values})
