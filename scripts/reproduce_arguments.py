"""Read the command line of the `reproduce_*.sh` scripts, before anything is installed.

This module needs only the standard library. If it is run as a script, it prints the extras of the package that the
given options need.
"""

import argparse
import re

DESCRIPTION = """Run experiments of the paper with `dfl-train --multirun experiment=…`, then `dfl-report`.

The grids are in conf/experiment/. Every call can be stopped and started again: finished points are skipped, interrupted
ones continue. A report is always written, and marks missing runs as missing."""
TARGETS = ("alignment_figure", "fc_table", "cnn_table", "all")
LAUNCHERS = ("basic", "joblib", "slurm", "ray")


def words(text: str) -> list[str]:
    """Split a comma-separated list."""
    return [word for word in text.split(",") if word]


def positive(text: str) -> int:
    """Return a whole number above zero. Raises `ArgumentTypeError`."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number above zero")
    return int(text)


def hours(text: str) -> float:
    """Convert a time such as 12h or 90m to hours. Raises `ArgumentTypeError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([hm])", text)
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a time above zero, such as 12h or 90m")
    return float(match[1]) / (60 if match[2] == "m" else 1)


def read_arguments() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Return the parser and the options of the command line."""
    parser = argparse.ArgumentParser(
        "reproduce",
        description=DESCRIPTION,
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="try every table cell once on a few images; not a result",
    )
    parser.add_argument("--protocol", choices=("paper", "authors", "fair"), help="default: fair")
    parser.add_argument(
        "--seeds", type=positive, default=1, metavar="N", help="seeds 0 … N-1 (default: 1)"
    )
    parser.add_argument(
        "--epochs", type=positive, metavar="N", help="number of epochs (default: as in the paper)"
    )
    parser.add_argument(
        "--only",
        type=words,
        default=[],
        metavar="WORDS",
        help="run only these, for example cifar10,conv3,las",
    )
    parser.add_argument(
        "--budget",
        type=hours,
        metavar="TIME",
        help="only the unfinished table cells that fit into this time on this machine, such as 12h:\n"
        "the first seed of all cells, the cheapest first, then the next seed",
    )
    parser.add_argument(
        "--launcher", choices=LAUNCHERS, help="default: basic; joblib if --jobs is above 1"
    )
    parser.add_argument(
        "--jobs",
        type=positive,
        metavar="N",
        help="runs at once (default: joblib 2, slurm 100, ray 1 per core)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print what would run. Without --smoke, also print the hours of the unfinished runs:\n"
        "this times training steps, so the project is installed first",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        help="further overrides for dfl-train, for example for SLURM\n"
        "hydra.launcher.gpus_per_node=1 hydra.launcher.partition=gpu",
    )
    asked = parser.parse_intermixed_args()
    asked.launcher = asked.launcher or ("joblib" if (asked.jobs or 1) > 1 else "basic")
    if asked.launcher == "basic" and (asked.jobs or 1) > 1:
        parser.error("--jobs: the basic launcher runs one job at a time; choose --launcher joblib")
    if asked.budget and (asked.launcher != "basic" or asked.smoke):
        parser.error(
            "--budget: assumes whole runs, one after another; omit --launcher, --jobs, --smoke"
        )
    return parser, asked


if __name__ == "__main__":
    _, options = read_arguments()
    needs_launcher = options.launcher != "basic" and not options.dry_run
    print(options.launcher if needs_launcher else "")
