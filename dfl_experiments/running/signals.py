"""Signals that end a run between two steps, so that its work is saved first."""

import signal
import threading
from types import FrameType
from typing import Any

REQUEUE = signal.SIGUSR2
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# sent by a scheduler some time before the end, and by the system at a limit of CPU time
WARNING = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to end; during training a checkpoint is written first."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Kept:
    """Pending signal of a launcher's process, handled at the next safe point of training."""

    signum: int | None = None
    """The signal's number; it stays until the process ends."""

    @classmethod
    def keep(cls, signum: int, frame: FrameType | None = None) -> None:
        """Remember the signal, as a signal handler. Nothing is interrupted."""
        cls.signum = signum


def handle(handler: Any) -> dict[int, Any]:
    """Set a handler for every signal that asks for the end, and return the earlier handlers by signal.

    A signal that is ignored stays ignored: a script's background job ignores SIGINT, and nohup ignores SIGHUP. A signal
    of `WARNING` is left alone if another library has set a handler for it.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    signals = [signum for signum in ENDING if signal.getsignal(signum) is not signal.SIG_IGN]
    signals += [signum for signum in WARNING if is_free(signum)]
    return {signum: signal.signal(signum, handler) for signum in signals}


def is_free(signum: int) -> bool:
    """Return whether no library but this package has set a handler for a signal."""
    handler = signal.getsignal(signum)
    return handler == signal.SIG_DFL or str(getattr(handler, "__module__", "")).startswith("dfl_experiments.")


class Stop:
    """Inside the block, note the signals that ask for the end; `raise_if_asked` acts on them after each step.

    A second SIGINT ends the process at once. A library that queues jobs again (submitit) handles SIGUSR2 itself: its
    handler is called by `pass_on`, once the run is saved, even if SIGTERM arrives together with SIGUSR2.
    """

    def __init__(self) -> None:
        self.requested: int | None = Kept.signum
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        self._before = handle(self._note)
        if self._before and REQUEUE not in self._before and callable(signal.getsignal(REQUEUE)):
            self._before[REQUEUE] = signal.signal(REQUEUE, self._note)
        return self

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self.requested is not None:
            raise KeyboardInterrupt
        if self.requested != REQUEUE:
            self.requested = signum

    def raise_if_asked(self) -> None:
        """Raise `Interrupted` if a signal has arrived."""
        if self.requested is not None:
            raise Interrupted(self.requested)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        # a signal that arrived after the last check, or together with another error
        if kind is None or not issubclass(kind, KeyboardInterrupt):
            self.raise_if_asked()


def pass_on(stop: KeyboardInterrupt) -> None:
    """Call another library's handler for the signal that ended a run, if it has one for SIGUSR2."""
    if isinstance(stop, Interrupted) and stop.signum == REQUEUE and not is_free(REQUEUE):
        signal.raise_signal(stop.signum)
