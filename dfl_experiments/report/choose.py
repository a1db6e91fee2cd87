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
    wins. If the scores are equal, the point with the lower validation loss wins. The best point has the most wins. A
    point with a failing run is used only if every point has one. A point at which all runs fail is used only if all
    runs of the cell fail. The score is the validation accuracy, or the test accuracy if there is no validation set.
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
    has_accuracy = set(ended.set_index(POINT_IN_CELL).index)
    has_failing = set(cell[cell.fails].set_index(POINT_IN_CELL).index)
    has_good = set(ended[~ended.fails].set_index(POINT_IN_CELL).index)
    candidates = has_accuracy - has_failing or has_good or has_accuracy
    table = ended.pivot(index="seed", columns=POINT_IN_CELL, values=["score", "validation_loss"])
    means = table["score"].mean()
    wins = dict.fromkeys(sorted(candidates), 0)
    for point, other in permutations(wins, 2):
        wins[point] += beats(table, point, other)
    return max(wins, key=lambda point: (wins[point], means[point]))


def beats(table: DataFrame, point: tuple[float, float], other: tuple[float, float]) -> bool:
    """Return whether a grid point wins against another one. Only seeds with a run at both points count.

    table: score and validation loss (columns) of each seed (row) at each grid point.
    """
    scores = table["score"][[point, other]].dropna()
    leads = scores[point] - scores[other]
    lead = leads.mean()
    if abs(lead) > TIE:
        return bool(lead > 0)
    losses = table["validation_loss"].loc[scores.index]
    excesses = losses[point] - losses[other]
    excess = excesses.mean(skipna=False)
    return bool(excess < 0)


def counted(runs: DataFrame, keys: Sequence[str] = POINT) -> DataFrame:
    """Return the runs to average. Failing runs are left out, unless all runs with the same values of `keys` fail."""
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
    ended_runs = runs[runs.has_ended]
    ended = ended_runs.groupby(POINT)
    unstable = ended_runs[ended_runs.unstable != ""].groupby(POINT)
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
    for quantity in PER_LAYER:
        names = layer_names(runs, quantity)
        frame = frame.join(averaged[names].mean(skipna=False))

    chosen_points = chosen.set_index(POINT).index
    is_chosen = frame.index.isin(chosen_points)
    before_n = frame.columns.get_loc("n")
    frame.insert(before_n, "chosen", is_chosen)
    frame = frame.droplevel(POINT_IN_CELL).reset_index()
    decided_cells = chosen.set_index(CELL).index
    is_decided = runs.set_index(CELL).index.isin(decided_cells)
    undecided = runs[~is_decided].groupby(CELL).agg(**identity)
    undecided["chosen"] = True
    frame = pd.concat([frame, undecided.reset_index()], ignore_index=True)

    counts = ["n", "ended", "failing", "unstable_runs"]
    frame[counts] = frame[counts].fillna(0).astype(int)
    texts = ["unstable", "devices"]
    frame[texts] = frame[texts].fillna("")
    after_lr = frame.columns.get_loc("lr") + 1
    frame.insert(after_lr, "lr_at_end", end_of_grid(frame, runs))
    return frame


def end_of_grid(points: DataFrame, runs: DataFrame) -> Series:
    """Return for each point "lowest" or "highest" if it is chosen and its learning rate is at this end of the grid.

    Return "" for other points, for a grid of one rate, and if all runs at the point fail.
    """
    tried = runs[runs.has_ended].groupby(CELL).lr
    ends = tried.agg(lowest="min", highest="max")
    ends = points[CELL].join(ends, on=CELL)
    has_good_run = points.failing < points.ended
    has_several_rates = ends.lowest < ends.highest
    is_marked = points.chosen & has_good_run & has_several_rates
    is_lowest = points.lr == ends.lowest
    is_highest = points.lr == ends.highest
    names = Series("", points.index)
    names[is_marked & is_lowest] = "lowest"
    names[is_marked & is_highest] = "highest"
    return names


def states(statuses: Iterable[str]) -> str:
    """Return the number of runs of each status: "3 finished, 1 failed"."""
    counts = Counter(statuses).most_common()
    return ", ".join(f"{count} {status}" for status, count in counts)


def joined(names: Iterable[str]) -> str:
    """Return the names as one text, sorted and without repetition."""
    texts = {str(name) for name in names}
    return ", ".join(sorted(texts))
