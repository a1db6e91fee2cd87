"""Signals that end a run between two steps, so that what it has done is safe."""

import signal
import threading
from types import FrameType
from typing import Any

REQUEUE = signal.SIGUSR2
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# what a scheduler sends some time before the end, and the system at a limit of CPU time
WARNING = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


class Interrupted(KeyboardInterrupt):
    """A signal asked for the end; in the midst of training a checkpoint is written on the way out."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Kept:
    """The signal that has come to a launcher's process, which it obeys when it next trains, and from then on."""

    signum: int | None = None

    @classmethod
    def keep(cls, signum: int, frame: FrameType | None = None) -> None:
        """A signal handler: nothing is interrupted, wherever it falls."""
        cls.signum = signum


def handle(handler: Any) -> dict[int, Any]:
    """Set a handler for every signal that asks for the end, and return the handlers before.

    A signal that is ignored stays ignored: a script's background job has no SIGINT, and nohup's has no SIGHUP. One of
    `WARNING` is left to a library that has a handler of its own for it.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    heard = [signum for signum in ENDING if signal.getsignal(signum) is not signal.SIG_IGN]
    heard += [signum for signum in WARNING if is_free(signum)]
    return {signum: signal.signal(signum, handler) for signum in heard}


def is_free(signum: int) -> bool:
    """Whether nobody but this package has a handler for a signal."""
    handler = signal.getsignal(signum)
    return handler == signal.SIG_DFL or str(getattr(handler, "__module__", "")).startswith("dfl_experiments.")


class Stop:
    """Inside the block the signals that ask for the end are noted, to be looked at after each step.

    A second SIGINT ends the process at once, as SIGINT does elsewhere. A library that queues jobs again (submitit) has
    a handler of its own for SIGUSR2, which gets its signal once the run is safe (see `pass_on`), also where SIGTERM
    comes with it.
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


def pass_on(stop: KeyboardInterrupt) -> None:
    """Give the signal that a run has obeyed to the handler of a library that was there before, if there is one."""
    if isinstance(stop, Interrupted) and stop.signum == REQUEUE and not is_free(REQUEUE):
        signal.raise_signal(stop.signum)
