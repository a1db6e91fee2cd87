"""How sure a number is: paired differences with Student's t, rank correlations with a bootstrap."""

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata, t

LEVEL = 0.95
FEWEST = 3
RESAMPLES = 2000


class Estimate(NamedTuple):
    """A value and the interval that covers it with probability `LEVEL`, None where there is nothing to judge it by.

    n: how many independent values it rests on.
    """

    value: float
    low: float | None
    high: float | None
    n: int

    @property
    def sign(self) -> int | None:
        """1 or -1 where the interval leaves out zero, 0 where it does not, None of fewer than `FEWEST` values.

        Accuracies are counts of images: two differences are easily equal by chance, and an interval then has no width.
        """
        if self.low is None or self.high is None or self.n < FEWEST:
            return None
        return int(self.low > 0) - int(self.high < 0)


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> Estimate | None:
    """The mean of first - second over the seeds that both have; None where they share none.

    Its interval is mean ± t · s/√n, with Student's t for n - 1 degrees of freedom: differences taken as normal.
    """
    differences = [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]
    if not differences:
        return None
    mean, n = statistics.fmean(differences), len(differences)
    if n == 1:
        return Estimate(mean, None, None, 1)
    half = float(t.ppf((1 + LEVEL) / 2, n - 1)) * statistics.stdev(differences) / n**0.5
    return Estimate(mean, mean - half, mean + half, n)


def rank_correlation(groups: Sequence[Sequence[tuple[float, float]]]) -> Estimate | None:
    """Spearman's ρ over the points of all groups; None where it is not defined.

    Its interval is the bootstrap's percentiles over whole groups: runs of one method are no independent points. n: how
    many groups.
    """
    value = spearman([point for group in groups for point in group])
    if value is None:
        return None
    random = np.random.default_rng(0)
    drawn = (random.integers(len(groups), size=len(groups)) for _ in range(RESAMPLES))
    found = [spearman([point for index in indices for point in groups[index]]) for indices in drawn]
    present = [one for one in found if one is not None]
    low, high = np.quantile(present, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high), len(groups))


def spearman(points: Sequence[tuple[float, float]]) -> float | None:
    """The correlation of the ranks of x with those of y, ties at their mean rank."""
    ranks = np.array([rankdata(values) for values in zip(*points, strict=True)])
    if len(points) < 3 or (np.ptp(ranks, axis=1) == 0).any():
        return None
    return float(np.corrcoef(ranks)[0, 1])
