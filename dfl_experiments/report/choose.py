"""Choose the grid point at which each method is shown, and average its runs."""

from collections import Counter
from collections.abc import Iterable, Sequence

from pandas import DataFrame, Series

from dfl_experiments.report.frame import CELL, distinct, layer_names
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
    fails = cell.groupby(POINT_IN_CELL).fails.any()
    points = fails[fails.index.isin(ended.set_index(POINT_IN_CELL).index)]
    candidates = list(points.index[~points]) or list(points.index)
    table = ended.pivot(index="seed", columns=POINT_IN_CELL, values=["score", "validation_loss"])

    def rank(point: tuple[float, float]) -> tuple[int, float]:
        wins = sum(beats(table, point, other) for other in candidates if other != point)
        return wins, table["score"][point].mean()

    return max(candidates, key=rank, default=None)


def beats(table: DataFrame, point: tuple[float, float], other: tuple[float, float]) -> bool:
    """Return whether a grid point wins against another one. Only seeds with a run at both points count.

    table: score and validation loss (columns) of each seed (row) at each grid point.
    """
    scores = table["score"][[point, other]].dropna()
    lead = scores[point].mean() - scores[other].mean()
    if abs(lead) > TIE:
        return bool(lead > 0)
    losses = table["validation_loss"].loc[scores.index]
    return bool(losses[point].mean(skipna=False) < losses[other].mean(skipna=False))


def counted(chosen: DataFrame, keys: Sequence[str] = CELL) -> DataFrame:
    """Return the runs that are averaged: those that do not fail or, if all with the same values of `keys` fail, all."""
    ended = chosen[chosen.status.isin(ENDED)]
    all_fail = ended.groupby(list(keys)).fails.transform("all")
    return ended[~ended.fails | all_fail]


def cells(runs: DataFrame, chosen: DataFrame) -> DataFrame:
    """Return a table with one row for each cell, computed from the runs at its chosen grid point.

    chosen: what `choose` returns for the runs.

    Columns: those of `means`, and
        `lr`, `weight_decay`: the chosen grid point.
        `lr_at_end`: whether the chosen learning rate is at an end of the grid, see `end_of_grid`.
    """
    frame = means(runs, chosen, CELL)
    averaged = counted(chosen).groupby(CELL, sort=False)
    rates = averaged.lr.first().reindex(frame.index)
    at_end = end_of_grid(rates.mask(averaged.fails.all()), runs)
    place = frame.columns.get_loc("n")
    frame.insert(place, "lr", rates)
    frame.insert(place + 1, "lr_at_end", at_end)
    frame.insert(place + 2, "weight_decay", averaged.weight_decay.first())
    return frame.reset_index()


def means(runs: DataFrame, shown: DataFrame, keys: Sequence[str]) -> DataFrame:
    """Return a table with one row for each combination of values of `keys`, which are its index.

    shown: those of the runs from which the results are computed.

    Columns:
        `rule`, `is_default`: the rule, and whether the settings are the defaults.
        `n`, `devices`: number of averaged runs (0: no accuracy yet), and their devices.
        `accuracy`, `sd`, `score`, `hours`, `cosine/1`, `dead/1`, …: means over the averaged runs; standard deviation.
        `ended`, `failing`, `unstable_runs`: number of ended runs, and how many of them fail or are unstable.
        `states`: number of runs of each status, counted over all of `runs`.
        `unstable`: first instability, as text.
    """
    keys = list(keys)
    every = distinct(runs).groupby(keys, sort=False)
    averaged = counted(shown, keys).groupby(keys, sort=False)
    ended = shown[shown.status.isin(ENDED)].groupby(keys, sort=False)
    unstable = shown[shown.unstable != ""].groupby(keys, sort=False)

    frame = every.agg(
        rule=("rule", "first"), is_default=("is_default", "first"), states=("status", states)
    )
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
    stability = unstable.agg(unstable=("unstable", "first"), unstable_runs=("rule", "size"))
    frame = frame.join(results)
    frame = frame.join(ended.agg(ended=("rule", "size"), failing=("fails", "sum")))
    frame = frame.join(stability)

    counts = ["n", "ended", "failing", "unstable_runs"]
    frame[counts] = frame[counts].fillna(0).astype(int)
    texts = ["unstable", "devices"]
    frame[texts] = frame[texts].fillna("")
    of_layers = [name for quantity in PER_LAYER for name in layer_names(runs, quantity)]
    return frame.join(averaged[of_layers].mean(skipna=False))


def end_of_grid(chosen_rates: Series, runs: DataFrame) -> Series:
    """Return for each cell "lowest" or "highest" if its chosen learning rate is at this end of its grid, else "".

    chosen_rates: the chosen learning rate of each cell; NaN if all of its runs fail.
    """
    tried = runs[runs.has_ended].groupby(CELL).lr
    lowest = tried.min().reindex(chosen_rates.index)
    highest = tried.max().reindex(chosen_rates.index)
    ends = Series("", index=chosen_rates.index)
    ends[chosen_rates == lowest] = "lowest"
    ends[chosen_rates == highest] = "highest"
    ends[lowest == highest] = ""
    return ends


def states(statuses: Iterable[str]) -> str:
    """Return the number of runs of each status: "3 finished, 1 failed"."""
    return ", ".join(f"{count} {status}" for status, count in Counter(statuses).most_common())


def joined(names: Iterable[str]) -> str:
    """Return the names as one text, sorted and without repetition."""
    return ", ".join(sorted(set(map(str, names))))
