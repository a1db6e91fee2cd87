"""How sure a number is: paired differences with Student's t, rank correlations with a bootstrap."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata, sem, t

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

    Its interval is the paired t-test's, mean ± t · s/√n with n - 1 degrees of freedom: differences taken as normal.
    """
    differences = np.array([first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())])
    n = len(differences)
    if n < 2:
        return Estimate(float(differences[0]), None, None, 1) if n else None
    mean, half = float(differences.mean()), float(t.ppf((1 + LEVEL) / 2, n - 1) * sem(differences))
    return Estimate(mean, mean - half, mean + half, n)


def rank_correlation(points: Sequence[tuple[float, float]]) -> Estimate | None:
    """Spearman's ρ of the points, its interval the bootstrap's percentiles; None where it is not defined."""
    value = spearman(points)
    if value is None:
        return None
    random = np.random.default_rng(0)
    drawn = (random.integers(len(points), size=len(points)) for _ in range(RESAMPLES))
    found = [one for indices in drawn if (one := spearman([points[index] for index in indices])) is not None]
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high), len(points))


def spearman(points: Sequence[tuple[float, float]]) -> float | None:
    """The correlation of the ranks of x with those of y, ties at their mean rank."""
    ranks = np.array([rankdata(values) for values in zip(*points, strict=True)])
    if len(points) < 3 or (np.ptp(ranks, axis=1) == 0).any():
        return None
    return float(np.corrcoef(ranks)[0, 1])
