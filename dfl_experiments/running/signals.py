"""Signals that end a run between two steps, so that what it has done is safe."""

import signal
import threading
from types import FrameType
from typing import Any

REQUEUE = getattr(signal, "SIGUSR2", None)


class Interrupted(KeyboardInterrupt):
    """A signal asked for the end; in the midst of training a checkpoint is written on the way out."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells have it: 130 after SIGINT, 143 after SIGTERM."""
        return 128 + self.signum


class Stop:
    """Inside the block SIGINT, SIGTERM and a scheduler's own signal are noted, for the run to look at after each step.

    A second SIGINT ends the process at once, as SIGINT does elsewhere. A library that queues jobs again (submitit) has
    handlers of its own: that of SIGUSR2 gets its signal once the run is safe (see `pass_on`), and where it keeps
    SIGTERM for itself, which it does to wait for SIGUSR2, it is left to it.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            # a script's background job ignores SIGINT, and goes on doing so
            signals = [signal.SIGINT] if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN else []
            if not _is_foreign(signal.SIGTERM):
                signals.append(signal.SIGTERM)
            if REQUEUE is not None and _is_foreign(REQUEUE):
                signals.append(REQUEUE)
            for signum in signals:
                self._before[signum] = signal.signal(signum, self._note)
        return self

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self.requested is not None:
            raise KeyboardInterrupt
        self.requested = signum

    def check(self) -> None:
        """Raise `Interrupted` if a signal has come."""
        if self.requested is not None:
            raise Interrupted(self.requested)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        # one that came after the last look at it, or that another error overtook
        if kind is None or not issubclass(kind, KeyboardInterrupt):
            self.check()


def _is_foreign(signum: int) -> bool:
    handler = signal.getsignal(signum)
    return callable(handler) and handler is not on_terminate


def pass_on(stop: KeyboardInterrupt) -> None:
    """Give the signal that a run has obeyed to the handler of a library that was there before, if there is one."""
    if isinstance(stop, Interrupted) and stop.signum == REQUEUE and _is_foreign(stop.signum):
        signal.raise_signal(stop.signum)


def on_terminate(signum: int, frame: FrameType | None) -> None:
    """SIGTERM outside of training: nothing needs to be saved."""
    raise Interrupted(signum)
