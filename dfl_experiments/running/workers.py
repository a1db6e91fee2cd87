"""Manage the processes that a launcher starts on this machine. When the command ends, they save their runs and end."""

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
from dfl_experiments.running.signals import Interrupted, PendingSignal, handle

# launchers whose processes run on this machine and end with the command
LOCAL = ("joblib", "submitit_local")
QUEUE = "submitit_slurm"  # launcher whose jobs continue after the command has ended
BUSY = threading.Lock()  # held while this process works on a point
SECONDS_BETWEEN_LOOKS = 1.0
LONGEST_GRACE = 3600.0  # longest time in seconds to wait until SLURM kills the process


def at_work(sweep: Sweep) -> set[int]:
    """Return the IDs of other processes on this machine that work on the sweep's points for this command."""
    folders = [sweep.folder / name for name in sweep.points]
    if not folders:  # a sweeper chooses the points during the sweep
        folders = [path.parent for path in sweep.folder.rglob(HOLDER)]
    pids = set()
    for folder in folders:
        with suppress(UserError):  # a damaged file is from another command
            holder = holder_of(folder)
            if holder and (holder.host, holder.command) == (platform.node(), sweep.command):
                pids.add(holder.pid)
    return pids - {os.getpid()}


def check_launcher(launcher: str, node: DictConfig) -> None:
    """Raise `UserError` if the launcher's options leave a job no time to save its run."""
    if launcher == QUEUE and node.timeout_min * 60 <= node.signal_delay_s:
        limit = (
            f"hydra.launcher.signal_delay_s={node.signal_delay_s} seconds, the time to save a run"
        )
        raise UserError(
            f"hydra.launcher.timeout_min={node.timeout_min}: must be longer than {limit}"
        )


def wind_down(sweep: Sweep) -> None:
    """Ask all processes that work on points to save and end. Wait for their end. SLURM jobs stay in the queue."""
    if sweep.launcher == QUEUE:
        command = ["squeue", "--me", "--noheader", "--states=PENDING,RUNNING"]
        with suppress(OSError):
            jobs = subprocess.run([*command, f"--name={sweep.name}"], capture_output=True)
            if jobs.stdout.strip():
                print("\ndfl-train: unfinished jobs stay in the queue (see squeue and scancel)")
        return
    asked: set[int] = set()
    while pids := at_work(sweep):
        if not asked:
            print(f"\ndfl-train: {len(pids)} running points save their checkpoints", flush=True)
        for pid in pids - asked:
            # the process has ended in the meantime
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGTERM)
            asked.add(pid)
        time.sleep(0.05)


def enter(command: str, launcher: str, number: int) -> bool:
    """Prepare a launcher's process for a point. Return whether the point may start. After a signal it may not.

    From now on, a signal takes effect only between two training steps. The process ends when its command ends, and
    every printed line begins with the job's number.
    """
    is_first_point = handle(PendingSignal.keep).get(signal.SIGTERM) != PendingSignal.keep
    if is_first_point and launcher in LOCAL:
        parent = int(command[1:].partition("-")[0])
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    logging.raiseExceptions = False
    for handler in logging.root.handlers:
        if not isinstance(handler, logging.FileHandler):
            handler.setFormatter(logging.Formatter(f"#{number} %(message)s"))
    return PendingSignal.signum is None


def wait_for_slurm(stop: KeyboardInterrupt, launcher: str) -> None:
    """In a SLURM job that received SIGTERM, wait until SLURM kills the process.

    If the job returned now, SLURM would count the job as completed and not queue it again. SLURM kills the process some
    time after SIGTERM. During this time, submitit can still handle SIGUSR2, and put the job back into the queue.
    """
    if launcher == QUEUE and isinstance(stop, Interrupted) and stop.signum == signal.SIGTERM:
        time.sleep(LONGEST_GRACE)


def silence_submitit() -> None:
    """Suppress submitit's message that a job succeeded. A job returns normally even if its point failed."""
    logging.getLogger("submitit").setLevel(logging.WARNING)


def _end_with(parent: int) -> None:
    """End this process after its parent process has ended."""
    while alive(parent):
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os.kill(os.getpid(), signal.SIGTERM)
    with BUSY:  # wait until the current point is saved
        os._exit(128 + signal.SIGTERM)
