"""What the `reproduce_*.sh` scripts do: thin calls of `dfl-train --multirun experiment=…`, then of `dfl-report`.

The grids are those of conf/experiment/. Every call can be stopped and started again: finished points are skipped,
interrupted ones go on. The report is made in any case, with what is still missing shown as missing.
"""

import argparse
import contextlib
import math
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from measuring import learner_of, medians, random_batch

from dfl_experiments.configuration.composition import PLACES, compose
from dfl_experiments.configuration.grids import TABLES, Grid, grid_of
from dfl_experiments.configuration.refusals import MISTAKES, one_line
from dfl_experiments.configuration.schema import check
from dfl_experiments.data.sources import Published
from dfl_experiments.running.device import choose_device

EXPERIMENTS = {"alignment_figure": ("alignment_figure",), **TABLES}
TARGETS = {**{name: (name,) for name in EXPERIMENTS}, "all": tuple(EXPERIMENTS)}
SMOKE = {"smoke": "128", "epochs": "1"}  # images of each kind, and epochs
BESIDE_STEPS = 1.15  # evaluation and augmentation
MOST_JOBS_AT_ONCE = 500  # SLURM takes arrays of up to 1,000
LAUNCHERS = ("basic", "joblib", "slurm", "ray")


def narrowed(grid: Grid, only: list[str], choices: dict[str, set[str]]) -> Grid | None:
    """The part of a grid that --only leaves; None if nothing is left."""
    axes = dict(grid.axes)
    for place in PLACES:
        wanted = [word for word in only if word in choices[place]]
        if not wanted:
            continue
        if place in axes:
            axes[place] = [value for value in axes[place] if value in wanted]
        elif grid.fixed[place] not in wanted:
            return None
    return Grid(grid.experiment, axes, grid.fixed) if all(axes.values()) else None


def chosen(target: str, only: list[str]) -> list[tuple[str, Grid]]:
    """Sweep name and grid of every call. Leaves the process with one line for a word that names nothing."""
    grids = [(sweep, grid_of(name)) for sweep in TARGETS[target] for name in EXPERIMENTS[sweep]]
    choices: dict[str, set[str]] = {place: set() for place in PLACES}
    for _, grid in grids:
        for place in PLACES:
            choices[place] |= set(grid.axes.get(place) or [grid.fixed[place]])
    for word in only:
        if not any(word in values for values in choices.values()):
            raise SystemExit(f"error: --only {word}: there are {', '.join(sorted(set().union(*choices.values())))}")
    found = [(sweep, one) for sweep, grid in grids if (one := narrowed(grid, only, choices))]
    if not found:
        raise SystemExit(f"error: --only {','.join(only)}: no cell is all of these")
    return found


def launcher_options(launcher: str, jobs: int | None) -> list[str]:
    """What makes Hydra start the jobs that way, so many at once."""
    if launcher == "joblib":
        return ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={jobs or 2}"]
    if launcher == "slurm":  # the time limit is this project's default, a day; what meets it is queued again
        batch = f"hydra.sweeper.max_batch_size={MOST_JOBS_AT_ONCE}"
        return ["hydra/launcher=submitit_slurm", f"hydra.launcher.array_parallelism={jobs or 100}", batch]
    if launcher == "ray":  # without a number, as many as there are cores
        return ["hydra/launcher=ray", *([f"+hydra.launcher.ray.init.num_cpus={jobs}"] if jobs else [])]
    return []


def arguments_of(asked: argparse.Namespace, sweep: str, grid: Grid, seeds: list[int]) -> list[str]:
    """The arguments of one call of `dfl-train`."""
    fixed = {**(SMOKE if asked.smoke else {}), **({"epochs": str(asked.epochs)} if asked.epochs else {})}
    return [
        "--multirun",
        f"experiment={grid.experiment}",
        *([f"protocol={asked.protocol}"] if asked.protocol else []),
        f"sweep={sweep}",
        *(f"{key}={','.join(values)}" for key, values in grid.axes.items()),
        f"seed={','.join(map(str, seeds))}",
        *(f"{key}={value}" for key, value in fixed.items()),
        *launcher_options(asked.launcher, asked.jobs),
        *asked.overrides,
    ]


def calls(asked: argparse.Namespace) -> list[tuple[Grid, list[str]]]:
    """Every call in order: one seed of everything before the next, save on a cluster, where all wait in one queue."""
    each = range(asked.seeds)
    together = [[seed] for seed in each] if asked.launcher in ("basic", "joblib") else [[*each]]
    found = []
    for seeds in together:
        for sweep, grid in chosen(asked.target, asked.only):
            if asked.smoke:  # every cell, but one point of its grid
                sweep = f"{sweep}-smoke"
                grid = replace(grid, axes={key: v if key in PLACES else v[:1] for key, v in grid.axes.items()})
            found.append((grid, arguments_of(asked, sweep, grid, seeds)))
    return found


