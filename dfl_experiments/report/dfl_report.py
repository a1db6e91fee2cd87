"""Report on the runs in some folders: a table of methods with confidence intervals, figures, and further tables."""

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
    from dfl_experiments.report.figures import Drawing
    from dfl_experiments.report.tables import Section

FORMATS = ("terminal", "markdown", "csv", "latex", "html", "commands")
EPILOG = """examples:
  dfl-report outputs/lr_grid                               the table of methods, then tables with details
  dfl-report outputs/lr_grid --format html --figures f     report.html, and every figure as PNG and PDF in f/
  dfl-report outputs/lr_grid --card las                    the rows of one rule
  dfl-report outputs/fc_table --paper                      with the paper's accuracies, and which runs are missing
"""


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        "dfl-report",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    formats = (
        "terminal (default), markdown, csv (one row for each method), latex (booktabs), html (one page), or "
        "commands (dfl-train commands that repeat the runs in the table of methods)"
    )
    add(
        "folders",
        nargs="+",
        type=Path,
        help="run directories, or folders that contain run directories",
    )
    add("--format", choices=FORMATS, default="terminal", metavar="FORMAT", help=formats)
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="write the report to FILE (html: default report.html)",
    )
    add(
        "--figures",
        type=Path,
        metavar="FOLDER",
        help="write every figure to FOLDER, as PNG and PDF",
    )
    add(
        "--paper",
        action="store_true",
        help="add the paper's accuracies, and list the paper's runs that are missing",
    )
    add("--card", metavar="RULE", help="show only the rows of one rule, such as las")
    return parser.parse_args(words)


def report(asked: argparse.Namespace) -> None:
    """Read the runs and write the report.

    Raises:
        UserError: a folder does not exist, there are no runs, or no run has the rule of --card.
        OSError: a file cannot be written.
    """
    from dfl_experiments.report.frame import runs as read_runs
    from dfl_experiments.report.tables import sections as sections_of

    runs = read_runs(*asked.folders)
    rules = sorted(set(runs.rule))
    if asked.card and asked.card not in rules:
        raise UserError(
            f"--card {asked.card}: no run of this rule; there are runs of {', '.join(rules)}"
        )
    sections = sections_of(runs)
    drawings = []
    if asked.figures or asked.format == "html":
        from dfl_experiments.report.figures import figures

        drawings = figures(sections)
    if asked.figures:
        save_all(drawings, asked.figures)
    if asked.format == "csv":
        write(csv_of(sections), asked.out)
    elif asked.format == "commands":
        write(commands(sections), asked.out)
    elif asked.format == "latex":
        write(latex(sections, asked.paper), asked.out)
    elif asked.format == "html":
        write(html(sections, asked, drawings), asked.out or Path("report.html"))
    else:
        write(text(sections, asked, drawings), asked.out)
    if asked.figures:
        print(f"{len(drawings)} figures in {asked.figures}")


def save_all(
    drawings: "Iterable[Drawing]", folder: Path, endings: Sequence[str] = ("png", "pdf")
) -> None:
    """Write every figure to a folder."""
    from dfl_experiments.report.style import save

    for drawing in drawings:
        for ending in endings:
            save(drawing.figure, folder / f"{drawing.name}.{ending}")


def parts(
    sections: "list[Section]", asked: argparse.Namespace, drawings: "Iterable[Drawing]"
) -> Iterator[tuple[str, Any]]:
    """Yield the parts of the report as (kind, content), section by section.

    kind: "heading", "table", "figure", "details", "notes" or "items".
    """
    import pandas as pd

    from dfl_experiments.report import tables
    from dfl_experiments.report.paper import missing, published
    from dfl_experiments.report.table_text import explanations

    runs = pd.concat([section.runs for section in sections])

    paper = published() if asked.paper else None
    columns: set[str] = set()
    for section in sections:
        if asked.card and asked.card not in set(section.runs.rule):
            continue
        answer = tables.answer(section, paper)
        yield "heading", section.title
        yield "table", answer.only(asked.card) if asked.card else answer
        columns.update(answer.frame.columns)
        for drawing in drawings:
            if drawing.section == section.title:
                yield "figure", drawing
        for table in tables.details(section):
            shown = table.only(asked.card) if asked.card else table
            if len(shown.frame):
                columns.update(shown.frame.columns)
                yield "details", shown
        yield "notes", tables.notes(section)
    if asked.paper:
        yield "heading", "Missing runs of the paper's tables"
        yield "items", missing(runs)
    yield "heading", "How the numbers are computed"
    yield "items", explanations(columns, bool(runs.smoke.any()))


