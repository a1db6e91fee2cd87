"""Comparisons of methods within one setting: confidence intervals, depth utility, cosines with BP."""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from dfl_experiments.report.choose import counted
from dfl_experiments.report.frame import POINT, ROW, distinct, layer_names

LEVEL = 0.95
FEWEST_DEGREES = 6  # with fewer degrees of freedom, a pooled variance gives no interval
# a method is pooled if its standard deviation is at most this multiple of the other methods'
LARGEST_RATIO = 3.0
FEWEST_SEEDS = 3  # with fewer seeds, a ratio has no interval
MOST_ZEROS = 0.5  # a layer has no cosine if its signal is zero for a larger share of samples
SPAN = ("bp", "shallow")  # the methods between which the depth utility places the others
NOISE_FLOORS = 3.0  # BP's lead over Shallow in single runs must exceed this many noise floors


class Estimate(NamedTuple):
    """A value with its confidence interval at level `LEVEL`; low and high are NaN if there is no interval."""

    value: float
    low: float = math.nan
    high: float = math.nan

    @property
    def verdict(self) -> int | None:
        """1: the interval is above zero; -1: it is below zero; 0: it contains zero; None: there is no interval."""
        if math.isnan(self.low):
            return None
        return int(self.low > 0) - int(self.high < 0)


def around(value: float, half: float) -> Estimate:
    """Return the estimate `value` with the interval from value − half to value + half."""
    return Estimate(value, value - half, value + half)


def samples_of(runs: pd.DataFrame) -> dict[str, np.ndarray]:
    """Return the accuracies of each method, one for each seed. Methods with a failing run are left out.

    runs: the runs of one setting.
    """
    samples = {}
    for method, cell in runs.groupby("method", sort=False):
        values = cell.accuracy.dropna().to_numpy()
        if len(values) and not cell.fails.any():
            samples[str(method)] = values
    return samples


def against(chosen: pd.DataFrame, control: str) -> pd.DataFrame:
    """Compare every method of each setting with a control by Dunnett's many-to-one comparison.

        difference = mean(method) − mean(control)
        interval = difference ± c s √(1/n + 1/n₀)

    The method has n runs, and the control has n₀ runs. s² is the variance pooled over the methods of the setting. c is
    Dunnett's two-sided critical value. It makes the intervals of a setting simultaneous: with probability `LEVEL`, all
    of them contain their true differences.

    An interval needs 2 runs of the method, 2 runs of the control, and 6 degrees of freedom of s². Methods with a
    failing run are left out. s² leaves out a method whose standard deviation is more than 3 × the pooled standard
    deviation of the other methods. Such a method gets Welch's t interval (`test` = "Welch").

    Args:
        chosen: runs at one grid point for each method, see `choose.choose`.
        control: a method's name, such as "bp".

    Returns:
        One row for each method. Columns: `ROW`, `method`, `difference`, `low`, `high` (fractions of 1) and `test`.

    Source: Dunnett, "A multiple comparison procedure for comparing several treatments with a control", 1955.
    """
    rows: list[tuple[Any, ...]] = []
    for key, row in chosen.groupby(ROW, sort=False):
        samples = samples_of(row)
        if control in samples:
            for method, (estimate, test) in dunnett(samples, control).items():
                rows.append((*key, method, *estimate, test))
    return pd.DataFrame(rows, columns=[*ROW, "method", "difference", "low", "high", "test"])


def dunnett(samples: Mapping[str, np.ndarray], control: str) -> dict[str, tuple[Estimate, str]]:
    """Return each method's difference from the control, and the test that gives the interval.

    The test is "Dunnett" or "Welch", or "" if there is no interval.
    """
    reference = samples[control]
    pooled = pooled_samples(samples, [control])
    variance, degrees = pooled_variance(pooled.values())
    has_intervals = control in pooled and degrees >= FEWEST_DEGREES and variance > 0
    sizes = sorted(len(values) for method, values in pooled.items() if method != control)
    critical = math.nan
    if has_intervals and sizes:
        critical = critical_value(tuple(sizes), len(reference))
    differences = {}
    for method, values in samples.items():
        if method == control:
            continue
        difference = float(values.mean() - reference.mean())
        estimate, test = Estimate(difference), ""
        if has_intervals and method in pooled:
            half = critical * standard_error(variance, values, reference)
            estimate, test = around(difference, half), "Dunnett"
        elif has_intervals and len(values) > 1:
            estimate, test = welch(values, reference), "Welch"
        differences[method] = (estimate, test)
    return differences


def pooled_samples(
    samples: Mapping[str, np.ndarray], references: Sequence[str]
) -> dict[str, np.ndarray]:
    """Return the samples from which the variance is pooled. A sample with a single value is left out.

    A method is also left out if its standard deviation exceeds 3 × the pooled standard deviation of the other methods.

    references: methods that are never left out for this reason.
    """
    repeated = {method: values for method, values in samples.items() if len(values) > 1}
    return {
        method: values
        for method, values in repeated.items()
        if method in references or not is_odd(method, repeated)
    }


