"""Signals that end a run between two steps, so that what it has done is safe."""

import signal
import threading
from types import FrameType
from typing import Any

REQUEUE = getattr(signal, "SIGUSR2", None)
ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Interrupted(KeyboardInterrupt):
    """A signal asked for the end; in the midst of training a checkpoint is written on the way out."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells have it: 130 after SIGINT, 143 after SIGTERM."""
        return 128 + self.signum


class Kept:
    """The signal that has come to a launcher's process, which it obeys when it next trains, and from then on."""

    signum: int | None = None

    @classmethod
    def keep(cls, signum: int, frame: FrameType | None = None) -> None:
        """A signal handler: nothing is interrupted, wherever it falls."""
        cls.signum = signum


def handle(handler: Any) -> dict[int, Any]:
    """Have a handler for every signal that asks for the end, and return those before.

    One that is ignored stays so: a script's background job has no SIGINT, and nohup's has no SIGHUP.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    heard = [signum for signum in ENDING if signal.getsignal(signum) is not signal.SIG_IGN]
    return {signum: signal.signal(signum, handler) for signum in heard}


class Stop:
    """Inside the block SIGINT, SIGTERM, SIGHUP and a scheduler's own signal are noted, to be looked at after each step.

    A second SIGINT ends the process at once, as SIGINT does elsewhere. A library that queues jobs again (submitit) has
    a handler of its own for SIGUSR2, which gets its signal once the run is safe (see `pass_on`), also where SIGTERM
    comes with it.
    """

    def __init__(self) -> None:
        self.requested: int | None = Kept.signum
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        self._before = handle(self._note)
        if self._before and REQUEUE is not None and callable(signal.getsignal(REQUEUE)):
            self._before[REQUEUE] = signal.signal(REQUEUE, self._note)
        return self

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self.requested is not None:
            raise KeyboardInterrupt
        if self.requested != REQUEUE or REQUEUE is None:
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
    if isinstance(stop, Interrupted) and stop.signum == REQUEUE and callable(signal.getsignal(stop.signum)):
        signal.raise_signal(stop.signum)
