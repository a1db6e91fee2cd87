"""What the `reproduce_*.sh` scripts do; `reproduce_arguments.py` says what."""

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
from reproduce_arguments import read_arguments

from dfl_experiments.configuration.composition import PLACES, compose
from dfl_experiments.configuration.grids import TABLES, Grid, grid_of
from dfl_experiments.configuration.refusals import MISTAKES, one_line
from dfl_experiments.configuration.schema import check
from dfl_experiments.errors import UserError
from dfl_experiments.running.device import choose_device

EXPERIMENTS = {"alignment_figure": ("alignment_figure",), **TABLES}
SMOKE = {"smoke": "128", "epochs": "1"}  # images of each kind, and epochs
SIZES = {  # images to train on, their shape, classes
    "mnist": (60_000, (1, 28, 28), 10),
    "cifar10": (50_000, (3, 32, 32), 10),
    "cifar100": (50_000, (3, 32, 32), 100),
    "tinyimagenet": (100_000, (3, 64, 64), 200),
}
BESIDE_STEPS = 1.15  # evaluation and augmentation
MOST_JOBS_AT_ONCE = 500  # SLURM takes arrays of up to 1,000


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
    """Sweep name and grid of every call. Raises `UserError` for a word that names nothing."""
    grids = [
        (sweep, grid_of(name))
        for sweep in (EXPERIMENTS if target == "all" else [target])
        for name in EXPERIMENTS[sweep]
    ]
    choices: dict[str, set[str]] = {place: set() for place in PLACES}
    for _, grid in grids:
        for place in PLACES:
            choices[place] |= set(grid.axes.get(place) or [grid.fixed[place]])
    for word in only:
        if not any(word in values for values in choices.values()):
            raise UserError(f"--only {word}: there are {', '.join(sorted(set().union(*choices.values())))}")
    found = [(sweep, one) for sweep, grid in grids if (one := narrowed(grid, only, choices))]
    if not found:
        raise UserError(f"--only {','.join(only)}: no cell is all of these")
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
    count, shape, classes = SIZES[point["dataset"]]
    learner = learner_of(cfg, shape, classes, choose_device(cfg.settings.device))
    batch = random_batch(shape, classes, cfg.settings.batch_size, learner.device)
    steps = {"plain": lambda: learner.step(*batch), "measured": lambda: learner.step(*batch, align=True)}
    times = medians(steps, 2, learner.device)
    every = cfg.settings.alignment.every or math.inf
    step = times["plain"] + (times["measured"] - times["plain"]) / every
    return step * math.ceil(count / cfg.settings.batch_size) * cfg.settings.epochs


def single_valued(overrides: list[str]) -> tuple[list[str], int]:
    """Of the user's overrides those with one value, and how many runs the others make of one. Hydra's own are none."""
    parsed = [one for one in OverridesParser.create().parse_overrides(overrides) if not one.is_hydra_override()]
    sweeps = [one for one in parsed if one.is_sweep_override()]
    times = math.prod(len(list(one.sweep_iterator())) for one in sweeps)
    return [str(one.input_line) for one in parsed if not one.is_sweep_override()], times


def dry_run(asked: argparse.Namespace) -> None:
    """Print what would be run, and about how long it would take here."""
    kinds: dict[tuple[str, ...], tuple[dict[str, str], int]] = {}  # a point of each, and how many runs it stands for
    fixed, times = single_valued(asked.overrides)
    fixed = [f"{key}={value}" for key in ("protocol", "epochs") if (value := getattr(asked, key))] + fixed
    for grid, arguments in calls(asked):
        print("dfl-train", *arguments)
        seeds = next(argument for argument in arguments if argument.startswith("seed="))
        repeats = (seeds.count(",") + 1) * times
        for point in grid.points():
            print("   ", " ".join(f"{key}={value}" for key, value in point.items()))
            kind = (grid.experiment, *(point[place] for place in PLACES))
            kinds[kind] = (point, kinds.get(kind, (point, 0))[1] + repeats)
    print(f"\n{sum(count for _, count in kinds.values())} runs", flush=True)
    if not asked.smoke:
        print(f"timing 2 steps of each of {len(kinds)} kinds of run", file=sys.stderr)
        total = sum(count * seconds_of(point, kind[0], fixed) for kind, (point, count) in kinds.items())
        hours = float(f"{BESIDE_STEPS * total / 3600:.2g}")
        print(f"about {hours:,g} hours on this machine, one after the other: from 2 steps of every kind of run")


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
    parser, asked = read_arguments()
    try:
        check_overrides(asked, parser)
        if asked.dry_run:
            dry_run(asked)
            return
    except MISTAKES as error:
        parser.error(one_line(error))
    raise SystemExit(run(asked))


if __name__ == "__main__":
    main()
