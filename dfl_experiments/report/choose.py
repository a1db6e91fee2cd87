"""Which grid point of a cell is shown, and what its runs amount to."""

from collections import Counter
from collections.abc import Iterable

import pandas as pd

from dfl_experiments.report.frame import CELL, ENDED, PER_LAYER, distinct, layer_names

POINT_IN_CELL = ["lr", "weight_decay"]
TIE = 1e-9  # scores nearer than this are equal


def choose(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs of the grid point that each cell shows, one for each seed; cells without an accuracy have none.

    Two points are compared over the seeds that both have: the higher mean score wins, and of a tie the lower validation
    loss. The point that wins most comparisons is shown. Points with a run that fails come after all others. `score` is
    the validation accuracy, or the test accuracy where nothing is held out.
    """
    parts = [runs.iloc[:0]]
    for _, cell in distinct(runs).groupby(CELL, sort=False):
        best = best_point(cell)
        if best is not None:
            lr, weight_decay = best
            parts.append(cell[(cell.lr == lr) & (cell.weight_decay == weight_decay)])
    return pd.concat(parts)


def best_point(cell: pd.DataFrame) -> tuple[float, float] | None:
    """Return (lr, weight_decay) of the grid point that a cell shows; None where no run has an accuracy."""
    ended = cell[cell.status.isin(ENDED)]
    if ended.empty:
        return None
    scores = ended.pivot(index="seed", columns=POINT_IN_CELL, values="score")
    losses = ended.pivot(index="seed", columns=POINT_IN_CELL, values="validation_loss")
    fails = cell.groupby(POINT_IN_CELL).fails.any()
    candidates = [point for point in scores if not fails[point]]
    candidates = candidates or list(scores)
    order = {}
    for point in candidates:
        wins = 0
        for other in candidates:
            pair = [point, other]
            wins += other != point and beats(scores[pair], losses[pair])
        order[point] = (wins, scores[point].mean())
    return max(candidates, key=lambda point: order[point])


def beats(scores: pd.DataFrame, losses: pd.DataFrame) -> bool:
    """Return whether the first of two points wins over the seeds that both have. (seeds, 2) each."""
    both = scores.dropna().index
    mine, other = scores.loc[both].mean()
    if abs(mine - other) > TIE:
        return bool(mine > other)
    my_loss, other_loss = losses.loc[both].mean(skipna=False)
    return bool(my_loss < other_loss)


def counted(chosen: pd.DataFrame) -> pd.DataFrame:
    """Return the runs that a cell's numbers are of: those with an accuracy that did not fail, or all where all did."""
    ended = chosen[chosen.status.isin(ENDED)]
    is_alive = ~ended.fails
    has_alive = is_alive.groupby([ended[key] for key in CELL]).transform("any")
    return ended[is_alive | ~has_alive]


def cells(runs: pd.DataFrame, chosen: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each cell: the means of the runs at its chosen grid point, and how its runs ended.

    chosen: what `choose` returns for the runs.

    Columns beside `CELL`, `rule`, `lr` and `weight_decay`: `n` seeds that the numbers are of; `accuracy`, `sd`,
    `score`, `at_best_validation`, `hours` and the values of every layer, means over them; `failing` of `ended` runs at
    this point; `points` with an accuracy; `states` of all runs; `unstable`, the first instability; `mixed` versions
    and devices. A cell that has no accuracy yet has n = 0.
    """
    shown = counted(chosen)
    of_layers = [name for quantity in PER_LAYER for name in layer_names(runs, quantity)]
    rows = []
    for key, cell in distinct(runs).groupby(CELL, sort=False):
        at_point = chosen[chosen.index.isin(cell.index)]
        mine = shown[shown.index.isin(cell.index)]
        ended = at_point[at_point.status.isin(ENDED)]
        unstable = at_point.unstable[at_point.unstable != ""]
        row = dict(zip(CELL, key, strict=True))
        row |= {
            "rule": cell.rule.iloc[0],
            "lr": mine.lr.max(),
            "weight_decay": mine.weight_decay.max(),
            "n": len(mine),
            "accuracy": mine.accuracy.mean(),
            "sd": mine.accuracy.std(),
            "score": mine.score.mean(),
            "at_best_validation": mine.at_best_validation.mean(skipna=False),
            "hours": mine.seconds.mean() / 3600,
            "ended": len(ended),
            "failing": int(ended.fails.sum()),
            "points": cell[cell.status.isin(ENDED)].groupby(POINT_IN_CELL).ngroups,
            "states": states(cell.status),
            "unstable": next(iter(unstable), ""),
            "unstable_runs": len(unstable),
            "devices": ", ".join(sorted(set(mine.device.astype(str)))),
            "mixed": mixed(mine),
        }
        row |= mine[of_layers].mean(skipna=False).to_dict()
        rows.append(row)
    return pd.DataFrame(rows)


def states(statuses: Iterable[str]) -> str:
    """Return how runs stand: "3 finished, 1 failed"."""
    return ", ".join(f"{count} {status}" for status, count in Counter(statuses).most_common())


def mixed(runs: pd.DataFrame) -> str:
    """Return the commits, versions of PyTorch and devices that some of the runs were made with and others not."""
    origins = [{*row.versions, f"device {row.device}"} for row in runs.itertuples()]
    everywhere = set.intersection(*origins) if origins else set()
    return "; ".join(sorted(set().union(*origins) - everywhere))
