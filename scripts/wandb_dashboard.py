"""The W&B workspace of a project: accuracy by method, alignment by iteration and layer, the grid, throughput.

    python scripts/wandb_dashboard.py --entity TEAM [--project dfl-experiments] [--layers 5] [--out dashboard.json]

Needs `pip install "dfl-experiments[dashboard]"` and a login (`wandb login`). Without a login, a network or an entity
the workspace's specification is written to a file, and the script says so.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from wandb.errors import Error as WandbError

try:
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as workspaces
except ModuleNotFoundError as error:
    raise SystemExit(f'error: {error.name} is missing: pip install "dfl-experiments[dashboard]"') from None

METHOD = panels.Config("method.name")


def lines(title: str, x: str, y: str, label: str) -> panels.LinePlot:
    """A metric over epochs or iterations, a curve for every method: mean and range over its runs."""
    return panels.LinePlot(
        title=title, x=x, y=[y], title_x=x, title_y=label, groupby=METHOD, groupby_aggfunc="mean",
        groupby_rangefunc="minmax", max_runs_to_show=100,
    )  # fmt: skip


def bars(title: str, key: str) -> panels.BarPlot:
    """A number of the runs' results, a bar for every method."""
    return panels.BarPlot(title=title, metrics=[panels.SummaryMetric(key)], groupby=METHOD, max_runs_to_show=100)


def dashboard(entity: str, project: str, layers: int) -> workspaces.Workspace:
    """The workspace. layers: how many hidden layers the alignment section has panels for."""
    accuracy = [
        lines("Test accuracy", "epoch", "test_accuracy", "test accuracy"),
        lines("Validation accuracy", "epoch", "validation_accuracy", "validation accuracy"),
        lines("Training loss", "epoch", "train_loss", "training loss"),
        bars("Accuracy that the protocol reports", "accuracy"),
    ]
    alignment = [
        lines(f"Layer {i}, {span}", span, f"{name}/{i}", "cosine with BP's error signal")
        for i in range(1, layers + 1)
        for span, name in (("iteration", "cosine_sample"), ("epoch", "cosine"))
    ]
    rate, decay = panels.Config("optimizer.lr"), panels.Config("optimizer.weight_decay")
    final = panels.SummaryMetric("accuracy")
    axes: dict[str, Any] = {"method": METHOD, "learning rate": rate, "weight decay": decay, "accuracy": final}
    columns = [panels.ParallelCoordinatesPlotColumn(metric, display_name=name) for name, metric in axes.items()]
    grid = [
        panels.ParallelCoordinatesPlot(title="Every point of the grid", columns=columns),
        panels.ScatterPlot(title="Accuracy over the learning rate", x=rate, y=final, log_x=True),
    ]
    speed = [bars("Samples per second", "samples_per_second"), bars("Seconds of training", "seconds")]
    sections: dict[str, list[Any]] = {
        "Accuracy by method": accuracy,
        "Alignment": alignment,
        "Grid": grid,
        "Throughput": speed,
    }
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name="Direct feedback learning",
        sections=[workspaces.Section(name=name, panels=those, is_open=True) for name, those in sections.items()],
        runset_settings=workspaces.RunsetSettings(
            filters=[workspaces.Tags().notin(["smoke"])],  # trials of the pipeline are no results
            groupby=[workspaces.Config(f"{group}.name") for group in ("dataset", "model", "method")],
        ),
    )


def main() -> None:
    """Make the workspace, or else the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entity", help="the user or team whose project it is")
    parser.add_argument("--project", default="dfl-experiments")
    parser.add_argument("--layers", type=int, default=5, help="hidden layers to show the alignment of (default: 5)")
    parser.add_argument("--out", type=Path, default=Path("dashboard.json"), help="the file, where it comes to that")
    asked = parser.parse_args()
    workspace = dashboard(asked.entity or "", asked.project, asked.layers)
    try:
        if not asked.entity:
            raise ValueError("no --entity")
        os.environ.setdefault("WANDB_SILENT", "true")
        workspace.save()
        print(f"workspace: {workspace.url}")
    except (WandbError, ValueError, OSError) as error:
        why = " ".join(str(error).split())
        asked.out.write_text(workspace._to_model().model_dump_json(indent=2, by_alias=True) + "\n")
        print(f"not saved to W&B ({why}); its specification is in {asked.out}")


if __name__ == "__main__":
    main()
