"""Check all points of a sweep before it begins, and run each point when its launcher starts it."""

import itertools
import logging
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
from dfl_experiments.running.locks import Busy, lock_run, refuse_links
from dfl_experiments.running.outcome import Sweep, SweepPoint, has_begun, write_outcome
from dfl_experiments.running.point_counter import PointCounter
from dfl_experiments.running.result import status_left
from dfl_experiments.running.run_directory import record_overrides
from dfl_experiments.running.summary import four_digits
from dfl_experiments.running.workers import BUSY, call_no_success, check_launcher

log = logging.getLogger(__name__)

MANY_JOBS = 50  # with more jobs the check takes long enough to show its progress
TRACEBACK = "traceback.txt"
# these belong to the command: Hydra takes them from the first composition alone
OF_THE_COMMAND = ("hydra.sweeper", "hydra.launcher", "hydra.sweep.dir", "sweep")


@dataclass(frozen=True)
class SweepJob:
    """A job as the launcher starts it."""

    command: str
    """Id of the sweep's command."""
    number: int = 0
    """Hydra's number of the job."""
    at_once: int = 1
    """How many jobs the launcher runs at once, -1 for one per core."""
    folder: Path | None = None
    """Folder of the sweep, where the points are counted; None to count nothing."""

    def count(self, kind: str, start: float) -> str:
        """Count the point as ended, and return how far the sweep has come, see `PointCounter.add`."""
        return "" if self.folder is None else PointCounter(self.folder, self.command).add(kind, start)


def check_sweep(cfg: DictConfig, command: str) -> Sweep:
    """Compose and check every point of a sweep.

    If the sweeper chooses values one after another, only its first combination is checked, and the sweep has no points.

    cfg: Hydra's configuration of the whole sweep.
    command: id of this command.
    Raises one of `MISTAKES` for a sweep without jobs, a wrong job, a job that changes what belongs to the command, and
    two jobs that are the same run or would write to one folder.
    """
    params = (OmegaConf.select(cfg, "hydra.sweeper.params") or {}).items()
    sweeper, launcher = (cfg.hydra.runtime.choices[f"hydra/{name}"] for name in ("sweeper", "launcher"))
    check_launcher(launcher, cfg.hydra.launcher)
    swept = [f"{key}={value}" for key, value in params]
    grid = sweep_points([*swept, *cfg.hydra.overrides.task], sweeper)
    is_grid = sweeper == BASIC
    jobs = list(itertools.islice(grid, None if is_grid else 1))
    is_long = len(jobs) > MANY_JOBS
    if is_long:
        print(f"checking {len(jobs)} jobs", flush=True)
    digests: dict[str, str] = {}
    folders: dict[str, str] = {}
    sweep_dir = Path(str(cfg.hydra.sweep.dir)).absolute()
    sweep = Sweep(sweep_dir, str(cfg.sweep), command, launcher, bool(cfg.force))
    bar = tqdm(jobs, "checking", unit="job", leave=False, disable=None if is_long else True)
    for number, overrides in enumerate(bar):
        job = " ".join(overrides)
        try:
            configuration, folder = check_job(cfg, overrides, number)
            if not is_grid and not configuration.settings.validation_fraction:
                raise UserError(f"validation_fraction=0: hydra/sweeper={sweeper} chooses by validation accuracy")
            refuse_links(sweep.folder / folder)
        except (*MISTAKES, ValueError) as error:
            raise UserError(f"{one_line(uncomposed(error, overrides))} (in the job {job})") from error
        for key, jobs_by_key, problem in (
            (configuration.config_digest, digests, "are the same run"),
            (folder, folders, f"would write to {folder} (hydra.sweep.subdir)"),
        ):
            if key in jobs_by_key:
                raise UserError(f"two jobs {problem}: {jobs_by_key[key]} and {job}")
            jobs_by_key[key] = job
        if is_grid:
            sweep.points[folder] = SweepPoint(overrides, configuration.config_digest)
    return sweep


