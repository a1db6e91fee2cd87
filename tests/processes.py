"""`dfl-train` in a process of its own, to be looked at or killed."""

import logging
import os
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

import dfl_experiments.running.run  # noqa: F401  # what a fork has, it need not import
from dfl_experiments.train import main


def dfl_train(
    folder: Path, *arguments: str, environment: dict[str, str] | None = None, timeout: float = 280
):
    """Run `dfl-train` in a folder as a person would, with what it writes.

    In a fork of this process, which has PyTorch already; in a new one where an environment is given.
    """
    command = [sys.executable, "-m", "dfl_experiments.train", *arguments]
    if environment is not None:
        # one thread, or two busy cores make a tiny network's threads wait for one another most of the time
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        return subprocess.run(
            command, cwd=folder, env=variables, capture_output=True, text=True, timeout=timeout
        )
    with tempfile.TemporaryDirectory() as place:
        files = Path(place) / "out", Path(place) / "err"
        code = ended(forked(folder, *arguments, files=files))
        return subprocess.CompletedProcess(command, code, *(file.read_text() for file in files))


def forked(
    folder: Path,
    *arguments: str,
    before: Callable[[], None] = lambda: None,
    files: tuple[Path, Path] | None = None,
) -> int:
    """Start `dfl-train` in a folder in a fork of this process, and return its process id.

    before: called in the fork. files: for what it writes to stdout and stderr; else both go to output.txt there.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.chdir(folder)
        out, err = files or (Path("output.txt"), Path("output.txt"))
        sys.stdout, sys.stderr = out.open("a", buffering=1), err.open("a", buffering=1)
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stderr.fileno(), 2)
        os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that a launcher starts
        # tqdm's own lock is shared with all forks: one that is killed while it holds the lock would block the others
        tqdm.set_lock(threading.RLock())
        # a fork waits for ever for OpenMP's threads, which stay with its parent
        if torch.get_num_threads() > 1:
            torch.set_num_threads(1)
            torch.set_num_threads = lambda count: None
        sys.argv = ["dfl-train", *arguments]
        before()
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(pid: int) -> int:
    """Wait for a process and return its exit code, that of a killed one below zero."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
