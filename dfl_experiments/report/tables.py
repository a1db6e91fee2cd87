"""The tables of a report, and the sections that they belong to."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
from pandas import DataFrame, Series

from dfl_experiments.report import compare
from dfl_experiments.report.choose import choose, grid_points
from dfl_experiments.report.frame import CELL, ROW, layer_names
from dfl_experiments.report.labels import KIND, SECTION, layers_sentence, option_names
from dfl_experiments.report.paper import SETTINGS
from dfl_experiments.report.run_record import ENDED
from dfl_experiments.report.style import (
    IN_WORDS,
    USUAL,
    common_words,
    method_name,
    method_order,
    title_of,
    words,
)
from dfl_experiments.report.table_text import MARK, NONE, Table, interval_text, numbers

MOST_RATES = 8  # columns in the table of rates
HALF_DIGIT = 5e-5  # half a unit in the last digit of an accuracy in a table
AT_END = "(lowest), (highest): the best lr is the lowest or the highest one that was tried: extend the grid."


@dataclass
class Section:
    """The runs of one net on one data set."""

    title: str
    runs: DataFrame
    chosen: DataFrame
    """Those of `runs` that are at the best grid points, see `choose.choose`."""
    points: DataFrame
    """One row for each grid point of each method, see `compared_points`."""

    @property
    def cells(self) -> DataFrame:
        """One row for each method of each setting: its best grid point."""
        return self.points[self.points.chosen]


def sections(runs: DataFrame) -> list[Section]:
    """Return the sections of a report. Smoke runs come last."""
    chosen = choose(runs)
    points = compared_points(runs, chosen).groupby(SECTION)
    parts = []
    for key, part in runs.groupby(SECTION, sort=True):
        title = title_of(part.iloc[0])
        parts.append(Section(title, part, among(chosen, part), points.get_group(key)))
    return parts


def among(chosen: DataFrame, runs: DataFrame) -> DataFrame:
    """Return those of the chosen runs that are also in `runs`."""
    return chosen[chosen.index.isin(runs.index)]


def compared_points(runs: DataFrame, chosen: DataFrame) -> DataFrame:
    """Return the rows of `choose.grid_points`. The chosen ones also have depth utility and differences from BP and DFA.

    chosen: what `choose.choose` returns for the runs.
    """
    utility = compare.depth_utility(chosen)
    utility = utility.rename(columns={"low": "utility_low", "high": "utility_high"})
    comparisons = [utility]
    for control in ("bp", "dfa"):
        names = [*CELL, *difference_names(control)]
        comparison = compare.against(chosen, control)
        comparisons.append(comparison.set_axis(names, axis="columns"))
    frame = grid_points(runs, chosen).sort_values("chosen", ascending=False, kind="stable")
    for comparison in comparisons:
        frame = frame.merge(comparison.assign(chosen=True), on=[*CELL, "chosen"], how="left")
    return ordered(frame)


def difference_names(control: str) -> list[str]:
    """Return the names of the columns with the differences from a control."""
    return [f"{name}_{control}" for name in ("difference", "low", "high", "test")]


def ordered(frame: DataFrame) -> DataFrame:
    """Sort the rows by setting, and within a setting by `method_order`."""
    order = frame.assign(order=frame.method.map(method_order))
    return order.sort_values([*ROW, "order"], kind="stable")[frame.columns]


def with_settings(
    frame: DataFrame, runs: DataFrame, columns: Mapping[Any, Iterable[str]]
) -> DataFrame:
    """Return a table of texts: the settings that differ between rows, the method, and `columns`.

    A column that contains only dashes is left out.

    frame: the setting and the method of each row.
    runs: the runs of the table, with a column for each option.
    columns: the texts of each further column.
    """
    shown = DataFrame(index=frame.index)
    for key in ROW:
        if key != "setting" and frame[key].nunique() > 1:
            in_words = IN_WORDS.get(key, {})
            shown[key] = [in_words.get(value, str(value)) for value in frame[key]]
    names = option_names(runs)
    options = runs.drop_duplicates(CELL).set_index(CELL)[names]
    shown[names] = frame[CELL].join(options, on=CELL)[names].replace("", NONE)
    shown["method"] = frame.method.map(method_name)
    for name, texts in columns.items():
        if set(texts) != {NONE}:
            shown[name] = list(texts)
    return shown


def answer(section: Section, paper: DataFrame | None = None) -> Table:
    """Return the table of methods. In each setting, the best method comes first.

    paper: published accuracies, see `paper.published`. Each is shown in the row with the same settings and epochs.
    """
    order = section.cells.assign(
        has_no_result=section.cells.n == 0,
        is_failing=section.cells.failing > 0,
        falling=-section.cells.accuracy,
    )
    keys = [*ROW, "has_no_result", "is_failing", "falling"]
    frame = order.sort_values(keys, kind="stable", ignore_index=True)
    rows = list(frame.itertuples())
    columns = {
        "lr": numbers(frame.lr, "g") + frame.lr_at_end.replace(".+", r" (\g<0>)", regex=True),
        "weight decay": numbers(frame.weight_decay.replace(0, math.nan), "g"),
        "n": frame.n.astype(str),
        "accuracy, %": [accuracy_text(row) for row in rows],
        "minus BP": [interval_text(*row) for row in frame[difference_names("bp")].to_numpy()],
        "minus DFA": [interval_text(*row) for row in frame[difference_names("dfa")].to_numpy()],
        "depth utility, %": [utility_text(row) for row in rows],
    }
    if paper is not None:
        published = frame.merge(paper, on=SETTINGS, how="left").published
        columns["paper, %"] = numbers(100 * published, ".2f")
        columns["minus paper"] = numbers(100 * (frame.accuracy - published), "+.2f")
    is_best = best_of_setting(frame)
    shown = with_settings(frame, section.runs, columns)
    comparisons = [
        MARK if is_best.any() else "",
        significance_text(frame, "bp"),
        significance_text(frame, "dfa"),
    ]
    comparison = " ".join(filter(None, comparisons))
    note = answer_caption(frame, section.runs)
    if frame.lr_at_end.any():
        note = f"{note} {AT_END}".strip()
    return Table("Methods", shown, note, is_best.tolist(), comparison)


def best_of_setting(frame: DataFrame) -> Series:
    """Return for each row whether its rounded accuracy is the highest of two or more methods without a failing run."""
    ranked = frame.accuracy.mask(frame.is_failing)
    in_setting = ranked.groupby([frame[key] for key in ROW])
    is_highest = ranked > in_setting.transform("max") - HALF_DIGIT
    has_others = in_setting.transform("count") > 1
    return is_highest & has_others


def significance_text(frame: DataFrame, control: str) -> str:
    """Return which methods differ significantly from a control: "Significantly different from BP: DFA, FA."

    Return "" if no method has an interval, or if the rows belong to several settings.
    """
    low, high = frame[f"low_{control}"], frame[f"high_{control}"]
    if low.isna().all() or len(frame[ROW].drop_duplicates()) > 1:
        return ""
    differing = frame.method[(low > 0) | (high < 0)]
    names = ", ".join(differing.map(method_name)) or "no method"
    return f"Significantly different from {method_name(control)}: {names}."


def answer_caption(frame: DataFrame, runs: DataFrame) -> str:
    """Return the unusual settings that all rows share, and the noise floors. runs: the runs of the section."""
    parts = common_words(frame, ["epochs", *USUAL])
    differing = [key for key in KIND if runs[key].nunique() > 1]
    kinds = runs[runs.shared != ""].drop_duplicates(KIND)
    for _, row in kinds.iterrows():
        names = [words(key, row[key]) for key in differing]
        kind = ", ".join(names)
        parts.append(f"{kind}: {row.shared}" if kind else row.shared)
    with_own = runs[runs.feedback_options != ""].drop_duplicates(["rule", "feedback_options"])
    for _, row in with_own.iterrows():
        parts.append(f"{method_name(row.rule)}: {row.feedback_options}")
    parts.append(noise_floor_text(frame))
    text = "; ".join(filter(None, parts))
    return f"{text[0].upper()}{text[1:]}." if text else ""


def noise_floor_text(frame: DataFrame) -> str:
    """Return the noise floor of one accuracy, or its range over the rows, as text; empty if unknown."""
    real = frame[(frame.n > 0) & ~frame.smoke]
    floors = 100 * compare.noise_floor(real.accuracy, real.test_images)
    if not floors.any():
        return ""
    span = f"{floors.min():.2f}"
    highest = f"{floors.max():.2f}"
    if span != highest:
        span += f" to {highest}"
    return f"noise floor √(p(1−p)/N) of one accuracy: {span} points"


def accuracy_text(row: Any) -> str:
    """Return a cell's accuracy, such as "66.56 ± 0.07 (2 of 3; 1 failed)", or the number of its runs by status."""
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
    """Return the tables that follow the table of methods. Empty tables are left out."""
    tables = [rates(section), alignment(section), stability(section)]
    return [table for table in tables if table is not None]


