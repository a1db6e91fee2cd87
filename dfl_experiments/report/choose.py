"""Choose the grid point at which each method is shown, and average its runs."""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import permutations

import pandas as pd
from pandas import DataFrame, Series

from dfl_experiments.report.frame import CELL, POINT, distinct, layer_names
from dfl_experiments.report.run_record import ENDED, PER_LAYER

POINT_IN_CELL = ["lr", "weight_decay"]
TIE = 1e-9  # scores that differ by less than this count as equal


def choose(runs: DataFrame) -> DataFrame:
    """Return the runs at the best grid point of each cell, one run for each seed.

    Every pair of grid points is compared over the seeds that both points have. The point with the higher mean score
    wins or, if the scores are equal, with the lower validation loss. The best point has the most wins. A point with a
    failing run is used only if every point has one. The score is the validation accuracy, or the test accuracy if there
    is no validation set.
    """
    runs = distinct(runs)
    needed = runs[[*CELL, *POINT_IN_CELL, "seed", "status", "fails", "score", "validation_loss"]]
    chosen: list[int] = []
    for _, cell in needed.groupby(CELL, sort=False):
        point = best_point(cell)
        if point is not None:
            chosen += cell.groupby(POINT_IN_CELL).groups[point].tolist()
    return runs.loc[chosen]


def best_point(cell: DataFrame) -> tuple[float, float] | None:
    """Return (lr, weight_decay) of the best grid point of a cell; None if no run has an accuracy."""
    ended = cell[cell.status.isin(ENDED)]
    if ended.empty:
        return None
    fails = cell.groupby(POINT_IN_CELL).fails.any()
    points = fails[fails.index.isin(ended.set_index(POINT_IN_CELL).index)]
    candidates = list(points.index[~points]) or list(points.index)
    table = ended.pivot(index="seed", columns=POINT_IN_CELL, values=["score", "validation_loss"])
    wins = dict.fromkeys(candidates, 0)
    for point, other in permutations(candidates, 2):
        wins[point] += beats(table, point, other)
    means = table["score"].mean()
    return max(candidates, key=lambda point: (wins[point], means[point]))


def beats(table: DataFrame, point: tuple[float, float], other: tuple[float, float]) -> bool:
    """Return whether a grid point wins against another one. Only seeds with a run at both points count.

    table: score and validation loss (columns) of each seed (row) at each grid point.
    """
    scores = table["score"][[point, other]].dropna()
    lead = (scores[point] - scores[other]).mean()
    if abs(lead) > TIE:
        return bool(lead > 0)
    losses = table["validation_loss"].loc[scores.index]
    excess = losses[point] - losses[other]
    return bool(excess.mean(skipna=False) < 0)


def counted(runs: DataFrame, keys: Sequence[str] = POINT) -> DataFrame:
    """Return the runs that are averaged: those that do not fail or, if all with the same values of `keys` fail, all."""
    ended = runs[runs.status.isin(ENDED)]
    all_fail = ended.groupby(list(keys)).fails.transform("all")
    return ended[~ended.fails | all_fail]


def grid_points(runs: DataFrame, chosen: DataFrame) -> DataFrame:
    """Return a table with one row for each grid point of each cell.

    A cell without a chosen point has one more row, with the states of all its runs. It counts as chosen.

    chosen: what `choose` returns for the runs.

    Columns:
        `POINT`, `rule`, `is_default`: the grid point, the rule, and whether the settings are the defaults.
        `states`: number of runs of each status.
        `lr_at_end`, `chosen`: see `end_of_grid`; whether this is the best point of its cell.
        `n`, `devices`: number of averaged runs (0: no accuracy yet), and their devices.
        `accuracy`, `sd`, `score`, `hours`, `cosine/1`, `dead/1`, …: means over the averaged runs; standard deviation.
        `ended`, `failing`, `unstable_runs`: number of ended runs, and how many of them fail or are unstable.
        `unstable`: first instability, as text.
    """
    runs = distinct(runs)
    identity = {
        "rule": ("rule", "first"),
        "is_default": ("is_default", "first"),
        "states": ("status", states),
    }
    frame = runs.groupby(POINT, sort=False).agg(
        **identity, lr=("lr", "first"), weight_decay=("weight_decay", "first")
    )
    averaged = counted(runs).groupby(POINT)
    ended = runs[runs.has_ended].groupby(POINT)
    unstable = runs[runs.unstable != ""].groupby(POINT)
    results = averaged.agg(
        n=("rule", "size"),
        accuracy=("accuracy", "mean"),
        sd=("accuracy", "std"),
        score=("score", "mean"),
        test_images=("test_images", "first"),
        hours=("seconds", "mean"),
        devices=("device", joined),
    )
    results["hours"] /= 3600
    frame = frame.join(results)
    frame = frame.join(ended.agg(ended=("rule", "size"), failing=("fails", "sum")))
    frame = frame.join(unstable.agg(unstable=("unstable", "first"), unstable_runs=("rule", "size")))
    of_layers = [name for quantity in PER_LAYER for name in layer_names(runs, quantity)]
    frame = frame.join(averaged[of_layers].mean(skipna=False))

    is_chosen = frame.index.isin(chosen.set_index(POINT).index)
    frame.insert(frame.columns.get_loc("n"), "chosen", is_chosen)
    frame = frame.droplevel(POINT_IN_CELL).reset_index()
    is_decided = runs.set_index(CELL).index.isin(chosen.set_index(CELL).index)
    undecided = runs[~is_decided].groupby(CELL).agg(**identity).reset_index()
    frame = pd.concat([frame, undecided.assign(chosen=True)], ignore_index=True)

    counts = ["n", "ended", "failing", "unstable_runs"]
    frame[counts] = frame[counts].fillna(0).astype(int)
    texts = ["unstable", "devices"]
    frame[texts] = frame[texts].fillna("")
    frame.insert(frame.columns.get_loc("lr") + 1, "lr_at_end", end_of_grid(frame, runs))
    return frame


def end_of_grid(points: DataFrame, runs: DataFrame) -> Series:
    """Return for each point "lowest" or "highest" if it is chosen and its learning rate is at this end of the grid.

    Return "" for other points, for a grid of one rate, and if all runs at the point fail.
    """
    tried = runs[runs.has_ended].groupby(CELL).lr
    ends = points[CELL].join(tried.agg(lowest="min", highest="max"), on=CELL)
    is_marked = points.chosen & (points.failing < points.ended) & (ends.lowest < ends.highest)
    names = Series("", points.index)
    names[is_marked & (points.lr == ends.lowest)] = "lowest"
    names[is_marked & (points.lr == ends.highest)] = "highest"
    return names


def states(statuses: Iterable[str]) -> str:
    """Return the number of runs of each status: "3 finished, 1 failed"."""
    counts = Counter(statuses).most_common()
    return ", ".join(f"{count} {status}" for status, count in counts)


def joined(names: Iterable[str]) -> str:
    """Return the names as one text, sorted and without repetition."""
    return ", ".join(sorted(set(map(str, names))))
