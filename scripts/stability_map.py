"""Show at which learning rates each rule is stable: draw accuracy, activations and dead units against the rate.

`reference.py` writes the figure, and its page describes the runs. Each column of the figure shows one net on one data
set. A cross marks a rate at which a run fails.
"""

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dfl_experiments.report.choose import choose
from dfl_experiments.report.frame import layer_names
from dfl_experiments.report.style import (
    look_of,
    method_name,
    method_order,
    save,
    styled,
    title_of,
    words,
)

FOLDER = Path("outputs/reference/stability_map")
COLUMN = ["model", "dataset"]
LARGEST_RMS = 1e3  # upper end of the axis; a collapsing run can reach 1e8
ROWS = {
    "accuracy": "test accuracy, %",
    "rms": "activation rms,\nlargest of all layers",
    "dead": "dead units, %,\nlargest of all layers",
}


def points(frame: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each net, data set, rule and learning rate.

    A row has the means over the seeds of the quantities in `ROWS`. Its column `fails` says whether a run fails.
    """
    frame = frame.assign(
        accuracy=100 * frame.accuracy,
        rms=frame[layer_names(frame, "activation_rms")].max(axis=1).clip(upper=LARGEST_RMS),
        dead=100 * frame[layer_names(frame, "dead")].max(axis=1),
    )
    groups = frame.groupby([*COLUMN, "rule", "lr"])
    return groups[list(ROWS)].mean().assign(fails=groups.fails.any()).reset_index()


def best_rates(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a table of texts with a row for each rule and a column for each net and data set.

    A text is the mean test accuracy in percent over the seeds, ± their standard deviation, and the learning rate with
    the best validation accuracy. A rate at which a run fails counts only if a run fails at every rate; then the text is
    "fails".
    """
    texts: dict[str, dict[str, str]] = {}
    for (model, dataset), part in choose(frame).groupby(COLUMN):
        column = f"{words('dataset', dataset)}, {words('model', model)}"
        for rule, runs in part.groupby("rule"):
            accuracy = 100 * runs.accuracy
            spread = f" ± {accuracy.std():.1f}" if len(runs) > 1 else ""
            text = f"{accuracy.mean():.1f}{spread} ({lr_text(runs.lr.iloc[0])})"
            texts.setdefault(column, {})[str(rule)] = "fails" if runs.fails.any() else text
    table = pd.DataFrame(texts)[sorted(texts)]
    table = table.loc[sorted(table.index, key=method_order)]
    table.insert(0, f"best of {frame.lr.nunique()} rates", table.index.map(method_name))
    return table


def lr_text(lr: float) -> str:
    """Return a learning rate in the notation of the command line, such as "1.25e-4"."""
    digits, exponent = f"{lr:.2e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def figure(frame: pd.DataFrame) -> Figure:
    """Draw a column for each net and data set, and a row for each quantity of `ROWS`."""
    means = points(frame)
    titles = {key: title_of(part.iloc[0]) for key, part in frame.groupby(COLUMN)}
    drawing = Figure(figsize=(1.2 + 2.9 * len(titles), 7.2), layout="constrained")
    all_axes = drawing.subplots(len(ROWS), len(titles), sharex=True, sharey="row", squeeze=False)
    for column, (key, title) in enumerate(titles.items()):
        shown = means[(means.model == key[0]) & (means.dataset == key[1])]
        for line, (name, label) in enumerate(ROWS.items()):
            axes = all_axes[line][column]
            draw_rules(axes, shown, name)
            axes.set_ylabel(label if column == 0 else "")
        all_axes[0][column].set_title(title, fontsize=9)
        all_axes[1][column].set_yscale("log")
        all_axes[1][column].yaxis.set_major_formatter("{x:g}")
        rates = sorted(means.lr.unique())
        all_axes[-1][column].set(xlabel="learning rate × 10⁴", xscale="log")
        all_axes[-1][column].set_xticks(rates, [f"{1e4 * rate:g}" for rate in rates])
        all_axes[-1][column].minorticks_off()
    handles, labels = all_axes[0][0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return drawing


def draw_rules(axes: Axes, shown: pd.DataFrame, name: str) -> None:
    """Draw one quantity against the rate: a line for each rule, a cross where a run fails."""
    for rule in sorted(shown.rule.unique(), key=method_order):
        colour, dash = look_of(rule)
        curve = shown[shown.rule == rule].sort_values("lr")
        style = {"color": colour, "linestyle": dash, "label": method_name(rule)}
        axes.plot(curve.lr, curve[name], "o", **style)
        failing = curve[curve.fails]
        axes.plot(failing.lr, failing[name], "x", color="black", markersize=9)
    axes.plot([], [], "x", color="black", label="a run fails")


def runs_of_map(kept: pd.DataFrame) -> pd.DataFrame:
    """Return those of the kept runs that belong to the map."""
    return kept[kept.folder.str.startswith(str(FOLDER))]


def write_figure(kept: pd.DataFrame) -> None:
    """Draw the map from the kept runs."""
    with styled():
        save(figure(runs_of_map(kept)), FOLDER / "stability.png", dpi=120)
