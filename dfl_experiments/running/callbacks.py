"""What Hydra calls before a run or a sweep begins and after a sweep: the check of all of it, and the summary.

Hydra lets a callback's errors pass with a warning, but not its SystemExit.
"""

import shutil
import signal
import sys
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
from dfl_experiments.running.locks import refuse_links
from dfl_experiments.running.summary import COMMAND, Sweep, summary
from dfl_experiments.running.sweep import check_sweep
from dfl_experiments.running.workers import QUEUE


def check_run(cfg: DictConfig) -> Configuration:
    """The checked configuration of a single run, for which there is a device and a directory. Raises `UserError`."""
    from dfl_experiments.running.device import choose_device

    refuse_chdir(cfg)
    overrides: Any = OmegaConf.to_container(cfg.hydra.overrides.task, resolve=False)
    configuration, run_dir = check(with_recorded(cfg, overrides)), Path(str(cfg.hydra.run.dir))
    flags: Any = OmegaConf.to_container(cfg.hydra.overrides.hydra, resolve=False)
    if configuration.settings.resume == AUTO and not any(flag.startswith("hydra.run.dir=") for flag in flags):
        raise UserError("resume=auto: name the run directory that is to be gone on in, hydra.run.dir=…")
    choose_device(configuration.settings.device)
    made(run_dir, "hydra.run.dir")
    refuse_links(run_dir)
    return configuration


def refuse_chdir(cfg: DictConfig) -> None:
    """Raise `UserError` where jobs would run in another folder, in which a relative data_dir is another one."""
    if cfg.hydra.job.chdir:
        raise UserError("hydra.job.chdir=true: a run stays in the folder that it is started in")


def made(folder: Path, key: str) -> None:
    """Make the folder. Raises `UserError`, naming the key that it comes from, where that cannot be."""
    Checks.made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{key}={folder}: cannot be made ({getattr(error, 'strerror', error)})") from error


def pin(config: DictConfig, sweep: Sweep) -> None:
    """Have every job, wherever and whenever a launcher composes it, find the sweep's folder and the command's id."""
    with read_write(config.hydra):
        config.hydra.sweep.dir = literal(str(sweep.folder))
        given: Any = OmegaConf.to_container(config.hydra.overrides.hydra, resolve=False)
        pinned = [f"hydra.sweep.dir={quoted(str(sweep.folder))}", f"++hydra.job.env_set.{COMMAND}={sweep.command}"]
        config.hydra.overrides.hydra = given + pinned


class Checks(Callback):
    """command: what this process is known by; checked, sweep: what was found, for the job and for its end; begun:
    whether there may be something to save; stopped_by: the signal that has asked for the end; made: the
    folders made for a run or a sweep, the innermost first."""

    command: ClassVar[str] = ""
    begun: ClassVar[bool] = False
    stopped_by: ClassVar[int | None] = None
    made: ClassVar[list[Path]] = []
    checked: ClassVar[Configuration | None] = None
    sweep: ClassVar[Sweep | None] = None

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuse a wrong run before its directory is made."""
        with refusing():
            HydraConfig.instance().set_config(config)
            Checks.checked = check_run(config)
            Checks.begun = True

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuse a sweep with a wrong job before anything of it begins."""
        with refusing():
            HydraConfig.instance().set_config(config)
            refuse_chdir(config)
            sweep = check_sweep(config, Checks.command)
            made(sweep.folder, "hydra.sweep.dir")
            pin(config, sweep)
            if sweep.launcher == QUEUE and shutil.which("sbatch"):
                from dfl_experiments.running.slurm import watch

                watch()
            if sweep.launcher == "ray":
                import ray

                before = signal.getsignal(signal.SIGTERM)
                ray.init(**plain(config.hydra.launcher.ray.init))
                signal.signal(signal.SIGTERM, before)  # Ray's own aborts this process three seconds later
            Checks.sweep = sweep  # only now is there something to sum up
            Checks.begun = True

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Keep no configuration of a job that is done: Hydra keeps what each returns to the end of a sweep."""
        job_return.cfg = job_return.hydra_cfg = None

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Sum up, and let the exit code say whether every point has its result.

        Hydra 1.4 calls this of a sweep that an error or a signal ends as well, whose exit code `train.main` knows.
        """
        if sys.exc_info()[1] is not None:
            return
        with refusing():
            sweep, Checks.sweep = Checks.sweep, None
            if sweep is not None and (code := summary(sweep)):
                raise SystemExit(code)
