"""Judge the paper's claims on the runs in a folder, and draw a figure of settings × claims.

    python scripts/claims.py outputs/mine      print the verdicts

A claim says that a difference is positive. It is supported if the 95 % interval of Welch's t is above zero,
contradicted if the interval is below zero, and undecided otherwise. There are three more verdicts: a run of one of the
two methods fails, there are too few seeds, or accuracy cannot rank the rules in this setting. Accuracy cannot rank the
rules if BP is not significantly more accurate than Shallow. A run that an error or a signal ended is left out.

Another table compares the published values in conf/experiment/published/values.csv with the runs that reproduce them.
"""

import argparse
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

from dfl_experiments.configuration.composition import CONF_DIR, compose, config_digest, plain
from dfl_experiments.configuration.recorded import read_recorded
from dfl_experiments.configuration.refusals import refusing
from dfl_experiments.report import compare
from dfl_experiments.report.choose import choose
from dfl_experiments.report.frame import CELL, ROW, distinct, runs
from dfl_experiments.report.style import method_name, row_title
from dfl_experiments.report.table_text import NONE, interval_text
from dfl_experiments.running.run_directory import CONFIG

SUPPORTED, CONTRADICTED, UNDECIDED = "supported", "contradicted", "undecided"
FAILS, CANNOT_RANK, TOO_FEW = "fails at this rate", "cannot rank", "too few seeds"
AGREES, DIFFERS, OTHER_LENGTH = "agrees", "differs", "other length"
NOT_REPRODUCIBLE = "not reproducible as published"
PUBLISHED = CONF_DIR / "experiment" / "published" / "values.csv"
MARKS = {
    SUPPORTED: "✓",
    CONTRADICTED: "✗",
    UNDECIDED: "?",
    FAILS: "fails",
    CANNOT_RANK: "=",
    TOO_FEW: "",
}
NET_OPTION = re.compile(r"model\.\w+=\[[^]]*\]")
# The figure's labels shorten the channels of a net and leave out its widths.
CHANNELS = re.compile(r"model\.channels=\[([^]]*)\]")
WIDTHS = re.compile(r", model\.widths=\[[^]]*\]")
COLORS = {
    SUPPORTED: "#009E73",
    CONTRADICTED: "#D55E00",
    UNDECIDED: "#999999",
    FAILS: "#7b3294",
    CANNOT_RANK: "#666666",
}

# Pairs of methods that a claim compares. The claim says that the first method has the larger value.
ALIGNMENT = (("las", "dfa"), ("ltas", "dfa"))
OVER_SHALLOW = (("dfa", "shallow"), ("las", "shallow"), ("ltas", "shallow"))
UNDER_BP = (("bp", "dfa"), ("bp", "las"), ("bp", "ltas"))
ACCURACY = (*ALIGNMENT, *OVER_SHALLOW, *UNDER_BP)
ALIGNS = "{} aligns better with BP than {}"
IS_BETTER = "{} is more accurate than {}"
LEADS_MORE = "{}'s lead over {} grows with the classes"
ORDER = [(ALIGNS, ALIGNMENT), (IS_BETTER, ACCURACY), (LEADS_MORE, ALIGNMENT)]  # in the figure
RULES = ("bp", "shallow", "dfa", "las", "ltas")
WEIGHTS = (1.0, -1.0, -1.0, 1.0)  # of the first method, the second one, and the same on other data
COLUMNS = ["claim", "setting", "n", "found", "verdict", "value", "low", "high", "p"]


class Contrast(NamedTuple):
    """A weighted sum of means with its 95 % interval and p-value; NaN if there are too few values."""

    value: float
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan


