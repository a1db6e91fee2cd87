"""Choose the grid point at which each method is shown, and average its runs."""

from collections import Counter
from collections.abc import Iterable, Sequence

import pandas as pd

from dfl_experiments.report.frame import CELL, distinct, layer_names
from dfl_experiments.report.run_record import ENDED, PER_LAYER

POINT_IN_CELL = ["lr", "weight_decay"]
TIE = 1e-9  # scores that differ by less than this count as equal


def choose(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs at the best grid point of each cell, one run for each seed.

    Every pair of grid points is compared over the seeds that both points have. The point with the higher mean score
    wins. If the scores are equal, the point with the lower validation loss wins. The best point has the most wins.

    The score is the validation accuracy. If there is no validation set, the score is the test accuracy. A point with a
    failing run is left out. If every point has a failing run, all points are compared. The result has no runs of a cell
    without an accuracy.
    """
    runs = distinct(runs)
    needed = runs[[*CELL, *POINT_IN_CELL, "seed", "status", "fails", "score", "validation_loss"]]
    chosen: list[int] = []
    for _, cell in needed.groupby(CELL, sort=False):
        point = best_point(cell)
        if point is not None:
            lr, weight_decay = point
            is_chosen = (cell.lr == lr) & (cell.weight_decay == weight_decay)
            chosen += cell.index[is_chosen].tolist()
    return runs.loc[chosen]


def best_point(cell: pd.DataFrame) -> tuple[float, float] | None:
    """Return (lr, weight_decay) of the best grid point of a cell; None if no run has an accuracy."""
    ended = cell[cell.status.isin(ENDED)]
    points = points_of(ended)
    failing = points_of(cell[cell.fails])
    candidates = sorted(points - failing) or sorted(points)
    if len(candidates) < 2:
        return candidates[0] if candidates else None
    scores = ended.pivot(index="seed", columns=POINT_IN_CELL, values="score")
    losses = ended.pivot(index="seed", columns=POINT_IN_CELL, values="validation_loss")
    order = {}
    for point in candidates:
        wins = 0
        for other in candidates:
            pair = [point, other]
            wins += other != point and beats(scores[pair], losses[pair])
        order[point] = (wins, scores[point].mean())
    return max(candidates, key=lambda point: order[point])


def points_of(runs: pd.DataFrame) -> set[tuple[float, float]]:
    """Return the grid points of the runs."""
    return set(zip(runs.lr, runs.weight_decay, strict=True))


def beats(scores: pd.DataFrame, losses: pd.DataFrame) -> bool:
    """Return whether the first of two grid points wins against the second.

    Only seeds with a run at both points count.

    scores, losses: one row for each seed, one column for each of the two points.
    """
    both = scores.dropna().index
    mine, other = scores.loc[both].mean()
    if abs(mine - other) > TIE:
        return bool(mine > other)
    my_loss, other_loss = losses.loc[both].mean(skipna=False)
    return bool(my_loss < other_loss)


def counted(chosen: pd.DataFrame, keys: Sequence[str] = CELL) -> pd.DataFrame:
    """Return the runs that are averaged: all ended runs that do not fail.

    If all ended runs with the same values of `keys` fail, all of them are averaged.
    """
    ended = chosen[chosen.status.isin(ENDED)]
    is_good = ~ended.fails
    has_good = is_good.groupby([ended[key] for key in keys]).transform("any")
    return ended[is_good | ~has_good]


def cells(runs: pd.DataFrame, chosen: pd.DataFrame) -> pd.DataFrame:
    """Return a table with one row for each cell, computed from the runs at its chosen grid point.

    chosen: what `choose` returns for the runs.

    Columns:
        `CELL`, `rule`, `is_default`, `lr`, `weight_decay`: the cell, its rule and its chosen grid point.
        `lr_at_end`: whether the chosen learning rate is at an end of the grid, see `end_of_grid`.
        `test_images`: number of test images.
        `n`: number of averaged runs; 0 if the cell has no accuracy yet.
        `accuracy`, `score`, `hours`, `cosine/1`, `dead/1`, …: means over the averaged runs.
        `sd`: standard deviation of the accuracy.
        `ended`: number of ended runs.
        `failing`: number of ended runs that fail.
        `states`: number of runs of each status, counted over all grid points.
        `unstable`: first instability, as text.
        `unstable_runs`: number of unstable runs.
        `devices`: devices of the averaged runs.
    """
    every = distinct(runs).groupby(CELL, sort=False)
    averaged = counted(chosen).groupby(CELL, sort=False)
    ended = chosen[chosen.status.isin(ENDED)].groupby(CELL, sort=False)
    unstable = chosen[chosen.unstable != ""].groupby(CELL, sort=False).unstable

    frame = every.agg(rule=("rule", "first"), is_default=("is_default", "first"))
    frame["lr"] = averaged.lr.first()
    frame["lr_at_end"] = end_of_grid(frame.lr.mask(averaged.fails.all()), runs)
    frame["weight_decay"] = averaged.weight_decay.first()
    frame["n"] = averaged.size()
    frame["accuracy"] = averaged.accuracy.mean()
    frame["sd"] = averaged.accuracy.std()
    frame["score"] = averaged.score.mean()
    frame["test_images"] = averaged.test_images.first()
    frame["hours"] = averaged.seconds.mean() / 3600
    frame["ended"] = ended.size()
    frame["failing"] = ended.fails.sum()
    frame["states"] = every.status.agg(states)
    frame["unstable"] = unstable.first()
    frame["unstable_runs"] = unstable.size()
    frame["devices"] = averaged.device.agg(joined)

    counts = ["n", "ended", "failing", "unstable_runs"]
    frame[counts] = frame[counts].fillna(0).astype(int)
    texts = ["unstable", "devices"]
    frame[texts] = frame[texts].fillna("")
    of_layers = [name for quantity in PER_LAYER for name in layer_names(runs, quantity)]
    return frame.join(averaged[of_layers].mean(skipna=False)).reset_index()


def end_of_grid(chosen_rates: pd.Series, runs: pd.DataFrame) -> pd.Series:
    """Return for each cell "lowest" or "highest" if its chosen learning rate is at this end of the grid, else "".

    The grid of a cell consists of the learning rates of all its runs that ended, also of those that fail. The text is
    empty if the grid has a single rate.

    chosen_rates: the chosen learning rate of each cell; NaN if all of its runs fail. The index consists of the columns
        `CELL`.
    """
    tried = runs[runs.status.isin(ENDED) | runs.fails].groupby(CELL).lr
    lowest = tried.min().reindex(chosen_rates.index)
    highest = tried.max().reindex(chosen_rates.index)
    ends = pd.Series("", index=chosen_rates.index)
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
