"""Show what the runs in some folders amount to: a table of methods, figures, details."""

import argparse
import logging
import os
import shlex
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from dfl_experiments.configuration.refusals import refusing
from dfl_experiments.errors import UserError
from dfl_experiments.running.run_directory import csv_text, naming

if TYPE_CHECKING:
    import pandas as pd

    from dfl_experiments.report.figures import Drawing

FORMATS = ("terminal", "markdown", "csv", "latex", "html", "commands")
EPILOG = """examples:
  dfl-report outputs/lr_grid                               the table of methods, and what stands behind it
  dfl-report outputs/lr_grid --format html --figures f     report.html, and every figure as PNG and PDF in f/
  dfl-report outputs/lr_grid --card las                    the audit of one rule
  dfl-report outputs/fc_table --paper                      beside the paper's accuracies, and what is missing
"""


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        "dfl-report", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    formats = (
        "terminal (default), markdown, csv (one row for each method), latex (booktabs), html (a page), or "
        "commands (what repeats the runs of each chosen grid point)"
    )
    add("folders", nargs="+", type=Path, help="run directories, or folders that hold some")
    add("--format", choices=FORMATS, default="terminal", metavar="FORMAT", help=formats)
    add("--out", type=Path, metavar="FILE", help="write there (html: default report.html)")
    add("--figures", type=Path, metavar="FOLDER", help="write every figure there, as PNG and PDF")
    add("--paper", action="store_true", help="show the paper's accuracies, and what is missing of them")
    add("--card", metavar="RULE", help="show the audit of one rule, such as las, and nothing else")
    return parser.parse_args(words)


def report(asked: argparse.Namespace) -> None:
    """Read the runs and write what is asked for. Raises `UserError` and OSError."""
    from dfl_experiments.report.frame import runs as read_runs

    runs = read_runs(*asked.folders)
    rules = sorted(set(runs.rule))
    if asked.card and asked.card not in rules:
        raise UserError(f"--card {asked.card}: no run of this rule here; there is {', '.join(rules)}")
    drawings = []
    if asked.figures or asked.format == "html":
        from dfl_experiments.report.figures import figures

        drawings = figures(runs)
    if asked.figures:
        save_all(drawings, asked.figures)
    if asked.format == "csv":
        write(csv_of(runs), asked.out)
    elif asked.format == "commands":
        write(commands(runs), asked.out)
    elif asked.format == "latex":
        write(latex(runs, asked.paper), asked.out)
    elif asked.format == "html":
        write(html(runs, asked, drawings), asked.out or Path("report.html"))
    else:
        write(text(runs, asked, drawings), asked.out)
    if asked.figures:
        print(f"{len(drawings)} figures in {asked.figures}")


def save_all(drawings: "Iterable[Drawing]", folder: Path, endings: Sequence[str] = ("png", "pdf")) -> None:
    """Write every figure to a folder."""
    from dfl_experiments.report.style import save

    for drawing in drawings:
        for ending in endings:
            save(drawing.figure, folder / f"{drawing.name}.{ending}")


def parts(runs: "pd.DataFrame", asked: argparse.Namespace, drawings: "Iterable[Drawing]") -> Iterator[tuple[str, Any]]:
    """Yield the parts of the report, each with its kind: of every section the answer, figures, then the details."""
    from dfl_experiments.report import tables
    from dfl_experiments.report.paper import missing, published

    paper = published() if asked.paper else None
    columns: set[str] = set()
    for title, section in tables.sections(runs).items():
        if asked.card and asked.card not in set(section.rule):
            continue
        answer = tables.answer(section, paper)
        yield "heading", title
        yield "table", answer.only(asked.card) if asked.card else answer
        columns.update(answer.frame.columns)
        for drawing in drawings:
            if drawing.section == title:
                yield "figure", drawing
        for table in tables.details(section):
            shown = table.only(asked.card) if asked.card else table
            if len(shown.frame):
                columns.update(shown.frame.columns)
                yield "details", shown
        yield "notes", tables.notes(section)
    if asked.paper:
        yield "heading", "Not there yet, of the paper's tables"
        yield "items", missing(runs)
    yield "heading", "How the numbers are computed"
    yield "items", tables.methods_text(columns, bool(runs.smoke.any()))