def check_job(cfg: DictConfig, overrides: Sequence[str], number: int = 0) -> tuple[Configuration, str]:
    """Return the checked configuration of one job, and its folder in the sweep's.

    cfg: Hydra's configuration of the whole sweep.
    Raises one of `MISTAKES`.
    """
    job_cfg = GlobalHydra.instance().config_loader().load_sweep_config(cfg, list(overrides))
    with open_dict(job_cfg.hydra.job):
        job_cfg.hydra.job.num, job_cfg.hydra.job.id = number, str(number)
    for key in OF_THE_COMMAND:
        if unresolved(job_cfg, key) != unresolved(cfg, key):
            raise UserError(f"{key}: differs from job to job; such a choice is for a command of its own")
    configuration = check(job_cfg)
    settings = configuration.settings
    if settings.resume is not None or settings.repeat is not None:
        raise UserError("resume and repeat are for a single run; a sweep started again goes on by itself")
    return configuration, subdir(job_cfg, configuration)


def subdir(cfg: DictConfig, configuration: Configuration) -> str:
    """Return a job's folder in the sweep's."""
    is_default = unresolved(cfg, "hydra.sweep.subdir") == "${point:}"
    return point_name(configuration.values) if is_default else str(cfg.hydra.sweep.subdir)


def unresolved(cfg: DictConfig, key: str) -> Any:
    """Return a part of a configuration with its interpolations unresolved."""
    parent, _, last = key.rpartition(".")
    node = OmegaConf.masked_copy(OmegaConf.select(cfg, parent) if parent else cfg, last)
    values: Any = OmegaConf.to_container(node, resolve=False)
    return values[last]


def run_point(cfg: DictConfig, run_dir: Path, overrides: Sequence[str], job: SweepJob) -> float | None:
    """Run a point of a sweep unless it is done or another process works on it, and return the reported accuracy.

    A point that fails writes its `result.json`, is reported in one line, and None is returned: the sweep goes on.
    """
    from dfl_experiments.running.run import failure

    start = time.time()
    try:
        with BUSY, lock_run(run_dir, job.command):
            try:
                result, is_new = run_or_find(check(cfg), run_dir, overrides, job)
            except BaseException as error:
                with suppress(OSError):  # a full disk must not hide the error itself
                    write_outcome(run_dir, job.command, **failure(error))
                raise
            if is_new:
                write_outcome(run_dir, job.command, result["status"], result["reason"])
        if is_new:
            (run_dir / TRACEBACK).unlink(missing_ok=True)
            ending = f"accuracy {four_digits(result['accuracy'])}"
            if result["status"] != "finished":
                ending = f"{result['status']}, {ending}"
            log.info("%s  (%s: %s)", job.count("ran", start) or result["status"], run_dir.name, ending)
        else:
            job.count("found", start)
        return result["accuracy"]
    except Busy as busy:
        job.count("elsewhere", start)
        log.info("%s", busy)
    except Exception as error:
        job.count("failed", start)
        if not isinstance(error, UserError | OSError):
            (run_dir / TRACEBACK).write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        # Hydra keeps what a job returns or raises; the frames hold the network and the images
        traceback.clear_frames(error.__traceback__)
        log.error("%s: failed: %s", run_dir.name, one_line(error))
        call_no_success()
    return None


def run_or_find(
    configuration: Configuration, run_dir: Path, overrides: Sequence[str], job: SweepJob
) -> tuple[dict[str, Any], bool]:
    """Return the result of a point in its locked directory, and whether it was run now and not found done."""
    from dfl_experiments.running.device import device_of_job, threads_of_job
    from dfl_experiments.running.run import result_if_done, run

    settings = configuration.settings
    # force=true starts a point anew once; a job that a queue starts again goes on
    is_anew = settings.force and not has_begun(run_dir, job.command)
    if not is_anew and (before := result_if_done(configuration, run_dir, settings.sweep)):
        return before, False
    record_overrides(run_dir, overrides)
    result = run(
        configuration,
        run_dir,
        settings.sweep,
        go_on=not is_anew and status_left(run_dir) is not None,
        command=job.command,
        device=device_of_job(settings.device, job.number),
        threads=threads_of_job(job.at_once),
    )
    return result, True
