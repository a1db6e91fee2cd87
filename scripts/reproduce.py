"""Run the experiments of the paper. The `reproduce_*.sh` scripts call this script.

`reproduce_arguments.py` defines the command line.
"""

import argparse
import contextlib
import itertools
import math
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from experiment_grids import TABLES, Grid, grid_of
from hydra.core.override_parser.overrides_parser import OverridesParser
from measuring import learner_of, medians, random_batch
from reproduce_arguments import read_arguments

from dfl_experiments.configuration.composition import PLACES, compose, point_name
from dfl_experiments.configuration.refusals import MISTAKES, one_line
from dfl_experiments.configuration.schema import check
from dfl_experiments.errors import UserError
from dfl_experiments.running.device import choose_device
from dfl_experiments.running.result import DONE, read_status

EXPERIMENTS = {"alignment_figure": ("alignment_figure",), **TABLES}
SMOKE = {"smoke": "128", "epochs": "1"}
SIZES = {  # number of training images, shape of an image, number of classes
    "mnist": (60_000, (1, 28, 28), 10),
    "cifar10": (50_000, (3, 32, 32), 10),
    "cifar100": (50_000, (3, 32, 32), 100),
    "tinyimagenet": (100_000, (3, 64, 64), 200),
}
# a run takes this multiple of its steps' time, because of evaluation and augmentation
BESIDE_STEPS = 1.15
MOST_JOBS_AT_ONCE = 500  # SLURM accepts arrays of up to 1,000


def narrowed(grid: Grid, only: list[str], choices: dict[str, set[str]]) -> Grid | None:
    """Return the part of a grid that --only selects. Return None if --only selects nothing of this grid."""
    axes = dict(grid.axes)
    for group in PLACES:
        wanted = [word for word in only if word in choices[group]]
        if not wanted:
            continue
        if group in axes:
            axes[group] = [value for value in axes[group] if value in wanted]
        elif grid.fixed[group] not in wanted:
            return None
    return Grid(grid.experiment, axes, grid.fixed) if all(axes.values()) else None


def chosen(target: str, only: list[str]) -> list[tuple[str, Grid]]:
    """Return the sweep name and the grid of every call of `dfl-train`.

    Raises:
        UserError: --only has an unknown word, or no run has all words of --only.
    """
    grids = []
    for sweep in EXPERIMENTS if target == "all" else [target]:
        grids += [(sweep, grid_of(name)) for name in EXPERIMENTS[sweep]]
    choices: dict[str, set[str]] = {group: set() for group in PLACES}
    for _, grid in grids:
        for group in PLACES:
            choices[group] |= set(grid.axes.get(group) or [grid.fixed[group]])
    for word in only:
        if not any(word in values for values in choices.values()):
            names = sorted(set().union(*choices.values()))
            raise UserError(f"--only {word}: choose from {', '.join(names)}")
    selected = [(sweep, part) for sweep, grid in grids if (part := narrowed(grid, only, choices))]
    if not selected:
        raise UserError(f"--only {','.join(only)}: no run combines these words")
    return selected


def launcher_options(launcher: str, jobs: int | None) -> list[str]:
    """Return the overrides for a launcher.

    jobs: number of jobs that run at the same time, or None for the launcher's default.
    """
    if launcher == "joblib":
        return ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={jobs or 2}"]
    if launcher == "slurm":  # a job that reaches its time limit (default: a day) is queued again
        at_once = f"hydra.launcher.array_parallelism={jobs or 100}"
        batch = f"hydra.sweeper.max_batch_size={MOST_JOBS_AT_ONCE}"
        return ["hydra/launcher=submitit_slurm", at_once, batch]
    if launcher == "ray":  # without a number of jobs, Ray runs one job per core
        cores = [f"+hydra.launcher.ray.init.num_cpus={jobs}"] if jobs else []
        return ["hydra/launcher=ray", *cores]
    return []


def arguments_of(asked: argparse.Namespace, sweep: str, grid: Grid, seeds: list[int]) -> list[str]:
    """Return the arguments of one call of `dfl-train`.

    Raises:
        UserError: an override sets a key that the script sets itself. The report would not know of it.
    """
    own = {"sweep": sweep}
    if asked.smoke:
        own |= SMOKE
    if asked.protocol:
        own["protocol"] = asked.protocol
    if asked.epochs:
        own["epochs"] = str(asked.epochs)
    own |= {key: ",".join(values) for key, values in grid.axes.items()}
    own["seed"] = ",".join(map(str, seeds))
    options = launcher_options(asked.launcher, asked.jobs)
    taken = {"experiment", *own, *(option.partition("=")[0] for option in options)}
    for override in asked.overrides:
        key = override.lstrip("+~").partition("=")[0]
        if key in taken or key.startswith("hydra.sweep."):
            raise UserError(f"{override}: the script sets {key} itself; --help lists its options")
    assignments = [f"{key}={value}" for key, value in own.items()]
    experiment = f"experiment={grid.experiment}"
    return ["--multirun", experiment, *assignments, *options, *asked.overrides]


