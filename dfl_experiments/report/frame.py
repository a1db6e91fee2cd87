"""Read run directories into the table of runs, which has one row for each run. Also read the curves of the runs."""

import logging
import os
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
from pandas import DataFrame, Series

from dfl_experiments.configuration.refusals import did_you_mean, one_line
from dfl_experiments.errors import UserError, printable
from dfl_experiments.report.labels import labelled
from dfl_experiments.report.run_record import ALIASES, NOT_IN_SETTING, as_text, record_of
from dfl_experiments.running.result import DONE
from dfl_experiments.running.run_directory import CONFIG, run_folders
from dfl_experiments.seal import complete_lines, opened

log = logging.getLogger(__name__)

# Columns that together identify a setting. The last one, `setting`, is a text with all other options that differ.
ROW = [
    "smoke", "dataset", "model", "augmentation", "epochs", "limit", "optimizer", "schedule", "precision", "protocol",
    "setting",
]  # fmt: skip
CELL = [*ROW, "method"]  # columns that identify a cell: one method in a setting
# columns that identify a grid point of a cell; it has a run for each seed
POINT = [*CELL, "lr", "weight_decay"]
MOST_VALUES = 12  # largest number of values that an error message lists


def runs(*folders: str | Path) -> DataFrame:
    """Return a table with one row for each run in and below the folders.

    Columns:
        `folder`, `status`, `reason`: the run directory, how the run ended, and why.
        `smoke`, `dataset`, `model`, `augmentation`, `epochs`, `limit`, `optimizer`, `schedule`, `precision`,
            `protocol`, `method`, `rule`, `lr`, `weight_decay`, `seed`: the settings. There is also a column for every
            other configuration key that differs between runs of one net and data set. `setting` holds all of these
            others as one text, and `config` holds all keys.
        `accuracy`, `validation_accuracy`, `score`, `seconds`, `cosine/1`, `dead/1`, …: the results. Accuracies are
            fractions of 1.
        `unstable`, `failed_to_learn`, `fails`: whether and how the run went wrong.

    A run that cannot be read is left out, and a warning names it.

    Raises:
        UserError: a folder does not exist, or there is no run in any folder.
    """
    records: dict[str, dict[str, Any]] = {}
    problem = f"no run directory there (a run directory contains {CONFIG})"
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
        for run_dir in run_folders(folder):
            try:
                records[os.path.realpath(run_dir)] = record_of(run_dir)
            except Exception as error:  # reading another user's files can raise any error
                problem = "no run that can be shown"
                kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
                text = f"{run_dir} ({kind}{one_line(error)})"
                log.warning("left out: %s", printable(text))
    if not records:
        raise UserError(f"{', '.join(map(str, folders))}: {problem}")
    frame = labelled(DataFrame(list(records.values())))
    frame["score"] = frame.validation_accuracy.fillna(frame.accuracy)
    warn_of_repeats(frame)
    return frame


def by_precedence(frame: DataFrame) -> DataFrame:
    """Sort the runs so that the preferred run comes first.

    Finished runs come before runs that ended in another way, and these come before all others. Among equal runs, those
    with measured alignment come first, then those that ended last.
    """
    order = DataFrame(
        {
            "is_finished": frame.status == "finished",
            "is_done": frame.status.isin(DONE),
            "is_measured": frame.measured_every > 0,
            "finished_at": frame.finished_at,
            "path": frame.folder.map(os.path.abspath),
        }
    )
    return frame.loc[order.sort_values(list(order), ascending=False).index]


def distinct(frame: DataFrame) -> DataFrame:
    """Return one run for each grid point and seed: the run that `by_precedence` puts first."""
    if not frame.duplicated([*POINT, "seed"]).any():
        return frame
    return by_precedence(frame).drop_duplicates([*POINT, "seed"]).sort_index()


def warn_of_repeats(frame: DataFrame) -> None:
    """Log a warning about runs with the same configuration and seed but different results."""
    done = by_precedence(frame[frame.status.isin(DONE)])
    repeated = done[done.duplicated([*POINT, "seed"], keep=False)]
    text = "same configuration and seed, different results: %s is shown, not %s"
    keys = ["status", "accuracy", "validation_accuracy"]
    for _, same in repeated.groupby([*POINT, "seed"], sort=False):
        results = same.groupby(keys, dropna=False).ngroup()
        shown = same.folder.iloc[0]
        for other in same.folder[results != results.iloc[0]]:
            log.warning(text, shown, other)


