"""Check all points of a sweep before it begins, and run each point when the launcher starts it."""

import itertools
import logging
import os
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf, open_dict
from tqdm import tqdm

from dfl_experiments.configuration.composition import point_name
from dfl_experiments.configuration.grids import BASIC, sweep_points
from dfl_experiments.configuration.refusals import MISTAKES, one_line, uncomposed
from dfl_experiments.configuration.schema import Configuration, check
from dfl_experiments.errors import UserError
from dfl_experiments.running.event_files import refuse_missing_package
from dfl_experiments.running.locks import Busy, lock_run
from dfl_experiments.running.outcome import Sweep, SweepPoint, has_begun, write_outcome
from dfl_experiments.running.point_counter import PointCounter
from dfl_experiments.running.result import status_left
from dfl_experiments.running.run_directory import (
    is_run,
    record_overrides,
    relative,
    write_atomically,
)
from dfl_experiments.running.summary import four_digits
from dfl_experiments.running.workers import BUSY, check_launcher, silence_submitit

log = logging.getLogger(__name__)

TRACEBACK = "traceback.txt"
# options that must be the same for all jobs, because Hydra reads them only once per command
SAME_FOR_ALL_JOBS = ("hydra.sweeper", "hydra.launcher", "hydra.sweep.dir", "sweep")


@dataclass(frozen=True)
class SweepJob:
    """A job of a sweep, which a launcher has started."""

    command: str
    """ID of the sweep's command."""
    number: int
    """Hydra's number of the job."""
    at_once: int
    """Number of jobs that the launcher runs at once; -1: one per core."""
    folder: Path
    """Folder of the sweep, where the ended points are counted."""


def check_sweep(cfg: DictConfig, command: str) -> Sweep:
    """Compose and check every point of a sweep.

    If the sweeper chooses values during the sweep, only one combination is checked, and `Sweep.points` stays empty.

    cfg: Hydra's configuration of the whole sweep.
    command: ID of this command.
    Raises one of `MISTAKES` if there is no job or a wrong job, if two jobs are the same run or have the same folder, or
    if the sweep's folder is a run.
    """
    sweeper, launcher = (
        cfg.hydra.runtime.choices[f"hydra/{name}"] for name in ("sweeper", "launcher")
    )
    check_launcher(launcher, cfg.hydra.launcher)
    is_grid = sweeper == BASIC
    jobs = jobs_of(cfg)
    jobs_by_name: dict[str, str] = {}
    sweep_dir = Path(str(cfg.hydra.sweep.dir)).absolute()
    if is_run(sweep_dir):
        raise UserError(
            f"{relative(sweep_dir)}: is a run, and would hide the runs of a sweep in it; choose another sweep="
        )
    flags = config_flags(cfg)
    sweep = Sweep(sweep_dir, str(cfg.sweep), command, launcher, bool(cfg.force), flags)
    progress = tqdm(jobs, "checking", unit="job", leave=False, disable=None)
    for number, overrides in enumerate(progress):
        job = " ".join(overrides)
        try:
            configuration, folder = check_job(cfg, overrides, number)
            if not is_grid and not configuration.settings.validation_fraction:
                raise UserError(
                    f"validation_fraction=0: hydra/sweeper={sweeper} needs a validation split"
                )
        except (*MISTAKES, ValueError) as error:
            problem = one_line(uncomposed(error, overrides))
            raise UserError(f"{problem} (in the job {job})") from error
        if not is_grid:
            return sweep
        name = point_name(configuration.values)
        if name in jobs_by_name:
            raise UserError(f"two jobs are the same run: {jobs_by_name[name]} and {job}")
        if folder in sweep.points:
            other = " ".join(sweep.points[folder].overrides)
            raise UserError(
                f"hydra.sweep.subdir: two jobs would write to {folder}: {other} and {job}"
            )
        jobs_by_name[name] = job
        sweep.points[folder] = SweepPoint(overrides, configuration)
    return sweep


def jobs_of(cfg: DictConfig) -> list[list[str]]:
    """Return the overrides of every job. If the sweeper chooses the jobs, return only the first combination."""
    params = (OmegaConf.select(cfg, "hydra.sweeper.params") or {}).items()
    swept = [f"{key}={value}" for key, value in params]
    sweeper = cfg.hydra.runtime.choices["hydra/sweeper"]
    grid = sweep_points([*swept, *cfg.hydra.overrides.task], sweeper)
    return list(itertools.islice(grid, None if sweeper == BASIC else 1))


def config_flags(cfg: DictConfig) -> list[str]:
    """Return the arguments of this command that say where the user's own options are."""
    flags = []
    for source in cfg.hydra.runtime.config_sources:
        if source.provider == "command-line":
            flags += ["--config-dir", relative(Path(source.path))]
    overrides: Any = OmegaConf.to_container(cfg.hydra.overrides.hydra, resolve=False)
    flags += [text for text in overrides if text.startswith("hydra.searchpath=")]
    return flags


