"""The console scripts `dfl-train`, `dfl-report`, `dfl-plot` and `dfl-data`.

Ctrl-C ends them with one line, even during imports. Nothing slow is imported here, so that this works while PyTorch is
still being imported.
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
    """End the process at once, while there is nothing to save. An exception during an import could be swallowed."""
    os.write(2, f"{program}: interrupted ({signal.Signals(signum).name})\n".encode())
    os._exit(128 + signum)


def run(program: str, module: str) -> None:
    """Call a module's `main` as a program. The reader of its output may close it early, as `head` does."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # unless it is ignored
        signal.signal(signal.SIGINT, partial(leave, program))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # the terminal's encoding may lack a character
            stream.reconfigure(errors="replace")
    try:
        try:
            import_module(module).main()
        finally:
            sys.stdout.flush()
    except OSError as error:  # the output is closed, or its disk is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again at its end
        if isinstance(error, BrokenPipeError):
            raise SystemExit(128 + signal.SIGPIPE) from None
        raise SystemExit(f"{program}: error: {error}") from None


train = partial(run, "dfl-train", "dfl_experiments.train")
report = partial(run, "dfl-report", "dfl_experiments.report.dfl_report")
plot = partial(run, "dfl-plot", "dfl_experiments.report.dfl_plot")
data = partial(run, "dfl-data", "dfl_experiments.dfl_data")
