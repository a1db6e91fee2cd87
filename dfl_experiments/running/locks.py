"""The lock on a run directory: one process at a time, and who that is."""

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

HOLDER = ".running"  # beside the lock, for those who only look


class Busy(UserError):
    """Another process is at work in the run directory."""


def refuse_links(run_dir: Path) -> None:
    """Raise `UserError` for a run directory with a symbolic link in it: a run would write to what that points to; or
    with a pipe, at which it would wait."""
    with suppress(FileNotFoundError, NotADirectoryError):
        for item in os.scandir(run_dir):
            if not item.is_dir(follow_symlinks=False) and not item.is_file(follow_symlinks=False):
                raise UserError(f"{item.path}: a symbolic link or a pipe, which a run would write through")


@contextmanager
def locked(run_dir: Path, command: str | None = None) -> Iterator[None]:
    """Hold the run directory, which is made if need be. Raises `Busy` while another process does, and `Fault` where the
    file cannot be locked.

    command: what the sweep that it is held for is known by. The lock is the system's own and ends with its process,
    however that ends; where the file system has none, it is the file, which a process that was killed leaves behind.
    What a killed process had not written to its end is removed.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(run_dir / ".lock").acquire(blocking=False)
    except Timeout:
        holder = holder_of(run_dir)
        elsewhere = holder is not None and holder.host != platform.node()
        advice = f"; if that has ended, remove {run_dir / '.lock'}" if elsewhere else ""
        raise Busy(f"{run_dir}: {holder or 'another process is at work there'}{advice}") from None
    except (OSError, NotImplementedError) as error:
        advice = "" if isinstance(error, PermissionError) else "; choose a place on another file system"
        raise Fault(f"{run_dir / '.lock'}: cannot be locked ({reason(error)}){advice}") from error
    with lock:
        for path in run_dir.glob(".*.new"):
            path.unlink()
        note = run_dir / HOLDER
        me = Holder(platform.node(), os.getpid(), command)
        write_atomically(note, json.dumps(me._asdict()))
        try:
            yield
        finally:
            note.unlink(missing_ok=True)


class Holder(NamedTuple):
    """A process at work in a run directory. command: what the sweep that it does this for is known by."""

    host: str
    pid: int
    command: str | None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} is at work on it"


def holder_of(run_dir: Path) -> Holder | None:
    """Who is at work in a run directory, as far as can be told without taking its lock; None if nobody is.

    Of a process on this machine it is known whether it still lives; of another machine's what it left is believed.
    Raises `UserError` where that is damaged.
    """
    held = read_json(run_dir / HOLDER)
    if held is None:
        return None
    try:
        found = Holder(str(held["host"]), int(held["pid"]), held.get("command"))
    except (KeyError, ValueError, TypeError, OverflowError):
        found = None
    if found is None or not 0 < found.pid < 2**31:
        raise UserError(f"{run_dir / HOLDER}: names no process")
    return None if found.host == platform.node() and not alive(found.pid) else found


def alive(pid: int) -> bool:
    """Whether there is a process of this number on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it lives, and is somebody else's
        pass
    with suppress(OSError):  # where the system tells: one that has ended and that nobody has asked for
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return True
