"""Start the console scripts `dfl-train`, `dfl-report`, `dfl-plot` and `dfl-data`.

Ctrl-C ends a script with one line, even while PyTorch is being imported. This works, because this
module imports no slow package.
"""

import io
import os
import signal
import sys
from functools import partial
from importlib import import_module
from types import FrameType
from typing import NoReturn


def leave(program: str, signum: int, frame: FrameType | None = None) -> NoReturn:
    """End the process at once, without an exception, because a module that is being imported could catch an exception.

    The process has nothing to save yet.
    """
    os.write(2, f"{program}: interrupted ({signal.Signals(signum).name})\n".encode())
    os._exit(128 + signum)


def run(program: str, module: str) -> None:
    """Call a module's `main` as a program. Show no traceback if the output is closed, for example by `| head`."""
    # The threads of PyTorch spin while they wait for each other. By default they spin for milliseconds. Then a tiny net
    # trains 20 to 60 times more slowly while other processes use the cores.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # an ignored SIGINT stays ignored
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, partial(leave, program))
    sys.argv[0] = program  # `python -m` sets a file name, which Hydra would print
    for stream in (sys.stdout, sys.stderr):
        # if the terminal's encoding lacks a character, print ?
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        try:
            import_module(module).main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None


train = partial(run, "dfl-train", "dfl_experiments.train")
report = partial(run, "dfl-report", "dfl_experiments.report.dfl_report")
plot = partial(run, "dfl-plot", "dfl_experiments.report.dfl_plot")
data = partial(run, "dfl-data", "dfl_experiments.dfl_data")