def calls(asked: argparse.Namespace) -> list[list[str]]:
    """Return the arguments of the calls of `dfl-train`, in order.

    All grids run with the first seed, then all grids run with the next seed. With the launchers slurm and ray, there is
    only one call for each grid, which runs all seeds.
    """
    seeds_of_calls = [[seed] for seed in range(asked.seeds)]
    if asked.launcher not in ("basic", "joblib"):
        seeds_of_calls = [[*range(asked.seeds)]]
    result = []
    for seeds in seeds_of_calls:
        for sweep, grid in chosen(asked.target, asked.only):
            if asked.smoke:  # every cell runs only one point of its grid
                sweep = f"{sweep}-smoke"
                firsts = {key: v[:1] for key, v in grid.axes.items() if key not in PLACES}
                grid = replace(grid, axes=grid.axes | firsts)
            result.append(arguments_of(asked, sweep, grid, seeds))
    return result


def seconds_of(point: dict[str, str], experiment: str, overrides: list[str]) -> float:
    """Return the estimated seconds of a run on this machine, from two steps with random images."""
    places = [f"{group}={point[group]}" for group in PLACES]
    cfg = check(compose([f"experiment={experiment}", *places, *overrides]))
    count, shape, classes = SIZES[point["dataset"]]
    learner = learner_of(cfg, shape, classes, choose_device(cfg.settings.device))
    batch = random_batch(shape, classes, cfg.settings.batch_size, learner.device)
    steps = {
        "plain": lambda: learner.step(*batch),
        "measured": lambda: learner.step(*batch, align=True),
    }
    times = medians(steps, 2, learner.device)
    every = cfg.settings.alignment.every or math.inf
    step = times["plain"] + (times["measured"] - times["plain"]) / every
    return step * math.ceil(count / cfg.settings.batch_size) * cfg.settings.epochs


def combinations_of(asked: argparse.Namespace) -> list[list[str]]:
    """Return the overrides of a run, once for each combination of the values that the user's overrides sweep.

    Overrides of Hydra's own options are left out.
    """
    own = [("protocol", asked.protocol), ("epochs", asked.epochs)]
    choices = [[f"{key}={value}"] for key, value in own if value]
    for override in OverridesParser.create().parse_overrides(asked.overrides):
        if override.is_hydra_override():
            continue
        if override.is_sweep_override():
            key = override.get_key_element()
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([str(override.input_line)])
    return [list(combination) for combination in itertools.product(*choices)]


@dataclass(frozen=True)
class PlannedCell:
    """The runs of one cell of a table with one seed: a method at all points of the cell's grid."""

    sweep: str
    grid: Grid
    """The part of the experiment's grid that belongs to the cell."""
    seed: int
    runs: int
    """Number of runs that are not finished."""
    hours: float
    """Estimated hours of these runs on this machine."""

    def __str__(self) -> str:
        point = next(self.grid.points())
        words = " ".join(point[group] for group in PLACES)
        name = f"{self.grid.experiment}: {words}, seed {self.seed}"
        return f"{self.hours:9.3g} h  {name}, runs: {self.runs}"


def cells_of(grid: Grid) -> Iterator[Grid]:
    """Split a grid into one grid for each cell."""
    groups = [group for group in grid.axes if group in PLACES]
    for values in itertools.product(*(grid.axes[group] for group in groups)):
        places = {group: [value] for group, value in zip(groups, values, strict=True)}
        yield replace(grid, axes=grid.axes | places)


def unfinished(sweep: str, grid: Grid, seed: int, overrides: list[str]) -> int:
    """Return the number of points of a cell's grid that have no finished run in outputs/SWEEP."""
    folder = Path("outputs", sweep)
    count = 0
    for point in grid.points():
        names = "-".join(point[group] for group in ("method", "model", "dataset", "augmentation"))
        done = False
        if any(folder.glob(f"{names}-seed{seed}-*")):  # if there may be a run; composing is slow
            values = [f"{key}={value}" for key, value in point.items()]
            cfg = compose([f"experiment={grid.experiment}", *values, f"seed={seed}", *overrides])
            done = read_status(folder / point_name(cfg))[0] in DONE
        count += not done
    return count


