"""The tables of a report, and the sections that they belong to."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from dfl_experiments.report import compare
from dfl_experiments.report.choose import cells, choose
from dfl_experiments.report.frame import CELL, ROW, distinct, layer_names
from dfl_experiments.report.labels import option_names
from dfl_experiments.report.paper import SETTINGS
from dfl_experiments.report.run_record import ENDED
from dfl_experiments.report.style import IN_WORDS, USUAL, method_name, method_order, title_of, words
from dfl_experiments.report.table_text import NONE, Table, interval_text, numbers

HALF_DIGIT = 5e-5  # half a unit in the last digit of an accuracy in a table
AT_END = "An lr marked (lowest) or (highest) is at this end of the method's grid: extend the grid."
SECTION = ["smoke", "dataset", "model", "augmentation"]
# Options are compared only between runs that are equal in these columns.
KIND = ["optimizer", "schedule", "protocol"]


@dataclass
class Section:
    """The runs of one net on one data set."""

    title: str
    runs: pd.DataFrame
    chosen: pd.DataFrame
    """Those of `runs` that are at the best grid points, see `choose.choose`."""
    cells: pd.DataFrame
    """One row for each method of each setting, see `compared_cells`."""


def sections(runs: pd.DataFrame) -> list[Section]:
    """Return the sections of a report. Smoke runs come last."""
    chosen = choose(runs)
    frame = compared_cells(runs, chosen)
    parts = []
    for key, part in runs.groupby(SECTION, sort=True):
        is_here = (frame[SECTION] == list(key)).all(axis="columns")
        parts.append(Section(title_of(part.iloc[0]), part, among(chosen, part), frame[is_here]))
    return parts


def among(chosen: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Return those of the chosen runs that are also in `runs`."""
    return chosen[chosen.index.isin(runs.index)]


