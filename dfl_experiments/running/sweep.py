"""A sweep: its points before it begins, and each point as its turn comes."""

import itertools
import logging
import traceback
from collections.abc import Sequence
from contextlib import suppress
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
from dfl_experiments.running.locks import Busy, locked, refuse_links
from dfl_experiments.running.result import status_left
from dfl_experiments.running.run_directory import record_overrides
from dfl_experiments.running.summary import Point, Sweep, has_begun, write_outcome
from dfl_experiments.running.workers import BUSY, call_no_success, check_launcher

log = logging.getLogger(__name__)

MANY_JOBS = 50  # from which on checking them takes long enough to be told
TRACEBACK = "traceback.txt"
# what belongs to the command and not to a job: Hydra would take it from the first composition alone
OF_THE_COMMAND = ("hydra.sweeper", "hydra.launcher", "hydra.sweep.dir", "sweep")


def check_sweep(cfg: DictConfig, command: str) -> Sweep:
    """The points of a sweep, every one of them composed and checked.

    A sweeper that chooses values as it goes has its first combination checked, and no points yet. cfg: Hydra's
    configuration of the whole; command: what its jobs are to know it by. Raises one of `MISTAKES` for a sweep without
    jobs, a wrong job, one that chooses what is the command's to choose, and two that are the same run or would write to
    one folder.
    """
    params = (OmegaConf.select(cfg, "hydra.sweeper.params") or {}).items()
    sweeper, launcher = (cfg.hydra.runtime.choices[f"hydra/{name}"] for name in ("sweeper", "launcher"))
    check_launcher(launcher, cfg.hydra.launcher)
    grid = sweep_points([*(f"{key}={value}" for key, value in params), *cfg.hydra.overrides.task], sweeper)
    is_grid = sweeper == BASIC
    jobs = list(itertools.islice(grid, None if is_grid else 1))
    if many := len(jobs) > MANY_JOBS:
        print(f"checking {len(jobs)} jobs", flush=True)
    loader = GlobalHydra.instance().config_loader()
    chosen = {key: unresolved(cfg, key) for key in OF_THE_COMMAND}
    runs: dict[str, str] = {}
    folders: dict[str, str] = {}
    sweep = Sweep(Path(str(cfg.hydra.sweep.dir)).absolute(), str(cfg.sweep), command, launcher, bool(cfg.force))
    for number, overrides in enumerate(tqdm(jobs, "checking", unit="job", leave=False, disable=None if many else True)):
        job = " ".join(overrides)
        try:
            one = loader.load_sweep_config(cfg, overrides)
            with open_dict(one.hydra.job):
                one.hydra.job.num, one.hydra.job.id = number, str(number)
            for key, value in chosen.items():
                if unresolved(one, key) != value:
                    raise UserError(f"{key}: differs from job to job; such a choice is for a command of its own")
            configuration = check(one)
            settings = configuration.settings
            if settings.resume is not None or settings.repeat is not None:
                raise UserError("resume and repeat are for a single run; a sweep started again goes on by itself")
            if not is_grid and not settings.validation_fraction:
                raise UserError(f"validation_fraction=0: hydra/sweeper={sweeper} chooses by validation accuracy")
            digest_of_run, folder = configuration.science, subdir(one, configuration)
            refuse_links(sweep.folder / folder)
        except (*MISTAKES, ValueError) as error:
            raise UserError(f"{one_line(uncomposed(error, overrides))} (in the job {job})") from error
        for key, seen in ((digest_of_run, runs), (folder, folders)):
            if key in seen:
                what = "are the same run" if seen is runs else f"would write to {folder} (hydra.sweep.subdir)"
                raise UserError(f"two jobs {what}: {seen[key]} and {job}")
            seen[key] = job
        if is_grid:
            sweep.points[folder] = Point(job, digest_of_run)
    return sweep


def subdir(cfg: DictConfig, configuration: Configuration) -> str:
    """A job's folder in that of its sweep."""
    given = unresolved(cfg, "hydra.sweep.subdir")
    return point_name(configuration.values) if given == "${point:}" else str(cfg.hydra.sweep.subdir)


def unresolved(cfg: DictConfig, key: str) -> Any:
    """A part of a configuration with its interpolations as they stand."""
    place, _, last = key.rpartition(".")
    node = OmegaConf.masked_copy(OmegaConf.select(cfg, place) if place else cfg, last)
    values: Any = OmegaConf.to_container(node, resolve=False)
    return values[last]


def run_point(
    cfg: DictConfig, run_dir: Path, overrides: Sequence[str], command: str, number: int = 0, at_once: int = 1
) -> float | None:
    """Run one point, unless it is done or another process is at work on it, and return the protocol's accuracy.

    command: the sweep's; number: the job's; at_once: how many the launcher runs together, -1 for one per core (see
    `device`). A point that fails leaves its `result.json` and says so in one line, and the sweep goes on; None is
    returned.
    """
    from dfl_experiments.running.device import device_of_job, threads_of_job
    from dfl_experiments.running.run import failure, found_done, run, summarise

    try:
        with BUSY, locked(run_dir, command):
            try:
                configuration = check(cfg)
                settings = configuration.settings
                anew = settings.force and not has_begun(run_dir, command)  # a job that is queued again goes on
                if not anew and (before := found_done(configuration, run_dir, settings.sweep)):
                    return before["accuracy"]
                record_overrides(run_dir, overrides)
                result = run(
                    configuration, run_dir, settings.sweep,
                    go_on=not anew and status_left(run_dir) is not None, command=command,
                    device=device_of_job(settings.device, number), threads=threads_of_job(at_once),
                )  # fmt: skip
            except BaseException as error:
                with suppress(OSError):  # of a full disk: the error itself is to be told
                    write_outcome(run_dir, command, **failure(error))
                raise
            write_outcome(run_dir, command, result["status"], result["reason"])
        (run_dir / TRACEBACK).unlink(missing_ok=True)
        summarise(result, run_dir)
        return result["accuracy"]
    except Busy as busy:
        log.info("%s", busy)
    except Exception as error:
        if not isinstance(error, UserError | OSError):
            (run_dir / TRACEBACK).write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        # Hydra keeps what a job returns or raises; the frames hold the network and the images
        traceback.clear_frames(error.__traceback__)
        log.error("%s: failed: %s", run_dir.name, one_line(error))
        call_no_success()
    return None
