"""The console script `dfl-report`: what the runs in some folders amount to, beside the paper."""

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

from dfl_experiments.config import UserError, one_line

FORMATS = ("terminal", "markdown", "csv", "latex", "html")
EPILOG = """examples:
  dfl-report outputs/fc_table                              the tables, here and now, whatever is still missing
  dfl-report outputs/fc_table outputs/cnn_table --format html --out report.html
  dfl-report outputs/alignment_figure --figures figures    every figure as PNG and PDF, its numbers as CSV
"""


def arguments() -> argparse.Namespace:
    """The command line, read."""
    parser = argparse.ArgumentParser(
        "dfl-report", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, help="run directories, or folders that hold some")
    parser.add_argument("--format", choices=FORMATS, default="terminal", help="of the tables (default: terminal)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write there (html: default report.html)")
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="write every figure there, as PNG, PDF and CSV")
    parser.add_argument("--title", default="Direct feedback learning: a report", help="of the page")
    return parser.parse_args()


def report(asked: argparse.Namespace) -> None:
    """Read the runs and write what is asked for. Raises `UserError` and OSError."""
    try:
        from dfl_experiments.report import curves, tables
        from dfl_experiments.report.cells import sections
        from dfl_experiments.report.runs import read_runs

        if asked.figures:
            from dfl_experiments.report.figures import write_figures
        if asked.format == "html":
            from dfl_experiments.report.page import page
    except ModuleNotFoundError as error:
        raise UserError(f'{error.name} is missing: pip install "dfl-experiments[report]"') from None
    found = sections(read_runs(asked.folders))
    drawn = [curves.figures(section) for section in found] if asked.figures or asked.format == "html" else []
    files: list[list[Path]] = []  # of each section's figures
    if asked.figures:
        for section, figures in zip(found, drawn, strict=True):
            prefix = f"{section.setting.slug}-"
            files.append(write_figures(figures, section.setting.title, asked.figures, prefix))
    if asked.format == "html":
        text = page(found, drawn, asked.title)
        asked.out = asked.out or Path("report.html")
    elif asked.format == "csv":
        text = tables.as_csv(found)
    elif asked.format == "latex":
        text = tables.as_latex(found)
    elif asked.format == "markdown":
        text = tables.as_text(found, "github", [pictures(paths, asked.out) for paths in files])
    else:
        text = tables.as_text(found, "simple")
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(text, encoding="utf-8")
        print(asked.out)
    else:
        print(text, end="")
    if asked.figures:
        print(f"{sum(map(len, files))} files in {asked.figures}")


def pictures(paths: Iterable[Path], page: Path | None) -> str:
    """The PNG files among the paths, as a Markdown page at that place shows them."""
    start = page.parent if page else Path()
    images = [Path(os.path.relpath(path, start)) for path in paths if path.suffix == ".png"]
    return "\n\n".join(f"![{image.stem}]({quote(image.as_posix())})" for image in images)


def main() -> None:
    """Run the command; a user's mistake ends in one line and exit code 2."""
    try:
        report(arguments())
    except UserError as error:
        print(f"dfl-report: error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except OSError as error:
        print(f"dfl-report: error: {error.filename}: {error.strerror}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