def planned_cells(asked: argparse.Namespace) -> list[PlannedCell]:
    """Return the unfinished cells in the order in which a budget is spent, with their hours on this machine.

    The cells of the first seed come first, then those of the next seed. Within a seed, the cheapest cell comes first.
    """
    combinations = combinations_of(asked)
    grids = []
    for sweep, whole in chosen(asked.target, asked.only):
        grids += [(sweep, grid) for grid in cells_of(whole)]
    # one run's; assumed equal for all augmentations, grid points and swept overrides
    seconds: dict[tuple[str, ...], float] = {}
    planned = []
    for seed in range(asked.seeds):
        of_seed = []
        for sweep, grid in grids:
            runs = sum(unfinished(sweep, grid, seed, overrides) for overrides in combinations)
            point = next(grid.points())
            kind = (grid.experiment, point["dataset"], point["model"], point["method"])
            if runs and kind not in seconds:
                print("timing 2 steps:", *kind, file=sys.stderr)
                seconds[kind] = seconds_of(point, grid.experiment, combinations[0])
            if runs:
                of_seed.append(
                    PlannedCell(sweep, grid, seed, runs, BESIDE_STEPS * runs * seconds[kind] / 3600)
                )
        planned += sorted(of_seed, key=lambda cell: cell.hours)
    return planned


def show(cells: list[PlannedCell]) -> None:
    """Print the cells, and their number of runs and hours in all."""
    for cell in cells:
        print(cell)
    runs, hours = sum(cell.runs for cell in cells), sum(cell.hours for cell in cells)
    print(f"{hours:9.3g} h  in all, one run after the other: {runs} runs of {len(cells)} cells")


def within(budget: float, planned: list[PlannedCell]) -> list[PlannedCell]:
    """Return the cells that fit into the budget. Raises `UserError` if no cell fits."""
    totals = itertools.accumulate(cell.hours for cell in planned)
    fitting = [cell for cell, total in zip(planned, totals, strict=True) if total <= budget]
    if planned and not fitting:
        raise UserError(
            f"--budget: too small; the cheapest cell takes about {planned[0].hours:.2g} hours here"
        )
    print(f"{len(planned) - len(fitting)} unfinished cells do not fit")
    return fitting


def report(asked: argparse.Namespace, sweeps: Iterable[str]) -> None:
    """Print the tables, and write a report in all formats into a folder."""
    paths = [Path("outputs", sweep) for sweep in dict.fromkeys(sweeps)]
    folders = [str(path) for path in paths if path.is_dir()]
    if not folders:
        print("no report: no run has a folder in outputs/")
        return
    target = Path("outputs", f"{asked.target}{'-smoke' * asked.smoke}-report")
    shutil.rmtree(target, ignore_errors=True)  # delete the report of the previous call
    from dfl_experiments.report.dfl_report import main as dfl_report

    written = {
        "markdown": "tables.md",
        "csv": "tables.csv",
        "latex": "tables.tex",
        "html": "report.html",
    }
    asked_for = [*folders, "--paper"]
    with contextlib.suppress(SystemExit):  # if the report fails, it has printed the reason
        dfl_report(asked_for)
        for kind, name in written.items():
            figures = ["--figures", str(target / "figures")] if kind == "html" else []
            dfl_report([*asked_for, "--format", kind, "--out", str(target / name), *figures])


def finish(child: subprocess.Popen[bytes]) -> int:
    """Wait for a process and return its exit code. Pass the signal SIGTERM on to the process.

    After a signal, `dfl-train` writes a checkpoint and ends by itself, so this function keeps waiting.
    """

    def pass_on(signum: int, _: object) -> None:
        if signum == signal.SIGTERM:  # not SIGINT, which a terminal sends to both processes
            child.send_signal(signum)

    before = {signum: signal.signal(signum, pass_on) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        return child.wait()
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def run(asked: argparse.Namespace, planned: list[list[str]]) -> int:
    """Make the planned calls, then write the report. Return the highest exit code.

    planned: arguments of each call.
    """
    codes, sweeps = [0], []
    for arguments in planned:
        words = dict(argument.partition("=")[::2] for argument in arguments)
        sweeps.append(words["sweep"])
        print("dfl-train", *arguments, flush=True)
        command = [sys.executable, "-m", "dfl_experiments.train", *arguments]
        codes.append(finish(subprocess.Popen(command)))
        # the call was refused, or stopped by a signal
        if codes[-1] in (2, 130, 143) or codes[-1] < 0:
            break
    report(asked, sweeps)
    return max(code if code >= 0 else 128 - code for code in codes)


def main() -> None:
    """Read the command line, and run or print the calls."""
    parser, asked = read_arguments()
    try:
        planned = calls(asked)
        if asked.budget or (asked.dry_run and not asked.smoke):
            cells = planned_cells(asked)
            if asked.budget:
                cells = within(asked.budget, cells)
                planned = [
                    arguments_of(asked, cell.sweep, cell.grid, [cell.seed]) for cell in cells
                ]
            show(cells)
    except MISTAKES as error:
        parser.error(one_line(error))
    if not asked.dry_run:
        raise SystemExit(run(asked, planned))
    for arguments in planned:
        print("dfl-train", *arguments)


if __name__ == "__main__":
    main()
