"""The tables of a report: frames of texts, and how they are written in each format."""

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from tabulate import LATEX_ESCAPE_RULES, tabulate

from dfl_experiments.report import compare
from dfl_experiments.report.choose import cells, choose
from dfl_experiments.report.frame import CELL, ENDED, ROW, distinct, layer_names, option_names
from dfl_experiments.report.style import IN_WORDS, method_name, method_order, title_of

NONE = "–"
# What Markdown obeys within a line. Of a link the end is enough, and a word may hold a _.
OBEYED = re.compile(r"[\\`*<&|~]|(?<!\w)_|_(?!\w)|\](?=[(\[])")
SHOWN = 5e-5  # half of the last digit that an accuracy is shown with
SECTION = ["smoke", "dataset", "model", "augmentation"]
# What stands once, at the end of a report: a sentence for each column that a table has.
METHODS = {
    "accuracy, %": (
        "Accuracy: on the test set, in percent, as the protocol reports it: mean over n seeds ± sample standard "
        "deviation. Each method is shown at its best learning rate, chosen on the validation split (on the test "
        "set where nothing is held out, which flatters it). A rate with a failing run is chosen last."
    ),
    "n": (
        "Failing runs: a run fails if it diverges, collapses (no unit of the last hidden layer is active) or fails "
        "to learn (it ends at chance, or a fifth under its own best test accuracy). A method with failing runs "
        "ranks below all others; its numbers are of the runs that did not fail."
    ),
    "minus BP": (
        "Minus BP, minus DFA: differences of the means in points, with 95 % intervals by Dunnett's comparison: all "
        "intervals of a setting hold together with 95 % probability. A difference is real where its interval "
        "excludes 0. (W) marks Welch's t, for a method whose seeds scatter over 3 times as much as the others'. An "
        "interval needs 2 runs of both methods, and 6 more runs than methods."
    ),
    "depth utility, %": (
        "Depth utility: (accuracy − Shallow) / (BP − Shallow), each at its own best rate. 0 %: no better than not "
        "training the lower layers; 100 %: BP. Intervals by Fieller's theorem, from 3 seeds on. A setting cannot "
        "rank rules where BP is not above Shallow."
    ),
    "layer 1": (
        "Cosines: of the applied error signal with BP's, mean of the last epoch. They depend on the learning rate: "
        "compare within one rate. There is none where the signal is BP's by construction, or where over half of "
        "the samples have no signal."
    ),
    "dead, worst layer": (
        "Dead: share of ReLU units that are 0 for all images. A run is unstable with over 95 % dead units in the "
        "last hidden layer, or where a layer's activations (rms) grew 50-fold since the first epoch."
    ),
}
SMOKE = "A smoke run is a trial of the pipeline on a few images, no result."


class Table(NamedTuple):
    """A table of a report."""

    title: str
    frame: pd.DataFrame
    """Its texts by column."""
    caption: str = ""
    """One line under it; empty for none."""
    best: Sequence[bool] = ()
    """Which rows are marked."""

    def only(self, rule: str) -> "Table":
        """Return the table with the rows of one rule, without marks."""
        name = method_name(rule)
        is_shown = self.frame.method.str.partition(", ")[0] == name
        return Table(self.title, self.frame[is_shown], self.caption)


