"""Run `dfl-train` in another process, so that tests can read its output or kill it."""

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

import dfl_experiments.running.run  # noqa: F401  # imported here once, so that forks need not
from dfl_experiments.train import main


def dfl_train(
    folder: Path, *arguments: str, environment: dict[str, str] | None = None, timeout: float = 280
):
    """Run `dfl-train` in a folder. Return its exit code and its output.

    It runs in a fork of this process, which saves the import of PyTorch. With an environment it runs in a new process.
    """
    command = [sys.executable, "-m", "dfl_experiments.train", *arguments]
    if environment is not None:
        # one thread: with more, the threads of a tiny network wait for one another most of the time
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        return subprocess.run(
            command, cwd=folder, env=variables, capture_output=True, text=True, timeout=timeout
        )
    with tempfile.TemporaryDirectory() as temporary:
        out, err = Path(temporary, "out"), Path(temporary, "err")
        code = ended(forked(folder, *arguments, files=(out, err)))
        return subprocess.CompletedProcess(command, code, out.read_text(), err.read_text())


def forked(
    folder: Path,
    *arguments: str,
    before: Callable[[], None] = lambda: None,
    files: tuple[Path, Path] | None = None,
) -> int:
    """Start `dfl-train` in a folder in a fork of this process, and return its process id.

    before: function that the fork calls first.
    files: for stdout and stderr; None: both are appended to output.txt in the folder.
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
        # forks share tqdm's default lock: a fork that is killed while it holds the lock would block the others for ever
        tqdm.set_lock(threading.RLock())
        # OpenMP's threads do not exist in a fork, which would wait for them for ever
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
    """Wait for a process, and return its exit code: minus the signal's number if a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
