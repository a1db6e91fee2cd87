"""Measured values of runs over iterations or epochs, and their means over seeds."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from pandas import DataFrame

from dfl_experiments.configuration.refusals import did_you_mean
from dfl_experiments.errors import UserError
from dfl_experiments.report.frame import curves


class Quantity(NamedTuple):
    """A quantity that `draw` can show."""

    column: str
    """Column of epochs.csv, without the ending /i for hidden layer i."""
    title: str
    """Title of a panel."""
    axis: str
    """Label of the y axis."""
    scale: float = 1
    """Factor by which the values are multiplied."""


ACCURACY = "accuracy (%)"
WHAT = {
    "loss": Quantity("train_loss", "Training loss", "loss"),
    "accuracy": Quantity("test_accuracy", "Test accuracy", ACCURACY, 100),
    "alignment": Quantity("cosine", "Alignment", "cosine of δ with BP's"),
    "norm": Quantity("norm_ratio", "Size of the error signal", "‖δ‖ / ‖δ of BP‖"),
    "rms": Quantity("activation_rms", "Activations", "root mean square of h"),
    "dead": Quantity("dead", "Dead units", "share of units (%)", 100),
    "lr": Quantity("lr", "Learning rate", "learning rate"),
}
# for each column, without the ending /i, the name of its quantity in `WHAT`
COLUMNS = {quantity.column: name for name, quantity in WHAT.items()}
COLUMNS["cosine_sample"] = "alignment"
KEYS = ("folder", "epoch", "iteration")  # columns that are not quantities


def quantity_of(name: str) -> Quantity:
    """Return the quantity with a name in `WHAT`, or of another column, such as "validation_loss"."""
    if name in WHAT:
        return WHAT[name]
    words = name.replace("_", " ")
    if name.endswith("accuracy"):
        return Quantity(name, words.capitalize(), ACCURACY, 100)
    return Quantity(name, words.capitalize(), words)


def recorded(frame: DataFrame, table: str) -> list[str]:
    """Return the names of the quantities in `epochs.csv` or `iterations.csv` of the runs."""
    rows = curves(frame, table, only_names=True)
    if table == "iterations":
        rows = with_names_of_epochs(rows)
    columns = dict.fromkeys(name.partition("/")[0] for name in rows)
    return [COLUMNS.get(column, column) for column in columns if column not in KEYS]


def known(names: Sequence[str], recorded_names: Sequence[str]) -> list[str]:
    """Return the names of quantities, each once, also for columns with another name.

    recorded_names: the quantities in the files of the runs, see `recorded`.

    Raises:
        UserError: a name is neither in `WHAT` nor in the files.
    """
    choices = list(dict.fromkeys([*WHAT, *recorded_names]))
    quantities = [COLUMNS.get(name, name) for name in names]
    for name in quantities:
        if name not in choices:
            there_are = f"there are {', '.join(choices)}"
            hint = did_you_mean(name, [*choices, *COLUMNS])
            raise UserError(f"what={name}: no such quantity; {there_are}{hint}")
    return list(dict.fromkeys(quantities))


def measured(
    frame: DataFrame, names: Sequence[str], x: str, smooth: int | None, notes: list[str]
) -> DataFrame:
    """Return the values of the runs in the format of `long`, with running means.

    On an x axis of iterations, values that are measured once an epoch are placed at its last iteration.
    """
    table = curves(frame)
    if "epoch" not in table:
        raise UserError("nothing to draw: no run has rows in epochs.csv")
    epochs = long(table, "epoch", names)
    if x == "epoch":
        values = smoothed(epochs, smooth or 1, notes)
    else:
        table = with_names_of_epochs(curves(frame, "iterations"))
        iterations = long(table, "iteration", names)
        longest = iterations.groupby(["folder", "column"]).size().max()
        iterations = smoothed(iterations, smooth or max(1, longest // 40), notes)
        ends = table.groupby(["folder", "epoch"], as_index=False).iteration.max()
        once = epochs[~epochs.column.isin(iterations.column)]
        once = once.merge(ends, left_on=["folder", "x"], right_on=["folder", "epoch"])
        values = pd.concat([iterations, once.assign(x=once.iteration)])
    if values.empty:
        raise UserError(f"nothing to draw: no run has such values by {x} yet")
    return values


def with_names_of_epochs(iterations: DataFrame) -> DataFrame:
    """Return the table of iterations.csv with the column names of epochs.csv, and ‖δ‖ / ‖δ of BP‖ of each layer."""
    table = iterations.rename(columns=lambda name: name.replace("cosine_sample/", "cosine/"))
    table = table.rename(columns={"loss": "train_loss"})
    norms = table.filter(regex="^norm/")
    references = table.filter(regex="^norm_bp/")
    ratios = norms / references.set_axis(norms.columns, axis="columns")
    ratios = ratios.rename(columns=lambda name: name.replace("norm", "norm_ratio"))
    return table.join(ratios)


def long(table: DataFrame, x: str, names: Sequence[str]) -> DataFrame:
    """Return a table with one row for each finite value of the named quantities in `table`.

    Columns:
        folder: the run directory.
        x: iteration or epoch.
        value: the value in the unit of the figure.
        column: name of the column in `table`.
        what: name of the quantity.
        layer: hidden layer, or 0 for a quantity of the whole net.
    """
    keys = {"folder": table.folder, "x": table[x]}
    # an empty first part with the types of the others
    empty = DataFrame(keys)[:0].assign(value=0.0, column="", what="", layer=0)
    parts = [empty]
    for name in names:
        quantity = quantity_of(name)
        for column in table:
            base, _, layer = column.partition("/")
            if base == quantity.column:
                part = DataFrame({**keys, "value": quantity.scale * table[column]})
                part["column"] = column
                part["what"] = name
                part["layer"] = int(layer or 0)
                parts.append(part[np.isfinite(part.value)])
    return pd.concat(parts, ignore_index=True)


def smoothed(values: DataFrame, window: int, notes: list[str]) -> DataFrame:
    """Return the centred running means of each curve. At its two ends, they are over fewer values."""
    if window == 1:
        return values
    notes.append(f"Running mean of {window} measured values.")
    curves = values.groupby(["folder", "what", "column"], sort=False).value
    means = curves.transform(lambda curve: curve.rolling(window, 1, center=True).mean())
    return values.assign(value=means)


def over_seeds(values: DataFrame, frame: DataFrame) -> DataFrame:
    """Return the mean, the lowest and the highest value of each line's runs at every x that all of them have."""
    curve = ["line", "what", "layer"]
    values = values.merge(frame[["folder", "line"]], on="folder")
    points = values.groupby([*curve, "x"]).value
    means = points.agg(mean="mean", low="min", high="max", runs="size")
    most = means.groupby(curve).runs.transform("max")
    complete = means[means.runs == most]
    return complete.reset_index()
