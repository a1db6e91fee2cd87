"""Comparisons of methods within one setting: confidence intervals, depth utility, cosines with BP."""

import math
from collections.abc import Collection, Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from pandas import DataFrame, Series
from scipy import stats

from dfl_experiments.report.choose import counted
from dfl_experiments.report.frame import POINT, ROW, distinct, layer_names

LEVEL = 0.95
FEWEST_DEGREES = 6  # with fewer degrees of freedom, a pooled variance gives no interval
LEAST_VARIANCE = 1e-18  # a variance below it comes from rounding: all seeds have the same accuracy
LARGEST_RATIO = 3.0  # of a method's standard deviation to the other methods', see `pooled`
FEWEST_SEEDS = 3  # with fewer seeds, a ratio has no interval
MOST_ZEROS = 0.5  # a layer has no cosine if its signal is zero for a larger share of samples
SPAN = ("bp", "shallow")  # the methods between which the depth utility places the others
NOISE_FLOORS = 3.0  # BP's lead over Shallow in single runs must exceed this many noise floors


Samples = Mapping[str, np.ndarray]  # accuracies of each method, one for each seed


class Estimate(NamedTuple):
    """A value with its confidence interval at level `LEVEL`; low and high are NaN if there is no interval."""

    value: float
    low: float = math.nan
    high: float = math.nan


def around(value: float, half: float) -> Estimate:
    """Return the estimate `value` with the interval from value − half to value + half."""
    return Estimate(value, value - half, value + half)


def samples_of(runs: DataFrame) -> dict[str, np.ndarray]:
    """Return the accuracies of each method, one for each seed. Methods with a failing run are left out.

    runs: the runs of one setting.
    """
    has_failing = runs.fails.groupby(runs.method).transform("any")
    good = runs[~has_failing].dropna(subset="accuracy")
    samples = {}
    for method, accuracies in good.groupby("method", sort=False).accuracy:
        samples[str(method)] = accuracies.to_numpy()
    return samples


def against(chosen: DataFrame, control: str) -> DataFrame:
    """Compare every method of each setting with a control by Dunnett's many-to-one comparison.

        difference = mean(method) − mean(control)
        interval = difference ± c s √(1/n + 1/n₀)

    The method has n runs, and the control has n₀ runs. s² is the variance pooled over the methods of the setting. c is
    Dunnett's two-sided critical value. It makes the intervals of a setting simultaneous: with probability `LEVEL`, all
    of them contain their true differences.

    An interval needs 2 runs of the method, 2 runs of the control, and 6 degrees of freedom of s². Methods with a
    failing run are left out. A method that s² leaves out (see `pooled`) gets Welch's t interval (`test` = "Welch"). If
    s² leaves out the control, all methods get it. Welch's intervals are not simultaneous.

    Args:
        chosen: runs at one grid point for each method, see `choose.choose`.
        control: a method's name, such as "bp".

    Returns:
        One row for each method; no row in settings without the control. Columns: `ROW`, `method`, `difference`, `low`,
        `high` (fractions of 1) and `test`.

    Source: Dunnett, "A multiple comparison procedure for comparing several treatments with a control", 1955.
    """
    rows: list[tuple[Any, ...]] = []
    for setting, runs in chosen.groupby(ROW, sort=False):
        differences = dunnett(samples_of(runs), control)
        for method, (estimate, test) in differences.items():
            rows.append((*setting, method, *estimate, test))
    names = [*ROW, "method", "difference", "low", "high", "test"]
    return DataFrame(rows, columns=names)


def dunnett(samples: Samples, control: str) -> dict[str, tuple[Estimate, str]]:
    """Return each method's difference from the control, and the test: "Dunnett", "Welch" or "" (no interval)."""
    if control not in samples:
        return {}
    reference = samples[control]
    pool = pooled(samples)
    is_enough = pool.degrees >= FEWEST_DEGREES and pool.variance > LEAST_VARIANCE
    has_intervals = is_enough and len(reference) > 1
    others = {method: values for method, values in samples.items() if method != control}
    pooled_sizes = [len(values) for method, values in others.items() if method in pool.methods]
    sizes = tuple(sorted(pooled_sizes))
    differences = {}
    for method, values in others.items():
        difference = values.mean() - reference.mean()
        estimate = Estimate(difference)
        test = ""
        if has_intervals and {method, control} <= set(pool.methods):
            test = "Dunnett"
            variance = pool.of_difference(len(values), len(reference))
            factor = critical_value(sizes, len(reference))
            estimate = around(difference, factor * math.sqrt(variance))
        elif has_intervals and len(values) > 1:
            test = "Welch"
            result = stats.ttest_ind(values, reference, equal_var=False)
            low, high = result.confidence_interval(LEVEL)
            estimate = Estimate(difference, low, high)
        differences[method] = (estimate, test)
    return differences


