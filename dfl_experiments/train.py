"""The entrypoint: `dfl-train key=value …`, one job or a multirun.

Exit codes: 0; 1 if the run, or a point of a sweep, failed; 2 for input that is refused; 130 and 143 after SIGINT and
SIGTERM, which end a run with a checkpoint; a second SIGINT ends it at once. A signal to the parent of a launcher's
processes alone ends those at once, and costs what they did since their last checkpoints.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dfl_experiments.configuration.composition import CONF_DIR, register_resolvers
from dfl_experiments.configuration.launchers import register_launchers
from dfl_experiments.configuration.refusals import choices_for
from dfl_experiments.running.callbacks import Checks, refusing
from dfl_experiments.running.run_directory import DONE, status_of
from dfl_experiments.running.signals import Interrupted, on_terminate, pass_on
from dfl_experiments.running.sweep import STARTED, run_point, summary

# at import: the processes of a launcher import this module and never see `main`
register_resolvers()
register_launchers()
MAIN_PROCESS: int | None = None
KILLED = ("TerminatedWorkerError", "BrokenProcessPool")  # joblib's words for a worker that was killed


@hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")
def job(cfg: DictConfig) -> float | None:
    """One job, which its check has let through: train, and return the accuracy that the protocol reports."""
    node = HydraConfig.get()
    run_dir = Path(node.runtime.output_dir)
    overrides: Any = OmegaConf.to_container(node.overrides.task, resolve=False)
    try:
        if node.mode == RunMode.MULTIRUN:
            return run_point(cfg, run_dir, overrides, node.job.num, node.launcher.get("n_jobs") or 1)
        with refusing():
            from dfl_experiments.running.run import run_alone

            assert Checks.checked is not None, "Hydra calls the callback first"
            return run_alone(Checks.checked, run_dir, overrides)["accuracy"]
    except KeyboardInterrupt as stop:
        pass_on(stop)
        if os.getpid() == MAIN_PROCESS:
            raise
        return None  # of a launcher's process: this point's result says it, the others go on


def main() -> None:
    """Run `job`, one job or a sweep, and end the process with the exit code that says how it went."""
    global MAIN_PROCESS
    MAIN_PROCESS = os.getpid()
    os.environ[STARTED] = str(time.time())
    on_term = signal.signal(signal.SIGTERM, on_terminate)
    Checks.checked = Checks.sweep = None
    done = -1
    try:
        while True:
            try:
                job()
                return
            except SystemExit as end:
                error = end.__context__
                if end.code == 1 and isinstance(error, HydraException | OmegaConfBaseException):
                    hint(error)
                    raise SystemExit(2) from None
                if Checks.sweep is None:  # no sweep, or one that has been summed up
                    raise
                done, before = points_done(), done
                if type(error).__name__ not in KILLED or done <= before:
                    raise
                # a killed worker takes joblib's others with it: as long as points get done, they go on
                print("dfl-train: a worker was killed; the sweep goes on")
                go_by_name(Checks.sweep.name)
    except KeyboardInterrupt as stop:
        raise SystemExit(stop.exit_code if isinstance(stop, Interrupted) else 130) from None
    finally:
        signal.signal(signal.SIGTERM, on_term)
        if Checks.sweep is not None:  # its launcher failed, or a signal ended it
            summary(Checks.sweep)


def hint(error: BaseException) -> None:
    """After Hydra's own refusal: what there is to choose from, where it does not say so."""
    if choices := choices_for(error):
        print(f"dfl-train: {choices}", file=sys.stderr)


def points_done() -> int:
    """How many points of this process's sweep have come to their end."""
    sweep = Checks.sweep
    return sum(status_of(sweep.folder / name)[0] in DONE for name in sweep.points) if sweep else 0


def go_by_name(sweep: str) -> None:
    """Let Hydra, which would look at the clock again, find the same sweep when it reads the command line anew."""
    if not any(argument.startswith("sweep=") for argument in sys.argv):
        sys.argv.append(f"sweep={sweep}")


if __name__ == "__main__":
    main()