def check_job(
    cfg: DictConfig, overrides: Sequence[str], number: int = 0
) -> tuple[Configuration, str]:
    """Return the checked configuration of one job, and the name of its folder.

    cfg: Hydra's configuration of the whole sweep.
    Raises one of `MISTAKES` if the job is wrong.
    """
    job_cfg = GlobalHydra.instance().config_loader().load_sweep_config(cfg, list(overrides))
    with open_dict(job_cfg.hydra.job):
        job_cfg.hydra.job.num, job_cfg.hydra.job.id = number, str(number)
    for key in SAME_FOR_ALL_JOBS:
        if unresolved(job_cfg, key) != unresolved(cfg, key):
            raise UserError(f"{key}: must be the same for all jobs; use one command for each value")
    configuration = check(job_cfg)
    settings = configuration.settings
    refuse_missing_package(settings.tracking)
    if settings.resume is not None or settings.repeat is not None:
        raise UserError(
            "resume and repeat are for a single run; start a sweep again to continue it"
        )
    return configuration, subdir(job_cfg, configuration)


def subdir(cfg: DictConfig, configuration: Configuration) -> str:
    """Return the name of a job's folder in the sweep's folder. Raises `UserError` for a folder outside of it."""
    if unresolved(cfg, "hydra.sweep.subdir") == "${point:}":
        return point_name(configuration.values)
    folder = os.path.normpath(str(cfg.hydra.sweep.subdir))
    if os.path.isabs(folder) or Path(folder).parts[:1] in ((), ("..",)):
        raise UserError(
            f"hydra.sweep.subdir='{cfg.hydra.sweep.subdir}': must be a folder inside the sweep's folder"
        )
    return folder


def unresolved(cfg: DictConfig, key: str) -> Any:
    """Return a part of a configuration without resolving interpolations."""
    parent, _, last = key.rpartition(".")
    node = OmegaConf.masked_copy(OmegaConf.select(cfg, parent) if parent else cfg, last)
    values: Any = OmegaConf.to_container(node, resolve=False)
    return values[last]


def run_point(
    cfg: DictConfig, run_dir: Path, overrides: Sequence[str], job: SweepJob
) -> float | None:
    """Run a point of a sweep, and return the reported accuracy. A point that is already done is not run again.

    If another process works on the point, return None. If the point fails, write its `result.json`, log one line and
    return None, so that the sweep continues.
    """
    from dfl_experiments.running.run import failure

    start, counter = time.time(), PointCounter(job.folder, job.command)
    name = os.path.relpath(run_dir, job.folder)
    try:
        with BUSY, lock_run(run_dir, job.command):
            try:
                result, is_new = run_or_find(check(cfg), run_dir, overrides, job)
            except BaseException as error:
                with suppress(OSError):  # a full disk must not hide the original error
                    write_outcome(run_dir, job.command, **failure(error))
                raise
            if is_new:
                write_outcome(run_dir, job.command, result["status"], result["reason"])
        if is_new:
            (run_dir / TRACEBACK).unlink(missing_ok=True)
            ending = f"accuracy {four_digits(result['accuracy'])}"
            if result["status"] != "finished":
                ending = f"{result['status']}, {ending}"
            progress = counter.add("ran", start) or result["status"]
            log.info("%s  (%s: %s)", progress, name, ending)
        else:
            counter.add("found", start)
        return result["accuracy"]
    except Busy as busy:
        counter.add("elsewhere", start)
        log.info("%s", busy)
    except Exception as error:
        counter.add("failed", start)
        details = ""
        if not isinstance(error, UserError | OSError):
            path = run_dir / TRACEBACK
            write_atomically(path, "".join(traceback.format_exception(error)))
            details = f" ({relative(path)} has the details)"
        # Hydra keeps the error of a job. Clear the error's frames, which would keep network and images in memory.
        traceback.clear_frames(error.__traceback__)
        log.error("%s: failed: %s%s", name, one_line(error), details)
        silence_submitit()
    return None


def run_or_find(
    configuration: Configuration, run_dir: Path, overrides: Sequence[str], job: SweepJob
) -> tuple[dict[str, Any], bool]:
    """Return the result of a point, and whether it was trained now. The directory must be locked."""
    from dfl_experiments.running.device import device_of_job, threads_of_job
    from dfl_experiments.running.earlier_run import result_if_done
    from dfl_experiments.running.run import run

    settings = configuration.settings
    # With force=true, a command deletes an earlier run only once. If a queue starts the job again, the point continues.
    is_forced = settings.force and not has_begun(run_dir, job.command)
    if not is_forced and (before := result_if_done(configuration, run_dir, settings.sweep)):
        return before, False
    record_overrides(run_dir, overrides)
    result = run(
        configuration,
        run_dir,
        settings.sweep,
        resume=not is_forced and status_left(run_dir) is not None,
        command=job.command,
        device=device_of_job(settings.device, job.number),
        threads=threads_of_job(job.at_once),
    )
    return result, True
