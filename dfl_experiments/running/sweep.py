"""A sweep: its points before it begins, each point as its turn comes, and how all of them ended."""

import csv
import io
import itertools
import logging
import os
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose
from omegaconf import DictConfig, OmegaConf, read_write

from dfl_experiments.configuration.composition import point_name, science
from dfl_experiments.configuration.grids import sweep_points
from dfl_experiments.configuration.refusals import MISTAKES, one_line
from dfl_experiments.configuration.schema import Configuration, check
from dfl_experiments.errors import UserError
from dfl_experiments.running.locks import Busy, locked
from dfl_experiments.running.run_directory import (
    CONFIG,
    DONE,
    LAST,
    PREVIOUS,
    RESULT,
    read_result,
    record_overrides,
    status_left,
    status_of,
    write_atomically,
)

log = logging.getLogger(__name__)

ROWS_SHOWN = 50
MANY_JOBS = 50  # from which on checking them takes long enough to be told
TRACEBACK = "traceback.txt"
STARTED = "DFL_STARTED"  # when the command began, for its launcher's processes too


@dataclass
class Sweep:
    """The sweep of this process: its folder, its name, and the overrides of every point by the name of its folder."""

    folder: Path
    name: str
    points: dict[str, str]


def check_sweep(cfg: DictConfig, config_name: str | None) -> Sweep:
    """The points of a sweep, every one of them composed and checked.

    A sweeper that chooses values as it goes has its first combination checked, and no points yet. cfg: Hydra's
    configuration of the whole. Raises one of `MISTAKES` for a sweep without jobs, a wrong job, or two jobs
    that are the same run or would write to one folder.
    """
    flags: Any = OmegaConf.to_container(cfg.hydra.overrides.hydra, resolve=False)
    params = (OmegaConf.select(cfg, "hydra.sweeper.params") or {}).items()
    grid = sweep_points([*(f"{key}={value}" for key, value in params), *cfg.hydra.overrides.task])
    is_grid = cfg.hydra.runtime.choices["hydra/sweeper"] == "basic"
    jobs = list(itertools.islice(grid, None if is_grid else 1))
    if len(jobs) > MANY_JOBS:
        print(f"checking {len(jobs)} jobs", flush=True)
    names: dict[str, str] = {}
    folders: dict[str, str] = {}
    for number, overrides in enumerate(jobs):
        job = " ".join(overrides)
        try:
            one = compose(config_name, [*flags, *overrides], return_hydra_config=True)
            with read_write(one.hydra.job):
                one.hydra.job.num, one.hydra.job.id = number, str(number)
            settings = check(one).settings
            if settings.resume is not None or settings.repeat is not None:
                raise UserError("resume and repeat are for a single run; a sweep started again goes on by itself")
            name, folder = point_name(one), str(one.hydra.sweep.subdir)
        except MISTAKES as error:
            raise UserError(f"{one_line(error)} (in the job {job})") from error
        for key, seen in ((name, names), (folder, folders)):
            if key in seen:
                what = "are the same run" if seen is names else f"would write to {folder} (hydra.sweep.subdir)"
                raise UserError(f"two jobs {what}: {seen[key]} and {job}")
            seen[key] = job
    return Sweep(Path(str(cfg.hydra.sweep.dir)), str(cfg.sweep), folders if is_grid else {})


def run_point(
    cfg: DictConfig, run_dir: Path, overrides: Sequence[str], number: int = 0, at_once: int = 1
) -> float | None:
    """Run one point, unless it is done or another process is at work on it, and return the protocol's accuracy.

    number: the job's; at_once: how many the launcher runs together, -1 for one per core (see `device`). A point that
    fails leaves its `result.json` and says so in one line, and the sweep goes on; None is returned.
    """
    from dfl_experiments.running.run import summarise

    try:
        with locked(run_dir):
            configuration = check(cfg)
            result = _run_unless_done(configuration, run_dir, overrides, number, at_once)
            if result is None:
                return (read_result(run_dir) or {}).get("accuracy")
        (run_dir / TRACEBACK).unlink(missing_ok=True)
        summarise(result, run_dir)
        return result["accuracy"]
    except Busy as busy:
        log.info("%s", busy)
    except Exception as error:
        if not isinstance(error, UserError | OSError):
            (run_dir / TRACEBACK).write_text("".join(traceback.format_exception(error)))
        # Hydra keeps what a job returns or raises; the frames hold the network and the images
        traceback.clear_frames(error.__traceback__)
        log.error("%s: failed: %s", run_dir.name, one_line(error))
    return None


def _run_unless_done(
    configuration: Configuration, run_dir: Path, overrides: Sequence[str], number: int, at_once: int
) -> dict[str, Any] | None:
    from dfl_experiments.running.device import device_of_job, threads_of_job
    from dfl_experiments.running.run import run

    settings = configuration.settings
    before, status = read_result(run_dir), status_left(run_dir)
    anew = settings.force and not touched_since_the_start(run_dir)
    if before is not None and not anew:
        if science(before["config"]) != configuration.science:
            raise UserError(f"{run_dir}: holds a run with another configuration; force=true replaces it")
        if status in DONE:
            log.info("%s: %s already, accuracy %s", run_dir.name, status, four_digits(before["accuracy"]))
            return None
    record_overrides(run_dir, overrides)
    return run(
        configuration, run_dir, settings.sweep, go_on=status is not None and not anew,
        device=device_of_job(settings.device, number), threads=threads_of_job(at_once),
    )  # fmt: skip


def touched_since_the_start(run_dir: Path) -> bool:
    """Whether this command has run the point already: a job that is queued again, say, whose force=true is obeyed."""
    times = [path.stat().st_mtime for name in (RESULT, LAST, PREVIOUS) if (path := run_dir / name).exists()]
    return max(times, default=0.0) >= float(os.environ.get(STARTED, "inf"))


def four_digits(accuracy: float | None) -> str:
    """An accuracy with four digits, a dash where there is none."""
    return "-" if accuracy is None else f"{accuracy:.4f}"


def summary(sweep: Sweep) -> int:
    """Print how every point ended, write it to `summary.csv`, and return the exit code: 1 unless all have an end."""
    names = sweep.points or {path.parent.name: "" for path in sorted(sweep.folder.glob(f"*/{CONFIG}"))}
    rows = [(name, *status_of(sweep.folder / name), job) for name, job in names.items()]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["point", "status", "accuracy", "reason", "overrides"])
    writer.writerows(rows)
    counts = Counter(status for _, status, *_ in rows)
    print(f"\nsweep {sweep.folder.name}: {len(rows)} points, {', '.join(f'{n} {s}' for s, n in counts.most_common())}")
    # of a long table the part that asks for attention comes first
    rows.sort(key=lambda row: row[1] == "finished")
    width = max((len(name) for name, *_ in rows), default=0)
    for name, status, accuracy, reason, job in rows[:ROWS_SHOWN]:
        print(f"  {name:{width}}  {status:11} {four_digits(accuracy):>6}  {reason or job}")
    if len(rows) > ROWS_SHOWN:
        print(f"  … and {len(rows) - ROWS_SHOWN} more")
    try:
        if sweep.folder.is_dir():
            write_atomically(sweep.folder / "summary.csv", text.getvalue())
            print(f"  {sweep.folder / 'summary.csv'}")
    except OSError as error:
        print(f"dfl-train: summary.csv: {error.strerror}")
    return 1 if counts.keys() & {"failed", "interrupted", "not started"} else 0
