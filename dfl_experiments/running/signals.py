"""Handle signals: a run ends between two steps, after a checkpoint is written."""

import signal
import threading
from types import FrameType
from typing import Any

REQUEUE = signal.SIGUSR2
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Signals that a scheduler sends some time before it ends a job. The operating system sends SIGXCPU when a process
# reaches its limit of CPU time.
WARNING = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


class Interrupted(KeyboardInterrupt):
    """Error: a signal asks the run to end. During training, a checkpoint is written before the process ends."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class PendingSignal:
    """The signal that a launcher's process has received. It takes effect after the current training step."""

    signum: int | None = None
    """Number of the signal. It is kept until the process ends."""

    @classmethod
    def keep(cls, signum: int, frame: FrameType | None = None) -> None:
        """Remember a signal without interrupting anything. This method is a signal handler."""
        cls.signum = signum


def handle(handler: Any) -> dict[int, Any]:
    """Set a handler for every signal that ends a run. Return the earlier handler of each signal.

    An ignored signal stays ignored, for example SIGHUP under nohup. If another library has set a handler for a signal
    in `WARNING`, this handler stays.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    signals = [signum for signum in ENDING if signal.getsignal(signum) is not signal.SIG_IGN]
    signals += [signum for signum in WARNING if is_free(signum)]
    return {signum: signal.signal(signum, handler) for signum in signals}


def is_free(signum: int) -> bool:
    """Return whether no other library has set a handler for a signal."""
    handler = signal.getsignal(signum)
    return handler == signal.SIG_DFL or str(getattr(handler, "__module__", "")).startswith(
        "dfl_experiments."
    )


class Stop:
    """Record the signals that arrive inside the block. After each step, `raise_if_asked` ends the run if needed.

    A second SIGINT ends the process at once. Another library may have set a handler for SIGUSR2. For example, the
    handler of submitit queues the job again. `pass_on` calls this handler after the run is saved. If SIGUSR2 and
    another signal arrive, only SIGUSR2 counts.
    """

    def __init__(self) -> None:
        self.requested: int | None = PendingSignal.signum
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
        # a signal may have arrived after the last check, or together with another error
        if kind is None or not issubclass(kind, KeyboardInterrupt):
            self.raise_if_asked()


def pass_on(stop: KeyboardInterrupt) -> None:
    """If SIGUSR2 ended the run, call the handler of another library for SIGUSR2. There may be none."""
    if isinstance(stop, Interrupted) and stop.signum == REQUEUE and not is_free(REQUEUE):
        signal.raise_signal(stop.signum)