def sections(runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the runs of each net and data set by title, smoke runs last."""
    return {title_of(part.iloc[0]): part for _, part in runs.groupby(SECTION, sort=True)}


def ordered(frame: pd.DataFrame) -> pd.DataFrame:
    """Return rows of methods by setting, and within it in the order of families."""
    order = frame.assign(order=frame.method.map(method_order))
    return order.sort_values([*ROW, "order"], kind="stable")[frame.columns]


def with_settings(frame: pd.DataFrame, runs: pd.DataFrame, columns: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """Return a table's texts: what differs between its rows, the method, then the columns that say something.

    frame: a row for each of the table. runs: those behind it, which have the options of their settings as columns.
    """
    shown = pd.DataFrame(index=frame.index)
    for key in ROW:
        if key != "setting" and frame[key].nunique() > 1:
            in_words = IN_WORDS.get(key, {})
            shown[key] = [in_words.get(value, str(value)) for value in frame[key]]
    names = option_names(runs)
    options = runs.drop_duplicates(CELL).set_index(CELL)[names]
    of_rows = frame[CELL].join(options, on=CELL)
    shown[names] = of_rows[names].replace("", NONE)
    shown["method"] = frame.method.map(method_name)
    for name, texts in columns.items():
        if set(texts) != {NONE}:
            shown[name] = list(texts)
    return shown


def answer(runs: pd.DataFrame, paper: pd.DataFrame | None = None) -> Table:
    """Return the table of methods: accuracy, differences from BP and DFA with intervals, depth utility; best first.

    paper: published accuracies, see `paper.published`; shown beside runs of the same length and settings.
    """
    frame = compared_cells(runs)
    frame["has_no_result"] = frame.n == 0
    frame["is_failing"] = frame.failing > 0
    frame["falling"] = -frame.accuracy
    frame = frame.sort_values([*ROW, "has_no_result", "is_failing", "falling"], kind="stable", ignore_index=True)
    frame["ranked"] = frame.accuracy.mask(frame.is_failing)
    rows = frame.groupby(ROW).ranked
    is_best = (frame.ranked > rows.transform("max") - SHOWN) & (rows.transform("count") > 1)
    columns = {
        "lr": numbers(frame.lr, "g"),
        "weight decay": numbers(frame.weight_decay.replace(0, math.nan), "g"),
        "n": [str(value) for value in frame.n],
        "accuracy, %": [accuracy_text(row) for row in frame.itertuples()],
        "minus BP": [interval_text(*row) for row in frame[bars("bp")].to_numpy()],
        "minus DFA": [interval_text(*row) for row in frame[bars("dfa")].to_numpy()],
        "depth utility, %": [utility_text(row) for row in frame.itertuples()],
    }
    if paper is not None:
        keys = ["dataset", "model", "augmentation", "method", "epochs", "optimizer", "setting"]
        published = frame.merge(paper, on=keys, how="left").published
        columns["paper, %"] = numbers(100 * published, ".2f")
        columns["minus paper"] = numbers(100 * (frame.accuracy - published), "+.2f")
    return Table(
        "Methods",
        with_settings(frame, runs, columns),
        f"{verdict(frame, is_best)} {answer_caption(frame)}".strip(),
        list(is_best),
    )


def verdict(frame: pd.DataFrame, is_best: pd.Series) -> str:
    """Return what the marks mean and, of a table with one setting, which methods cannot be told from BP."""
    if not is_best.any():
        return ""
    text = "The mark: highest accuracy of its setting."
    if len(frame[ROW].drop_duplicates()) > 1:
        return text
    is_open = (frame.low_bp <= 0) & (frame.high_bp >= 0)
    names = ", ".join(map(method_name, frame.method[is_open]))
    if names:
        return f"{text} Not distinguished from BP by these runs: {names}."
    return f"{text} All differences from BP are real." if frame.low_bp.notna().any() else text


def compared_cells(runs: pd.DataFrame) -> pd.DataFrame:
    """Return every cell with its differences from BP and DFA and its depth utility, as numbers."""
    chosen = choose(runs)
    frame = cells(runs, chosen)
    utility = compare.depth_utility(chosen)
    frame = frame.merge(utility.rename(columns={"low": "utility_low", "high": "utility_high"}), on=CELL, how="left")
    for control in ("bp", "dfa"):
        differences = compare.against(chosen, control).set_axis([*CELL, *bars(control)], axis="columns")
        frame = frame.merge(differences, on=CELL, how="left")
    return frame


def bars(control: str) -> list[str]:
    """Return the names of the columns with the differences from a control."""
    return [f"{name}_{control}" for name in ("difference", "low", "high", "test")]


def answer_caption(frame: pd.DataFrame) -> str:
    """Return the length of the runs where all have one, and the noise floor of their accuracies."""
    parts = []
    if frame.epochs.nunique() == 1:
        parts.append(f"{frame.epochs.iloc[0]} epochs")
    counted = frame[frame.n > 0]
    floors = []
    for row in counted[~counted.smoke].itertuples():
        floor = compare.noise_floor(row.accuracy, compare.TEST_IMAGES.get(row.dataset))
        floors.append(100 * floor)
    if any(floors):
        low, high = f"{min(floors):.2f}", f"{max(floors):.2f}"
        span = low if low == high else f"{low} to {high}"
        parts.append(f"noise floor √(p(1−p)/N) of one accuracy: {span} points")
    single = (counted.n < 2).sum()
    if single:
        parts.append(f"{single} of {len(frame)} rows have one seed and no interval")
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def numbers(values: pd.Series, style: str) -> list[str]:
    """Return numbers as texts, a dash for NaN."""
    return [NONE if math.isnan(value) else f"{value:{style}}" for value in values]


def accuracy_text(row: Any) -> str:
    """Return a cell's accuracy: "98.64 ± 0.07", "66.56 (1 of 3; 2 fail)", "fails: 3 of 3", or how its runs stand."""
    if row.n == 0:
        return row.states
    if row.failing == row.ended:
        return f"fails at this rate: {row.failing} of {row.ended}"
    text = f"{100 * row.accuracy:.2f}"
    if row.n > 1:
        text += f" ± {100 * row.sd:.2f}"
    if row.failing:
        text += f" ({row.n} of {row.ended}; {row.failing} failed)"
    return text


def interval_text(value: float, low: float, high: float, test: str = "", style: str = "+.2f") -> str:
    """Return "+0.12 [-0.10, +0.34]" from fractions, in points; without the interval where there is none."""
    if math.isnan(value):
        return NONE
    text = f"{100 * value:{style}}"
    if not math.isnan(low):
        text += f" [{100 * low:{style}}, {100 * high:{style}}]"
    return f"{text} (W)" if test == "Welch" else text


def utility_text(row: Any) -> str:
    """Return a cell's depth utility in percent, or that its setting cannot rank."""
    if row.ranks is False or row.ranks is np.False_:
        return "cannot rank"
    return interval_text(row.utility, row.utility_low, row.utility_high, style=".0f")


def rates(runs: pd.DataFrame) -> Table | None:
    """Return accuracy by learning rate and weight decay; None where no method has two points."""
    ended = distinct(runs[runs.status.isin(ENDED) | runs.fails])
    if ended.groupby(CELL)[["lr", "weight_decay"]].nunique().max(axis=None) in (1, math.nan):
        return None
    has_decay = ended.weight_decay.any()
    rows = ordered(ended.drop_duplicates(CELL)).set_index(CELL, drop=False)
    columns = {}
    for (lr, decay), point in sorted(ended.groupby(["lr", "weight_decay"]), reverse=True, key=lambda group: group[0]):
        name = f"lr {lr:g}, decay {decay:g}" if has_decay else f"lr {lr:g}"
        texts = {key: point_text(same) for key, same in point.groupby(CELL)}
        columns[name] = [texts.get(key, NONE) for key in rows.index]
    shown = with_settings(rows.reset_index(drop=True), runs, columns)
    return Table("Rates", shown, "Accuracy in percent (n seeds) at each point of the grid.")


def point_text(point: pd.DataFrame) -> str:
    """Return the accuracy at a grid point: "98.3 (3)", "66.6 (1 of 3)", "fails (3 of 3)"."""
    alive = point[~point.fails]
    if alive.empty:
        return f"fails ({len(point)} of {len(point)})"
    count = f"{len(alive)} of {len(point)}" if len(alive) < len(point) else str(len(alive))
    return f"{100 * alive.accuracy.mean():.2f} ({count})"


def alignment(runs: pd.DataFrame) -> Table | None:
    """Return the cosine with BP of every layer, by learning rate; None where nothing was measured."""
    frame = compare.alignment(runs)
    if frame.empty:
        return None
    frame = ordered(frame).sort_values([*ROW, "lr"], kind="stable")
    columns = {"lr": numbers(frame.lr, "g"), "n": [str(n) for n in frame.n]}
    for name in layer_names(frame, "cosine"):
        layer = name.removeprefix("cosine/")
        columns[f"layer {layer}"] = numbers(frame[name], "+.2f")
    columns["no signal"] = list(frame.no_signal.replace("", NONE))
    caption = "Cosine with BP's error signal."
    if frame.no_signal.any():
        caption += " No signal: layers where over half of the samples have none."
    return Table("Alignment", with_settings(frame, runs, columns), caption)


def stability(runs: pd.DataFrame) -> Table | None:
    """Return how near the runs are to a collapse, at each method's shown point; None where it was not measured."""
    frame = ordered(cells(runs, choose(runs)))
    frame = frame[frame.n > 0]
    measured = layer_names(frame, "dead") + layer_names(frame, "activation_rms")
    if frame[measured].isna().all(axis=None):
        return None
    columns = {
        "lr": numbers(frame.lr, "g"),
        "dead, worst layer": largest(frame, "dead", ".0%"),
        "activation rms, worst layer": largest(frame, "activation_rms", ".3g"),
    }
    if "norm_ratio/1" in frame:
        columns["‖δ₁‖/‖δ₁ of BP‖"] = numbers(frame["norm_ratio/1"], ".2g")
    columns["unstable runs"] = [unstable_text(row) for row in frame.itertuples()]
    columns["failing runs"] = [f"{row.failing} of {row.ended}" for row in frame.itertuples()]
    return Table("Stability", with_settings(frame, runs, columns), "After the last epoch.")


def largest(frame: pd.DataFrame, quantity: str, style: str) -> list[str]:
    """Return a quantity's largest value over the layers, and which layer has it, of each row."""
    texts = []
    for _, row in frame[layer_names(frame, quantity)].iterrows():
        values = row.dropna()
        text = NONE
        if len(values):
            layer = values.idxmax().partition("/")[2]
            text = f"{values.max():{style}} (layer {layer})"
        texts.append(text)
    return texts


def unstable_text(row: Any) -> str:
    """Return how many runs of a cell were unstable, and where the first of them was."""
    text = f"{row.unstable_runs} of {row.ended}"
    return f"{text}: {row.unstable}" if row.unstable_runs else text


def details(runs: pd.DataFrame) -> list[Table]:
    """Return the tables that stand behind the answer: rates, alignment and stability, as far as there are runs."""
    return [table for table in (rates(runs), alignment(runs), stability(runs)) if table is not None]


def notes(runs: pd.DataFrame) -> list[str]:
    """Return what a reader must know of a section: runs without a result, and cells of mixed origin."""
    texts = []
    unfinished = runs[~runs.status.isin(ENDED)]
    for status, part in unfinished.groupby("status"):
        methods = sorted(part.method.unique(), key=method_order)
        names = ", ".join(map(method_name, methods))
        text = f"{len(part)} {status}: {names}"
        reasons = sorted(set(part.reason) - {""})
        if reasons:
            rest = ", …" if len(reasons) > 1 else ""
            text += f" ({reasons[0]}{rest})"
        texts.append(f"{text}.")
    mixed = "; ".join(cells(runs, choose(runs)).mixed)
    origins = sorted(set(mixed.split("; ")) - {""})
    if origins:
        texts.append(f"Mixed: some methods' runs differ in version or device ({', '.join(origins)}).")
    return texts


def methods_text(columns: Collection[str], has_smoke: bool) -> list[str]:
    """Return the sentences on how the numbers of these columns are computed."""
    sentences = [sentence for column, sentence in METHODS.items() if column in columns]
    return [*sentences, SMOKE] if has_smoke else sentences


def write(table: Table, style: str) -> str:
    """Return a table as text: style is simple (for a terminal), github, latex_booktabs or html."""
    clean, mark, kind = STYLES[style]
    cells_of = table.frame.map(clean)
    if len(table.best):
        marked = cells_of.method.map(mark.format)
        cells_of["method"] = cells_of.method.mask(table.best, marked)
    heads = cells_of.columns if style == "github" else map(clean, cells_of.columns)
    text = tabulate(cells_of.to_numpy().tolist(), list(heads), kind, disable_numparse=True)
    if style == "latex_booktabs":
        for rule in ("toprule", "midrule", "bottomrule"):
            text = text.replace(r"\hline", rf"\{rule}", 1)
    return text


def markdown(text: str) -> str:
    """Escape what Markdown would obey in a line of text."""
    return OBEYED.sub(r"\\\g<0>", text)


def latex(text: str) -> str:
    """Escape what LaTeX would obey in a text."""
    symbols = {"±": r"$\pm$", "−": "$-$", "–": "--", "‖": r"$\|$", "δ": r"$\delta$", "₁": "$_1$"}
    return text.translate(str.maketrans(LATEX_ESCAPE_RULES | symbols))


# How cells are escaped, how the best method is marked, and tabulate's name of the format.
STYLES: dict[str, tuple[Callable[[str], str], str, str]] = {
    "simple": (str, "{} *", "simple"),
    "github": (markdown, "**{}**", "github"),
    "latex_booktabs": (latex, r"\textbf{{{}}}", "latex_raw"),
    "html": (escape, "<b>{}</b>", "unsafehtml"),
}