def is_odd(method: str, samples: Mapping[str, np.ndarray]) -> bool:
    """Return whether a method's standard deviation exceeds 3 × the pooled standard deviation of the other methods."""
    variance, _ = pooled_variance(values for name, values in samples.items() if name != method)
    return bool(samples[method].std(ddof=1) > LARGEST_RATIO * math.sqrt(variance))


def pooled_variance(samples: Iterable[np.ndarray]) -> tuple[float, int]:
    """Return the pooled variance s² = Σ (x − mean)² / Σ (n − 1) and its degrees of freedom Σ (n − 1).

    If every sample has a single value, the variance and the degrees of freedom are 0.
    """
    squares, degrees = 0.0, 0
    for values in samples:
        squares += float(((values - values.mean()) ** 2).sum())
        degrees += len(values) - 1
    return (squares / degrees if degrees else 0.0), degrees


def standard_error(variance: float, first: np.ndarray, second: np.ndarray) -> float:
    """Return s √(1/n + 1/n₀), the standard error of the difference between the means of two samples.

    variance: s².
    """
    return math.sqrt(variance * (1 / len(first) + 1 / len(second)))


def student(degrees: float) -> float:
    """Return the two-sided critical value of Student's t at `LEVEL`."""
    return float(stats.t.ppf((1 + LEVEL) / 2, degrees))


@cache
def critical_value(sizes: tuple[int, ...], control_size: int) -> float:
    """Return Dunnett's two-sided critical value for groups and a control of these sizes.

    SciPy computes the value by quasi-Monte-Carlo integration; a fixed random state makes it repeatable.
    """
    groups = [np.arange(size, dtype=float) for size in sizes]
    reference = np.arange(control_size, dtype=float)
    generator = np.random.default_rng(0)
    interval = stats.dunnett(*groups, control=reference, rng=generator).confidence_interval(LEVEL)
    half = (interval.high[0] - interval.low[0]) / 2
    variance, _ = pooled_variance([*groups, reference])
    return float(half / standard_error(variance, groups[0], reference))


def welch(first: np.ndarray, second: np.ndarray) -> Estimate:
    """Return mean(first) − mean(second) with Welch's t interval, see `contrast`."""
    return contrast([first, second], [1.0, -1.0])


def contrast(samples: Sequence[np.ndarray], weights: Sequence[float]) -> Estimate:
    """Return Σ w_k mean(x_k) with an interval that does not assume equal variances.

    The weights are w_k. Sample x_k has n_k values with variance s_k². The standard error is √(Σ w_k² s_k²/n_k), with
    Welch–Satterthwaite degrees of freedom. There is no interval if a sample has fewer than 2 values, or if all
    variances are 0.
    """
    n = np.array([len(values) for values in samples])
    means = np.array([values.mean() for values in samples])
    value = float(means @ weights)
    if n.min() < 2:
        return Estimate(value)
    variances = np.array([values.var(ddof=1) for values in samples])
    parts = np.square(weights) * variances / n
    variance = parts.sum()
    if variance == 0:
        return Estimate(value)
    degrees = variance**2 / (parts**2 / (n - 1)).sum()
    half = student(degrees) * math.sqrt(variance)
    return around(value, half)


def depth_utility(chosen: pd.DataFrame) -> pd.DataFrame:
    """Return the depth utility of each method, for every setting that has BP and Shallow.

        utility = (accuracy − accuracy_Shallow) / (accuracy_BP − accuracy_Shallow)

    Each accuracy is that of a method at its own best learning rate. Shallow does not train the lower blocks. A method
    as accurate as Shallow has utility 0, and a method as accurate as BP has utility 1. The interval is Fieller's, with
    the variance that `against` pools over the setting. The interval needs 3 seeds, and a method that the variance does
    not leave out.

    The column `ranks` says whether BP is significantly more accurate than Shallow. If BP or Shallow has a single run,
    BP must be better by more than 3 noise floors. If `ranks` is False, the utility is NaN. Methods with a failing run
    are left out.

    Source: Fieller, "Some problems in interval estimation", 1954.
    """
    rows: list[tuple[Any, ...]] = []
    for key, row in chosen.groupby(ROW, sort=False):
        samples = samples_of(row)
        bp, shallow = samples.get("bp"), samples.get("shallow")
        if bp is None or shallow is None:
            continue
        ranks = can_rank(samples, row.test_images.max())
        pooled = pooled_samples(samples, SPAN)
        for method, values in samples.items():
            if method in SPAN:
                continue
            utility = Estimate(math.nan)
            if ranks:
                utility = fieller(values, bp, shallow, pooled.values())
            if method not in pooled:
                utility = Estimate(utility.value)
            rows.append((*key, method, *utility, ranks))
    return pd.DataFrame(rows, columns=[*ROW, "method", "utility", "low", "high", "ranks"])


