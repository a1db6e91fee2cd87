"""The report as one HTML page that needs no network: tables that sort, plots that answer, every cell with its runs."""

import base64
import gzip
import html
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader
from omegaconf import OmegaConf
from plotly.offline import get_plotlyjs

from dfl_experiments.report.cells import Section, by_row, methods_of
from dfl_experiments.report.commands import command
from dfl_experiments.report.findings import by_claim, findings
from dfl_experiments.report.outcomes import figures
from dfl_experiments.report.panels import Curves, Figure, HeatMap, Panel, Points, Series
from dfl_experiments.report.paper import TITLES
from dfl_experiments.report.runs import Run
from dfl_experiments.report.tables import (
    COLUMNS,
    FORMATS,
    FOUND,
    PAIRED,
    mixed_note,
    not_begun,
    numbers,
    ours_and_paper,
    paired_table,
    row,
    rule,
)

FEW_EPOCHS = 10
CONFIG_LEFT_OUT = ("resume", "repeat", "force", "sweep", "data_dir")


def traces(one: Series) -> list[dict[str, Any]]:
    """A curve in plotly's words, its range over seeds before it."""
    band = {
        "x": [*one.x, *reversed(one.x)], "y": [*one.high, *reversed(one.low)], "fill": "toself", "opacity": 0.2,
        "fillcolor": one.look.colour, "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False, "mode": "lines",
    }  # fmt: skip
    line = {
        "x": [*one.x], "y": one.y, "name": one.look.name, "mode": "lines+markers" if len(one.x) == 1 else "lines",
        "line": {"color": one.look.colour, "width": 2, "dash": one.look.dash}, "marker": {"symbol": one.look.marker},
    }  # fmt: skip
    return [band, line] if one.low else [line]


def short(node: Any) -> Any:
    """Numbers in no more digits than a plot shows, which halves a page's plots; of texts nothing is markup."""
    if isinstance(node, dict):
        return {key: short(value) for key, value in node.items()}
    if isinstance(node, list):
        return [short(value) for value in node]
    if isinstance(node, str):
        return html.escape(node, quote=False)
    return float(f"{node:.5g}") if isinstance(node, float) else node


def plot(panel: Panel) -> dict[str, Any]:
    """A panel as plotly's data and layout."""
    x: dict[str, Any] = {} if isinstance(panel, HeatMap) else {"title": {"text": panel.x}}
    y: dict[str, Any] = {"autorange": "reversed"}
    layout = {"title": {"text": panel.title}, "xaxis": x, "yaxis": y}
    if isinstance(panel, Curves):
        layout["yaxis"] = {"title": {"text": panel.y}} | ({"range": panel.y_range} if panel.y_range else {})
        layout["yaxis"] |= {"type": "log"} if panel.log else {}
        if max(len(one.x) for one in panel.series) <= FEW_EPOCHS:
            x["dtick"] = 1  # no halves of epochs
        return {"data": [trace for one in panel.series for trace in traces(one)], "layout": layout}
    if isinstance(panel, HeatMap):
        frames = [
            {
                "type": "rect", "x0": j - 0.5, "x1": j + 0.5, "y0": i - 0.5, "y1": i + 0.5,
                "line": {"color": "#D55E00", "width": 4},
            }
            for i, j in panel.chosen
        ]  # fmt: skip
        x |= {"type": "category", "title": {"text": panel.across[0]}}
        y |= {"type": "category", "title": {"text": panel.down[0]}}
        heat = {
            "type": "heatmap", "x": panel.across[1], "y": panel.down[1], "z": panel.values, "text": panel.labels,
            "zmin": panel.scale[0] - 0.01, "zmax": panel.scale[1] + 0.01,
            "texttemplate": "%{text}", "colorscale": "Cividis", "hoverongaps": False,
        }  # fmt: skip
        return {"data": [heat], "layout": layout | {"shapes": frames}}
    if isinstance(panel, Points):
        points = [
            {
                "x": [*one.x], "y": one.y, "name": one.look.name, "mode": "markers",
                "marker": {"color": one.look.colour, "symbol": one.look.marker, "size": 8, "opacity": 0.8},
            }
            for one in panel.series
        ]  # fmt: skip
        return {"data": points, "layout": layout | {"yaxis": {"title": {"text": panel.y}}}}
    bars = {
        "type": "bar", "orientation": "h", "y": panel.names, "x": panel.values, "marker": {"color": panel.colours},
        "text": [f"{value:,.0f}" for value in panel.values],
    }  # fmt: skip
    return {"data": [bars], "layout": layout}


def configuration(run: Run) -> str:
    """What a run was made with, as YAML."""
    return OmegaConf.to_yaml({key: value for key, value in run.config.items() if key not in CONFIG_LEFT_OUT})


def headline(drawn: Sequence[tuple[Section, list[Figure]]]) -> Figure | None:
    """The figure to begin with: the alignment of layer 1, with SGD as the paper's where there is such a one."""
    real = [(section, those) for section, those in drawn if not section.setting.smoke]
    as_the_paper = [(section, those) for section, those in real if "optimizer=sgd" in section.setting.differences]
    shown = [figure for _, those in [*as_the_paper, *real] for figure in those]
    return next((figure for figure in shown if figure.name.endswith("-alignment")), None)


def compressed(text: str) -> str:
    """A text as the page unpacks it: gzip in base64, a third of its size."""
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def page(sections: Sequence[Section]) -> str:
    """The whole page."""
    drawn = [(section, figures(section)) for section in sections]
    environment = Environment(loader=PackageLoader("dfl_experiments.report", "."), autoescape=True, trim_blocks=True)
    functions = (
        by_row, command, configuration, methods_of, mixed_note, not_begun, numbers,
        ours_and_paper, paired_table, row, rule,
    )  # fmt: skip
    environment.globals |= {function.__name__: function for function in functions}
    environment.globals["plot"] = lambda panel: short(plot(panel))
    return environment.get_template("page.html").render(
        drawn=drawn,
        titles=TITLES,
        columns=COLUMNS,
        number_columns=FORMATS,
        plotly=compressed(get_plotlyjs()),
        claims=by_claim(findings(sections)),
        head=headline(drawn),
        found_note=FOUND,
        paired_note=PAIRED,
    )