def claims(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a table with one row for each claim in each setting.

    Columns: `COLUMNS`. n is the number of seeds, and found is a text.

    A setting ends with the number of learning rates. Accuracies are compared at each method's best rate, cosines over
    the rates at which both methods have enough seeds. The last columns are the difference, its interval and p-value.
    """
    real = frame[~frame.smoke & frame.has_ended]
    chosen = choose(real)
    rows: list[dict[str, Any]] = []
    for key, row in with_all_diverged(chosen, real).groupby(ROW, sort=True):
        all_points = real[(real[ROW] == list(key)).all(axis="columns")]
        for suffix, variant in variants_of(row).items():
            options = {"": "", ", init=default": ", random B"}.get(suffix, suffix)
            setting = title_with_net(row.iloc[0]) + options + rates_text(all_points)
            rows += alignment_claims(row, all_points, variant, setting)
            rows += accuracy_claims(row, variant, setting)
    rows += class_claims(chosen, real)
    return pd.DataFrame(rows, columns=COLUMNS)


def with_all_diverged(chosen: pd.DataFrame, real: pd.DataFrame) -> pd.DataFrame:
    """Return the chosen runs, and all runs of the methods without an accuracy, whose runs diverged at every rate."""
    every = distinct(real)
    is_decided = every.set_index(CELL).index.isin(chosen.set_index(CELL).index)
    return every[every.index.isin(chosen.index) | ~is_decided]


def variants_of(row: pd.DataFrame) -> dict[str, dict[str, str]]:
    """Return which methods of a setting are compared with each other: for each variant, the method of each rule.

    If every rule has one method, they are one variant. Otherwise the methods with the same options are a variant, such
    as {", init=default": {"dfa": "dfa, init=default", "las": "las, init=default"}}. "" (no options) is first.
    """
    methods = row[["rule", "method"]].drop_duplicates()
    suffixes = [method.removeprefix(rule) for rule, method in methods.itertuples(index=False)]
    if methods.rule.is_unique and len(set(suffixes)) > 1:
        suffixes = [""] * len(methods)
    variants: dict[str, dict[str, str]] = {suffix: {} for suffix in sorted(set(suffixes))}
    for suffix, rule, method in zip(suffixes, methods.rule, methods.method, strict=True):
        variants[suffix][rule] = method
    return variants


def title_with_net(row: pd.Series) -> str:
    """Return the title of a setting, with the net's options that all runs of this net and data set share."""
    options = [f", {option}" for option in NET_OPTION.findall(row["shared"])]
    return "".join([row_title(row), *options])


def rates_text(points: pd.DataFrame) -> str:
    """Return the number of learning rates of the rules that a claim names, as the end of a setting's name."""
    named = points[points.rule.isin(RULES)]
    numbers = named.groupby("method").lr.nunique()
    fewest, most = numbers.min(), numbers.max()
    if most == 1:
        return ", 1 rate"
    return f", {most} rates" if fewest == most else f", {fewest} to {most} rates"


def welch(first: np.ndarray, second: np.ndarray) -> Contrast:
    """Return mean(first) − mean(second) with Welch's t interval, see `contrast`."""
    return contrast([first, second], WEIGHTS[:2])


def contrast(samples: Sequence[np.ndarray], weights: Sequence[float]) -> Contrast:
    """Return Σ w_k mean(x_k) with an interval that does not assume equal variances.

        standard error = √(Σ w_k² s_k²/n_k), with Welch–Satterthwaite degrees of freedom

    There is no interval if a sample has fewer than 2 values, or if the values of each sample are equal.
    """
    n = np.array([len(values) for values in samples])
    means = np.array([values.mean() for values in samples])
    value = float(means @ weights)
    if n.min() < 2:
        return Contrast(value)
    variances = np.array([values.var(ddof=1) for values in samples])
    parts = np.square(weights) * variances / n
    variance = parts.sum()
    if variance < compare.LEAST_VARIANCE:
        return Contrast(value)
    degrees = variance**2 / (parts**2 / (n - 1)).sum()
    standard_error = math.sqrt(variance)
    half = compare.student(degrees) * standard_error
    p = 2 * stats.t.sf(abs(value) / standard_error, degrees)
    return Contrast(value, value - half, value + half, p)


def judged(
    claim: str,
    setting: str,
    samples: Sequence[np.ndarray],
    unit: str,
    failing: str,
    rates: str = "",
) -> dict[str, Any]:
    """Return a claim's row with the verdict.

    samples: values of the two methods, or of the two methods on each of two data sets.
    failing: what `failures` returns for the methods of the claim.
    rates: text with the learning rates that were compared.
    """
    n = min(map(len, samples))
    difference = Contrast(math.nan)
    if n:
        difference = contrast(samples, WEIGHTS[: len(samples)])
    verdict = UNDECIDED  # also if there is no interval because the values of each method are equal
    if n < compare.FEWEST_SEEDS:
        verdict = TOO_FEW
    elif difference.low > 0:
        verdict = SUPPORTED
    elif difference.high < 0:
        verdict = CONTRADICTED
    scale = 0.01 if unit == "cosine" else 1  # `interval_text` multiplies by 100
    value, low, high, _ = (scale * number for number in difference)
    return {
        "claim": claim,
        "setting": setting,
        "n": n,
        "found": failing or f"{interval_text(value, low, high)} {unit}{rates}",
        "verdict": FAILS if failing else verdict,
        **difference._asdict(),
    }


def failures(runs_of: pd.DataFrame, methods: Iterable[str]) -> str:
    """Return a text on the methods of a claim that have failing runs, such as "DFA fails: 3 of 3".

    The text is empty if there are none. A method with a single run is ignored.
    """
    texts = []
    for method in methods:
        side = runs_of[runs_of.method == method]
        if side.fails.any() and len(side) > 1:
            texts.append(
                f"{method_name(side.rule.iloc[0])} fails: {side.fails.sum()} of {len(side)}"
            )
    return ", ".join(texts)


def accuracy_claims(
    row: pd.DataFrame, variant: dict[str, str], setting: str
) -> Iterator[dict[str, Any]]:
    """Yield the claims on accuracy in a setting.

    row: the runs of each method at its chosen grid point. variant: the method of each rule.
    """
    samples = compare.samples_of(row)
    has_span = {"bp", "shallow"} <= samples.keys()
    ranks = not has_span or compare.can_rank(samples, row.test_images.max())
    for first, second in ACCURACY:
        if not {first, second} <= variant.keys():
            continue
        methods = [variant[first], variant[second]]
        accuracies = [row.accuracy[row.method == method].dropna().to_numpy() for method in methods]
        failing = failures(row, methods)
        if min(map(len, accuracies)) == 0 and not failing:
            continue
        claim = IS_BETTER.format(method_name(first), method_name(second))
        verdict = judged(claim, setting, accuracies, "points", failing)
        if not ranks and verdict["verdict"] not in (FAILS, TOO_FEW):
            verdict["verdict"] = CANNOT_RANK
        yield verdict


def alignment_claims(
    row: pd.DataFrame, all_points: pd.DataFrame, variant: dict[str, str], setting: str
) -> Iterator[dict[str, Any]]:
    """Yield the claims on layer 1's cosine in a setting.

    Each method's cosine is averaged over the learning rates at which both methods have enough seeds.

    row: the runs at the chosen grid points. all_points: the runs at all grid points. variant: the method of each rule.
    """
    measured = compare.cosines(all_points)
    if "cosine/1" not in measured:
        return
    by_rate = measured.pivot_table(
        "cosine/1", ["method", "seed"], ["lr", "weight_decay"], dropna=False
    )
    for first, second in ALIGNMENT:
        if not {first, second} <= variant.keys():
            continue
        methods = [variant[first], variant[second]]
        sides = [
            by_rate.query("method == @method").dropna(axis="columns", how="all")
            for method in methods
        ]
        common = sides[0].columns.intersection(sides[1].columns)
        counts = pd.concat([side[common].count() for side in sides], axis="columns")
        has_seeds = counts.min(axis="columns") >= compare.FEWEST_SEEDS
        if has_seeds.any():
            common = common[has_seeds]
        means = [
            side[common].mean(axis="columns", skipna=False).dropna().to_numpy() for side in sides
        ]
        failing = failures(row, methods)
        if min(map(len, means)) or failing:
            claim = ALIGNS.format(method_name(first), method_name(second))
            rates = ", ".join(f"{lr:g}" for lr, _ in sorted(common, reverse=True))
            yield judged(claim, setting, means, "cosine", failing, f" (lr {rates})")


def class_claims(chosen: pd.DataFrame, real: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Yield the claims that a method's lead over DFA is larger on CIFAR-100 than on CIFAR-10.

    All other settings are equal on these two data sets.

    chosen: the runs of each method at its chosen grid point. real: the runs at all grid points.
    """
    # the net's options are in `setting` on one data set and in `shared` on the other; the title has them in both cases
    others = [name for name in ROW if name not in ("dataset", "setting")] + ["title"]
    cifar, every = (on_cifar(frame) for frame in (chosen, real))
    for key, rows in cifar.groupby(others, sort=True):
        all_points = every[(every[others] == list(key)).all(axis="columns")]
        accuracies = rows.groupby(["dataset", "method"]).accuracy.apply(np.array)
        for first, second in ALIGNMENT:
            datasets = ("cifar100", "cifar10")
            sides = [(dataset, method) for dataset in datasets for method in (first, second)]
            if accuracies.index.isin(sides).sum() < len(sides):
                continue
            claim = LEADS_MORE.format(method_name(first), method_name(second))
            setting = rows.title.iloc[0] + rates_text(all_points)
            on_cifar100 = rows[rows.dataset == "cifar100"]
            failing = failures(on_cifar100, [first, second]) or failures(rows, [first, second])
            yield judged(claim, setting, list(accuracies[sides]), "points", failing)


def on_cifar(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the runs on CIFAR-10 and CIFAR-100, with a title that is the same for both data sets."""
    cifar = frame[frame.dataset.isin(["cifar10", "cifar100"])]
    titles = [re.sub("CIFAR-100?", "CIFAR", title_with_net(row)) for _, row in cifar.iterrows()]
    return cifar.assign(title=titles)


def published(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a table with one row for each published value.

    Columns: source, method, published (in percent), n (number of seeds), cosine (of layer 1), found (a text), verdict.
    A comparison needs three seeds, see `compared`.
    """
    rows = []
    for value in pd.read_csv(PUBLISHED, keep_default_na=False).itertuples():
        values = plain(
            compose([f"experiment=published/{value.experiment}", f"method={value.rule}"])
        )
        runs_of = runs_with(frame, values)
        whole = runs_of[runs_of.epochs == values["epochs"]]
        rates = whole.accuracy.to_numpy()
        row = {
            "source": value.source,
            "method": method_name(value.rule),
            "published": value.accuracy,
            "n": len(rates),
            "cosine": layer_1_cosine(whole),
        }
        if value.not_reproducible:
            row |= {"found": value.not_reproducible, "verdict": NOT_REPRODUCIBLE}
        elif whole.fails.any():
            row |= {"found": failures(whole, whole.method.unique()), "verdict": FAILS}
        elif len(rates) >= compare.FEWEST_SEEDS:
            row |= compared(rates, value.accuracy / 100, value.runs, whole.test_images.max())
        else:
            lengths = ", ".join(map(str, sorted(set(runs_of.epochs) - {values["epochs"]})))
            is_other = whole.empty and bool(lengths)
            found = f"{len(rates)} of {compare.FEWEST_SEEDS} seeds"
            if len(rates):
                found = f"{100 * rates.mean():.2f}: {found}"
            if is_other:
                found = f"{lengths} epochs in place of {values['epochs']}"
            row |= {"found": found, "verdict": OTHER_LENGTH if is_other else TOO_FEW}
        rows.append(row)
    return pd.DataFrame(rows)


def layer_1_cosine(runs_of: pd.DataFrame) -> str:
    """Return the mean cosine of layer 1 as text: a dash if it is not measured, or if the signal is BP's."""
    measured = compare.cosines(runs_of)
    if measured.empty or "cosine/1" not in measured:
        return NONE
    mean = measured["cosine/1"].mean()
    return NONE if math.isnan(mean) else f"{mean:+.2f}"


def runs_with(frame: pd.DataFrame, values: dict[str, Any]) -> pd.DataFrame:
    """Return the ended runs with this configuration.

    Seed, number of epochs, alignment settings and memory format may differ from this configuration.
    """
    has_rule = frame.rule == values["method"]["name"]
    has_lr = frame.lr == values["optimizer"]["lr"]
    has_ended = frame.accuracy.notna() | frame.fails
    same = distinct(frame[has_rule & has_lr & has_ended])
    free = {key: values[key] for key in ("seed", "epochs", "alignment", "memory_format")}
    digest = config_digest(values)
    digests = [
        config_digest(read_recorded(Path(folder) / CONFIG, folder) | free) for folder in same.folder
    ]
    return same[np.array(digests, dtype=object) == digest]


def compared(
    rates: np.ndarray, published_rate: float, published_runs: int, images: int
) -> dict[str, Any]:
    """Compare the accuracies of several seeds with a published accuracy, and return `found` and `verdict`.

        difference = mean(rates) − published_rate ± t s √(1/n + 1/m)

    s is the standard deviation of our n accuracies. The published one is the mean of m runs, whose standard deviation
    is taken to be the same. The two agree if the interval contains 0, or if the difference is at most the noise floor
    √(p(1 − p)/N), where p is the published accuracy.

    published_runs: m. images: N, the number of test images.
    """
    error = rates.std(ddof=1) * math.sqrt(1 / len(rates) + 1 / published_runs)
    half = compare.student(len(rates) - 1) * error
    difference = compare.around(float(rates.mean()) - published_rate, half)
    is_near = abs(difference.value) <= compare.noise_floor(published_rate, images)
    agrees = is_near or difference.low <= 0 <= difference.high
    found = f"{100 * rates.mean():.2f}: {interval_text(*difference)} points"
    return {"found": found, "verdict": AGREES if agrees else DIFFERS}


def short_setting(setting: str) -> str:
    """Return a setting's name with the net's options in few characters."""
    return CHANNELS.sub(r"channels \1", WIDTHS.sub("", setting))


def picture(verdicts: pd.DataFrame) -> Figure:
    """Draw a grid of settings (rows) and claims (columns), with a mark for each verdict."""
    shown = verdicts[verdicts.verdict != TOO_FEW]
    settings = list(shown.setting.unique())
    names = []
    for claim, pairs in ORDER:
        every = [claim.format(method_name(first), method_name(second)) for first, second in pairs]
        names += [name for name in every if name in set(shown.claim)]
    size = (6.0 + 0.5 * len(names), 2.8 + 0.27 * len(settings))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    for row in shown.itertuples():
        x, y = names.index(row.claim), settings.index(row.setting)
        mark, colour = MARKS[row.verdict], COLORS[row.verdict]
        sides = [x - 0.46, x + 0.46]
        axes.fill_between(sides, y - 0.42, y + 0.42, color=colour, alpha=0.22, linewidth=0)
        axes.text(x, y, mark, ha="center", va="center", fontsize=11 if len(mark) == 1 else 8)
    axes.set(xlim=(-0.5, len(names) - 0.5), ylim=(len(settings) - 0.5, -0.5))
    labels = [short_setting(setting) for setting in settings]
    is_clear = len(set(labels)) == len(labels)
    axes.set_yticks(range(len(settings)), labels if is_clear else settings, fontsize=9)
    axes.set_xticks(range(len(names)), names, rotation=50, ha="left", fontsize=9)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    legend = [
        f"{mark} {verdict}" for verdict, mark in MARKS.items() if verdict not in (FAILS, TOO_FEW)
    ]
    legend += ["fails: a run fails at every rate", "blank: not compared"]
    figure.supxlabel("   ".join(legend), fontsize=9)
    return figure


def main() -> None:
    """Print the claims on the runs in the folders of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", type=Path, nargs="+")
    folders = parser.parse_args().folders
    with refusing("claims.py"):
        frame = runs(*folders)
    shown = claims(frame)[["claim", "setting", "n", "found", "verdict"]]
    print(shown.to_markdown(index=False))
    print()
    print(published(frame).to_markdown(index=False))


if __name__ == "__main__":
    main()