class Pool(NamedTuple):
    """A variance s² that is pooled over several methods."""

    methods: Collection[str]
    variance: float
    degrees: int
    """Degrees of freedom."""

    def of_difference(self, first: int, second: int) -> float:
        """Return s² (1/n + 1/n₀), the variance of the difference between means of n and n₀ values."""
        return self.variance * (1 / first + 1 / second)


def pooled(samples: Samples) -> Pool:
    """Return the pooled variance of the methods with more than one value.

    A method is left out if its standard deviation exceeds 3 × the pooled standard deviation of the other methods.
    """
    repeated = {method: values for method, values in samples.items() if len(values) > 1}
    kept = {}
    for method, values in repeated.items():
        others = [repeated[other] for other in repeated if other != method]
        variance, _ = pooled_variance(others)
        largest = LARGEST_RATIO * math.sqrt(variance)
        if values.std(ddof=1) <= largest:
            kept[method] = values
    variance, degrees = pooled_variance(kept.values())
    return Pool(kept, variance, degrees)


def pooled_variance(samples: Collection[np.ndarray]) -> tuple[float, int]:
    """Return the pooled variance s² = Σ (x − mean)² / Σ (n − 1), and its degrees of freedom Σ (n − 1)."""
    squares = 0.0
    degrees = 0
    for values in samples:
        squares += values.var() * len(values)
        degrees += len(values) - 1
    return squares / max(degrees, 1), degrees


def student(degrees: float) -> float:
    """Return the two-sided critical value of Student's t at `LEVEL`."""
    return float(stats.t.ppf((1 + LEVEL) / 2, degrees))


@cache
def critical_value(sizes: tuple[int, ...], control_size: int) -> float:
    """Return Dunnett's two-sided critical value for groups and a control of these sizes.

    For one group it is Student's. Otherwise SciPy computes it by quasi-Monte-Carlo integration; a fixed random state
    makes it repeatable.
    """
    if len(sizes) == 1:
        return student(sizes[0] + control_size - 2)
    groups = [np.arange(size, dtype=float) for size in sizes]
    control = np.arange(control_size, dtype=float)
    generator = np.random.default_rng(0)
    result = stats.dunnett(*groups, control=control, rng=generator)
    interval = result.confidence_interval(LEVEL)
    half = (interval.high[0] - interval.low[0]) / 2
    variance, degrees = pooled_variance([*groups, control])
    pool = Pool((), variance, degrees)
    standard_error = math.sqrt(pool.of_difference(sizes[0], control_size))
    return float(half / standard_error)


def depth_utility(chosen: DataFrame) -> DataFrame:
    """Return the depth utility of each method, for every setting that has BP and Shallow.

        utility = (accuracy − accuracy_Shallow) / (accuracy_BP − accuracy_Shallow)

    Each accuracy is that of a method at its own best learning rate. The interval is Fieller's, with the variance that
    `against` pools over the setting. It needs 3 seeds. The variance must not leave out the method, BP or Shallow.

    The column `ranks` says whether BP is significantly more accurate than Shallow. If not, the utility is NaN. Methods
    with a failing run are left out.

    Source: Fieller, "Some problems in interval estimation", 1954.
    """
    rows: list[tuple[Any, ...]] = []
    for setting, runs in chosen.groupby(ROW, sort=False):
        samples = samples_of(runs)
        if not samples.keys() >= set(SPAN):
            continue
        pool = pooled(samples)
        ranks = can_rank(samples, runs.test_images.max())
        bp = samples.pop("bp")
        shallow = samples.pop("shallow")
        for method, values in samples.items():
            utility = Estimate(math.nan)
            if ranks:
                utility = fieller(values, bp, shallow, pool)
            if not {method, *SPAN} <= set(pool.methods):
                utility = Estimate(utility.value)
            rows.append((*setting, method, *utility, ranks))
    names = [*ROW, "method", "utility", "low", "high", "ranks"]
    return DataFrame(rows, columns=names)


