"""The entrypoint: `dfl-train key=value …`, one job or a multirun.

Exit codes: 0; 1 if the run, or a point of a sweep, failed; 2 for input that is refused; 130, 143 and 129 after SIGINT,
SIGTERM and SIGHUP, which end a run, or all that a launcher has at work on this machine, with checkpoints; a second
SIGINT ends it at once.
"""

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
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dfl_experiments import __version__
from dfl_experiments.configuration.composition import CONF_DIR, quoted, register_resolvers
from dfl_experiments.configuration.launchers import register_launchers
from dfl_experiments.configuration.refusals import in_our_words
from dfl_experiments.errors import any_text
from dfl_experiments.running import workers
from dfl_experiments.running.callbacks import Checks, refusing
from dfl_experiments.running.signals import Interrupted, Kept, handle, pass_on
from dfl_experiments.running.summary import COMMAND, done, summary
from dfl_experiments.running.sweep import run_point

# at import: the processes of a launcher import this module and never see `main`
register_resolvers()
register_launchers()
MAIN_PROCESS: int | None = None
# flags whose value may look like an override
VALUED = ("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--experimental-rerun")
KILLED = ("TerminatedWorkerError", "BrokenProcessPool")  # joblib's words for a worker that was killed


@hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")
def job(cfg: DictConfig) -> float | None:
    """One job, which its check has let through: train, and return the accuracy that the protocol reports."""
    node = HydraConfig.get()
    run_dir = Path(node.runtime.output_dir)
    overrides: Any = OmegaConf.to_container(node.overrides.task, resolve=False)
    is_main = os.getpid() == MAIN_PROCESS
    try:
        if node.mode == RunMode.MULTIRUN:
            command, at_once = os.environ[COMMAND], node.launcher.get("n_jobs") or 1
            if not is_main and not workers.enter(command, node.runtime.choices["hydra/launcher"], node.job.num):
                return None
            return run_point(cfg, run_dir, overrides, command, node.job.num, at_once)
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
    global MAIN_PROCESS
    MAIN_PROCESS = os.getpid()
    any_text()
    if "--version" in sys.argv[1:]:
        print(f"dfl-experiments {__version__}")
        return
    Checks.command, Checks.checked, Checks.sweep = workers.command_id(uuid4().hex), None, None
    Checks.ending = False
    sys.argv[1:] = overrides_first(sys.argv[1:])
    handlers = handle(on_signal)
    ended = -1
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
                ended, before = done(Checks.sweep), ended
                if type(error).__name__ not in KILLED or ended <= before:
                    raise
                # a killed worker takes joblib's others with it: as long as points get done, they go on
                print("dfl-train: a worker was killed; the sweep goes on")
                go_by_name(Checks.sweep.name)
    except KeyboardInterrupt as stop:
        raise SystemExit(stop.exit_code if isinstance(stop, Interrupted) else 130) from None
    finally:
        if Checks.sweep is not None:  # its launcher failed, or a signal ended it
            if not Checks.ending:
                with suppress(KeyboardInterrupt):
                    workers.wind_down(Checks.sweep)
            summary(Checks.sweep)
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
    if Checks.sweep is not None and not (signum == signal.SIGINT and Checks.ending):
        Checks.ending = True
        workers.wind_down(Checks.sweep)
    raise Interrupted(signum)


def hint(error: BaseException) -> None:
    """After Hydra's own refusal, what it does not say: what there is to choose from."""
    if said := in_our_words(error):
        print(f"dfl-train: error: {said}", file=sys.stderr)


def go_by_name(sweep: str) -> None:
    """Let Hydra, which would look at the clock again, find the same sweep when it reads the command line anew."""
    if not any(argument.startswith("sweep=") for argument in sys.argv):
        sys.argv.insert(1, f"sweep={quoted(sweep)}")


if __name__ == "__main__":
    main()
