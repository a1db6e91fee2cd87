"""Group runs into the lines of a figure, and choose the label, the colour and the dash of each line."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex
from pandas import DataFrame
from pandas.api.types import is_numeric_dtype

from dfl_experiments.report.choose import states
from dfl_experiments.report.frame import POINT, by_precedence
from dfl_experiments.report.labels import option_names
from dfl_experiments.report.style import (
    DASHES,
    PALETTE,
    USUAL,
    Look,
    common_words,
    looks_of,
    method_order,
    title_of,
    words,
)

# largest number of labels in the legend; with more, the legend explains only colours and dashes
MOST_LABELS = 6
# Columns that can appear in the label of a line. Options appear after FIRST_NAMES and before LAST_NAMES.
FIRST_NAMES = ("method", "model", "dataset", "augmentation")
LAST_NAMES = (
    "lr", "weight_decay", "epochs", "limit", "optimizer", "schedule", "precision", "protocol", "smoke",
)  # fmt: skip


def with_lines(frame: DataFrame, keys: Sequence[str], notes: list[str]) -> DataFrame:
    """Return the runs to draw, with the number of their line in the column `line`.

    Of several runs with the same settings and seed, one is drawn. If a line has finished runs, its other runs are left
    out.
    """
    point = [*POINT, *keys]
    frame = by_precedence(frame).drop_duplicates([*point, "seed"])
    frame["line"] = frame.groupby(point).ngroup()
    is_finished = frame.status == "finished"
    has_finished = is_finished.groupby(frame.line).transform("any")
    rest = frame[has_finished & ~is_finished]
    unfinished = frame[~has_finished]
    if len(rest):
        notes.append(f"Left out of the means: {states(rest.status)}.")
    if len(unfinished):
        notes.append(f"Not finished: {states(unfinished.status)}.")
    return frame.drop(rest.index)


def lines_of(frame: DataFrame, color: str | None, facet: str | None, notes: list[str]) -> DataFrame:
    """Return a table with one row for each line. The index is the line's number. The new columns are:

    facet: value of the key `facet`.
    heading: this value as a label.
    label: text with the values that differ between lines.
    look: colour and dash.
    legend: the line's text in the legend. It is the label or, if there are many labels, the meaning of the look.
    """
    lines = frame.drop_duplicates("line")
    lines = lines.set_index("line").sort_index()
    order = lines.method.map(method_order).sort_values(kind="stable")
    lines = lines.loc[order.index]
    lines["facet"] = lines[facet] if facet else ""
    lines["heading"] = in_words(lines, facet) if facet else ""
    columns = differing_columns(lines, color)
    lines["label"] = ""
    for column in columns:
        lines["label"] = lines.label.str.cat(in_words(lines, column), sep=", ")
    lines["label"] = lines.label.str.strip(", ")
    key = color or next(iter(columns), "method")
    lines["look"] = looks(lines, key)
    lines["legend"] = lines.label
    if lines.label.nunique() > MOST_LABELS and lines[key].nunique() < lines.label.nunique():
        lines["legend"] = in_words(lines, key)
        others = [column for column in columns if column != key]
        if others:
            notes.append(f"Lines with the same colour and dash differ in {', '.join(others)}.")
    return lines


def differing_columns(lines: DataFrame, color: str | None) -> list[str]:
    """Return the columns whose values differ between the lines of one facet."""
    names = [*FIRST_NAMES, *option_names(lines), *LAST_NAMES]
    if color and color not in names:
        names.append(color)
    counts = lines.groupby("facet")[names].nunique()
    return counts.columns[counts.max() > 1].tolist()


def in_words(lines: DataFrame, column: str) -> list[str]:
    """Return the values of a column as labels."""
    return [words(column, value) for value in lines[column]]


def looks(lines: DataFrame, key: str) -> list[Look]:
    """Return the look of each line. The value in the column `key` decides the colour.

    If there are few labels, lines of the same colour get different dashes.
    """
    values = sorted(lines[key].unique())
    if key == "method":
        by_method = looks_of(values)
        looks_of_values = [by_method[value] for value in values]
    elif is_numeric_dtype(lines[key]):
        colours = colormaps["viridis"](np.linspace(0, 0.85, len(values)))  # from dark to light
        looks_of_values = [Look(to_hex(colour)) for colour in colours]
    else:
        looks_of_values = [Look(PALETTE[index % len(PALETTE)]) for index in range(len(values))]
    by_value = dict(zip(values, looks_of_values, strict=True))
    by_label = dict(zip(lines.label, lines[key].map(by_value), strict=True))
    if len(set(by_label.values())) < len(by_label) <= MOST_LABELS:
        used: Counter[str] = Counter()
        for label, look in by_label.items():
            dash = DASHES[used[look.colour] % len(DASHES)]
            used[look.colour] += 1
            by_label[label] = Look(look.colour, dash)
    return [by_label[label] for label in lines.label]


def title(lines: DataFrame) -> str:
    """Return the title of a figure: nets and data sets, and method, rate and unusual settings that all lines share."""
    rows = lines.to_dict("records")
    titles = list(dict.fromkeys(title_of(row) for row in rows))
    if len(titles) > 3:
        titles = [f"{len(titles)} nets and data sets"]
    shared = common_words(lines, ["method", "lr", *USUAL])
    return " · ".join([*titles, *shared])