def html(runs: "pd.DataFrame", asked: argparse.Namespace, drawings: "Iterable[Drawing]") -> str:
    """Return the report as a page, its figures in it."""
    from dfl_experiments.report import page

    return page.page(getattr(page, kind)(content) for kind, content in parts(runs, asked, drawings))


def text(runs: "pd.DataFrame", asked: argparse.Namespace, drawings: "Iterable[Drawing]") -> str:
    """Return the report for a terminal or in Markdown."""
    from dfl_experiments.report import tables

    is_markdown = asked.format == "markdown"
    clean = tables.markdown if is_markdown else str
    lines: list[str] = []
    for kind, content in parts(runs, asked, drawings):
        if kind == "heading":
            lines.append(f"## {clean(content)}\n" if is_markdown else f"{content}\n{72 * '='}\n")
        elif kind == "figure":
            lines.append(picture(asked.figures / f"{content.name}.png", asked.out))
        elif kind == "notes":
            lines += [f"{clean(note)}\n" for note in content]
        elif kind == "items" and is_markdown:
            lines += [*(f"- {item}" for item in content), ""]
        elif kind == "items":
            lines += [*(textwrap.fill(item, 100, initial_indent="- ", subsequent_indent="  ") for item in content), ""]
        else:
            lines.append(tables.write(content, "github" if is_markdown else "simple") + "\n")
            lines += [f"{clean(content.caption)}\n"] if content.caption else []
    return "\n".join(lines)


def picture(file: Path, page: Path | None) -> str:
    """Return the line with which a Markdown page shows an image."""
    path = os.path.relpath(file, page.parent if page else Path())
    return f"![{file.stem}]({quote(Path(path).as_posix())})\n"


def latex(runs: "pd.DataFrame", with_paper: bool) -> str:
    """Return the answer of every section as a LaTeX table; needs the package booktabs."""
    from dfl_experiments.report import tables
    from dfl_experiments.report.paper import published

    texts = []
    for title, section in tables.sections(runs).items():
        table = tables.answer(section, published() if with_paper else None)
        caption = tables.latex(f"{title}. Test accuracy, mean ± sd over n seeds. {table.caption}")
        body = tables.write(table, "latex_booktabs")
        texts.append(f"\\begin{{table}}\n\\centering\n\\caption{{{caption}}}\n{body}\n\\end{{table}}\n")
    return "\n".join(texts)


def csv_of(runs: "pd.DataFrame") -> str:
    """Return one row for each method of each setting: numbers, accuracies as fractions."""
    from dfl_experiments.report.tables import compared_cells, ordered

    frame = ordered(compared_cells(runs))
    rows = frame.astype(object).where(frame.notna(), None)
    return csv_text([list(rows.columns), *rows.to_numpy().tolist()])


def commands(runs: "pd.DataFrame") -> str:
    """Return what repeats every run of the chosen grid points, with its accuracy beside it."""
    from dfl_experiments.report.choose import choose
    from dfl_experiments.report.tables import ordered

    lines = []
    for run in ordered(choose(runs)).itertuples():
        words = ["dfl-train", f"repeat={Path(run.folder).resolve()}"]
        if run.plugins:
            words.append(f"plugins=[{','.join(run.plugins)}]")
        lines.append(f"{shlex.join(words)}  # {run.method}, seed {run.seed}: {100 * run.accuracy:.2f} %\n")
    return "".join(lines)


def write(content: str, path: Path | None) -> None:
    """Write a text to a file and print its path, or print the text."""
    if path is None:
        print(content.rstrip("\n"))
        return
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8", errors="replace")
    print(path)


def main(words: Sequence[str] | None = None) -> None:
    """Run the command; a user's mistake ends in one line and exit code 2."""
    with refusing("dfl-report"):
        logging.basicConfig(format="dfl-report: %(message)s", force=True)
        report(arguments(words))


if __name__ == "__main__":
    from dfl_experiments.console import report as program

    program()
