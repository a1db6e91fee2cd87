"""Write a report in one of its formats: its tables and figures, section by section."""

import io
import os
import sys
import textwrap
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
from matplotlib.figure import Figure

from dfl_experiments.errors import UserError
from dfl_experiments.report import frame, table_text, tables
from dfl_experiments.report.figures import Drawing, figures
from dfl_experiments.report.paper import missing, published
from dfl_experiments.report.style import METADATA, save, styled
from dfl_experiments.report.tables import Section
from dfl_experiments.running.run_directory import rerun_arguments

STYLE = """
:root { color-scheme: light dark; --line: #8886; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 0 auto; padding: 0 1rem 4rem; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 3rem; border-bottom: 1px solid var(--line); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .25rem .7rem; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line); }
.note { font-size: .85rem; opacity: .8; }
figure { margin: 1.5rem 0; overflow-x: auto; background: white; border-radius: .4rem; }
figure svg { max-width: 100%; height: auto; min-width: 20rem; }
"""
HEAD = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Direct feedback runs</title>
<style>{STYLE}</style>
</head>
<body>
<h1>Direct feedback runs</h1>"""
HTML = {"heading": "<h2>{}</h2>", "title": "<h3>{}</h3>", "note": '<p class="note">{}</p>'}


def report(asked: Namespace) -> None:
    """Read the runs and write the report. Raises `UserError` for options that do not fit, and if there are no runs."""
    if asked.card and asked.format in ("csv", "latex", "commands"):
        raise UserError(
            f"--card: the format {asked.format} has no cards; choose terminal, markdown or html"
        )
    if asked.out and asked.out.is_dir():
        raise UserError(f"--out {asked.out}: is a folder; name a file")
    if asked.figures and asked.figures.is_file():
        raise UserError(f"--figures {asked.figures}: is a file; name a folder")
    runs = frame.runs(*asked.folders)
    for key, value in asked.where:
        runs = frame.with_value(runs, key, value)
    rules = sorted(set(runs.rule))
    if asked.card and asked.card not in rules:
        raise UserError(
            f"--card {asked.card}: no run of this rule; there are runs of {', '.join(rules)}"
        )
    sections = tables.sections(runs)
    drawings = figures(sections) if asked.figures or asked.format == "html" else []
    if asked.figures:
        save_all(drawings, asked.figures)
    path = asked.out
    if asked.format == "csv":
        content = csv_of(sections)
    elif asked.format == "commands":
        content = commands(sections)
    elif asked.format == "latex":
        content = latex(sections, asked)
    elif asked.format == "html":
        content = html(sections, asked, drawings)
        path = path or Path("report.html")
    else:
        content = text(sections, asked, drawings)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8", errors="replace")
        print(path)
    else:
        print(content.rstrip("\n"))
    if asked.figures:
        print(f"{len(drawings)} figures in {asked.figures}")


def save_all(
    drawings: Iterable[Drawing], folder: Path, endings: Sequence[str] = ("png", "pdf")
) -> None:
    """Write every figure to a folder."""
    for drawing in drawings:
        for ending in endings:
            save(drawing.figure, folder / f"{drawing.name}.{ending}")


def parts(
    sections: list[Section], asked: Namespace, drawings: Iterable[Drawing]
) -> Iterator[tuple[str, Any]]:
    """Yield the parts of the report as (kind, content), section by section.

    kind: "heading", "title" (of a table that is not the first of its section), "table", "figure", "note" or "items".
    """
    runs = pd.concat([section.runs for section in sections])
    paper = published() if asked.paper else None
    columns: set[str] = set()
    for section in sections:
        if asked.card and asked.card not in set(section.runs.rule):
            continue
        shown = [tables.answer(section, paper), *tables.details(section)]
        runs_shown = section.runs
        if asked.card:
            shown = [table.only(asked.card) for table in shown]
            runs_shown = runs_shown[runs_shown.rule == asked.card]
        answer, *details = [table for table in shown if len(table.frame)]
        yield "heading", section.title
        yield "table", answer
        yield "note", answer.caption
        for drawing in drawings:
            if drawing.section == section.title:
                yield "figure", drawing
        for table in details:
            yield "title", f"{table.title}: {section.title}"
            yield "table", table
            yield "note", table.caption
        for note in tables.notes(runs_shown):
            yield "note", note
        for table in shown:
            columns.update(table.frame.columns)
    if asked.paper:
        yield "heading", "Missing runs of the paper's tables"
        yield "items", missing(runs)
    yield "heading", "How the numbers are computed"
    yield "items", table_text.explanations(columns, bool(runs.smoke.any()))


def text(sections: list[Section], asked: Namespace, drawings: Iterable[Drawing]) -> str:
    """Return the report for a terminal or in Markdown."""
    is_markdown = asked.format == "markdown"
    clean = table_text.markdown if is_markdown else str
    lines: list[str] = []
    for kind, content in parts(sections, asked, drawings):
        if kind == "heading":
            lines.append(f"## {clean(content)}" if is_markdown else f"{content}\n{72 * '='}")
        elif kind == "title":
            lines.append(f"### {clean(content)}" if is_markdown else content)
        elif kind == "table":
            lines.append(table_text.write(content, asked.format))
        elif kind == "figure":
            file = asked.figures / f"{content.name}.png"
            lines.append(picture(file, asked.out) if is_markdown else f"Figure: {file}")
        elif kind == "note":
            lines.append(clean(content))
        else:
            width = sys.maxsize if is_markdown else 100
            items = [textwrap.fill(f"- {item}", width, subsequent_indent="  ") for item in content]
            lines.append("\n".join(items))
    return "\n\n".join(filter(None, lines)) + "\n"


def html(sections: list[Section], asked: Namespace, drawings: Iterable[Drawing]) -> str:
    """Return the report as one HTML page with tables and SVG figures. The page loads no other file."""
    body = [HEAD]
    for kind, content in parts(sections, asked, drawings):
        if kind == "table":
            body.append(f'<div class="wide">{table_text.write(content, "html")}</div>')
        elif kind == "figure":
            body.append(f"<figure>{svg(content.figure)}</figure>")
        elif kind == "items":
            items = [f"<li>{escape(item)}</li>" for item in content]
            body += ["<ul>", *items, "</ul>"]
        elif content:
            body.append(HTML[kind].format(escape(content)))
    return "\n".join([*body, "</body>\n</html>\n"])


def svg(figure: Figure) -> str:
    """Return a figure as an SVG element."""
    file = io.StringIO()
    with styled():
        figure.savefig(file, format="svg", metadata=METADATA["svg"])
    text = file.getvalue()
    return text[text.index("<svg") :]


def picture(file: Path, page: Path | None) -> str:
    """Return the Markdown line that shows an image file, with its path relative to the report's file."""
    path = os.path.relpath(file, page.parent if page else Path())
    address = quote(Path(path).as_posix())
    return f"![{file.stem}]({address})"


