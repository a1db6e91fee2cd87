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

HOLDER = ".running"  # beside the lock, for those who only look


class Busy(Exception):
    """Another process is at work in the run directory."""


def refuse_links(run_dir: Path) -> None:
    """Raise `UserError` for a run directory with a symbolic link in it: a run would write to what that points to."""
    with suppress(FileNotFoundError, NotADirectoryError):
        for item in os.scandir(run_dir):
            if item.is_symlink():
                raise UserError(
                    f"{item.path}: a symbolic link, which a run would write through; put the file itself there"
                )


@contextmanager
def locked(run_dir: Path, command: str | None = None) -> Iterator[None]:
    """Hold the run directory, which is made if need be. Raises `Busy` while another process does, and `Fault` where the
    file system has no locks.

    command: what the sweep that it is held for is known by. The lock is the system's own and ends with its process,
    however that ends.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(run_dir / ".lock").acquire(blocking=False)
    except Timeout:
        raise Busy(f"{run_dir}: another process is at work there") from None
    except (OSError, NotImplementedError) as error:
        advice = "" if isinstance(error, PermissionError) else "; choose a place on another file system"
        raise Fault(f"{run_dir / '.lock'}: cannot be locked ({reason(error)}){advice}") from error
    with lock:
        holder = run_dir / HOLDER
        me = Holder(platform.node(), os.getpid(), command)
        holder.write_text(json.dumps(me._asdict()), encoding="utf-8")
        try:
            yield
        finally:
            holder.unlink(missing_ok=True)


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
    """
    try:
        held = json.loads((run_dir / HOLDER).read_text(encoding="utf-8"))
        found = Holder(str(held["host"]), int(held["pid"]), held.get("command"))
    except (OSError, ValueError, KeyError, TypeError):
        return None
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
