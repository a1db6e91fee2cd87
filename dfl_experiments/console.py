"""The console scripts `dfl-train`, `dfl-report` and `dfl-data`, which end in one line from their first moment on.

Nothing slow is imported here: Ctrl-C is heard while PyTorch is still being imported.
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
    """End at once, as long as there is nothing to save: an exception in the midst of an import may go astray."""
    os.write(2, f"{program}: interrupted ({signal.Signals(signum).name})\n".encode())
    os._exit(128 + signum)


def run(program: str, module: str) -> None:
    """Call a module's `main` as a program. Whoever reads its output may leave early, as `head` does."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
        signal.signal(signal.SIGINT, partial(leave, program))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal's encoding may lack a letter
            stream.reconfigure(errors="replace")
    try:
        try:
            import_module(module).main()
        finally:
            sys.stdout.flush()
    except OSError as error:  # nobody reads the output any more, or the disk that it goes to is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        if isinstance(error, BrokenPipeError):
            raise SystemExit(128 + signal.SIGPIPE) from None
        raise SystemExit(f"{program}: error: {error}") from None


train = partial(run, "dfl-train", "dfl_experiments.train")
report = partial(run, "dfl-report", "dfl_experiments.report.dfl_report")
data = partial(run, "dfl-data", "dfl_experiments.data.dfl_data")
