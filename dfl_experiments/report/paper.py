"""What the paper reports: 69 accuracies in two tables (Yang, Lee, Park: *Direct Feedback Learning With Local Alignment
Support*, IEEE Access, 2024). Its captions are swapped, so they go by "FC table" and "CNN table" here."""

import csv
from pathlib import Path

from dfl_experiments.report.runs import Cell

TITLES = {"fc": "FC table", "cnn": "CNN table", "other": "Other runs, in no table of the paper's"}
METHODS = ("bp", "shallow", "dfa", "las", "ltas")


def published() -> dict[str, dict[Cell, float]]:
    """The accuracy of every cell, a fraction, by table."""
    tables: dict[str, dict[Cell, float]] = {"fc": {}, "cnn": {}}
    with Path(__file__).with_name("paper_tables.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            tables[row["table"]][Cell(*(row[name] for name in Cell._fields))] = float(row["accuracy"])
    return tables


PAPER = published()


def table_of(cell: Cell) -> str:
    """The table that a cell's row belongs to: "fc", "cnn", or "other"."""
    return next((name for name, cells in PAPER.items() if any(cell[:3] == other[:3] for other in cells)), "other")
