"""Create the W&B workspace of a project. It shows accuracy, alignment, stability, learning rates and throughput.

    python scripts/wandb_dashboard.py --entity TEAM [--project dfl-experiments] [--layers 5] [--out dashboard.json]

The script needs `pip install "dfl-experiments[dashboard]"` and a login (`wandb login`). If the login, the network or
the entity is missing, the script writes the specification of the workspace to a file, and prints the reason.
"""

import argparse
import os
from pathlib import Path
from typing import Any

try:
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as workspaces
    from wandb.errors import Error as WandbError
except ModuleNotFoundError as error:
    raise SystemExit(f'{error}; run: pip install "dfl-experiments[dashboard]"') from error

METHOD = panels.Config("method.name")
STABILITY = {
    "dead": "share of units that are 0 for every image",
    "activation_rms": "root mean square of h",
    "norm_ratio": "‖δ‖ / ‖δ of BP‖",
}


def lines(title: str, x: str, y: str, label: str) -> panels.LinePlot:
    """Return a plot of a metric over epochs or iterations.

    A line shows the mean over the runs of a method. A band shows the range of these runs.

    x: "epoch" or "iteration". y: name of the metric. label: label of the y axis.
    """
    return panels.LinePlot(
        title=title, x=x, y=[y], title_x=x, title_y=label, groupby=METHOD, groupby_aggfunc="mean",
        groupby_rangefunc="minmax", max_runs_to_show=100,
    )  # fmt: skip


def bars(title: str, key: str) -> panels.BarPlot:
    """Return a bar plot of one result of the runs, with a bar for each method.

    key: name of the result.
    """
    return panels.BarPlot(
        title=title, metrics=[panels.SummaryMetric(key)], groupby=METHOD, max_runs_to_show=100
    )


def dashboard(entity: str, project: str, layers: int) -> workspaces.Workspace:
    """Return the workspace of a project.

    entity: user or team in W&B.
    layers: number of hidden layers for which alignment and stability are shown.
    """
    accuracy = [
        lines("Test accuracy", "epoch", "test_accuracy", "test accuracy"),
        lines("Validation accuracy", "epoch", "validation_accuracy", "validation accuracy"),
        lines("Training loss", "epoch", "train_loss", "training loss"),
        bars("Accuracy: depth utility is (rule − Shallow) / (BP − Shallow)", "accuracy"),
    ]
    alignment = []
    for i in range(1, layers + 1):
        for span, name in (("iteration", "cosine_sample"), ("epoch", "cosine")):
            alignment.append(
                lines(f"Layer {i}, {span}", span, f"{name}/{i}", "cosine with BP's error signal")
            )
    stability = []
    for i in range(1, layers + 1):
        for name, label in STABILITY.items():
            stability.append(lines(f"Layer {i}, {name}", "epoch", f"{name}/{i}", label))
    rate, decay = panels.Config("optimizer.lr"), panels.Config("optimizer.weight_decay")
    final = panels.SummaryMetric("accuracy")
    axes: dict[str, Any] = {
        "method": METHOD,
        "learning rate": rate,
        "weight decay": decay,
        "accuracy": final,
    }
    columns = [
        panels.ParallelCoordinatesPlotColumn(metric, display_name=name)
        for name, metric in axes.items()
    ]
    grid = [
        panels.ParallelCoordinatesPlot(title="Every point of the grid", columns=columns),
        panels.ScatterPlot(title="Accuracy over the learning rate", x=rate, y=final, log_x=True),
    ]
    speed = [bars("Images/s", "samples_per_second"), bars("Seconds of training", "seconds")]
    sections: dict[str, list[Any]] = {
        "Accuracy by method": accuracy,
        "Alignment": alignment,
        "Stability": stability,
        "Grid": grid,
        "Throughput": speed,
    }
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name="Direct feedback learning",
        sections=[
            workspaces.Section(name=name, panels=plots, is_open=True)
            for name, plots in sections.items()
        ],
        runset_settings=workspaces.RunsetSettings(
            # leave out smoke runs, which only test the pipeline
            filters=[workspaces.Tags().notin(["smoke"])],
            groupby=[
                workspaces.Config(f"{group}.name") for group in ("dataset", "model", "method")
            ],
        ),
    )


def main() -> None:
    """Save the workspace to W&B, or write its specification to a file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entity", help="user or team that owns the project")
    parser.add_argument("--project", default="dfl-experiments", help="default: %(default)s")
    parser.add_argument(
        "--layers",
        type=int,
        default=5,
        help="number of hidden layers to show (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("dashboard.json"),
        help="output file (default: %(default)s)",
    )
    options = parser.parse_args()
    workspace = dashboard(options.entity or "", options.project, options.layers)
    try:
        if not options.entity:
            raise ValueError("no --entity")
        os.environ.setdefault("WANDB_SILENT", "true")
        workspace.save()
        print(f"workspace: {workspace.url}")
    except (WandbError, ValueError, OSError) as error:
        why = " ".join(str(error).split())
        options.out.write_text(
            workspace._to_model().model_dump_json(indent=2, by_alias=True) + "\n"
        )
        print(f"not saved to W&B ({why}); its specification is in {options.out}")


if __name__ == "__main__":
    main()
