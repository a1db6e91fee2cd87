"""Measured values of runs over iterations or epochs, and their means over seeds."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from pandas import DataFrame

from dfl_experiments.errors import UserError
from dfl_experiments.report.frame import curves


class Quantity(NamedTuple):
    """A quantity that `draw` can show."""

    columns: tuple[str, ...]
    """Columns of epochs.csv, without the ending /i for hidden layer i. A second column is for the validation set."""
    title: str
    """Title of a panel."""
    axis: str
    """Label of the y axis."""
    scale: float = 1
    """Factor by which the values are multiplied."""


WHAT = {
    "loss": Quantity(("train_loss", "validation_loss"), "Training loss", "loss"),
    "accuracy": Quantity(
        ("test_accuracy", "validation_accuracy"), "Test accuracy", "accuracy (%)", 100
    ),
    "alignment": Quantity(("cosine",), "Alignment", "cosine of δ with BP's"),
    "norm": Quantity(("norm_ratio",), "Size of the error signal", "‖δ‖ / ‖δ of BP‖"),
    "rms": Quantity(("activation_rms",), "Activations", "root mean square of h"),
    "dead": Quantity(("dead",), "Dead units", "share of units (%)", 100),
}
# column of epochs.csv, without the ending /i: the quantity that it belongs to
COLUMNS = {column: name for name, quantity in WHAT.items() for column in quantity.columns}
# in iterations.csv; other quantities are measured once an epoch
BY_ITERATION = ("loss", "alignment", "norm")


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
        ends = table.groupby(["folder", "epoch"], as_index=False).iteration.max()
        once = epochs[~epochs.column.isin(iterations.column)]
        once = once.merge(ends.rename(columns={"epoch": "x"}), on=["folder", "x"])
        longest = iterations.groupby(["folder", "column"]).size().max()
        window = smooth or max(1, longest // 40)
        values = pd.concat([smoothed(iterations, window, notes), once.assign(x=once.iteration)])
    if values.empty:
        raise UserError("nothing to draw: no run has values yet")
    return values


def with_names_of_epochs(iterations: DataFrame) -> DataFrame:
    """Return the table of iterations.csv with the column names of epochs.csv, and ‖δ‖ / ‖δ of BP‖ of each layer."""
    table = iterations.rename(columns=lambda name: name.replace("cosine_sample/", "cosine/"))
    norms = table.filter(regex="^norm/")
    references = table.filter(regex="^norm_bp/").set_axis(norms.columns, axis="columns")
    ratios = (norms / references).rename(columns=lambda name: name.replace("norm", "norm_ratio"))
    return table.rename(columns={"loss": "train_loss"}).join(ratios)


def long(table: DataFrame, x: str, names: Sequence[str]) -> DataFrame:
    """Return a table with one row for each finite value in `table`.

    Columns:
        folder: the run directory.
        x: iteration or epoch.
        column: name of the column in `table`.
        value: the value in the unit of the figure.
        what: name of the quantity in `WHAT`.
        layer: hidden layer, or 0 for a quantity of the whole net.
        is_validation: whether the value was measured on the validation set.
    """
    rows = []
    for column in table:
        quantity, _, layer = column.partition("/")
        name = COLUMNS.get(quantity, "")
        if name in names:
            is_validation = quantity.startswith("validation")
            rows.append((column, name, int(layer or 0), is_validation, WHAT[name].scale))
    about = DataFrame(rows, columns=["column", "what", "layer", "is_validation", "scale"])
    values = table.melt(["folder", x], about.column, var_name="column")
    values = values[np.isfinite(values.value.astype(float))].merge(about, on="column")
    values["value"] *= values.scale
    return values.rename(columns={x: "x"}).drop(columns="scale")


def smoothed(values: DataFrame, window: int, notes: list[str]) -> DataFrame:
    """Return the centred running means of each curve. At its two ends, they are over fewer values."""
    if window == 1:
        return values
    notes.append(f"Running mean of {window} measured values.")
    curves = values.groupby(["folder", "column"], sort=False).value
    means = curves.transform(lambda curve: curve.rolling(window, 1, center=True).mean())
    return values.assign(value=means)


def over_seeds(values: DataFrame, frame: DataFrame) -> DataFrame:
    """Return the mean, the lowest and the highest value of each line's runs at every x that all of them have."""
    curve = ["line", "what", "layer", "is_validation"]
    values = values.merge(frame[["folder", "line"]], on="folder")
    points = values.groupby([*curve, "x"]).value
    means = points.agg(mean="mean", low="min", high="max", runs="size")
    most = means.groupby(curve).runs.transform("max")
    return means[means.runs == most].reset_index()