def latex(sections: list[Section], asked: Namespace) -> str:
    """Return the tables of every section in LaTeX. The LaTeX document needs the package booktabs."""
    lines = []
    title = ""
    for kind, content in parts(sections, asked, []):
        if kind == "heading":
            title = f"{content}. Test accuracy, mean ± sd over n seeds"
        elif kind == "title":
            title = content
        elif kind == "table":
            caption = table_text.latex(f"{title}. {content.caption}")
            lines += [r"\begin{table}", r"\centering", rf"\caption{{{caption}}}"]
            lines += [table_text.write(content, "latex"), "\\end{table}\n"]
    return "\n".join(lines) + "\n"


def csv_of(sections: list[Section]) -> str:
    """Return CSV text with one row for each grid point of each method. Accuracies are fractions of 1.

    `chosen` is true for the rows of the table of methods. Only these rows have comparisons with other methods.
    """
    frame = pd.concat([section.points for section in sections])
    return frame.to_csv(index=False, float_format="%.9g")


def commands(sections: list[Section]) -> str:
    """Return for each run in the table of methods a line with the command that repeats it, and with its accuracy."""
    lines = []
    chosen = pd.concat([section.chosen for section in sections])
    for run in tables.ordered(chosen).itertuples():
        folder = str(Path(run.folder).resolve())
        arguments = rerun_arguments("repeat", folder, run.plugins)
        comment = f"{run.method}, seed {run.seed}: {100 * run.accuracy:.2f} %"
        lines.append(f"dfl-train {arguments}  # {comment}\n")
    return "".join(lines)