def html(
    sections: "list[Section]", asked: argparse.Namespace, drawings: "Iterable[Drawing]"
) -> str:
    """Return the report as an HTML page that contains its figures."""
    from dfl_experiments.report import page

    return page.page(
        getattr(page, kind)(content) for kind, content in parts(sections, asked, drawings)
    )


def text(
    sections: "list[Section]", asked: argparse.Namespace, drawings: "Iterable[Drawing]"
) -> str:
    """Return the report for a terminal or in Markdown."""
    from dfl_experiments.report import table_text

    is_markdown = asked.format == "markdown"
    clean = table_text.markdown if is_markdown else str
    lines: list[str] = []
    for kind, content in parts(sections, asked, drawings):
        if kind == "heading":
            lines.append(f"## {clean(content)}\n" if is_markdown else f"{content}\n{72 * '='}\n")
        elif kind == "figure":
            lines.append(picture(asked.figures / f"{content.name}.png", asked.out))
        elif kind == "notes":
            lines += [f"{clean(note)}\n" for note in content]
        elif kind == "items" and is_markdown:
            lines += [*(f"- {item}" for item in content), ""]
        elif kind == "items":
            lines += [
                *(
                    textwrap.fill(item, 100, initial_indent="- ", subsequent_indent="  ")
                    for item in content
                ),
                "",
            ]
        else:
            lines.append(table_text.write(content, "github" if is_markdown else "simple") + "\n")
            lines += [f"{clean(content.caption)}\n"] if content.caption else []
    return "\n".join(lines)


def picture(file: Path, page: Path | None) -> str:
    """Return the Markdown line that shows an image file, with its path relative to the report's file."""
    path = os.path.relpath(file, page.parent if page else Path())
    return f"![{file.stem}]({quote(Path(path).as_posix())})\n"


def latex(sections: "list[Section]", with_paper: bool) -> str:
    """Return the table of methods of every section in LaTeX. The LaTeX document needs the package booktabs."""
    from dfl_experiments.report import table_text
    from dfl_experiments.report.paper import published
    from dfl_experiments.report.tables import answer

    paper = published() if with_paper else None
    texts = []
    for section in sections:
        table = answer(section, paper)
        caption = f"{section.title}. Test accuracy, mean ± sd over n seeds. {table.caption}"
        body = table_text.write(table, "latex_booktabs")
        texts += [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{table_text.latex(caption)}}}",
            body,
            "\\end{table}\n",
        ]
    return "\n".join(texts) + "\n"


def csv_of(sections: "list[Section]") -> str:
    """Return CSV text with one row for each method in each setting. Accuracies are fractions of 1."""
    import pandas as pd

    frame = pd.concat([section.cells for section in sections])
    rows = frame.astype(object).where(frame.notna(), None)
    return csv_text([list(rows.columns), *rows.to_numpy().tolist()])


def commands(sections: "list[Section]") -> str:
    """Return one line for each run in the table of methods.

    The line is a command that repeats the run. A comment in the line gives the accuracy.
    """
    import pandas as pd

    from dfl_experiments.report.tables import ordered

    lines = []
    for run in ordered(pd.concat([section.chosen for section in sections])).itertuples():
        words = ["dfl-train", f"repeat={Path(run.folder).resolve()}"]
        if run.plugins:
            words.append(f"plugins=[{','.join(run.plugins)}]")
        lines.append(
            f"{shlex.join(words)}  # {run.method}, seed {run.seed}: {100 * run.accuracy:.2f} %\n"
        )
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
    """Run the command. After a user's mistake, print one line and exit with code 2."""
    with refusing("dfl-report"):
        logging.basicConfig(format="dfl-report: %(message)s", force=True)
        report(arguments(words))


if __name__ == "__main__":
    from dfl_experiments.console import report as program

    program()
