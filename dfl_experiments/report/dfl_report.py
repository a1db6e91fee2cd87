"""Report on the runs in some folders: a table of methods with confidence intervals, figures, and further tables."""

import argparse
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dfl_experiments.configuration.refusals import refusing

FORMATS = ("terminal", "markdown", "csv", "latex", "html", "commands")
FORMAT = """terminal (default), markdown, csv (one row for each learning rate and weight decay of a method),
latex (booktabs), html (one page), or commands (dfl-train commands that repeat the runs in the table of methods)"""
EPILOG = """examples:
  dfl-report outputs/lr_grid                               the table of methods, then tables with details
  dfl-report outputs/lr_grid --format html --figures f     report.html, and every figure as PNG and PDF in f/
  dfl-report outputs/lr_grid --format latex --out t.tex    LaTeX tables for a paper
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
    folders = "run directories, or folders that contain run directories"
    add("folders", nargs="+", type=Path, help=folders)
    add("--format", choices=FORMATS, default="terminal", metavar="FORMAT", help=FORMAT)
    out = "write the report to FILE (html: default report.html)"
    add("--out", type=Path, metavar="FILE", help=out)
    figures = "write every figure to FOLDER, as PNG and PDF"
    add("--figures", type=Path, metavar="FOLDER", help=figures)
    paper = "add the paper's accuracies, and list the paper's runs that are missing"
    add("--paper", action="store_true", help=paper)
    add("--card", metavar="RULE", help="show only the rows of one rule, such as las")
    add_where(add)
    return parser.parse_args(words)


def add_where(add: Callable[..., Any]) -> None:
    """Add the option --where to a command line. add: the parser's `add_argument`."""
    where = "use only the runs with this value of a configuration key or column; KEY=A,B: A or B (may be repeated)"
    add("--where", type=condition, action="append", default=[], metavar="KEY=VALUE", help=where)


def condition(text: str) -> tuple[str, str]:
    """Split a text such as "method=las" into a key and a value. Raises `ArgumentTypeError`."""
    key, equals, value = (part.strip() for part in text.partition("="))
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, value


def main(words: Sequence[str] | None = None) -> None:
    """Run the command. After a user's mistake, print one line and exit with code 2."""
    with refusing("dfl-report"):
        logging.basicConfig(format="dfl-report: %(message)s", force=True)
        asked = arguments(words)
        # imported here, because it takes seconds, and --help does not need it
        from dfl_experiments.report.document import report

        report(asked)


if __name__ == "__main__":
    from dfl_experiments.console import report as program

    program()
