"""The entrypoint: `dfl-train key=value …`, one job or a multirun.

Exit codes: 0; 1 if the run, or a point of a sweep, failed; 2 for input that is refused; 128 + its number after a signal
that ends a run, or all that a launcher has at work on this machine, with checkpoints (130 after SIGINT, 143 after
SIGTERM); a second SIGINT ends it at once.
"""

import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn
from uuid import uuid4

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from dfl_experiments import __version__
from dfl_experiments.configuration.composition import CONF_DIR, quoted, register_resolvers
from dfl_experiments.configuration.grids import BASIC
from dfl_experiments.configuration.launchers import register_launchers
from dfl_experiments.configuration.refusals import refuse, refusing, uncomposed
from dfl_experiments.console import leave
from dfl_experiments.errors import Fault, reason
from dfl_experiments.running import workers
from dfl_experiments.running.callbacks import Checks
from dfl_experiments.running.signals import Interrupted, Kept, handle, pass_on
from dfl_experiments.running.summary import COMMAND, done, objective, summary
from dfl_experiments.running.sweep import run_point

# at import: the processes of a launcher import this module and never see `main`
register_resolvers()
register_launchers()
# flags whose value may look like an override
VALUED = ("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--experimental-rerun")
KILLED = ("TerminatedWorkerError", "BrokenProcessPool")  # joblib's words for a worker that was killed


@hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")
def job(cfg: DictConfig) -> float | None:
    """One job, which its check has let through: train, and return the accuracy that the protocol reports.

    A sweeper that chooses by it is given the validation accuracy instead.
    """
    node = HydraConfig.get()
    run_dir = Path(node.runtime.output_dir)
    overrides: Any = OmegaConf.to_container(node.overrides.task, resolve=False)
    is_main = Checks.command.startswith(f"c{os.getpid()}-")
    try:
        if node.mode == RunMode.MULTIRUN:
            command, at_once = os.environ[COMMAND], node.launcher.get("n_jobs") or 1
            if not is_main and not workers.enter(command, node.runtime.choices["hydra/launcher"], node.job.num):
                return None
            accuracy = run_point(cfg, run_dir, overrides, command, node.job.num, at_once)
            return accuracy if node.runtime.choices["hydra/sweeper"] == BASIC else objective(run_dir)
        with refusing():
            from dfl_experiments.running.run import run_alone

            assert Checks.checked is not None, "Hydra calls the callback first"
            return run_alone(Checks.checked, run_dir, overrides)["accuracy"]
    except KeyboardInterrupt as stop:
        pass_on(stop)
        if is_main:
            raise
        Kept.keep(signal.SIGTERM)  # of a launcher's process: this point's result says it, no other is begun
        workers.call_no_success()
        workers.leave_to_the_queue(stop, node.runtime.choices["hydra/launcher"])
        return None


def main() -> None:
    """Run `job`, one job or a sweep, and end the process with the exit code that says how it went."""
    if "--version" in sys.argv[1:]:
        print(f"dfl-experiments {__version__}")
        return
    Checks.command = f"c{os.getpid()}-{uuid4().hex}"  # the process that a launcher's end with, and a name
    Checks.checked, Checks.sweep = None, None
    Checks.begun, Checks.stopped_by, Checks.made = False, None, []
    logging.raiseExceptions = False  # whoever reads the screen may have left
    sys.argv[1:] = overrides_first(sys.argv[1:])
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises an error, which is told in one line here, and prints no page
    handlers = handle(on_signal)
    ended = -1
    try:
        with refusing():
            while True:
                try:
                    job()
                    return
                except Exception as error:
                    if not Checks.begun and not isinstance(error, BrokenPipeError):
                        refuse(uncomposed(error, sys.argv[1:]))
                    if Checks.sweep is None:  # no sweep, or one that has been summed up
                        raise
                    ended, before = done(Checks.sweep), ended
                    if type(error).__name__ not in KILLED or ended <= before:
                        said = f"{type(error).__name__}: {reason(error)}"
                        raise Fault(f"hydra/launcher={Checks.sweep.launcher}: {said}") from error
                    # a killed worker takes joblib's others with it: as long as points get done, they go on
                    print("dfl-train: a worker was killed; the sweep goes on")
                    if not any(argument.startswith("sweep=") for argument in sys.argv):
                        sys.argv.insert(1, f"sweep={quoted(Checks.sweep.name)}")  # Hydra would look at the clock again
    except KeyboardInterrupt as stop:
        signum = stop.signum if isinstance(stop, Interrupted) else Checks.stopped_by or signal.SIGINT
        print(f"dfl-train: interrupted ({signal.Signals(signum).name})", file=sys.stderr)
        raise SystemExit(128 + signum) from None
    finally:
        if Checks.sweep is not None:  # its launcher failed, or a signal ended it
            if Checks.stopped_by is None:
                with suppress(KeyboardInterrupt):
                    workers.wind_down(Checks.sweep)
            summary(Checks.sweep)
        for folder in Checks.made:
            with suppress(OSError):  # it is in use, unless the run was refused
                folder.rmdir()
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def overrides_first(arguments: Sequence[str]) -> list[str]:
    """A command line with its flags, and their values, behind all overrides: Hydra reads none between them."""
    overrides: list[str] = []
    flags: list[str] = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        is_override = "=" in argument or argument.startswith("~")
        own = is_override and not argument.startswith("-") and before not in VALUED
        (overrides if own else flags).append(argument)
    return [*overrides, *flags]


def on_signal(signum: int, frame: FrameType | None) -> NoReturn:
    """Outside of training: nothing of this process needs to be saved, what its launcher has at work may."""
    if not Checks.begun:
        leave("dfl-train", signum)
    if Checks.sweep is not None and not (signum == signal.SIGINT and Checks.stopped_by):
        Checks.stopped_by = signum
        workers.wind_down(Checks.sweep)
    raise Interrupted(signum)


if __name__ == "__main__":
    from dfl_experiments.console import train

    train()
