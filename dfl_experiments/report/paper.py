"""Read the 69 accuracies in the two tables of the paper.

Source: Yang, Lee, Park: "Direct Feedback Learning With Local Alignment Support", IEEE Access, 2024. The captions of its
two tables are swapped; here the tables are named "fc" and "cnn".
"""

from pathlib import Path

import pandas as pd
from pandas import DataFrame

from dfl_experiments.report.labels import conf_values
from dfl_experiments.report.run_record import ALL_IMAGES
from dfl_experiments.report.style import method_name, title_of

ROWS = ["dataset", "augmentation", "model"]
# A run is compared with a published accuracy if both have equal values in these columns.
SETTINGS = [*ROWS, "method", "epochs", "limit", "optimizer", "schedule", "is_default"]


def published() -> DataFrame:
    """Return the published accuracies as fractions of 1. The other columns hold the settings of a comparable run."""
    frame = pd.read_csv(Path(__file__).with_name("paper_tables.csv"))
    frame = frame.rename(columns={"accuracy": "published"})
    frame["epochs"] = frame.dataset.map(lambda name: conf_values("dataset", name)["epochs"])
    frame["limit"] = ALL_IMAGES
    frame["optimizer"] = "adam"
    frame["schedule"] = "step"
    frame["is_default"] = True
    frame["smoke"] = False
    return frame


def missing(runs: DataFrame) -> list[str]:
    """Return one line for each incomplete row of the paper's tables. The line names the methods without a run."""
    mine = runs.loc[~runs.smoke, SETTINGS].drop_duplicates()
    paper = published().merge(mine, on=SETTINGS, how="left", indicator="source")
    lines = []
    for _, row in paper.groupby(ROWS, sort=False):
        absent = row.method[row.source == "left_only"]
        if absent.empty:
            continue
        names = ", ".join(map(method_name, absent))
        state = "not begun" if len(absent) == len(row) else f"missing {names}"
        first = row.iloc[0]
        lines.append(f"{title_of(first)} ({first.epochs} epochs): {state}")
    return lines
