"""Read what the paper reports: 69 accuracies in two tables.

Source: Yang, Lee, Park: "Direct Feedback Learning With Local Alignment Support", IEEE Access, 2024. The captions of its
two tables are swapped, so they go by "fc" and "cnn" here.
"""

from pathlib import Path

import pandas as pd

from dfl_experiments.report.frame import conf_values
from dfl_experiments.report.style import method_name, title_of

ROWS = ["dataset", "augmentation", "model"]


def published() -> pd.DataFrame:
    """Return the published accuracies as fractions, with the settings that a run must have to stand beside one."""
    frame = pd.read_csv(Path(__file__).with_name("paper_tables.csv"))
    frame["epochs"] = [int(conf_values("dataset", name)["epochs"]) for name in frame.dataset]
    return frame.assign(optimizer="adam", setting="", smoke=False).rename(columns={"accuracy": "published"})


def missing(runs: pd.DataFrame) -> list[str]:
    """Return a line for each row of the paper's tables that is not complete: which methods are missing."""
    keys = [*ROWS, "method", "epochs", "optimizer", "setting"]
    mine = runs.loc[~runs.smoke, keys].drop_duplicates()
    paper = published().merge(mine, on=keys, how="left", indicator="source")
    lines = []
    for _, row in paper.groupby(ROWS, sort=False):
        absent = row.method[row.source == "left_only"]
        if absent.empty:
            continue
        names = ", ".join(map(method_name, absent))
        state = "not begun" if len(absent) == len(row) else f"missing {names}"
        lines.append(f"{title_of(row.iloc[0])} ({row.epochs.iloc[0]} epochs): {state}")
    return lines
