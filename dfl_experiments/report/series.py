"""Measured values of runs over iterations or epochs, and their means over seeds."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from dfl_experiments.errors import UserError
from dfl_experiments.report.frame import curves

MOST_POINTS = 500  # largest number of points in a curve


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
COLUMNS = {quantity.columns[0]: name for name, quantity in WHAT.items()}
# in iterations.csv; other quantities are measured once an epoch
BY_ITERATION = ("loss", "alignment", "norm")


def axis_of(frame: pd.DataFrame, names: Sequence[str], by: str | None, notes: list[str]) -> str:
    """Return the x axis, "iteration" or "epoch".

    The axis is "epoch" in three cases: `by` is "epoch", a run has no iterations.csv, or iterations.csv has none of the
    quantities.
    """
    lacking = sum(not (Path(folder) / "iterations.csv").exists() for folder in frame.folder)
    if by == "epoch" or not set(names) & set(BY_ITERATION):
        notes.append("By epoch.")
        return "epoch"
    if lacking:
        runs = "no run has" if lacking == len(frame) else f"{lacking} of {len(frame)} runs have no"
        notes.append(f"By epoch: {runs} iterations.csv.")
        return "epoch"
    return "iteration"


def measured(
    frame: pd.DataFrame, names: Sequence[str], by: str, smooth: int | None, notes: list[str]
) -> pd.DataFrame:
    """Return the values of the runs in the format of `long`.

    Some quantities are measured once an epoch. On an x axis of iterations, their values are placed at the last
    iteration of the epoch.
    """
    epochs = curves(frame)
    if "epoch" not in epochs:
        raise UserError("nothing to draw: no run has rows in epochs.csv")
    if by == "epoch":
        table = long(epochs, "epoch", names)
    else:
        iterations = with_names_of_epochs(curves(frame, "iterations"))
        ends = iterations.groupby(["folder", "epoch"], as_index=False).iteration.max()
        once = epochs.columns.difference(iterations.columns).union(["folder", "epoch"])
        by_epoch = long(epochs[once].merge(ends, on=["folder", "epoch"]), "iteration", names)
        table = pd.concat([smoothed(long(iterations, "iteration", names), smooth, notes), by_epoch])
    if table.empty:
        raise UserError("nothing to draw: no run has values yet")
    return table


def with_names_of_epochs(iterations: pd.DataFrame) -> pd.DataFrame:
    """Return the table of iterations.csv with the column names of epochs.csv.

    The ratio ‖δ‖ / ‖δ of BP‖ of each layer is added.
    """
    table = iterations.rename(columns=lambda name: name.replace("cosine_sample/", "cosine/"))
    table = table.rename(columns={"loss": "train_loss"})
    ratios = {}
    for name in table.columns:
        if name.startswith("norm_bp/"):
            layer = name.removeprefix("norm_bp/")
            ratios[f"norm_ratio/{layer}"] = table[f"norm/{layer}"] / table[name]
    return table.assign(**ratios)


def long(table: pd.DataFrame, x: str, names: Sequence[str]) -> pd.DataFrame:
    """Return a table with one row for each value in `table`.

    Columns:
        folder: the run directory.
        x: iteration or epoch.
        value: the value in the unit of the figure.
        raw: NaN. `smoothed` writes the measured value here.
        what: name of the quantity in `WHAT`.
        layer: hidden layer, or 0 for a quantity of the whole net.
        is_validation: whether the value was measured on the validation set.
    """
    empty = {
        "folder": "",
        "x": 0.0,
        "value": 0.0,
        "raw": 0.0,
        "what": "",
        "layer": 0,
        "is_validation": False,
    }
    parts = [pd.DataFrame([empty]).iloc[:0]]
    for column in table:
        quantity, _, layer = column.partition("/")
        for name in names:
            if quantity in WHAT[name].columns:
                part = table[["folder", x, column]].set_axis(
                    ["folder", "x", "value"], axis="columns"
                )
                part = part[np.isfinite(part.value)]
                part["value"] *= WHAT[name].scale
                is_validation = quantity.startswith("validation")
                parts.append(
                    part.assign(
                        raw=math.nan, what=name, layer=int(layer or 0), is_validation=is_validation
                    )
                )
    return pd.concat(parts, ignore_index=True)


def smoothed(table: pd.DataFrame, smooth: int | None, notes: list[str]) -> pd.DataFrame:
    """Return the table with running means in the column `value` and the measured values in the column `raw`."""
    groups = table.groupby(["folder", "what", "layer"], sort=False)
    size = groups.value.transform("size")
    window = (size // 40).clip(lower=1) if smooth is None else size.clip(smooth, smooth)
    if window.max() > 1:
        notes.append(f"Running mean of {span(window)} measured iterations.")
    means = groups.value.transform(lambda values: running_mean(values, window[values.index[0]]))
    return table.assign(raw=table.value, value=means)


def running_mean(values: pd.Series, window: int) -> pd.Series:
    """Return the centred running mean over `window` values. At the two ends, the mean is over fewer values."""
    return values.rolling(window, center=True, min_periods=1).mean() if window > 1 else values


def over_seeds(table: pd.DataFrame, frame: pd.DataFrame) -> pd.DataFrame:
    """Return the mean, the lowest and the highest value of each line at every x.

    The values are computed over the runs of the line. An x is left out if one of these runs has no value there. Lines
    with more than `MOST_POINTS` points are thinned.
    """
    table = table.merge(frame[["folder", "line"]], on="folder")
    curve = ["line", "what", "layer", "is_validation"]
    values = table.groupby([*curve, "x"], as_index=False).agg(
        mean=("value", "mean"),
        low=("value", "min"),
        high=("value", "max"),
        raw=("raw", "first"),
        runs=("value", "size"),
    )
    values["raw"] = values.raw.where(values.runs == 1)
    values = values[values.runs == values.groupby(curve).runs.transform("max")]
    points = values.groupby(curve).x
    index, size = points.cumcount(), points.transform("size")
    step = (size - 1) // MOST_POINTS + 1
    is_last = index == size - 1
    return values[is_last | (index % step == 0)]


def span(numbers: pd.Series) -> str:
    """Return the range of numbers as text: "2 to 5", or "2" if all are equal."""
    low, high = numbers.min(), numbers.max()
    return f"{low} to {high}" if low < high else str(low)
