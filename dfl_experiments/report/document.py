"""Write a report in one of its formats: its tables and figures, section by section."""

import os
import sys
import textwrap
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from dfl_experiments.errors import UserError
from dfl_experiments.report import frame, page, table_text, tables
from dfl_experiments.report.figures import Drawing, figures
from dfl_experiments.report.paper import missing, published
from dfl_experiments.report.style import save
from dfl_experiments.report.tables import Section
from dfl_experiments.running.run_directory import rerun_arguments


def report(asked: Namespace) -> None:
    """Read the runs and write the report. Raises `UserError` if there are no runs, or none of the rule of --card."""
    if asked.card and asked.format in ("csv", "latex", "commands"):
        raise UserError(
            f"--card: the format {asked.format} has no cards; choose terminal, markdown or html"
        )
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
        content = page.page(parts(sections, asked, drawings))
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

    kind: "heading", "table", "figure", "details", "notes" or "items".
    """
    runs = pd.concat([section.runs for section in sections])
    paper = published() if asked.paper else None
    columns: set[str] = set()
    for section in sections:
        if asked.card and asked.card not in set(section.runs.rule):
            continue
        shown = [tables.answer(section, paper), *tables.details(section)]
        if asked.card:
            shown = [table.only(asked.card) for table in shown]
        answer, *details = [table for table in shown if len(table.frame)]
        for table in shown:
            columns.update(table.frame.columns)
        yield "heading", section.title
        yield "table", answer
        for drawing in drawings:
            if drawing.section == section.title:
                yield "figure", drawing
        for table in details:
            yield "details", table
        yield "notes", tables.notes(section)
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
        elif kind == "figure":
            lines.append(picture(asked.figures / f"{content.name}.png", asked.out))
        elif kind == "notes":
            lines += [clean(note) for note in content]
        elif kind == "items":
            width = sys.maxsize if is_markdown else 100
            items = [textwrap.fill(f"- {item}", width, subsequent_indent="  ") for item in content]
            lines.append("\n".join(items))
        else:
            lines.append(table_text.write(content, "github" if is_markdown else "simple"))
            lines.append(clean(content.caption))
    return "\n\n".join(filter(None, lines)) + "\n"


def picture(file: Path, page: Path | None) -> str:
    """Return the Markdown line that shows an image file, with its path relative to the report's file."""
    path = os.path.relpath(file, page.parent if page else Path())
    return f"![{file.stem}]({quote(Path(path).as_posix())})"


def latex(sections: list[Section], asked: Namespace) -> str:
    """Return the tables of every section in LaTeX. The LaTeX document needs the package booktabs."""
    texts = []
    heading = ""
    for kind, content in parts(sections, asked, []):
        if kind == "heading":
            heading = content
        elif kind in ("table", "details"):
            title = content.title
            if kind == "table":
                title = "Test accuracy, mean ± sd over n seeds"
            caption = table_text.latex(f"{heading}. {title}. {content.caption}")
            texts.append("\\begin{table}\n\\centering")
            texts.append(rf"\caption{{{caption}}}")
            texts.append(table_text.write(content, "latex_booktabs"))
            texts.append("\\end{table}\n")
    return "\n".join(texts) + "\n"


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
        arguments = rerun_arguments("repeat", str(Path(run.folder).resolve()), run.plugins)
        accuracy = f"{run.method}, seed {run.seed}: {100 * run.accuracy:.2f} %"
        lines.append(f"dfl-train {arguments}  # {accuracy}\n")
    return "".join(lines)
