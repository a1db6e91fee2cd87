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
from dfl_experiments.running.run_directory import csv_text, rerun_arguments


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
    if asked.format == "csv":
        write(csv_of(sections), asked.out)
    elif asked.format == "commands":
        write(commands(sections), asked.out)
    elif asked.format == "latex":
        write(latex(sections, asked.paper), asked.out)
    elif asked.format == "html":
        write(page.page(parts(sections, asked, drawings)), asked.out or Path("report.html"))
    else:
        write(text(sections, asked, drawings), asked.out)
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
        if kind == "heading" and is_markdown:
            lines.append(f"## {clean(content)}\n")
        elif kind == "heading":
            lines.append(f"{content}\n{72 * '='}\n")
        elif kind == "figure":
            lines.append(picture(asked.figures / f"{content.name}.png", asked.out))
        elif kind == "notes":
            lines += [f"{clean(note)}\n" for note in content]
        elif kind == "items":
            width = sys.maxsize if is_markdown else 100
            for item in content:
                lines.append(textwrap.fill(f"- {item}", width, subsequent_indent="  "))
            lines.append("")
        else:
            lines.append(table_text.write(content, "github" if is_markdown else "simple") + "\n")
            lines += [f"{clean(content.caption)}\n"] if content.caption else []
    return "\n".join(lines)


def picture(file: Path, page: Path | None) -> str:
    """Return the Markdown line that shows an image file, with its path relative to the report's file."""
    path = os.path.relpath(file, page.parent if page else Path())
    return f"![{file.stem}]({quote(Path(path).as_posix())})\n"


def latex(sections: list[Section], with_paper: bool) -> str:
    """Return the tables of every section in LaTeX. The LaTeX document needs the package booktabs."""
    paper = published() if with_paper else None
    texts = []
    for section in sections:
        for table in [tables.answer(section, paper), *tables.details(section)]:
            title = table.title
            if title == "Methods":
                title = "Test accuracy, mean ± sd over n seeds"
            caption = f"{section.title}. {title}. {table.caption}"
            texts.append("\\begin{table}\n\\centering")
            texts.append(rf"\caption{{{table_text.latex(caption)}}}")
            texts.append(table_text.write(table, "latex_booktabs"))
            texts.append("\\end{table}\n")
    return "\n".join(texts) + "\n"


def csv_of(sections: list[Section]) -> str:
    """Return CSV text with one row for each grid point of each method. Accuracies are fractions of 1.

    `chosen` is true for the rows of the table of methods. Only these rows have comparisons with other methods.
    """
    frame = pd.concat([tables.grid_points(section) for section in sections])
    rows = frame.astype(object).where(frame.notna(), None)
    return csv_text([list(rows.columns), *rows.to_numpy().tolist()])


def commands(sections: list[Section]) -> str:
    """Return for each run in the table of methods a line with the command that repeats it, and with its accuracy."""
    lines = []
    chosen = pd.concat([section.chosen for section in sections])
    for run in tables.ordered(chosen).itertuples():
        arguments = rerun_arguments("repeat", str(Path(run.folder).resolve()), run.plugins)
        accuracy = f"{run.method}, seed {run.seed}: {100 * run.accuracy:.2f} %"
        lines.append(f"dfl-train {arguments}  # {accuracy}\n")
    return "".join(lines)


def write(content: str, path: Path | None) -> None:
    """Write a text to a file and print its path, or print the text."""
    if path is None:
        print(content.rstrip("\n"))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8", errors="replace")
    print(path)
