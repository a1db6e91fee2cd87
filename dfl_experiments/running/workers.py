"""A launcher's processes on this machine: each saves its run before it ends, and none outlives its command."""

import logging
import os
import platform
import signal
import subprocess
import threading
import time
from contextlib import suppress

from omegaconf import DictConfig

from dfl_experiments.errors import UserError
from dfl_experiments.running.locks import HOLDER, alive, holder_of
from dfl_experiments.running.outcome import Sweep
from dfl_experiments.running.signals import Interrupted, Kept, handle

LOCAL = ("joblib", "submitit_local")  # launchers whose processes run on this machine and end with the command
QUEUE = "submitit_slurm"  # its jobs go on after the command has ended
BUSY = threading.Lock()  # held while this process works on a point
SECONDS_BETWEEN_LOOKS = 1.0
LONGEST_GRACE = 3600.0


def at_work(sweep: Sweep) -> set[int]:
    """Return the IDs of other processes on this machine that work on the sweep's points for this command."""
    names = list(sweep.points) or [path.parent.name for path in sweep.folder.glob(f"*/{HOLDER}")]
    pids = set()
    for name in names:
        with suppress(UserError):  # a damaged file is none of this command's
            holder = holder_of(sweep.folder / name)
            if holder and (holder.host, holder.command) == (platform.node(), sweep.command):
                pids.add(holder.pid)
    return pids - {os.getpid()}


def check_launcher(launcher: str, node: DictConfig) -> None:
    """Raise `UserError` for launcher options with which no job would run, or none would save in time."""
    if node.get("n_jobs") == 0:
        raise UserError("hydra.launcher.n_jobs=0: must be the number of jobs at once, or -1 for one per core")
    if launcher == QUEUE and node.timeout_min * 60 <= node.signal_delay_s:
        raise UserError(
            f"hydra.launcher.timeout_min={node.timeout_min}: must be longer than hydra.launcher.signal_delay_s="
            f"{node.signal_delay_s} seconds, the time before its end at which a job is told to save"
        )


def wind_down(sweep: Sweep) -> None:
    """Ask every process that works on a point to save and end, and wait for them. Jobs in a queue stay there."""
    if sweep.launcher == QUEUE:
        command = ["squeue", "--me", "--noheader", "--states=PENDING,RUNNING", f"--name={sweep.name}"]
        with suppress(OSError):
            if subprocess.run(command, capture_output=True).stdout.strip():
                print("\ndfl-train: unfinished jobs stay in the queue (squeue lists them, scancel cancels them)")
        return
    asked: set[int] = set()
    while pids := at_work(sweep):
        if not asked:
            print(f"\ndfl-train: {len(pids)} running points save their checkpoints", flush=True)
        for pid in pids - asked:
            with suppress(ProcessLookupError, PermissionError):  # it has ended in the meantime
                os.kill(pid, signal.SIGTERM)
            asked.add(pid)
        time.sleep(0.05)


def enter(command: str, launcher: str, number: int) -> bool:
    """Prepare a launcher's process for a point, and return whether to start it: not if a signal has arrived.

    From now on signals wait for a safe point of training, the process ends after its command, and every line on the
    screen starts with the job's number.
    """
    if handle(Kept.keep).get(signal.SIGTERM) != Kept.keep and launcher in LOCAL:
        parent = int(command[1:].partition("-")[0])
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    logging.raiseExceptions = False
    for handler in logging.root.handlers:
        if not isinstance(handler, logging.FileHandler):
            handler.setFormatter(logging.Formatter(f"#{number} %(message)s"))
    return Kept.signum is None


def leave_to_the_queue(stop: KeyboardInterrupt, launcher: str) -> None:
    """Wait, in a SLURM job that received SIGTERM, until SLURM kills the process.

    A job that returned would count as completed, and SLURM would not queue it again. SLURM kills a job that it
    preempts, queues again or cancels after a time of grace; submitit handles SIGUSR2 in the meantime.
    """
    if launcher == QUEUE and isinstance(stop, Interrupted) and stop.signum == signal.SIGTERM:
        time.sleep(LONGEST_GRACE)


def call_no_success() -> None:
    """Stop submitit from logging success for a point that failed or was interrupted, whose job returns normally."""
    logging.getLogger("submitit").setLevel(logging.WARNING)


def _end_with(parent: int) -> None:
    while alive(parent):
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os.kill(os.getpid(), signal.SIGTERM)
    with BUSY:  # wait until the current point is saved
        os._exit(128 + signal.SIGTERM)