def can_rank(samples: Mapping[str, np.ndarray], test_images: float) -> bool:
    """Return whether BP is significantly more accurate than Shallow. If not, accuracy cannot rank the rules."""
    bp, shallow = samples["bp"], samples["shallow"]
    variance, degrees = pooled_variance(pooled_samples(samples, SPAN).values())
    if min(len(bp), len(shallow)) < 2:
        half = NOISE_FLOORS * noise_floor(bp.mean(), test_images)
    else:
        half = student(degrees) * standard_error(variance, bp, shallow)
    return bool(bp.mean() - shallow.mean() > half)


def noise_floor(accuracy: float, test_images: float) -> float:
    """Return the standard deviation √(p(1−p)/N) of an accuracy p on N test images; 0 if N is unknown (NaN)."""
    return 0.0 if math.isnan(test_images) else math.sqrt(accuracy * (1 - accuracy) / test_images)


def fieller(
    values: np.ndarray, bp: np.ndarray, shallow: np.ndarray, all_samples: Iterable[np.ndarray]
) -> Estimate:
    """Return (mean(values) − mean(shallow)) / (mean(bp) − mean(shallow)) with Fieller's interval."""
    top = float(values.mean() - shallow.mean())
    bottom = float(bp.mean() - shallow.mean())
    ratio = top / bottom
    variance, degrees = pooled_variance(all_samples)
    fewest = min(len(values), len(bp), len(shallow))
    if fewest < FEWEST_SEEDS or variance == 0:
        return Estimate(ratio)
    t = student(degrees)
    var_top = variance * (1 / len(values) + 1 / len(shallow))
    var_bottom = variance * (1 / len(bp) + 1 / len(shallow))
    covariance = variance / len(shallow)
    g = t**2 * var_bottom / bottom**2
    if g >= 1:
        return Estimate(ratio)
    centre = ratio - g * covariance / var_bottom
    spread = var_top - 2 * ratio * covariance + ratio**2 * var_bottom
    spread -= g * (var_top - covariance**2 / var_bottom)
    half = t / abs(bottom) * math.sqrt(max(spread, 0.0))
    low = (centre - half) / (1 - g)
    high = (centre + half) / (1 - g)
    return Estimate(ratio, low, high)


def cosines(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs with meaningful cosines. Runs of BP, runs of Shallow and failing runs are left out.

    A layer's cosine becomes NaN if its signal equals BP's by construction. It also becomes NaN if the signal is zero
    for more than half of the samples at this grid point. The column `no_signal` lists the layers whose signal is zero
    that often.
    """
    kept = counted(distinct(runs))
    kept = kept[~kept.fails & ~kept.rule.isin(["bp", "shallow"])].assign(no_signal="")
    for name in layer_names(kept, "cosine"):
        layer = name.removeprefix("cosine/")
        is_exact = kept.exact_layers.map(lambda layers, layer=layer: layer in layers)
        is_silent = share_without_signal(kept, layer) > MOST_ZEROS
        kept[name] = kept[name].mask(is_exact | is_silent)
        kept["no_signal"] += np.where(is_silent, f", {layer}", "")
    kept["no_signal"] = kept.no_signal.str.removeprefix(", ")
    return kept


def share_without_signal(kept: pd.DataFrame, layer: str) -> pd.Series:
    """Return the share of samples for which a layer's signal is zero in the last epoch.

    The share is averaged over the runs at the grid point.
    """
    if f"zeros/{layer}" not in kept:
        return pd.Series(0.0, kept.index)
    images = kept.images_per_second * kept.seconds / kept.done_epochs.clip(lower=1)  # in one epoch
    batches = np.ceil(images.round() / kept.images_per_batch)
    every = kept.measured_every.clip(lower=1)
    # iterations 0, every, 2 · every, … are measured; if none of them is in the last epoch, one in an earlier epoch
    before = np.ceil((kept.done_epochs - 1).clip(lower=0) * batches / every)
    measured = (np.ceil(kept.done_epochs * batches / every) - before).clip(lower=1)
    samples = (measured * kept.images_per_batch).clip(upper=images)
    share = kept[f"zeros/{layer}"] / samples
    return share.groupby([kept[key] for key in POINT]).transform("mean")


def alignment(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the mean cosine of every layer in the last epoch, for each method at each learning rate.

    Compare methods only at the same learning rate, because the cosine depends on it. `cosines` describes which cosines
    are left out.
    """
    kept = cosines(runs)
    names = layer_names(kept, "cosine")
    points = kept.groupby(POINT, sort=False)
    means = points[names].mean()
    is_measured = kept[names].notna().any(axis="columns") | (kept.no_signal != "")
    means["n"] = is_measured.groupby([kept[key] for key in POINT], sort=False).sum()
    means["no_signal"] = points.no_signal.first()
    has_cosine = means[names].notna().any(axis="columns")
    return means[has_cosine | (means.no_signal != "")].reset_index()
