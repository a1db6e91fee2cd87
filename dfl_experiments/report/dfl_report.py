"""The console script `dfl-report`: what the runs in some folders amount to, beside the paper."""

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import quote

from dfl_experiments.configuration.refusals import one_line
from dfl_experiments.errors import UserError, any_text

FORMATS = ("terminal", "markdown", "csv", "latex", "html")
EPILOG = """examples:
  dfl-report outputs/fc_table                              the tables, here and now, whatever is still missing
  dfl-report outputs/fc_table outputs/cnn_table --format html --out report.html
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
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="write every figure there, as PNG, PDF and CSV")
    return parser.parse_args(given)


def report(asked: argparse.Namespace) -> None:
    """Read the runs and write what is asked for. Raises `UserError` and OSError, and what a missing extra raises."""
    from dfl_experiments.report import tables
    from dfl_experiments.report.cells import sections
    from dfl_experiments.report.runs import read_runs

    found = sections(read_runs(asked.folders))
    images: list[list[Path]] = [[] for _ in found]  # of each section's figures
    if asked.figures:
        from dfl_experiments.report.figures import write_figures

        images = [write_figures(section, asked.figures) for section in found]
    if asked.format == "html":
        from dfl_experiments.report.page import page

        text = page(found)
        asked.out = asked.out or Path("report.html")
    elif asked.format == "markdown":
        shown = zip([tables.as_text([section], "github") for section in found], images, strict=True)
        text = "\n".join(words + pictures(those, asked.out) for words, those in shown)
    else:
        text = {"csv": tables.as_csv, "latex": tables.as_latex, "terminal": tables.as_text}[asked.format](found)
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(text, encoding="utf-8", errors="replace")
        print(asked.out)
    else:
        print(text, end="")
    if asked.figures:
        print(f"{sum(map(len, images))} figures in {asked.figures}")


def pictures(images: Iterable[Path], page: Path | None) -> str:
    """Image files as a Markdown page at that place shows them."""
    start = page.parent if page else Path()
    links = [(path.stem, quote(Path(os.path.relpath(path, start)).as_posix())) for path in images]
    return "".join(f"\n![{name}]({link})\n" for name, link in links)


def main(given: Sequence[str] | None = None) -> None:
    """Run the command; a user's mistake ends in one line and exit code 2."""
    any_text()
    try:
        report(arguments(given))
        return
    except UserError as error:
        message, code = one_line(error), error.exit_code
    except ModuleNotFoundError as error:
        message, code = f'{error.name} is missing: pip install "dfl-experiments[report]"', 2
    except OSError as error:
        message, code = f"{error.filename}: {error.strerror}", 1
    print(f"dfl-report: error: {message}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