def layer_names(frame: DataFrame, quantity: str) -> list[str]:
    """Return the names of a quantity's columns in the order of layers: `cosine/1`, `cosine/2`, …"""
    names = [name for name in frame if name.startswith(f"{quantity}/")]
    return sorted(names, key=lambda name: int(name.partition("/")[2]))


def refuse_no_table(frame: Any, function: str) -> None:
    """Raise `UserError` if the argument of a public function is not a table of runs."""
    if not isinstance(frame, DataFrame):
        raise UserError(
            f"{function}: takes the table that dfl.runs(folder) returns, or rows of it such as "
            f"runs[:1], not a {type(frame).__name__}"
        )


def curves(frame: DataFrame, table: str = "epochs", only_names: bool = False) -> DataFrame:
    """Return the rows of `epochs.csv` or `iterations.csv` of all runs, with a column for the run's `folder`.

    An incomplete last line is left out, because a run that still trains may be writing it.

    only_names: read only the names of the columns, and no rows.

    Raises:
        UserError: `frame` is no table of runs, or `table` is neither "epochs" nor "iterations".
    """
    refuse_no_table(frame, "curves")
    if table not in ("epochs", "iterations"):
        raise UserError(f"table={table!r}: choose epochs or iterations")
    tables = []
    for folder in frame.folder:
        path = Path(folder) / f"{table}.csv"
        if not path.exists():
            continue
        with opened(path) as file:
            content = file.readline() if only_names else file.read()
        lines = complete_lines(content)
        if not lines:
            continue
        try:
            rows = pd.read_csv(BytesIO(lines), dtype=float)
        except ValueError as error:  # another user's file can hold anything
            log.warning("left out: %s", printable(f"{path} ({one_line(error)})"))
            continue
        # the copy is one block of memory, so adding a column is fast
        tables.append(rows.copy().assign(folder=folder))
    return pd.concat(tables, ignore_index=True) if tables else DataFrame({"folder": []})


def with_value(frame: DataFrame, key: str, value: str) -> DataFrame:
    """Return the runs with this value of a column or a configuration key, or with one of several: "las,dfa".

    Raises `UserError` if no run has the value, or one of the values.
    """
    column = column_of(frame, key)
    values = column.map(comparable)
    wanted = {comparable(value)}
    if wanted.isdisjoint(values):
        wanted = {comparable(part) for part in value.split(",")}
    if not wanted <= set(values):
        problem = f"{key}={value}: no run has this value{choices_of(column)}"
        raise UserError(printable(problem))
    return frame[values.isin(wanted)]


def choices_of(column: Series) -> str:
    """Return "; there are …" with the lowest values of a column; empty if it has none."""
    choices = column[column != ""].dropna().drop_duplicates()
    lowest = choices.sort_values()[:MOST_VALUES]
    texts = [f"{choice:g}" if isinstance(choice, float) else str(choice) for choice in lowest]
    return f"; there are {', '.join(texts)}" if texts else ""


def comparable(value: Any) -> float | str:
    """Return a value in a form in which equal values are equal: 0.001 for "1e-3", "[8,8]" for "[8, 8]"."""
    text = str(value).strip("'\"").replace(" ", "").lower()
    try:
        return float(text)
    except ValueError:
        return text


def column_of(frame: DataFrame, key: str) -> Series:
    """Return the values of a column or a configuration key: numbers if all are numbers, else texts.

    A run without the key, or without a value in the column, has an empty text. An option that is null has the text
    "null". Raises `UserError` if no run has the key.
    """
    name = ALIASES.get(key, key)
    keys = set().union(*frame.config)
    is_column = name in frame and name != "config"  # the column config holds mappings
    if is_column and (name in NOT_IN_SETTING or name not in keys):
        column = frame[name]
        return column.map(as_text).mask(column.isna(), "") if column.hasnans else column
    if name not in keys:
        hint = did_you_mean(key, sorted(keys.union(frame)))
        raise UserError(f"{printable(key)}: no run has this key{hint}")
    # of type object, because otherwise pandas replaces None by NaN
    found = [config.get(name, "") for config in frame.config]
    values = Series(found, frame.index, dtype=object)
    types = values.map(type)
    if types.isin([int, float]).all():
        return values.infer_objects()
    return values.map(lambda value: value if value == "" else as_text(value))


def with_key(frame: DataFrame, key: str) -> DataFrame:
    """Return the frame with a column for a configuration key, see `column_of`."""
    return frame.assign(**{key: column_of(frame, key)})
