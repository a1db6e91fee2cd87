"""A sweep: its points before it begins, and each point as its turn comes."""

import itertools
import logging
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from tqdm import tqdm

from dfl_experiments.configuration.composition import point_name
from dfl_experiments.configuration.grids import sweep_points
from dfl_experiments.configuration.refusals import MISTAKES, one_line
from dfl_experiments.configuration.schema import Configuration, check
from dfl_experiments.configuration.sweep_loader import use_quick_compositions, validate_no_more
from dfl_experiments.data.packs import digest
from dfl_experiments.errors import UserError
from dfl_experiments.running.locks import Busy, locked, refuse_links
from dfl_experiments.running.result import DONE, read_result, status_left
from dfl_experiments.running.run_directory import record_overrides
from dfl_experiments.running.summary import Point, Sweep, four_digits, has_begun, write_outcome
from dfl_experiments.running.tracking import make_whole
from dfl_experiments.running.workers import BUSY, call_no_success

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
    grid = sweep_points([*(f"{key}={value}" for key, value in params), *cfg.hydra.overrides.task])
    sweeper, launcher = (cfg.hydra.runtime.choices[f"hydra/{name}"] for name in ("sweeper", "launcher"))
    is_grid = sweeper == "basic"
    jobs = list(itertools.islice(grid, None if is_grid else 1))
    if many := len(jobs) > MANY_JOBS:
        print(f"checking {len(jobs)} jobs", flush=True)
    compose = use_quick_compositions()
    chosen = {key: unresolved(cfg, key) for key in OF_THE_COMMAND}
    runs: dict[str, str] = {}
    folders: dict[str, str] = {}
    sweep = Sweep(Path(str(cfg.hydra.sweep.dir)).absolute(), str(cfg.sweep), command, launcher, bool(cfg.force))
    for number, overrides in enumerate(tqdm(jobs, "checking", unit="job", leave=False, disable=None if many else True)):
        job = " ".join(overrides)
        try:
            one = compose(cfg, overrides)
            with open_dict(one.hydra.job):
                one.hydra.job.num = one.hydra.job.id = number
            for key, value in chosen.items():
                if unresolved(one, key) != value:
                    raise UserError(f"{key}: differs from job to job; such a choice is for a command of its own")
            configuration = check(one)
            settings = configuration.settings
            if settings.resume is not None or settings.repeat is not None:
                raise UserError("resume and repeat are for a single run; a sweep started again goes on by itself")
            digest_of_run, folder = configuration.science, subdir(one, configuration)
            refuse_links(sweep.folder / folder)
        except MISTAKES as error:
            raise UserError(f"{one_line(error)} (in the job {job})") from error
        for key, seen in ((digest_of_run, runs), (folder, folders)):
            if key in seen:
                what = "are the same run" if seen is runs else f"would write to {folder} (hydra.sweep.subdir)"
                raise UserError(f"two jobs {what}: {seen[key]} and {job}")
            seen[key] = job
        if is_grid:
            sweep.points[folder] = Point(job, digest_of_run)
    if is_grid:
        validate_no_more()
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
    from dfl_experiments.running.run import failure, summarise

    try:
        with BUSY, locked(run_dir, command):
            try:
                result = _run_unless_done(check(cfg), run_dir, overrides, command, number, at_once)
            except BaseException as error:
                with suppress(OSError):  # of a full disk: the error itself is to be told
                    write_outcome(run_dir, command, **failure(error))
                raise
            if result is None:
                return (read_result(run_dir) or {}).get("accuracy")
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


def _run_unless_done(
    configuration: Configuration, run_dir: Path, overrides: Sequence[str], command: str, number: int, at_once: int
) -> dict[str, Any] | None:
    from dfl_experiments.running.device import device_of_job, threads_of_job
    from dfl_experiments.running.run import run, same_configuration

    settings = configuration.settings
    before, status = read_result(run_dir), status_left(run_dir)
    anew = settings.force and not has_begun(run_dir, command)  # a job that is queued again goes on
    if before is not None and not anew:
        same_configuration(configuration, run_dir, before)
        source = configuration.components["dataset.source"].build()
        data = digest(settings.dataset.name, source, Path(settings.data_dir))
        if None not in (data, before.get("data")) and data != before["data"]:
            raise UserError(f"{run_dir}: holds a run on other data, which have changed; force=true replaces it")
        if status in DONE:
            log.info("%s: %s already, accuracy %s", run_dir.name, status, four_digits(before["accuracy"]))
            make_whole(settings.tracking, run_dir, before, settings.sweep)
            return None
    record_overrides(run_dir, overrides)
    return run(
        configuration, run_dir, settings.sweep, go_on=status is not None and not anew, command=command,
        device=device_of_job(settings.device, number), threads=threads_of_job(at_once),
    )  # fmt: skip
