"""Entrypoint `dfl-train key=value …`: train one run, or a sweep with `--multirun`.

Exit codes: 0: success; 1: the run or a point of the sweep failed; 2: wrong input; 128 + n: signal n ended the command
after checkpoints were written (SIGINT: 130, SIGTERM: 143). A second SIGINT ends the command at once.
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
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from dfl_experiments import __version__
from dfl_experiments.configuration.composition import CONF_DIR, quoted, register_resolvers
from dfl_experiments.configuration.grids import BASIC, read_in_jobs
from dfl_experiments.configuration.launchers import register_launchers
from dfl_experiments.configuration.recorded import composable
from dfl_experiments.configuration.refusals import refuse, refusing, uncomposed
from dfl_experiments.console import leave
from dfl_experiments.errors import Fault, UserError, reason
from dfl_experiments.running import workers
from dfl_experiments.running.callbacks import Checks, Command, sum_up
from dfl_experiments.running.outcome import COMMAND, count_done, objective
from dfl_experiments.running.signals import Interrupted, PendingSignal, handle, pass_on
from dfl_experiments.running.sweep import SweepJob, run_point

# Register outside `main`, because a launcher's processes import this module, but do not call `main`.
register_resolvers()
register_launchers()
# flags that are followed by a value, which may look like an override
FLAGS_WITH_VALUE = ("--config-dir", "-cd", "--config-name", "-cn")
DRY_RUN = "--dry-run"
KILLED = ("TerminatedWorkerError", "BrokenProcessPool")  # joblib's errors for a killed worker


@hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")
def job(cfg: DictConfig) -> float | None:
    """Run one job, and return the accuracy that the protocol reports.

    For an optimising sweeper, return the validation accuracy instead.

    A single run uses the configuration that `on_run_start` checked. For a job of a sweep, the configuration is composed
    and checked again here, because the launcher may run the job in another process.
    """
    node = HydraConfig.get()
    run_dir = Path(node.runtime.output_dir)
    overrides: Any = OmegaConf.to_container(node.overrides.task, resolve=False)
    is_main = Checks.command.id.startswith(f"c{os.getpid()}-")
    try:
        if node.mode == RunMode.MULTIRUN:
            at_once = node.launcher.get("n_jobs") or 1
            sweep_job = SweepJob(os.environ[COMMAND], node.job.num, at_once, Path(node.sweep.dir))
            launcher = node.runtime.choices["hydra/launcher"]
            if not is_main and not workers.enter(sweep_job.command, launcher, node.job.num):
                return None
            accuracy = run_point(cfg, run_dir, overrides, sweep_job)
            return (
                accuracy if node.runtime.choices["hydra/sweeper"] == BASIC else objective(run_dir)
            )
        with refusing():
            from dfl_experiments.running.run import run_alone

            assert Checks.command.checked is not None, "on_run_start has set it"
            return run_alone(Checks.command.checked, run_dir, overrides)["accuracy"]
    except KeyboardInterrupt as stop:
        pass_on(stop)
        if is_main:
            raise
        # so that this launcher's process starts no further point
        PendingSignal.keep(signal.SIGTERM)
        workers.silence_submitit()
        workers.wait_for_slurm(stop, node.runtime.choices["hydra/launcher"])
        return None


def main() -> None:
    """Run the command line, which is one run or a sweep, and exit with its exit code."""
    if "--version" in sys.argv[1:]:
        print(f"dfl-experiments {__version__}")
        return
    # workers end when the process with this ID ends
    command = Checks.command = Command(f"c{os.getpid()}-{uuid4().hex}")
    command.is_dry = DRY_RUN in sys.argv[1:]
    logging.raiseExceptions = False  # no traceback if the output is a closed pipe
    arguments = [argument for argument in sys.argv[1:] if argument != DRY_RUN]
    sys.argv[1:] = overrides_first(read_in_jobs(composable(arguments)))
    # Hydra then raises its errors, and `refusing` prints one line
    os.environ["HYDRA_FULL_ERROR"] = "1"
    handlers = handle(on_signal)
    try:
        with refusing():
            refuse_dashes(sys.argv[1:])
            run_jobs()
    except KeyboardInterrupt as stop:
        signum: int = command.stopped_by or signal.SIGINT
        if isinstance(stop, Interrupted):
            signum = stop.signum
        print(f"dfl-train: interrupted ({signal.Signals(signum).name})", file=sys.stderr)
        raise SystemExit(128 + signum) from None
    finally:
        if command.sweep is not None:  # no summary yet: the launcher failed, or a signal arrived
            if command.stopped_by is None:
                with suppress(KeyboardInterrupt):
                    workers.wind_down(command.sweep)
            sum_up(command.sweep)
        for folder in command.made:
            # rmdir removes only an empty folder, so only that of a refused run
            with suppress(OSError):
                folder.rmdir()
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def run_jobs() -> None:
    """Run the command's jobs. If one worker is killed, joblib ends all workers. In this case, start the sweep again.

    The sweep is not started again if the last start finished no further point.
    """
    command = Checks.command
    ended_before = -1
    while True:
        try:
            job()
            return
        except Exception as error:
            if not command.begun and not isinstance(error, BrokenPipeError):
                refuse(uncomposed(error, sys.argv[1:]))
            if command.sweep is None:  # not a sweep, or the summary is already printed
                raise
            ended = count_done(command.sweep)
            if type(error).__name__ not in KILLED or ended <= ended_before:
                problem = f"{type(error).__name__}: {reason(error)}"
                raise Fault(f"hydra/launcher={command.sweep.launcher}: {problem}") from error
            ended_before = ended
            print("dfl-train: a worker was killed; the sweep continues")
            if not any(argument.startswith("sweep=") for argument in sys.argv):
                # repeat the sweep under the same name, which by default is made from the current time
                sys.argv.insert(1, f"sweep={quoted(command.sweep.name)}")


def refuse_dashes(arguments: Sequence[str]) -> None:
    """Raise `UserError` for an option that is written with dashes, such as --epochs=3 or --method dfa."""
    keys = {path.name for path in CONF_DIR.iterdir() if path.is_dir()}
    keys |= yaml.safe_load((CONF_DIR / "config.yaml").read_text(encoding="utf-8")).keys() - {
        "hydra"
    }
    for argument in arguments:
        name = argument.removeprefix("--").partition("=")[0]
        if argument.startswith("--") and name.partition(".")[0] in keys:
            raise UserError(f"{argument}: options are written without dashes; write {name}=…")


def overrides_first(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with all overrides before the flags and their values. Hydra accepts only this order."""
    overrides: list[str] = []
    flags: list[str] = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        is_override = "=" in argument or argument.startswith("~")
        if is_override and not argument.startswith("-") and before not in FLAGS_WITH_VALUE:
            overrides.append(argument)
        else:
            flags.append(argument)
    return [*overrides, *flags]


def on_signal(signum: int, frame: FrameType | None) -> NoReturn:
    """Handle a signal that arrives outside of training. Then only the launcher's processes have something to save."""
    command = Checks.command
    if not command.begun:
        leave("dfl-train", signum)
    if command.sweep is not None and not (signum == signal.SIGINT and command.stopped_by):
        command.stopped_by = signum
        workers.wind_down(command.sweep)
    raise Interrupted(signum)


if __name__ == "__main__":
    from dfl_experiments.console import train

    train()
