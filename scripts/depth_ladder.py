"""Show up to which depth each rule trains: draw accuracy, alignment and dead units against depth.

    python scripts/depth_ladder.py                        print the table and draw the figure from the kept summary
    python scripts/depth_ladder.py --collect A B          write the runs of these sweeps to the summary first

There is one sweep for each of two initialisations. The first sweep is `dfl-train --multirun experiment=depth_digits`.
The second sweep is the same command with `model.init=kaiming sweep=depth_digits_kaiming`.

The summary is a CSV file with a row for each run. `--collect` adds the runs of the given sweeps. A run with the same
initialisation, depth, rule, rate and seed replaces the earlier one.
"""

import argparse
from pathlib import Path

import pandas as pd
from families import FAMILIES, FAMILY_COLOURS
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dfl_experiments.configuration.refusals import refusing
from dfl_experiments.report.frame import layer_names, runs, with_key
from dfl_experiments.report.style import method_name, method_order, save

SUMMARY = Path("outputs/reference/depth_digits/summary.csv")
KEY = ["init", "depth", "rule", "lr", "seed"]
CELL = ["init", "depth", "rule"]
COLUMNS = [*KEY, "status", "accuracy", "validation_accuracy", "fails"]
AUDIT = {"cosine/1": "cosine with BP, layer 1", "dead": "dead units, worst layer"}
INITS = {"default": "PyTorch's initialisation", "kaiming": "He initialisation"}
SINGLE = ("bp", "shallow")  # rules with thick lines; the others have thin lines


def collected(folders: list[Path]) -> pd.DataFrame:
    """Return one row for each run.

    depth: number of hidden layers. dead: largest share of dead units over the layers.
    """
    parts = []
    for folder in folders:
        frame = with_key(runs(folder), "model.widths")
        frame["init"] = frame.config.map(lambda config: config.get("model.init", "default"))
        frame["depth"] = frame["model.widths"].str.count(",") + 1
        frame["dead"] = frame[layer_names(frame, "dead")].max(axis=1)
        parts.append(frame[[*COLUMNS, "cosine/1", "norm_ratio/1", "dead"]])
    return pd.concat(parts)


def with_collected(summary: pd.DataFrame, folders: list[Path]) -> pd.DataFrame:
    """Return the summary with the runs of these sweeps. They replace runs with the same values of `KEY`."""
    every = pd.concat([summary, collected(folders)])
    return every.drop_duplicates(KEY, keep="last").sort_values(KEY, ignore_index=True)


def at_best_rate(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the runs of each combination of rule, depth and initialisation at its best learning rate.

    The best rate has the highest validation accuracy. A rate with a failing run is used only if every rate has one. A
    rate at which all runs fail is used only if all runs fail at every rate.
    """
    rates = summary.groupby([*CELL, "lr"], as_index=False).agg(
        score=("validation_accuracy", "mean"), fails=("fails", "any"), all_fail=("fails", "all")
    )
    ordered = rates.sort_values(["fails", "all_fail", "score"], ascending=[True, True, False])
    best = ordered.drop_duplicates(CELL)[[*CELL, "lr"]]
    return summary.merge(best, on=[*CELL, "lr"])


def without_failing(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs that do not fail. If all runs of a cell fail, all of them are kept."""
    all_fail = runs.groupby(CELL).fails.transform("all")
    return runs[~runs.fails | all_fail]


def cell_text(cell: pd.DataFrame, lowest: float, highest: float) -> str:
    """Return the mean test accuracy in percent over the runs that do not fail: "26.7 ▲ (2 of 3 fail)".

    lowest, highest: the ends of the grid of learning rates. ▼ or ▲ marks a cell whose best rate is at this end.
    """
    text = f"{100 * without_failing(cell).accuracy.mean():.1f}"
    failing = cell.fails.sum()
    rate = cell.lr.iloc[0]
    if failing < len(cell) and rate == lowest:
        text += " ▼"
    if failing < len(cell) and rate == highest:
        text += " ▲"
    return f"{text} ({failing} of {len(cell)} fail)" if failing else text


def markdown(summary: pd.DataFrame) -> str:
    """Return a table in Markdown: a row for each rule, a column for each combination of initialisation and depth."""
    texts: dict[str, dict[str, str]] = {}
    for (init, depth, rule), cell in at_best_rate(summary).groupby(CELL):
        column = f"{init}, {depth} layers"
        text = cell_text(cell, summary.lr.min(), summary.lr.max())
        texts.setdefault(column, {})[str(rule)] = text
    table = pd.DataFrame(texts)
    table = table.loc[sorted(table.index, key=method_order)]
    table.insert(0, "rule", table.index.map(method_name))
    return table.to_markdown(index=False, disable_numparse=True)


def draw_rules(axes: Axes, means: pd.DataFrame) -> None:
    """Draw a thin line for each rule and a thick line for the mean of each family.

    means: one column for each rule.
    """
    for family, members in FAMILIES.items():
        colour = FAMILY_COLOURS[family]
        present = means[[rule for rule in members if rule in means]]
        for rule in present:
            width, label = (2.0, method_name(rule)) if rule in SINGLE else (0.6, None)
            dash = "--" if rule == "shallow" else "-"
            axes.plot(present[rule], dash, color=colour, linewidth=width, label=label)
        if family != "backpropagation":
            axes.plot(present.mean(axis=1), color=colour, linewidth=2.4, label=family)
    axes.grid(alpha=0.3)


def figure(summary: pd.DataFrame) -> Figure:
    """Draw accuracy, cosine and dead units against depth, with a column for each initialisation.

    The accuracy is the mean over all runs, so that a rule does not seem better where only few of its runs survive. The
    other quantities are means over the runs that do not fail.
    """
    every = at_best_rate(summary)
    chosen = without_failing(every)
    quantities = {"accuracy": "test accuracy", **AUDIT}
    inits = [init for init in INITS if init in set(chosen["init"])]
    drawing = Figure(figsize=(4.6 * len(inits), 7.4), layout="constrained")
    all_axes = drawing.subplots(
        len(quantities), len(inits), sharex=True, sharey="row", squeeze=False
    )
    for column, init in enumerate(inits):
        for axes, name in zip(all_axes[:, column], quantities, strict=True):
            drawn = every if name == "accuracy" else chosen
            of_init = drawn[drawn["init"] == init]
            draw_rules(axes, of_init.pivot_table(name, "depth", "rule"))
        all_axes[0, column].set_title(INITS[init])
        all_axes[-1, column].set(xlabel="hidden layers", xticks=sorted(chosen.depth.unique()))
    for axes, label in zip(all_axes[:, 0], quantities.values(), strict=True):
        axes.set_ylabel(label)
    handles, labels = all_axes[0, 0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return drawing


def main() -> None:
    """With --collect, write the summary. Then print the table and write the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--collect",
        type=Path,
        nargs="+",
        metavar="FOLDER",
        help="folders of sweeps for a new summary",
    )
    folders = parser.parse_args().collect
    with refusing("depth_ladder.py"):
        if folders:
            summary = with_collected(pd.read_csv(SUMMARY), folders)
            summary.to_csv(SUMMARY, index=False, float_format="%.6g")
        print(markdown(pd.read_csv(SUMMARY)))
        write_figure()


def write_figure() -> None:
    """Draw the figure of the summary."""
    save(figure(pd.read_csv(SUMMARY)), SUMMARY.with_name("depth.png"), dpi=120)


if __name__ == "__main__":
    main()
