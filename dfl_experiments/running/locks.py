"""Lock a run directory for one process at a time, and record the ID of this process."""

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from dfl_experiments.errors import Fault, UserError, reason
from dfl_experiments.running.run_directory import write_atomically
from dfl_experiments.seal import read_json

HOLDER = ".running"  # file that names the process with the lock; reading the file needs no lock


class Busy(UserError):
    """Error: another process works in the run directory."""


class Holder(NamedTuple):
    """The process that works in a run directory."""

    host: str
    """Name of the machine on which it runs."""
    pid: int
    """Process ID on that machine."""
    command: str | None = None
    """ID of the sweep's command; None for a single run."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} works in it"


@contextmanager
def lock_run(run_dir: Path, command: str | None = None) -> Iterator[None]:
    """Hold the lock of a run directory inside the block. Make the directory if it does not exist.

    The operating system releases the lock when the process ends, even if the process is killed. Some file systems have
    no locks. There, the directory is locked while the file `.lock` exists, and a killed process leaves this file
    behind. Incomplete files of killed processes are removed.

    command: ID of the sweep's command; None for a single run.
    Raises `Busy` if another process holds the lock, and `Fault` if the file cannot be locked.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(run_dir / ".lock").acquire(blocking=False)
    except Timeout:
        holder = holder_of(run_dir)
        message = f"{run_dir}: {holder or 'another process works in it'}"
        if holder is not None and holder.host != platform.node():
            message += f"; if that process has ended, remove {run_dir / '.lock'}"
        raise Busy(message) from None
    except (OSError, NotImplementedError) as error:
        raise Fault(f"{run_dir / '.lock'}: cannot be locked ({reason(error)})") from error
    with lock:
        for path in run_dir.glob(".*.new"):
            path.unlink()
        note = run_dir / HOLDER
        holder = Holder(platform.node(), os.getpid(), command)
        write_atomically(note, json.dumps(holder._asdict()))
        try:
            yield
        finally:
            note.unlink(missing_ok=True)


def holder_of(run_dir: Path) -> Holder | None:
    """Return the process that works in a run directory; None if there is none. This works without the lock.

    The file `.running` names the process. On this host, the function checks that the process still runs. A process on
    another host is assumed to run.
    Raises `UserError` if the file is damaged.
    """
    content = read_json(run_dir / HOLDER)
    if content is None:
        return None
    holder = Holder(**content)
    has_ended = holder.host == platform.node() and not alive(holder.pid)
    return None if has_ended else holder


def alive(pid: int) -> bool:
    """Return whether a process with this ID runs on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # the process runs, but belongs to another user
        pass
    with suppress(OSError):  # a zombie process has ended; on Linux, /proc shows this state
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
        return after_name.split()[0] != "Z"
    return True
