"""What an epoch leaves of its numbers: the rows of the CSV files, and what result.json says so far."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dfl_experiments.running.run_directory import Row, iteration_columns


def iteration_rows(values: Tensor, numbers: list[str], epoch: int) -> list[Row]:
    """The rows of iterations.csv that an epoch's values make. values: (iterations, numbers), on the CPU."""
    told = set(iteration_columns(numbers))
    return [
        {"iteration": (epoch - 1) * len(values) + index, "epoch": epoch}
        | {name: value for name, value in zip(numbers, row, strict=True) if name in told}
        for index, row in enumerate(values.tolist(), start=1)
    ]


def per_layer(columns: dict[str, Tensor], quantity: str, reduce: Callable[[Tensor], Any]) -> dict[str, float]:
    """One quantity of every layer over an epoch's measured iterations, by layer number; empty if there is none.

    Values that are not a number, because a signal was zero for the whole batch, are left out; NaN if all are.
    """
    found = {}
    for name, column in columns.items():
        kind, _, layer = name.partition("/")
        if kind == quantity and not (columns[f"zeros/{layer}"].isnan()).all():
            found[layer] = float(reduce(column[~column.isnan()]))
    return found


def by_layer(row: dict[str, Any], quantity: str) -> dict[str, Any]:
    """One quantity of a row of epochs.csv, by layer number."""
    return {name.removeprefix(f"{quantity}/"): x for name, x in row.items() if name.startswith(f"{quantity}/")}


def reported_accuracies(epochs: list[tuple[float | None, float]]) -> dict[str, Any]:
    """`test_accuracy` of result.json, from the validation and test accuracy of every epoch.

    The first of equally good epochs counts.
    """
    chosen = max(epochs, key=lambda pair: pair[0] if pair[0] is not None else -1.0)
    tests = [test for _, test in epochs]
    return {
        "last": tests[-1],
        "at_best_validation": chosen[1] if chosen[0] is not None else None,
        "best": max(tests),
        "best_epoch": tests.index(max(tests)) + 1,
    }
