"""The command `dfl-plot`: the curves of one or more runs in one figure."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from dfl_experiments.configuration.refusals import refusing
from dfl_experiments.report.dfl_report import add_where

EPILOG = """examples:
  dfl-plot outputs/2026-01-31/12-00-00            loss, accuracy and alignment of a run, as plot.png in its folder
  dfl-plot outputs/grid --facet optimizer.lr      a sweep: means over seeds, a panel for each learning rate
  dfl-plot RUN1 RUN2 --what alignment --layer 1,3 --by epoch --out alignment.pdf
  dfl-plot outputs/grid --where method=las,dfa --where optimizer.lr=1e-3
  dfl-plot outputs/grid --what norm,rms,dead --log --color method --out stability.svg
  dfl-plot outputs/grid --what alignment --layer 1 --size 3.4x2.4 --out figure.pdf      for a paper
"""
WHAT = """comma-separated: loss, accuracy, alignment (cosine with BP's error signal), norm (length of the error signal,
divided by the length of BP's), rms (size of the activations), dead (share of dead units), or any column of epochs.csv
or iterations.csv, such as validation_loss (default: loss,accuracy,alignment if measured)"""


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        "dfl-plot",
        description="Draw the curves of one or more runs in one figure.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="a run directory, or a folder of runs")
    add("--what", type=names, help=WHAT)
    layer = "hidden layers, such as 1,3 (default: all)"
    add("--layer", dest="layers", type=layers, metavar="LAYER", help=layer)
    by = "x axis (default: iteration, if all drawn runs have iterations.csv)"
    add("--by", choices=("iteration", "epoch"), help=by)
    smooth = "running mean over N values; 1: none (default: 1/40 of the iterations; by epoch: none)"
    add("--smooth", type=positive, metavar="N", help=smooth)
    color = "one colour for each value of this configuration key (default: method)"
    add("--color", metavar="KEY", help=color)
    facet = "one panel for each value of this configuration key, such as optimizer.lr"
    add("--facet", metavar="KEY", help=facet)
    add_where(add)
    log = "logarithmic y axis, except for accuracy, alignment and dead"
    add("--log", action="store_true", help=log)
    size = "for a paper: width and height in inches, such as 3.4x2.4; title and caption are printed, not drawn"
    add("--size", type=inches, metavar="WxH", help=size)
    add("--dpi", type=dots, default=150, help="dots per inch of a PNG file (default: 150)")
    out = ".png, .pdf or .svg file (default: plot.png; in the folder RUN if there is only one RUN)"
    add("--out", type=Path, metavar="FILE", help=out)
    return parser.parse_args(words)


def names(text: str) -> list[str]:
    """Return the entries of a comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def layers(text: str) -> list[int]:
    """Return the numbers of a comma-separated list."""
    return [positive(name) for name in names(text)]


def positive(text: str) -> int:
    """Convert a text to a positive integer. Raises `ArgumentTypeError`."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def dots(text: str) -> int:
    """Convert a text to a number of dots per inch. Raises `ArgumentTypeError`."""
    if not text.isdecimal() or not 20 <= int(text) <= 1200:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 20 to 1200")
    return int(text)


def inches(text: str) -> tuple[float, float]:
    """Convert a text such as "3.4x2.4" to a width and a height. Raises `ArgumentTypeError`."""
    width, _, height = text.lower().partition("x")
    try:
        size = (float(width), float(height))
    except ValueError:
        size = (0.0, 0.0)
    if not all(1 <= side <= 100 for side in size):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size from 1x1 to 100x100 inches")
    return size


def plot(asked: argparse.Namespace) -> Path:
    """Draw the figure and return the path of its file."""
    from dfl_experiments.report.frame import runs, with_value
    from dfl_experiments.report.lines import draw
    from dfl_experiments.report.style import save

    options = vars(asked)  # apart from these four, the parameters of `draw`
    folders, where, out, dpi = [options.pop(name) for name in ("runs", "where", "out", "dpi")]
    frame = runs(*folders)
    for key, value in where:
        frame = with_value(frame, key, value)
    figure = draw(frame, **options)
    folder = folders[0] if len(folders) == 1 else Path()
    path: Path = out or folder / "plot.png"
    save(figure, path, dpi)
    return path


def main(words: Sequence[str] | None = None) -> None:
    """Run the command. After a user's mistake, print one line and exit with code 2."""
    logging.basicConfig(format="dfl-plot: %(message)s", force=True)
    logging.getLogger("dfl_experiments.report").setLevel(logging.INFO)
    with refusing("dfl-plot"):
        print(plot(arguments(words)))


if __name__ == "__main__":
    from dfl_experiments.console import plot as program

    program()
