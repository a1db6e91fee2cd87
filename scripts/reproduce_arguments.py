"""The command line of the `reproduce_*.sh` scripts, which any Python reads before anything is installed.

As a script it prints the extras that a call needs.
"""

import argparse

WHAT = """Runs of the paper: thin calls of `dfl-train --multirun experiment=…`, then of `dfl-report`.

The grids are those of conf/experiment/. Every call can be stopped and started again: finished points are skipped,
interrupted ones go on. The report is made in any case, with what is still missing shown as missing."""
TARGETS = ("alignment_figure", "fc_table", "cnn_table", "all")
LAUNCHERS = ("basic", "joblib", "slurm", "ray")


def words(text: str) -> list[str]:
    """A comma-separated list."""
    return [word for word in text.split(",") if word]


def positive(text: str) -> int:
    """A whole number above zero."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number above zero")
    return int(text)


def read_arguments() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The command line, read, and what refuses a wrong one."""
    parser = argparse.ArgumentParser(
        "reproduce", description=WHAT, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--smoke", action="store_true", help="every cell once, on a few images: a trial, no results")
    parser.add_argument("--protocol", choices=("paper", "authors", "fair"), help="default: fair")
    parser.add_argument("--seeds", type=positive, default=1, metavar="N", help="seeds 0 … N-1 (default: 1)")
    parser.add_argument("--epochs", type=positive, metavar="N", help="in place of the paper's number")
    parser.add_argument("--only", type=words, default=[], metavar="WORDS", help="such as cifar10,conv3,las")
    parser.add_argument("--launcher", choices=LAUNCHERS, help="default: basic; joblib if --jobs is above 1")
    parser.add_argument("--jobs", type=positive, metavar="N", help="runs at once: joblib 2, slurm 100, ray a core each")
    parser.add_argument("--dry-run", action="store_true", help="print the runs and an estimate of the time")
    parser.add_argument(
        "overrides",
        nargs="*",
        help="further overrides for dfl-train, such as\n"
        "hydra.launcher.gpus_per_node=1 hydra.launcher.partition=gpu, which SLURM is told",
    )
    asked = parser.parse_intermixed_args()
    asked.launcher = asked.launcher or ("joblib" if (asked.jobs or 1) > 1 else "basic")
    if asked.launcher == "basic" and (asked.jobs or 1) > 1:
        parser.error("--jobs: the basic launcher runs one at a time; choose --launcher joblib")
    if asked.launcher == "ray" and asked.jobs and any("ray.init.address=" in one for one in asked.overrides):
        parser.error("--jobs: Ray counts the cores of a cluster it joins itself; leave it out")
    return parser, asked


if __name__ == "__main__":
    _, found = read_arguments()
    print(",".join(["report", *[found.launcher] * (found.launcher != "basic")]))
