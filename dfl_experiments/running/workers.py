"""The processes that a launcher starts here: none is cut off while it saves, and none outlives its command."""

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
from dfl_experiments.running.signals import Interrupted, Kept, handle
from dfl_experiments.running.summary import Sweep

LOCAL = ("joblib", "submitit_local")  # launchers whose processes end with the command, on its machine
QUEUE = "submitit_slurm"  # whose jobs go on without it
BUSY = threading.Lock()  # held by a process while it is at work on a point
SECONDS_BETWEEN_LOOKS = 1.0
LONGEST_GRACE = 3600.0


def at_work(sweep: Sweep) -> set[int]:
    """The other processes on this machine that are at work on the sweep's points for this command."""
    names = list(sweep.points) or [path.parent.name for path in sweep.folder.glob(f"*/{HOLDER}")]
    holders = []
    for name in names:
        with suppress(UserError):  # nobody of this command leaves a damaged one
            holders.append(holder_of(sweep.folder / name))
    ours = (platform.node(), sweep.command)
    return {holder.pid for holder in holders if holder and (holder.host, holder.command) == ours} - {os.getpid()}


def check_launcher(launcher: str, node: DictConfig) -> None:
    """Raise `UserError` for options of a launcher under which no job would run, or none would be saved in time."""
    if node.get("n_jobs") == 0:
        raise UserError("hydra.launcher.n_jobs=0: must be the number of jobs at once, or -1 for one per core")
    if launcher == QUEUE and node.timeout_min * 60 <= node.signal_delay_s:
        raise UserError(
            f"hydra.launcher.timeout_min={node.timeout_min}: must be longer than hydra.launcher.signal_delay_s="
            f"{node.signal_delay_s} seconds, the time before its end at which a job is told to save"
        )


def wind_down(sweep: Sweep) -> None:
    """Ask every process at work on a point to save it and end, and wait until they have; a queue's jobs stay in it."""
    if sweep.launcher == QUEUE:
        command = ["squeue", "--me", "--noheader", "--states=PENDING,RUNNING", f"--name={sweep.name}"]
        with suppress(OSError):
            if subprocess.run(command, capture_output=True).stdout.strip():
                print("\ndfl-train: what has not ended stays in the queue (squeue shows it, scancel takes it out)")
        return
    asked: set[int] = set()
    while pids := at_work(sweep):
        if not asked:
            print(f"\ndfl-train: {len(pids)} points under way save their checkpoints", flush=True)
        for pid in pids - asked:
            with suppress(ProcessLookupError, PermissionError):  # it has ended meanwhile
                os.kill(pid, signal.SIGTERM)
            asked.add(pid)
        time.sleep(0.05)


def enter(command: str, launcher: str, number: int) -> bool:
    """Prepare a launcher's process for a point: signals wait for a safe place, the command's end is one, and every line
    on the screen says which job it is of.

    Returns whether the point is to be begun: not when a signal has come already.
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
    """Of a queue's job that SIGTERM has ended: wait for the end that SLURM has in mind, which may queue it again.

    To return would be to have come to an end. What SLURM preempts, queues again or cancels it kills after its time of
    grace; SIGUSR2 meanwhile has submitit's handler.
    """
    if launcher == QUEUE and isinstance(stop, Interrupted) and stop.signum == signal.SIGTERM:
        time.sleep(LONGEST_GRACE)


def call_no_success() -> None:
    """Of a point that failed or was interrupted: have submitit, whose job returns nevertheless, not log a success."""
    logging.getLogger("submitit").setLevel(logging.WARNING)


def _end_with(parent: int) -> None:
    while alive(parent):
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os.kill(os.getpid(), signal.SIGTERM)
    with BUSY:  # until the point in hand is saved
        os._exit(128 + signal.SIGTERM)