def rates(section: Section) -> Table | None:
    """Return accuracy by learning rate and weight decay; None if every method has a single grid point.

    Each grid point is a column or, if there are more than `MOST_RATES`, a row.
    """
    points = section.points[section.points.ended > 0]
    grid = ["lr", "weight_decay"]
    counts = points.groupby(CELL)[grid].nunique()
    if counts.le(1).all(axis=None):
        return None
    texts = [point_text(point) for point in points.itertuples()]
    points = points.assign(text=texts)
    caption = "Accuracy in percent (n seeds) at each point of the grid."
    if points.groupby(grid).ngroups > MOST_RATES:
        frame = ordered(points.sort_values(grid))
        columns = {
            "lr": numbers(frame.lr, "g"),
            "weight decay": numbers(frame.weight_decay.replace(0, math.nan), "g"),
            "accuracy, %": frame.text,
        }
        return Table("Rates", with_settings(frame, section.runs, columns), caption)
    table = points.pivot(index=CELL, columns=grid, values="text")
    table = table.fillna(NONE).sort_index(axis="columns")
    names = [f"lr {lr:g}" for lr, _ in table]
    if points.weight_decay.any():
        names = [f"lr {lr:g}, decay {decay:g}" for lr, decay in table]
    table = table.set_axis(names, axis="columns")
    table = ordered(table.reset_index())
    shown = with_settings(table, section.runs, table[names])
    return Table("Rates", shown, caption)


