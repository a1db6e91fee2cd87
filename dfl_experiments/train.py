"""The entrypoint: `dfl-train key=value …`, one job or a multirun.

Exit codes: 0; 1 if the run, or a point of a sweep, failed; 2 for input that is refused; 130 and 143 after SIGINT and
SIGTERM, which end a run with a checkpoint; a second SIGINT ends it at once. A signal to the parent of a launcher's
processes alone ends those at once, and costs what they did since their last checkpoints.
"""

import os
import signal
import sys
import time
import traceback
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.types import RunMode
from omegaconf import DictConfig

from dfl_experiments.command_line import accepted, refuse
from dfl_experiments.config import CONF_DIR, UserError
from dfl_experiments.hydra_input import MISTAKES
from dfl_experiments.launchers import register_launchers
from dfl_experiments.messages import reason
from dfl_experiments.results import DONE, status_left
from dfl_experiments.settings import register_resolvers
from dfl_experiments.stopping import Interrupted, on_terminate, pass_on
from dfl_experiments.sweep import STARTED, Sweep, run_point, run_single, summary

# at import: the processes of a launcher import this module and never see `main`
register_resolvers()
register_launchers()
FULL_ERROR = "HYDRA_FULL_ERROR"
MAIN_PROCESS: int | None = None
# what every job's error passes through, wherever the job ran
JOB_ERRORS = vars(JobReturn)["return_value"].fget.__code__
KILLED = ("TerminatedWorkerError", "BrokenProcessPool")  # joblib's words for it


@hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")
def job(cfg: DictConfig) -> float | None:
    """One job: check the configuration, train, and return the accuracy that the protocol reports."""
    hydra_config = HydraConfig.get()
    run_dir = Path(hydra_config.runtime.output_dir)
    try:
        if hydra_config.mode == RunMode.MULTIRUN:
            return run_point(cfg, run_dir, hydra_config.job.num, hydra_config.launcher.get("n_jobs") or 1)
        return run_single(cfg, hydra_config, run_dir)
    except UserError as error:
        # Hydra would print a line of its own before the error
        refuse(error)
    except KeyboardInterrupt as stop:
        pass_on(stop)
        if os.getpid() == MAIN_PROCESS:
            raise
        return None  # of a launcher's process: this point's result says it, the others go on


def _raised_by_us(error: BaseException) -> bool:
    """Whether an error comes from a job or from the check before it, not from Hydra as it sets up what it was given."""
    codes = {frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)}
    return not codes.isdisjoint({JOB_ERRORS, accepted.__code__})


def main() -> None:
    """Run `job`; a user's mistake ends in one line and exit code 2, and HYDRA_FULL_ERROR=1 shows where it came from."""
    global MAIN_PROCESS
    MAIN_PROCESS = os.getpid()
    before = os.environ.get(FULL_ERROR)
    # Hydra then passes errors on to us instead of printing its own shortened traceback
    os.environ[FULL_ERROR] = "1"
    on_term = signal.signal(signal.SIGTERM, on_terminate)
    os.environ[STARTED] = str(time.time())
    code = 0
    try:
        asked = accepted(sys.argv[1:])
        if isinstance(asked, Sweep):
            code = run_sweep(asked)
        else:
            job()
    except KeyboardInterrupt as stop:
        code = stop.exit_code if isinstance(stop, Interrupted) else 130
    except MISTAKES as error:
        refuse(error)
    except OSError as error:
        refuse(error, code=1)
    except Exception as error:
        if _raised_by_us(error):
            raise
        refuse(error)
    finally:
        signal.signal(signal.SIGTERM, on_term)
        os.environ.pop(FULL_ERROR)
        if before is not None:
            os.environ[FULL_ERROR] = before
    if code:
        raise SystemExit(code)


def run_sweep(sweep: Sweep) -> int:
    """Run a sweep and return its exit code; start it again if a worker was killed, as long as points get done.

    A worker that is killed takes joblib's other workers with it, and what they had done since their last checkpoints.
    """
    if not any(argument.startswith("sweep=") for argument in sys.argv):
        sys.argv.append(f"sweep={sweep.name}")  # its default is the time, and Hydra would look at the clock again
    done, stopped = -1, 0
    try:
        while True:
            try:
                job()
                break
            except Exception as error:
                points = [sweep.folder / name for name in sweep.points]
                done, before = sum(status_left(point) in DONE for point in points), done
                if isinstance(error, MISTAKES) or not any(point.exists() for point in points):
                    raise
                traceback.clear_frames(error.__traceback__)
                print(f"dfl-train: the launcher stopped: {type(error).__name__}: {reason(error)}")
                if type(error).__name__ not in KILLED or done <= before:
                    stopped = 1
                    break
    except KeyboardInterrupt:
        summary(sweep)
        raise
    return summary(sweep) or stopped


if __name__ == "__main__":
    main()
