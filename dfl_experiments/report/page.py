"""The report as one HTML page that needs no network: tables that sort, plots that answer, every cell with its runs."""

import json
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader
from omegaconf import OmegaConf
from plotly.offline import get_plotlyjs

from dfl_experiments.report.cells import Entry, Section
from dfl_experiments.report.curves import Bars, Curves, Figure, HeatMap, Panel, Series
from dfl_experiments.report.paper import TITLES
from dfl_experiments.report.runs import Run
from dfl_experiments.report.tables import (
    COLUMNS,
    difference,
    hours_of,
    ours_and_paper,
    percent,
    row,
    rule,
    still_missing,
    wide,
)

FEW_EPOCHS = 10
CONFIG_LEFT_OUT = ("resume", "repeat", "force", "sweep", "data_dir")


def _line(one: Series) -> list[dict[str, Any]]:
    traces: list[dict[str, Any]] = []
    if one.low:
        band = {
            "x": [*one.x, *reversed(one.x)], "y": [*one.high, *reversed(one.low)], "fill": "toself", "opacity": 0.2,
            "fillcolor": one.colour, "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False, "mode": "lines",
        }  # fmt: skip
        traces.append(band)
    line = {"color": one.colour, "width": 2, "dash": "dash" if one.dashed else "solid"}
    mode = "lines+markers" if len(one.x) == 1 else "lines"
    traces.append({"x": one.x, "y": one.y, "name": one.name, "mode": mode, "line": line})
    return traces


def plot(panel: Panel) -> dict[str, Any]:
    """A panel as plotly's data and layout."""
    layout: dict[str, Any] = {"title": {"text": panel.title}, "xaxis": {"title": {"text": panel.x}}}
    if isinstance(panel, Curves):
        layout["yaxis"] = {"title": {"text": panel.y}} | ({"range": panel.y_range} if panel.y_range else {})
        if max((len(one.x) for one in panel.series), default=0) <= FEW_EPOCHS:
            layout["xaxis"]["dtick"] = 1  # no halves of epochs
        return {"data": [trace for one in panel.series for trace in _line(one)], "layout": layout}
    if isinstance(panel, HeatMap):
        row_index, column = panel.chosen
        frame = {
            "type": "rect", "x0": column - 0.5, "x1": column + 0.5, "y0": row_index - 0.5, "y1": row_index + 0.5,
            "line": {"color": "#D55E00", "width": 4},
        }  # fmt: skip
        layout |= {"shapes": [frame], "yaxis": {"title": {"text": panel.y}, "autorange": "reversed"}}
        layout["xaxis"] |= {"type": "category"}
        layout["yaxis"] |= {"type": "category"}
        heat = {
            "type": "heatmap", "x": panel.columns, "y": panel.rows, "z": panel.values, "text": panel.labels,
            "zmin": panel.scale[0] - 0.01, "zmax": panel.scale[1] + 0.01,
            "texttemplate": "%{text}", "colorscale": "Cividis", "hoverongaps": False,
        }  # fmt: skip
        return {"data": [heat], "layout": layout}
    assert isinstance(panel, Bars)
    layout["yaxis"] = {"autorange": "reversed"}
    bars = {
        "type": "bar", "orientation": "h", "y": panel.names, "x": panel.values, "marker": {"color": panel.colours},
        "text": [f"{value:,.0f}" for value in panel.values],
    }  # fmt: skip
    return {"data": [bars], "layout": layout}


def anchor(number: int, entry: Entry) -> str:
    """The id of an entry's place in the page."""
    return "-".join([f"cell{number}", *entry.cell])


def _run(run: Run) -> dict[str, Any]:
    config = {key: value for key, value in run.config.items() if key not in CONFIG_LEFT_OUT}
    return {
        "folder": str(run.folder),
        "seed": run.config.seed,
        "lr": f"{run.axes[0]:g}",
        "weight_decay": f"{run.axes[1]:g}",
        "status": run.status,
        "reason": run.reason,
        "epochs": f"{run.result.get('epochs', len(run.epochs.get('epoch', [])))} of {run.config.epochs}",
        "accuracy": percent(run.result.get("accuracy")),
        "commit": str(run.result.get("git_commit") or "")[:12],
        "device": run.result.get("device") or "",
        "minutes": f"{(run.result.get('seconds') or 0) / 60:.1f}",
        "config": OmegaConf.to_yaml(OmegaConf.create(config)),
    }


def _entry(number: int, entry: Entry) -> dict[str, Any]:
    numbers = {"ours": entry.mean, "±": entry.deviation, "paper": entry.paper, "difference": difference(entry)}
    numbers |= {"hours": hours_of(entry), "at best val.": entry.at_best_validation}
    numbers |= {"lr": entry.best.lr, "weight decay": entry.best.weight_decay} if entry.best else {}
    cells = dict(zip(COLUMNS, row(entry), strict=True))
    return {
        "anchor": anchor(number, entry),
        "title": ", ".join(entry.cell),
        "state": entry.state,
        # what a column is sorted by: the number itself, and nothing where there is none
        "cells": [
            (name, text, numbers.get(name) if name in (*numbers, "lr", "weight decay") else text)
            for name, text in cells.items()
        ],
        "runs": [_run(run) for run in entry.runs],
    }


def _tables(number: int, section: Section) -> list[dict[str, Any]]:
    tables = []
    for name, title in TITLES.items():
        entries = section.table(name)
        missing = still_missing(section, name)
        if entries or missing:
            header, rows = wide(section, name, ours_and_paper)
            tables.append({
                "title": title, "header": header, "wide": rows, "columns": COLUMNS, "missing": missing,
                "entries": [_entry(number, entry) for entry in entries],
                "anchors": {(*entry.cell[:3], entry.cell.method): anchor(number, entry) for entry in entries},
            })  # fmt: skip
    return tables


def page(sections: Sequence[Section], figures: Sequence[Sequence[Figure]], title: str) -> str:
    """The whole page. figures: those of each section."""
    plots: list[dict[str, Any]] = []
    shown = []
    for number, (section, those) in enumerate(zip(sections, figures, strict=True)):
        drawn = []
        for figure in those:
            first = len(plots)
            plots += [plot(panel) for panel in figure.panels]
            drawn.append({"title": figure.title, "note": figure.note, "plots": range(first, len(plots))})
        tables, smoke = _tables(number, section), section.setting.smoke
        shown.append({
            "id": f"section{number}", "title": section.setting.title, "rule": rule(section), "smoke": smoke,
            "tables": tables, "figures": drawn,
        })  # fmt: skip
    environment = Environment(loader=PackageLoader("dfl_experiments.report", "."), autoescape=True, trim_blocks=True)
    # a script's text ends at the first "</", wherever that stands
    data = json.dumps(plots, ensure_ascii=False, allow_nan=False).replace("</", "<\\/")
    return environment.get_template("page.html").render(
        title=title, sections=shown, plots=data, plotly=get_plotlyjs(), any_smoke=any(s["smoke"] for s in shown)
    )