def point_text(point: Any) -> str:
    """Return the accuracy at a grid point: "98.3 (3)", "66.6 (1 of 3)", "fails (3 of 3)"."""
    if point.failing == point.ended:
        return f"fails ({point.ended} of {point.ended})"
    count = f"{point.n} of {point.ended}" if point.failing else point.n
    return f"{100 * point.accuracy:.2f} ({count})"


def alignment(section: Section) -> Table | None:
    """Return the cosine with BP of every layer, by learning rate; None if the cosine was not measured."""
    frame = compare.alignment(section.runs)
    if frame.empty:
        return None
    frame = ordered(frame).sort_values([*ROW, "lr"], kind="stable")
    columns = {"lr": numbers(frame.lr, "g"), "n": frame.n.astype(str)}
    for name in layer_names(frame, "cosine"):
        columns[name.replace("cosine/", "layer ")] = numbers(frame[name], "+.2f")
    columns["no signal"] = frame.no_signal.replace("", NONE)
    caption = "Cosine with BP's error signal."
    if frame.no_signal.any():
        caption += " No signal: layers where more than half of the samples have a zero signal."
    caption = f"{caption} {layers_sentence(section.runs)}".strip()
    shown = with_settings(frame, section.runs, columns)
    return Table("Alignment", shown, caption)


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
    of_ended = " of " + frame.ended.astype(str)
    first = frame.unstable.mask(frame.unstable != "", ": " + frame.unstable)
    columns["unstable runs"] = frame.unstable_runs.astype(str) + of_ended + first
    columns["failing runs"] = frame.failing.astype(str) + of_ended
    shown = with_settings(frame, section.runs, columns)
    caption = f"After the last epoch. {layers_sentence(section.runs)}".strip()
    return Table("Stability", shown, caption)


def largest(frame: DataFrame, quantity: str, style: str) -> Series:
    """Return for each row a text such as "12% (layer 3)": the largest value over the layers, and its layer."""
    values = frame[layer_names(frame, quantity)].dropna(how="all")
    names = values.idxmax(axis="columns").astype(str)
    layers = names.str.removeprefix(f"{quantity}/")
    highest = numbers(values.max(axis="columns"), style)
    texts = highest + " (layer " + layers + ")"
    return texts.reindex(frame.index, fill_value=NONE)


def notes(runs: DataFrame) -> list[str]:
    """Return a note for each status of the runs without an accuracy: their number, their methods, the first reason."""
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
    return texts
