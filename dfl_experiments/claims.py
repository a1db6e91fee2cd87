"""The claim on a run directory: one process at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

SECONDS_TO_CLAIM = 0.5


class Busy(Exception):
    """Another process is at work in the run directory."""


@contextmanager
def claimed(run_dir: Path) -> Iterator[None]:
    """Hold the run directory, which is made if need be. Raises `Busy` while another process does.

    The lock is the system's own and ends with its process, however that ends.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        # not at once: a summary may be looking at it
        lock = FileLock(run_dir / ".lock").acquire(timeout=SECONDS_TO_CLAIM)
    except Timeout:
        raise Busy(f"{run_dir}: another process is at work there") from None
    with lock:
        yield
