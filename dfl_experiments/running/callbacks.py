"""Hydra's callbacks: check a run or a sweep before it begins, and print the summary of a sweep.

Hydra turns an error of a callback into a warning. To stop the command, a callback therefore raises SystemExit.
"""

import shutil
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, read_write

from dfl_experiments.configuration.composition import AUTO, literal, plain, quoted
from dfl_experiments.configuration.recorded import with_recorded
from dfl_experiments.configuration.refusals import refusing
from dfl_experiments.configuration.schema import Configuration, check
from dfl_experiments.errors import UserError
from dfl_experiments.running.outcome import COMMAND, Sweep
from dfl_experiments.running.plan import PlannedRun, planned_runs, print_time, show_plan
from dfl_experiments.running.point_counter import PointCounter
from dfl_experiments.running.run_directory import refuse_folder_of_runs
from dfl_experiments.running.summary import print_summary
from dfl_experiments.running.sweep import check_job, check_sweep, jobs_of
from dfl_experiments.running.workers import QUEUE


def check_run(cfg: DictConfig) -> tuple[Configuration, Path]:
    """Return the checked configuration of a single run, and its directory. Raises `UserError` for a wrong option."""
    from dfl_experiments.running.device import choose_device

    if cfg.hydra.job.chdir:  # in another working directory, a relative data_dir would be wrong
        raise UserError("hydra.job.chdir=true: a run cannot change the working directory")
    overrides: Any = OmegaConf.to_container(cfg.hydra.overrides.task, resolve=False)
    configuration = check(with_recorded(cfg, overrides))
    run_dir = Path(str(cfg.hydra.run.dir))
    flags: Any = OmegaConf.to_container(cfg.hydra.overrides.hydra, resolve=False)
    resume = configuration.settings.resume
    if resume == AUTO and not any(flag.startswith("hydra.run.dir=") for flag in flags):
        raise UserError("resume=auto needs hydra.run.dir=<directory>")
    if resume not in (None, AUTO) and run_dir.resolve() != Path(resume).expanduser().resolve():
        problem = f"resume={resume} continues the run in its own directory"
        raise UserError(f"hydra.run.dir={run_dir}: {problem}; leave out hydra.run.dir=")
    refuse_folder_of_runs(run_dir)
    choose_device(configuration.settings.device)
    return configuration, run_dir


def note_grid(cfg: DictConfig) -> None:
    """Print a note if a single run has an experiment's grid, and the command does not choose a point of it."""
    overrides: Any = OmegaConf.to_container(cfg.hydra.overrides.task, resolve=False)
    chosen = [override.partition("=")[0] for override in overrides]
    keys = [key for key in OmegaConf.select(cfg, "hydra.sweeper.params") or () if key not in chosen]
    if keys:
        print(f"this is one run; the experiment's grid over {', '.join(keys)} needs --multirun")


def make_folder(folder: Path, key: str) -> None:
    """Make a folder, and store in `Checks.command.made` the folders that did not exist before.

    key: option that sets the folder.
    Raises `UserError` if the folder cannot be made.
    """
    Checks.command.made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        cause = getattr(error, "strerror", error)
        raise UserError(f"{key}={folder}: cannot be made ({cause})") from error


def pin(config: DictConfig, sweep: Sweep) -> None:
    """Add the sweep's folder and the command's ID to the overrides of all jobs.

    The launcher composes the configuration of each job later. The overrides give all jobs the same two values.
    """
    with read_write(config.hydra):
        config.hydra.sweep.dir = literal(str(sweep.folder))
        overrides: Any = OmegaConf.to_container(config.hydra.overrides.hydra, resolve=False)
        pinned = [
            f"hydra.sweep.dir={quoted(str(sweep.folder))}",
            f"++hydra.job.env_set.{COMMAND}={sweep.command}",
        ]
        config.hydra.overrides.hydra = overrides + pinned


@dataclass
class Command:
    """The state of a command."""

    id: str = ""
    """ID of the command, which is passed to its jobs."""
    is_dry: bool = False
    """Whether to list the runs without starting them."""
    begun: bool = False
    """Whether a run or sweep has started, so that there may be something to save."""
    stopped_by: int | None = None
    """The signal that ended the command."""
    made: list[Path] = field(default_factory=list)
    """Folders that were made for the run or sweep, the innermost first."""
    checked: Configuration | None = None
    """Checked configuration of a single run."""
    sweep: Sweep | None = None
    """The sweep; None before its check and after its summary."""


class Checks(Callback):
    """Check a run or a sweep before it begins, and print the summary of a sweep."""

    command: ClassVar[Command] = Command()
    """The command that this process runs. Hydra makes the callback, so the command cannot be passed to it."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check a single run before its directory is made."""
        command = Checks.command
        with refusing():
            HydraConfig.instance().set_config(config)
            command.checked, run_dir = check_run(config)
            note_grid(config)
            if command.is_dry:
                planned = PlannedRun(run_dir, str(run_dir), command.checked)
                show_plan([planned], command.checked.settings.force)
                raise SystemExit(0)
            make_folder(run_dir, "hydra.run.dir")
            command.begun = True

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check all jobs of a sweep before the first one begins."""
        command = Checks.command
        with refusing():
            HydraConfig.instance().set_config(config)
            sweep = check_sweep(config, command.id)
            if command.is_dry:
                print(f"sweep {sweep.name}, in {sweep.folder}")
                if sweep.points:
                    show_plan(planned_runs(sweep), sweep.force)
                else:
                    (job,) = jobs_of(config)
                    n_trials = OmegaConf.select(config, "hydra.sweeper.n_trials")
                    most = "" if n_trials is None else f", up to {n_trials} runs"
                    text = f"the sweeper chooses the points during the sweep{most}; one run takes"
                    print(text, flush=True)
                    print_time([PlannedRun(sweep.folder, "", check_job(config, job)[0])])
                raise SystemExit(0)
            make_folder(sweep.folder, "hydra.sweep.dir")
            pin(config, sweep)
            PointCounter(sweep.folder, sweep.command).start(len(sweep.points))
            if sweep.launcher == QUEUE and shutil.which("sbatch"):
                from dfl_experiments.running.slurm import watch

                watch()
            if sweep.launcher == "ray":
                start_ray(config)
            command.sweep = sweep  # from now on, the end of the sweep prints a summary
            command.begun = True

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Remove the configuration from a job's return value. Hydra keeps all return values until the sweep ends."""
        job_return.cfg = job_return.hydra_cfg = None

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the summary, and exit with code 1 if a point has no result.

        Hydra 1.4 also calls this method after an error or a signal. In this case `train.main` prints the summary.
        """
        if sys.exc_info()[1] is not None:
            return
        command = Checks.command
        with refusing():
            sweep, command.sweep = command.sweep, None
            if sweep is not None and (code := sum_up(sweep)):
                raise SystemExit(code)


def start_ray(config: DictConfig) -> None:
    """Start or join a Ray cluster, and restore the handler of SIGTERM afterwards.

    Ray sets its own handler, which aborts the process 3 s after the signal.
    """
    import ray

    before = signal.getsignal(signal.SIGTERM)
    ray.init(**plain(config.hydra.launcher.ray.init))
    signal.signal(signal.SIGTERM, before)


def sum_up(sweep: Sweep) -> int:
    """Remove the point counter, print the summary of a sweep, and return the exit code."""
    PointCounter(sweep.folder, sweep.command).remove()
    return print_summary(sweep)
