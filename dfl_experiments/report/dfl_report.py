"""The console script `dfl-report`: what the runs in some folders amount to, beside the paper."""

import argparse
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import quote

from dfl_experiments.configuration.refusals import refusing
from dfl_experiments.errors import UserError
from dfl_experiments.running.run_directory import naming

FORMATS = ("terminal", "markdown", "csv", "latex", "html", "commands")
STYLES = {"terminal": "simple", "markdown": "github", "latex": "latex_booktabs", "html": "html"}  # tabulate's
EPILOG = """examples:
  dfl-report outputs/fc_table                              the tables, here and now, whatever is still missing
  dfl-report outputs/fc_table outputs/cnn_table --format html --out report.html
  dfl-report outputs/fc_table --format commands            the best run of every cell, as a dfl-train command line
  dfl-report outputs/batches --across batch_size           one table with a column for every value that was swept
  dfl-report outputs/alignment_figure --figures figures    every figure as PNG and PDF, its numbers as CSV
"""


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, read."""
    parser = argparse.ArgumentParser(
        "dfl-report", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, help="run directories, or folders that hold some")
    parser.add_argument("--format", choices=FORMATS, default="terminal", help="of the tables (default: terminal)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write there (html: default report.html)")
    parser.add_argument("--across", metavar="KEY", help="one table, with a column for every value of this key")
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="write every figure there, as PNG, PDF and CSV")
    return parser.parse_args(given)


def report(asked: argparse.Namespace) -> None:
    """Read the runs and write what is asked for. Raises `UserError` and OSError, and what a missing extra raises."""
    from dfl_experiments.report import tables
    from dfl_experiments.report.cells import sections
    from dfl_experiments.report.commands import across, commands
    from dfl_experiments.report.runs import read_runs
    from dfl_experiments.report.setting import words_of

    if asked.format == "html":
        asked.out = asked.out or Path("report.html")
    runs = read_runs(asked.folders)
    if asked.across:
        if asked.figures:
            raise UserError("--across: has no figures")
        write(as_table(across(runs, asked.across), asked.format), asked.out)
        return
    found = sections(runs)
    images: list[list[Path]] = [[] for _ in found]  # of each section's figures
    if asked.figures:
        os.environ["MPLBACKEND"] = "agg"  # another one may not be installed, and is not needed to write files
        from dfl_experiments.report.figures import write_figures

        words = words_of([section.setting for section in found])
        images = [write_figures(section, asked.figures, those) for section, those in zip(found, words, strict=True)]
    if asked.format == "html":
        from dfl_experiments.report.page import page

        text = page(found)
    elif asked.format == "markdown":
        answers = tables.answers(found, "github")
        parts = [f"# Answers\n\n{answers}"] if answers else []
        shown = [pictures(those, asked.out) for those in images]
        text = "\n".join([*parts, tables.as_text(found, "github", shown)])
    elif asked.format == "terminal":
        text = "\n".join([tables.as_text(found), tables.answers(found)]).rstrip("\n") + "\n"
    else:
        text = {"csv": tables.as_csv, "latex": tables.as_latex, "commands": commands}[asked.format](found)
    write(text, asked.out)
    if asked.figures:
        print(f"{sum(map(len, images))} figures in {asked.figures}")


def write(text: str, place: Path | None) -> None:
    """Write a text to a file, or print it."""
    if place:
        with naming(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text, encoding="utf-8", errors="replace")
        print(place)
    else:
        print(text, end="")


def as_table(lines: list[list[str]], kind: str) -> str:
    """Lines, the heading first, in one of `FORMATS`."""
    from dfl_experiments.report.tables import table
    from dfl_experiments.running.run_directory import csv_text

    if kind == "csv":
        return csv_text(lines)
    if kind not in STYLES:
        raise UserError(f"--across: goes with --format {', '.join([*STYLES, 'csv'])}")
    return table(lines, STYLES[kind])


def pictures(images: Iterable[Path], page: Path | None) -> str:
    """Image files as a Markdown page at that place shows them."""
    start = page.parent if page else Path()
    links = [(path.stem, quote(Path(os.path.relpath(path, start)).as_posix())) for path in images]
    return "\n".join(f"![{name}]({link})\n" for name, link in links)


def main(given: Sequence[str] | None = None) -> None:
    """Run the command; a user's mistake ends in one line and exit code 2."""
    with refusing("dfl-report"):
        try:
            report(arguments(given))
        except ModuleNotFoundError as error:
            raise UserError(f'{error.name} is missing: pip install "dfl-experiments[report]"') from error


if __name__ == "__main__":
    from dfl_experiments.console import report as program

    program()
