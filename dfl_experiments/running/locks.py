"""The lock on a run directory: one process at a time, and which process that is."""

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

HOLDER = ".running"  # beside the lock: read by processes that do not take the lock


class Busy(UserError):
    """Another process is at work in the run directory."""


class Holder(NamedTuple):
    """A process at work in a run directory."""

    host: str
    """Name of its machine."""
    pid: int
    """Its process ID there."""
    command: str | None
    """Id of the sweep's command that it works for; None for a single run."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} is at work on it"


def refuse_links(run_dir: Path) -> None:
    """Raise `UserError` if a run directory holds a symbolic link or a pipe.

    A run would write through the link to another file, and would wait at the pipe.
    """
    with suppress(FileNotFoundError, NotADirectoryError):
        for item in os.scandir(run_dir):
            if not item.is_dir(follow_symlinks=False) and not item.is_file(follow_symlinks=False):
                raise UserError(f"{item.path}: a symbolic link or a pipe, which a run would write through")


@contextmanager
def lock_run(run_dir: Path, command: str | None = None) -> Iterator[None]:
    """Hold the lock of a run directory inside the block; make the directory if it does not exist.

    The operating system releases the lock when the process ends, however it ends. On a file system without locks, the
    lock is the file itself, and a killed process leaves it behind. Half-written files of a killed process are removed.

    command: id of the sweep's command that the run belongs to.
    Raises `Busy` if another process holds the lock, `Fault` if the file cannot be locked.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(run_dir / ".lock").acquire(blocking=False)
    except Timeout:
        raise Busy(busy_message(run_dir)) from None
    except (OSError, NotImplementedError) as error:
        advice = "" if isinstance(error, PermissionError) else "; choose a folder on another file system"
        raise Fault(f"{run_dir / '.lock'}: cannot be locked ({reason(error)}){advice}") from error
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


def busy_message(run_dir: Path) -> str:
    """Return the line that says which process holds a run directory."""
    holder = holder_of(run_dir)
    message = f"{run_dir}: {holder or 'another process is at work there'}"
    if holder is not None and holder.host != platform.node():
        message += f"; if that process has ended, remove {run_dir / '.lock'}"
    return message


def holder_of(run_dir: Path) -> Holder | None:
    """Return the process that works in a run directory, None if there is none. The lock is not taken.

    For this host the process ID is checked; for other hosts the file is trusted.
    Raises `UserError` if the file is damaged.
    """
    content = read_json(run_dir / HOLDER)
    if content is None:
        return None
    try:
        holder = Holder(str(content["host"]), int(content["pid"]), content.get("command"))
    except (KeyError, ValueError, TypeError, OverflowError):
        holder = None
    if holder is None or not 0 < holder.pid < 2**31:
        raise UserError(f"{run_dir / HOLDER}: names no process")
    has_ended = holder.host == platform.node() and not alive(holder.pid)
    return None if has_ended else holder


def alive(pid: int) -> bool:
    """Return whether a process with this ID runs on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs, and belongs to another user
        pass
    with suppress(OSError):  # a zombie has ended; /proc tells, where there is one
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return True
