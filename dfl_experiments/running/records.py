"""Convert the results of an epoch to rows of the CSV files and to entries of result.json."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dfl_experiments.running.run_directory import Row, iteration_columns


def iteration_rows(values: Tensor, metric_names: list[str], epoch: int) -> list[Row]:
    """Return the rows of iterations.csv for one epoch.

    values: metrics of the epoch, on the CPU; one row per iteration, one column per metric.
    """
    columns = set(iteration_columns(metric_names))
    rows: list[Row] = []
    for index, numbers in enumerate(values.tolist(), start=1):
        row: Row = {"iteration": (epoch - 1) * len(values) + index, "epoch": epoch}
        for name, number in zip(metric_names, numbers, strict=True):
            if name in columns:
                row[name] = number
        rows.append(row)
    return rows


def per_layer(
    columns: dict[str, Tensor], quantity: str, reduce: Callable[[Tensor], Any]
) -> dict[str, float]:
    """Reduce one quantity over the iterations of an epoch. Return one number for each layer, by layer number.

    A layer without measurements in this epoch is left out. NaN values come from batches with a zero signal. They are
    also left out. If no value is left, the mean is NaN.

    columns: the epoch's metrics by name, such as `norm/1`.
    reduce: the reduction, such as torch.mean.
    """
    values = {}
    for name, column in columns.items():
        kind, _, layer = name.partition("/")
        if kind != quantity:
            continue
        is_measured = not columns[f"zeros/{layer}"].isnan().all()
        if is_measured:
            numbers = column[~column.isnan()]
            values[layer] = float(reduce(numbers))
    return values


def by_layer(row: dict[str, Any], quantity: str) -> dict[str, Any]:
    """Return the values of one quantity in a row of epochs.csv, by layer number."""
    prefix = f"{quantity}/"
    names = [name for name in row if name.startswith(prefix)]
    return {name.removeprefix(prefix): row[name] for name in names}


def reported_accuracies(epochs: list[tuple[float | None, float]]) -> dict[str, Any]:
    """Return the entry `test_accuracy` of result.json. If several epochs are equally good, the first one counts.

    epochs: validation and test accuracy of every epoch.
    """
    held_out = [-1.0 if validation is None else validation for validation, _ in epochs]
    tests = [test for _, test in epochs]
    chosen = held_out.index(max(held_out))
    best = max(tests)
    return {
        "last": tests[-1],
        "at_best_validation": None if epochs[chosen][0] is None else tests[chosen],
        "best": best,
        "best_epoch": tests.index(best) + 1,
    }