def compared_cells(runs: pd.DataFrame, chosen: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of `choose.cells` with more columns: the differences from BP and DFA, and the depth utility.

    chosen: what `choose.choose` returns for the runs.
    """
    frame = cells(runs, chosen)
    utility = compare.depth_utility(chosen)
    frame = frame.merge(
        utility.rename(columns={"low": "utility_low", "high": "utility_high"}), on=CELL, how="left"
    )
    for control in ("bp", "dfa"):
        differences = compare.against(chosen, control).set_axis(
            [*CELL, *difference_names(control)], axis="columns"
        )
        frame = frame.merge(differences, on=CELL, how="left")
    return ordered(frame)


def difference_names(control: str) -> list[str]:
    """Return the names of the columns with the differences from a control."""
    return [f"{name}_{control}" for name in ("difference", "low", "high", "test")]


def ordered(frame: pd.DataFrame) -> pd.DataFrame:
    """Sort the rows by setting, and within a setting by `method_order`."""
    order = frame.assign(order=frame.method.map(method_order))
    return order.sort_values([*ROW, "order"], kind="stable")[frame.columns]


def with_settings(
    frame: pd.DataFrame, runs: pd.DataFrame, columns: Mapping[str, Sequence[str]]
) -> pd.DataFrame:
    """Return a table of texts.

    The first columns are the settings that differ between rows. The next column is the method. The last columns are
    those of `columns`. A column that contains only dashes is left out.

    frame: the setting and the method of each row.
    runs: the runs of the table, with a column for each option.
    columns: the texts of each further column.
    """
    shown = pd.DataFrame(index=frame.index)
    for key in ROW:
        if key != "setting" and frame[key].nunique() > 1:
            in_words = IN_WORDS.get(key, {})
            shown[key] = [in_words.get(value, str(value)) for value in frame[key]]
    names = option_names(runs)
    options = runs.drop_duplicates(CELL).set_index(CELL)[names]
    options_of_rows = frame[CELL].join(options, on=CELL)
    shown[names] = options_of_rows[names].replace("", NONE)
    shown["method"] = frame.method.map(method_name)
    for name, texts in columns.items():
        if set(texts) != {NONE}:
            shown[name] = list(texts)
    return shown


def answer(section: Section, paper: pd.DataFrame | None = None) -> Table:
    """Return the table of methods. In each setting, the best method comes first.

    The table shows accuracies, differences from BP and DFA with their intervals, and depth utilities.

    paper: published accuracies, see `paper.published`. Each is shown in the row with the same settings and epochs.
    """
    frame = section.cells.assign(
        has_no_result=section.cells.n == 0,
        is_failing=section.cells.failing > 0,
        falling=-section.cells.accuracy,
    )
    frame = frame.sort_values(
        [*ROW, "has_no_result", "is_failing", "falling"], kind="stable", ignore_index=True
    )
    is_best = best_of_setting(frame)
    columns = {
        "lr": rate_texts(frame),
        "weight decay": numbers(frame.weight_decay.replace(0, math.nan), "g"),
        "n": [str(value) for value in frame.n],
        "accuracy, %": [accuracy_text(row) for row in frame.itertuples()],
        "minus BP": [interval_text(*row) for row in frame[difference_names("bp")].to_numpy()],
        "minus DFA": [interval_text(*row) for row in frame[difference_names("dfa")].to_numpy()],
        "depth utility, %": [utility_text(row) for row in frame.itertuples()],
    }
    if paper is not None:
        published = frame.merge(paper, on=SETTINGS, how="left").published
        columns["paper, %"] = numbers(100 * published, ".2f")
        columns["minus paper"] = numbers(100 * (frame.accuracy - published), "+.2f")
    captions = [
        verdict(frame, is_best),
        answer_caption(frame, section.runs),
        AT_END if frame.lr_at_end.any() else "",
    ]
    caption = " ".join(filter(None, captions))
    return Table("Methods", with_settings(frame, section.runs, columns), caption, is_best.tolist())


def rate_texts(frame: pd.DataFrame) -> list[str]:
    """Return the learning rates as texts, such as "0.001", or "0.001 (highest)" at an end of the grid."""
    texts = numbers(frame.lr, "g")
    ends = [f" ({end})" if end else "" for end in frame.lr_at_end]
    return [text + end for text, end in zip(texts, ends, strict=True)]


def best_of_setting(frame: pd.DataFrame) -> pd.Series:
    """Return for each row whether its rounded accuracy is the highest of its setting.

    Methods with a failing run are left out. If fewer than two methods of a setting remain, no row is best.
    """
    ranked = frame.accuracy.mask(frame.is_failing)
    in_setting = ranked.groupby([frame[key] for key in ROW])
    is_highest = ranked > in_setting.transform("max") - HALF_DIGIT
    return is_highest & (in_setting.transform("count") > 1)


def verdict(frame: pd.DataFrame, is_best: pd.Series) -> str:
    """Return the part of the caption that explains the mark of the best methods.

    If all rows have one setting, also name the methods without a significant difference from BP.
    """
    if not is_best.any():
        return ""
    text = "The mark: highest accuracy of its setting."
    if len(frame[ROW].drop_duplicates()) > 1:
        return text
    includes_zero = (frame.low_bp <= 0) & (frame.high_bp >= 0)
    names = ", ".join(map(method_name, frame.method[includes_zero]))
    if names:
        return f"{text} No significant difference from BP: {names}."
    return (
        f"{text} All differences from BP are significant." if frame.low_bp.notna().any() else text
    )


def answer_caption(frame: pd.DataFrame, runs: pd.DataFrame) -> str:
    """Return the settings that all rows share, the noise floors, and the number of rows without an interval.

    frame: the rows of the table. runs: the runs of its section.
    """
    parts = []
    if frame.epochs.nunique() == 1:
        parts.append(words("epochs", frame.epochs.iloc[0]))
    for key, default in USUAL.items():
        value = frame[key].iloc[0]
        if frame[key].nunique() == 1 and value != default:
            parts.append(words(key, value))
    counted = frame[frame.n > 0]
    for _, row in runs.drop_duplicates(KIND).iterrows():
        if row.shared:
            kind = [words(key, row[key]) for key in KIND if runs[key].nunique() > 1]
            parts.append(": ".join(filter(None, [", ".join(kind), row.shared])))
    floors = []
    for row in counted[~counted.smoke].itertuples():
        floor = compare.noise_floor(row.accuracy, row.test_images)
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


def accuracy_text(row: Any) -> str:
    """Return a cell's accuracy as text, such as "98.64 ± 0.07" or "66.56 (1 of 3; 2 failed)".

    If the cell has no accuracy, return the number of its runs of each status instead.
    """
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


def utility_text(row: Any) -> str:
    """Return a cell's depth utility in percent. Return "cannot rank" if BP is not significantly better than Shallow."""
    if pd.notna(row.ranks) and not row.ranks:
        return "cannot rank"
    return interval_text(row.utility, row.utility_low, row.utility_high, style=".0f")


def details(section: Section) -> list[Table]:
    """Return the tables that follow the table of methods: rates, alignment and stability. Empty tables are left out."""
    tables = [rates(section.runs), alignment(section.runs), stability(section)]
    return [table for table in tables if table is not None]


def rates(runs: pd.DataFrame) -> Table | None:
    """Return accuracy by learning rate and weight decay; None if every method has a single grid point."""
    ended = distinct(runs[runs.status.isin(ENDED) | runs.fails])
    if ended.groupby(CELL)[["lr", "weight_decay"]].nunique().max(axis=None) in (1, math.nan):
        return None
    has_decay = ended.weight_decay.any()
    rows = ordered(ended.drop_duplicates(CELL)).set_index(CELL, drop=False)
    columns = {}
    for (lr, decay), point in sorted(
        ended.groupby(["lr", "weight_decay"]), reverse=True, key=lambda group: group[0]
    ):
        name = f"lr {lr:g}, decay {decay:g}" if has_decay else f"lr {lr:g}"
        texts = {key: point_text(same) for key, same in point.groupby(CELL)}
        columns[name] = [texts.get(key, NONE) for key in rows.index]
    shown = with_settings(rows.reset_index(drop=True), runs, columns)
    return Table("Rates", shown, "Accuracy in percent (n seeds) at each point of the grid.")


def point_text(point: pd.DataFrame) -> str:
    """Return the accuracy at a grid point: "98.3 (3)", "66.6 (1 of 3)", "fails (3 of 3)"."""
    good = point[~point.fails]
    if good.empty:
        return f"fails ({len(point)} of {len(point)})"
    count = f"{len(good)} of {len(point)}" if len(good) < len(point) else str(len(good))
    return f"{100 * good.accuracy.mean():.2f} ({count})"


def alignment(runs: pd.DataFrame) -> Table | None:
    """Return the cosine with BP of every layer, by learning rate; None if the cosine was not measured."""
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
        caption += " No signal: layers where more than half of the samples have a zero signal."
    return Table("Alignment", with_settings(frame, runs, columns), caption)


def stability(section: Section) -> Table | None:
    """Return dead units, activations and unstable runs at each method's best point; None if nothing was measured."""
    frame = section.cells[section.cells.n > 0]
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
    return Table("Stability", with_settings(frame, section.runs, columns), "After the last epoch.")


def largest(frame: pd.DataFrame, quantity: str, style: str) -> list[str]:
    """Return for each row a text such as "12% (layer 3)": the largest value over the layers, and its layer."""
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
    """Return the number of unstable runs of a cell, and the first instability."""
    text = f"{row.unstable_runs} of {row.ended}"
    return f"{text}: {row.unstable}" if row.unstable_runs else text


def notes(section: Section) -> list[str]:
    """Return one note for each status of the runs without an accuracy.

    The note has the number of these runs, their methods, and the first reason.
    """
    texts = []
    unfinished = section.runs[~section.runs.status.isin(ENDED)]
    for status, part in unfinished.groupby("status"):
        methods = sorted(part.method.unique(), key=method_order)
        names = ", ".join(map(method_name, methods))
        text = f"{len(part)} {status}: {names}"
        reasons = sorted(set(part.reason) - {""})
        if reasons:
            rest = ", …" if len(reasons) > 1 else ""
            text += f" ({reasons[0]}{rest})"
        texts.append(f"{text}.")
    return texts