def can_rank(samples: Samples, test_images: float) -> bool:
    """Return whether BP is significantly more accurate than Shallow. If not, accuracy cannot rank the rules.

    If BP or Shallow has a single run, BP must lead by more than 3 noise floors. If the pooled variance leaves out one
    of the two, the test is Welch's t.
    """
    bp = samples["bp"]
    shallow = samples["shallow"]
    lead = bp.mean() - shallow.mean()
    if min(len(bp), len(shallow)) < 2:
        floor = noise_floor(bp.mean(), test_images)
        return bool(lead > NOISE_FLOORS * floor > 0)
    pool = pooled(samples)
    if not set(SPAN) <= set(pool.methods):
        test = stats.ttest_ind(bp, shallow, equal_var=False)
        return bool(test.confidence_interval(LEVEL).low > 0)
    variance = pool.of_difference(len(bp), len(shallow))
    standard_error = math.sqrt(variance)
    half = student(pool.degrees) * standard_error
    return bool(lead > half)


def noise_floor(accuracy: Any, test_images: Any) -> Any:
    """Return the standard deviation √(p(1−p)/N) of accuracies p on N test images; 0 if N is unknown (NaN)."""
    return np.nan_to_num(np.sqrt(accuracy * (1 - accuracy) / test_images))


def fieller(values: np.ndarray, bp: np.ndarray, shallow: np.ndarray, pool: Pool) -> Estimate:
    """Return (mean(values) − mean(shallow)) / (mean(bp) − mean(shallow)) with Fieller's interval."""
    lowest = shallow.mean()
    bottom = bp.mean() - lowest
    ratio = (values.mean() - lowest) / bottom
    fewest = min(len(values), len(bp), len(shallow))
    if fewest < FEWEST_SEEDS or pool.variance < LEAST_VARIANCE:
        return Estimate(ratio)
    t = student(pool.degrees)
    var_top = pool.of_difference(len(values), len(shallow))
    var_bottom = pool.of_difference(len(bp), len(shallow))
    covariance = pool.variance / len(shallow)
    g = t**2 * var_bottom / bottom**2
    if g >= 1:
        return Estimate(ratio)
    centre = ratio - g * covariance / var_bottom
    spread = var_top - 2 * ratio * covariance + ratio**2 * var_bottom
    var_rest = var_top - covariance**2 / var_bottom
    spread -= g * var_rest
    spread = max(spread, 0.0)  # rounding can make it negative
    half = t * math.sqrt(spread) / abs(bottom)
    low = (centre - half) / (1 - g)
    high = (centre + half) / (1 - g)
    return Estimate(ratio, low, high)


def cosines(runs: DataFrame) -> DataFrame:
    """Return the runs with meaningful cosines. Runs of BP, runs of Shallow and failing runs are left out.

    A layer's cosine becomes NaN if its signal equals BP's by construction, or if it is zero for more than half of the
    samples at this grid point. The column `no_signal` lists the layers whose signal is zero that often.
    """
    kept = counted(distinct(runs))
    kept = kept[~kept.fails & ~kept.rule.isin(SPAN)]
    kept = kept.assign(no_signal="")
    for name in layer_names(kept, "cosine"):
        layer = name.removeprefix("cosine/")
        is_exact = np.array([layer in layers for layers in kept.exact_layers], dtype=bool)
        share = share_without_signal(kept, layer)
        is_silent = share > MOST_ZEROS
        kept[name] = kept[name].mask(is_exact | is_silent)
        kept["no_signal"] += np.where(is_silent, f", {layer}", "")
    kept["no_signal"] = kept.no_signal.str.removeprefix(", ")
    return kept


def share_without_signal(kept: DataFrame, layer: str) -> Series:
    """Return the share of samples whose signal in a layer is zero in the last epoch, averaged over the grid point."""
    zeros = f"zeros/{layer}"
    if zeros not in kept:
        return Series(0.0, kept.index)
    epochs = kept.done_epochs.clip(lower=1)
    images = kept.images_per_second * kept.seconds / epochs  # in one epoch
    batches = np.ceil(images.round() / kept.images_per_batch)
    every = kept.measured_every.clip(lower=1)
    measured_batches = (batches / every).clip(lower=1)
    samples = measured_batches * kept.images_per_batch
    samples = samples.clip(upper=images)
    shares = kept.assign(share=kept[zeros] / samples)
    return shares.groupby(POINT).share.transform("mean")


def alignment(runs: DataFrame) -> DataFrame:
    """Return the mean cosine of every layer in the last epoch, for each method at each learning rate, see `cosines`.

    Compare methods only at the same learning rate, because the cosine depends on it.
    """
    kept = cosines(runs)
    names = layer_names(kept, "cosine")
    has_cosine = kept[names].notna().any(axis="columns")
    kept = kept[has_cosine | (kept.no_signal != "")]
    points = kept.groupby(POINT, sort=False)
    means = points[names].mean()
    means["n"] = points.size()
    means["no_signal"] = points.no_signal.first()
    return means.reset_index()
