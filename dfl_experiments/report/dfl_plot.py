"""The console script `dfl-plot`: the curves of one or many runs in one figure."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from dfl_experiments.configuration.refusals import refusing

EPILOG = """examples:
  dfl-plot outputs/2026-01-31/12-00-00            loss, accuracy and alignment of a run, into plot.png in its folder
  dfl-plot outputs/grid --facet optimizer.lr      a sweep: means over seeds, a panel for each learning rate
  dfl-plot RUN1 RUN2 --what alignment --layer 1,3 --by epoch --out alignment.pdf
  dfl-plot outputs/grid --what norm,rms,dead --log --color method --out stability.svg
"""


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        "dfl-plot",
        description="Draw the curves of one or many runs in one figure.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="a run directory, or a folder that holds some, as a sweep")
    add("--what", type=names, help="loss, accuracy, alignment, norm, rms, dead (default: the first three, if measured)")
    add("--layer", type=layers, help="hidden layers, such as 1,3 (default: all)")
    add("--by", choices=("iteration", "epoch"), help="the x axis (default: iteration where all runs have them)")
    add("--smooth", type=positive, metavar="N", help="running mean of N measured iterations; 1 is none")
    add("--color", metavar="KEY", help="a colour for each value of a configuration key (default: method)")
    add("--facet", metavar="KEY", help="a panel for each value of a configuration key, such as optimizer.lr")
    add("--log", action="store_true", help="logarithmic y axis for loss, norm and rms")
    add("--dpi", type=positive, default=150, help="dots per inch of a PNG file (default: 150)")
    add("--out", type=Path, metavar="FILE", help=".png, .pdf or .svg (default: plot.png in RUN, or here for several)")
    return parser.parse_args(words)


def names(text: str) -> list[str]:
    """Return the entries of a list with commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def layers(text: str) -> list[int]:
    """Return the numbers of a list with commas."""
    return [positive(name) for name in names(text)]


def positive(text: str) -> int:
    """Return a positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive integer")
    return int(text)


def plot(asked: argparse.Namespace) -> Path:
    """Draw what is asked for, and return the path of the file."""
    from dfl_experiments.report.frame import runs
    from dfl_experiments.report.lines import draw
    from dfl_experiments.report.style import ending_of, save

    path = asked.out or (asked.runs[0] if len(asked.runs) == 1 else Path()) / "plot.png"
    ending_of(path)
    options = {"color": asked.color, "facet": asked.facet, "smooth": asked.smooth, "log": asked.log}
    save(draw(runs(*asked.runs), asked.what, asked.layer, asked.by, **options), path, asked.dpi)
    return path


def main(words: Sequence[str] | None = None) -> None:
    """Run the command; a user's mistake ends in one line and exit code 2."""
    logging.basicConfig(format="dfl-plot: %(message)s", force=True)
    with refusing("dfl-plot"):
        print(plot(arguments(words)))


if __name__ == "__main__":
    from dfl_experiments.console import plot as program

    program()
