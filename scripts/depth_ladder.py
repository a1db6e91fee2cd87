"""Show how deep each rule trains: accuracy against depth for two initialisations, and the audit beside it.

    python scripts/depth_ladder.py                        print the table and draw the figure from the kept summary
    python scripts/depth_ladder.py --collect A B          write the summary anew from the folders of two sweeps

The runs are those of `dfl-train --multirun experiment=depth_digits` and of the same with `model.init=kaiming
sweep=depth_digits_kaiming`. Thousands of folders become one summary.csv with a row for each run.
"""

import argparse
from pathlib import Path

import pandas as pd

from dfl_experiments.report.frame import layer_names, runs, with_key
from dfl_experiments.report.style import FAMILIES, FAMILY_COLOURS, method_name, method_order

KEPT = Path("outputs/reference/depth_digits")
COLUMNS = ["init", "depth", "rule", "lr", "seed", "status", "accuracy", "validation_accuracy", "fails"]
AUDIT = {"cosine/1": "cosine with BP, layer 1", "dead": "dead units, worst layer"}
INITS = {"default": "PyTorch's default initialisation", "kaiming": "He initialisation"}
SINGLE = ("bp", "shallow")  # drawn by themselves, the others by family


def collected(folders: list[Path]) -> pd.DataFrame:
    """Return one row for each run: depth is the number of hidden layers, `dead` the largest share over the layers."""
    parts = []
    for folder in folders:
        frame = with_key(runs(folder), "model.widths")
        frame["init"] = with_key(frame, "model.init")["model.init"] if "kaiming" in folder.name else "default"
        frame["depth"] = frame["model.widths"].str.count(",") + 1
        frame["dead"] = frame[layer_names(frame, "dead")].max(axis=1)
        parts.append(frame[[*COLUMNS, "cosine/1", "norm_ratio/1", "dead"]])
    return pd.concat(parts).sort_values(COLUMNS[:5], ignore_index=True)


def at_best_rate(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the runs at the rate that is best on the validation split, for each rule, depth and initialisation."""
    cell = ["init", "depth", "rule"]
    scores = summary.groupby([*cell, "lr"], as_index=False).validation_accuracy.mean()
    best = scores.loc[scores.groupby(cell).validation_accuracy.idxmax(), [*cell, "lr"]]
    return summary.merge(best, on=[*cell, "lr"])


def table(summary: pd.DataFrame) -> pd.DataFrame:
    """Return mean test accuracy in percent by rule (rows) and by initialisation and depth (columns)."""
    means = at_best_rate(summary).pivot_table("accuracy", "rule", ["init", "depth"]) * 100
    order = sorted(means.index, key=method_order)
    return means.loc[order].round(1)


def markdown(summary: pd.DataFrame) -> str:
    """Return the table for a page in Markdown."""
    frame = table(summary)
    frame.index = [method_name(rule) for rule in frame.index]
    frame.columns = [f"{init}, {depth} layers" for init, depth in frame.columns]
    return frame.rename_axis("rule").to_markdown(floatfmt=".1f")


def figure(summary: pd.DataFrame):
    """Draw accuracy, cosine and dead units against depth: a thin line for each rule, a thick one for each family."""
    from matplotlib.figure import Figure

    chosen = at_best_rate(summary)
    quantities = {"accuracy": "test accuracy", **AUDIT}
    inits = [init for init in INITS if init in set(chosen["init"])]
    drawing = Figure(figsize=(4.6 * len(inits), 7.4), layout="constrained")
    all_axes = drawing.subplots(len(quantities), len(inits), sharex=True, sharey="row", squeeze=False)
    for column, init in enumerate(inits):
        for line, (name, label) in enumerate(quantities.items()):
            axes = all_axes[line][column]
            means = chosen[chosen["init"] == init].pivot_table(name, "depth", "rule")
            for family, members in FAMILIES.items():
                colour = FAMILY_COLOURS[family]
                present = means[[rule for rule in members if rule in means]]
                for rule in present:
                    look = {"linewidth": 2.0, "label": method_name(rule)} if rule in SINGLE else {"linewidth": 0.6}
                    dash = "--" if rule == "shallow" else "-"
                    axes.plot(present[rule], color=colour, linestyle=dash, **look)
                if family != "backpropagation":
                    axes.plot(present.mean(axis=1), color=colour, linewidth=2.4, label=family)
            axes.set_ylabel(label if column == 0 else "")
            axes.grid(alpha=0.3)
        all_axes[0][column].set_title(INITS[init])
        all_axes[-1][column].set(xlabel="hidden layers", xticks=sorted(chosen.depth.unique()))
    handles, labels = all_axes[0][0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return drawing


def main() -> None:
    """Read the command line; collect, or print the table and write the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collect", type=Path, nargs="+", metavar="FOLDER", help="sweeps to write the summary from")
    parser.add_argument("--out", type=Path, default=KEPT, metavar="FOLDER", help="default: %(default)s")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    if asked.collect:
        collected(asked.collect).to_csv(asked.out / "summary.csv", index=False, float_format="%.6g")
    summary = pd.read_csv(asked.out / "summary.csv")
    print(markdown(summary))
    from dfl_experiments.report.style import save

    save(figure(summary), asked.out / "depth.png", dpi=120)
    print(asked.out / "depth.png")


if __name__ == "__main__":
    main()
