"""Group runs into the lines of a figure, and choose the label, the colour and the dash of each line."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from pandas.api.types import is_numeric_dtype

from dfl_experiments.report.choose import states
from dfl_experiments.report.frame import POINT
from dfl_experiments.report.labels import option_names
from dfl_experiments.report.style import (
    DASHES,
    PALETTE,
    Look,
    family_of,
    gradient,
    look_of,
    title_of,
    words,
)

# largest number of labels in the legend; with more, the legend explains only the colours
MOST_LABELS = 6
# Columns that can appear in the label of a line. Options appear after FIRST_NAMES and before LAST_NAMES.
FIRST_NAMES = ("method", "model", "dataset", "augmentation")
LAST_NAMES = (
    "lr", "weight_decay", "epochs", "limit", "optimizer", "schedule", "precision", "protocol", "smoke", "origin",
)  # fmt: skip


def with_lines(frame: pd.DataFrame, keys: Sequence[str], notes: list[str]) -> pd.DataFrame:
    """Return the runs to draw, with the columns `line` and `origin`.

    line: number of the line that the run belongs to.
    origin: name of the run's folder, if there is another run with the same settings and seed; else empty.

    If a line has finished runs, its other runs are left out. Sentences about unfinished runs are added to `notes`.
    """
    point = list(dict.fromkeys([*POINT, *keys, "origin"]))
    frame = frame.reset_index(drop=True).assign(origin="")
    paths = [Path(folder).absolute() for folder in frame.folder]
    parents, names = [path.parent.name for path in paths], [path.name for path in paths]
    for origins in (parents, names, frame.folder):
        is_repeated = frame.duplicated([*point, "seed"], keep=False)
        if not is_repeated.any():
            break
        line = frame.groupby(point, dropna=False).ngroup()
        is_ambiguous = is_repeated.groupby(line).transform("any")
        frame["origin"] = frame.origin.mask(is_ambiguous, origins)
    frame["line"] = frame.groupby(point, dropna=False).ngroup()
    is_finished = frame.status == "finished"
    has_finished = is_finished.groupby(frame.line).transform("any")
    rest = frame[has_finished & ~is_finished]
    unfinished = frame[~has_finished]
    if len(rest):
        notes.append(f"Left out of the means: {states(rest.status)}.")
    if len(unfinished):
        notes.append(f"Not finished: {states(unfinished.status)}.")
    return frame.drop(rest.index)


def lines_of(
    frame: pd.DataFrame, color: str | None, facet: str | None, notes: list[str]
) -> pd.DataFrame:
    """Return a table with one row for each line. The index is the line's number. The new columns are:

    facet: value of the key `facet`.
    heading: this value as a label.
    label: text with the values that differ between lines.
    look: colour and dash.
    legend: the line's text in the legend. It is the label or, if there are many lines, the meaning of the colour.
    """
    lines = frame.drop_duplicates("line").set_index("line").sort_index()
    lines["facet"] = lines[facet] if facet else ""
    lines["heading"] = in_words(lines, facet) if facet else ""
    columns = differing_columns(lines, color)
    texts = [in_words(lines, column) for column in columns]
    lines["label"] = (
        [", ".join(filter(None, row)) for row in zip(*texts, strict=True)] if texts else ""
    )
    key = color or next(iter(columns), "label")
    lines["look"] = looks(lines, key)
    lines["legend"] = lines.label
    if lines.label.nunique() > MOST_LABELS:
        lines["legend"] = in_words(lines, key)
        others = ["folder" if column == "origin" else column for column in columns if column != key]
        notes.append(f"Lines of one colour differ in {', '.join(others)}.")
    if lines.legend.nunique() > MOST_LABELS and key == "method":
        lines["legend"] = lines.method.map(family_of)
        lines["look"] = [Look(look.colour) for look in lines["look"]]
    return lines


def differing_columns(lines: pd.DataFrame, color: str | None) -> list[str]:
    """Return the columns whose values differ between the lines of one facet."""
    names = [*FIRST_NAMES, *option_names(lines), *LAST_NAMES]
    if color and color not in names:
        names.append(color)
    counts = lines.groupby("facet")[names].nunique()
    return counts.columns[counts.max() > 1].tolist()


def in_words(lines: pd.DataFrame, column: str) -> list[str]:
    """Return the values of a column as labels."""
    return [words(column, value) for value in lines[column]]


def looks(lines: pd.DataFrame, key: str) -> list[Look]:
    """Return the look of each line. The value in the column `key` decides the colour.

    If there are few labels, lines of the same colour get different dashes.
    """
    values = sorted(lines[key].unique())
    is_number = is_numeric_dtype(lines[key])
    by_value = {}
    for index, value in enumerate(values):
        if key == "method":
            by_value[value] = look_of(value)
        elif is_number:
            by_value[value] = gradient(index, len(values))
        else:
            by_value[value] = Look(PALETTE[index % len(PALETTE)])
    by_label = dict(zip(lines.label, lines[key].map(by_value), strict=True))
    is_ambiguous = len(set(by_label.values())) < len(by_label)
    if is_ambiguous and len(by_label) <= MOST_LABELS:
        colours = [look.colour for look in by_label.values()]
        for index, label in enumerate(by_label):
            colour = colours[index]
            dash = colours[:index].count(colour)
            by_label[label] = Look(colour, DASHES[dash % len(DASHES)])
    return [by_label[label] for label in lines.label]


def title(lines: pd.DataFrame) -> str:
    """Return the title of a figure: nets and data sets, method, learning rate.

    If there are more than three pairs of net and data set, the title only gives their number. The method is left out if
    it differs between lines. The learning rate is also left out if it differs.
    """
    titles = list(dict.fromkeys(title_of(row) for row in lines.to_dict("records")))
    if len(titles) > 3:
        titles = [f"{len(titles)} nets and data sets"]
    for column in ("method", "lr"):
        if lines[column].nunique() == 1:
            titles.append(words(column, lines[column].iloc[0]))
    return " · ".join(titles)