def seconds_of(point: dict[str, str], experiment: str, overrides: list[str]) -> float:
    """How long a run would take on this machine's device, from two steps of its size with random images."""
    cfg = check(compose([f"experiment={experiment}", *(f"{place}={point[place]}" for place in PLACES), *overrides]))
    size: Published = cfg.components["dataset.source"].build().published
    learner = learner_of(cfg, size.shape, size.classes, choose_device(cfg.settings.device))
    batch = random_batch(size.shape, size.classes, cfg.settings.batch_size, learner.device)
    steps = {"plain": lambda: learner.step(*batch), "measured": lambda: learner.step(*batch, align=True)}
    times = medians(steps, 2, learner.device)
    every = cfg.settings.alignment.every or math.inf
    step = times["plain"] + (times["measured"] - times["plain"]) / every
    return step * math.ceil(size.train / cfg.settings.batch_size) * cfg.settings.epochs


def single_valued(overrides: list[str]) -> tuple[list[str], int]:
    """Of the user's overrides those with one value, and how many runs the others make of one. Hydra's own are none."""
    parsed = [one for one in OverridesParser.create().parse_overrides(overrides) if not one.is_hydra_override()]
    sweeps = [one for one in parsed if one.is_sweep_override()]
    times = math.prod(len(list(one.sweep_iterator())) for one in sweeps)
    return [str(one.input_line) for one in parsed if not one.is_sweep_override()], times


def dry_run(asked: argparse.Namespace) -> None:
    """Print what would be run, and about how long it would take here."""
    known: dict[tuple[str, ...], float] = {}
    count, total = 0, 0.0
    fixed, times = single_valued(asked.overrides)
    fixed = [f"{key}={value}" for key in ("protocol", "epochs") if (value := getattr(asked, key))] + fixed
    for grid, arguments in calls(asked):
        print("dfl-train", *arguments)
        seeds = next(argument for argument in arguments if argument.startswith("seed="))
        repeats = (seeds.count(",") + 1) * times
        for point in grid.points():
            print("   ", " ".join(f"{key}={value}" for key, value in point.items()))
            count += repeats
            kind = (grid.experiment, *(point[place] for place in PLACES))
            if kind not in known and not asked.smoke:
                known[kind] = seconds_of(point, grid.experiment, fixed)
            total += repeats * known.get(kind, 0.0)
    print(f"\n{count} runs")
    if not asked.smoke:
        hours = BESIDE_STEPS * total / 3600
        print(f"about {hours:,.1f} hours on this machine, one after the other: from 2 steps of every kind of run")


def report(asked: argparse.Namespace, sweeps: Iterable[str]) -> None:
    """The tables on the terminal, then everything else into a folder of its own."""
    folders = [str(Path("outputs", sweep)) for sweep in dict.fromkeys(sweeps) if Path("outputs", sweep).is_dir()]
    if not folders:
        print("no report: no run has left a folder in outputs/")
        return
    place = Path("outputs", f"{asked.target}{'-smoke' * asked.smoke}-report")
    shutil.rmtree(place, ignore_errors=True)  # of an earlier report nothing stays beside this one
    from dfl_experiments.report.dfl_report import main as dfl_report

    written = {"markdown": "tables.md", "csv": "tables.csv", "latex": "tables.tex", "html": "report.html"}
    with contextlib.suppress(SystemExit):  # of a report that cannot be made: it has said why
        dfl_report(folders)
        for kind, name in written.items():
            figures = ["--figures", str(place / "figures")] if kind == "markdown" else []
            dfl_report([*folders, "--format", kind, "--out", str(place / name), *figures])


def finish(child: subprocess.Popen[bytes]) -> int:
    """Wait for a process that this one's signals have reached, or are passed on to, and return its exit code.

    `dfl-train` ends by itself, after its checkpoint: a wait that is interrupted must not kill it.
    """

    def pass_on(signum: int, _: object) -> None:
        if signum == signal.SIGTERM:  # of SIGINT a terminal tells both
            child.send_signal(signum)

    before = {signum: signal.signal(signum, pass_on) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        return child.wait()
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def run(asked: argparse.Namespace) -> int:
    """All calls, then the report; the worst exit code."""
    codes, sweeps = [0], []
    for _, arguments in calls(asked):
        sweeps.append(next(argument for argument in arguments if argument.startswith("sweep=")).partition("=")[2])
        print("dfl-train", *arguments, flush=True)
        codes.append(finish(subprocess.Popen([sys.executable, "-m", "dfl_experiments.train", *arguments])))
        if codes[-1] in (2, 130, 143) or codes[-1] < 0:  # refused, or stopped
            break
    report(asked, sweeps)
    return max(code if code >= 0 else 128 - code for code in codes)


def words(text: str) -> list[str]:
    """A comma-separated list."""
    return [word for word in text.split(",") if word]


def positive(text: str) -> int:
    """A whole number above zero."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number above zero")
    return int(text)


def check_overrides(asked: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse an override of what the script says to `dfl-train` itself, which the report would know nothing of."""
    given, asked.overrides = asked.overrides, []
    own = {argument.partition("=")[0] for _, arguments in calls(asked) for argument in arguments}
    asked.overrides = given
    for override in given:
        key = override.lstrip("+~").partition("=")[0]
        if key in own or key.startswith("hydra.sweep."):
            parser.error(f"{override}: the script sets {key} itself; --help shows what it can be told")


def main() -> None:
    """Read the command line and do as it says."""
    parser = argparse.ArgumentParser(
        "reproduce", description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
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
    check_overrides(asked, parser)
    if asked.dry_run:
        try:
            dry_run(asked)
        except MISTAKES as error:
            parser.error(one_line(error))
    else:
        raise SystemExit(run(asked))


if __name__ == "__main__":
    main()
