"""Signals, limits of parallel jobs, and messages of device errors."""

import signal
from pathlib import Path

import pytest
import torch

from dfl_experiments.configuration.composition import compose
from dfl_experiments.configuration.launchers import register_launchers
from dfl_experiments.configuration.schema import check
from dfl_experiments.errors import Fault
from dfl_experiments.running.device import device_of_job, threads_of_job
from dfl_experiments.running.run import explained
from dfl_experiments.running.signals import ENDING, WARNING, Interrupted, Stop, pass_on

SIGNALS = [*ENDING, *WARNING]


@pytest.mark.parametrize("checks", [True, False])
@pytest.mark.parametrize("signum", SIGNALS)
def test_signal_is_handled_at_the_next_check_or_at_the_end(signum, checks):
    before, reached = signal.getsignal(signum), []

    def steps():
        with Stop() as stop:
            stop.raise_if_asked()
            signal.raise_signal(signum)
            reached.append("the step's end")
            if checks:
                stop.raise_if_asked()
            reached.append("the block's end")

    with pytest.raises(Interrupted) as end:
        steps()
    assert len(reached) == (1 if checks else 2)
    assert end.value.signum == signum
    assert signal.getsignal(signum) is before


def test_second_sigint_ends_at_once():
    def twice():
        with Stop():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as end:
        twice()
    assert not isinstance(end.value, Interrupted)


def test_scheduler_handler_gets_its_signal_after_the_checkpoint():
    """SIGUSR2 is the scheduler's warning. It is passed on, and a SIGTERM that follows is not."""
    calls = []

    def handler(signum, frame):
        calls.append(signum)

    before = {signum: signal.signal(signum, handler) for signum in (signal.SIGTERM, signal.SIGUSR2)}

    def steps():
        with Stop() as stop:
            signal.raise_signal(signal.SIGUSR2)
            signal.raise_signal(signal.SIGTERM)
            assert not calls
            stop.raise_if_asked()

    try:
        with pytest.raises(Interrupted) as end:
            steps()
        pass_on(end.value)
        assert calls == [signal.SIGUSR2]
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def test_signal_handled_by_another_library_is_left_to_it():
    calls = []
    before = signal.signal(signal.SIGUSR1, lambda signum, frame: calls.append(signum))
    try:
        with Stop() as stop:
            signal.raise_signal(signal.SIGUSR1)
            stop.raise_if_asked()
        assert calls == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop() as stop:
            signal.raise_signal(signal.SIGHUP)
            stop.raise_if_asked()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("jobs", "threads"), [(1, 8), (2, 8), (3, 5), (16, 1), (40, 1), (-1, 1), (-2, 1)]
)
def test_jobs_share_the_cores(jobs, threads, monkeypatch):
    """There are 16 cores, and a single job takes 8 threads. -1 job: as many jobs as cores."""
    monkeypatch.setattr("dfl_experiments.running.device.ALL_THREADS", 8)
    monkeypatch.setattr("dfl_experiments.running.device.cores", lambda: 16)
    assert threads_of_job(jobs) == threads


def test_jobs_take_turns_on_the_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    devices = [device_of_job("auto", job) for job in range(4)]
    assert devices == ["cuda:0", "cuda:1", "cuda:2", "cuda:0"]
    assert device_of_job("cpu", 1) == "cpu"


def test_launchers_have_limits_on_jobs_and_time():
    register_launchers()
    joblib = compose(["hydra/launcher=joblib"], hydra=True).hydra.launcher
    assert joblib.n_jobs == 2
    slurm = compose(["hydra/launcher=submitit_slurm"], hydra=True).hydra.launcher
    assert slurm.timeout_min == 24 * 60
    assert slurm.max_num_timeout > 0


def test_device_errors_become_one_line_with_advice():
    settings = check(compose(["batch_size=32"])).settings
    memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n2 GiB")
    disk = OSError(28, "No space left on device", "epochs.csv")
    for error, words in (
        (memory, "batch_size=32: out of memory"),
        (disk, "epochs.csv: No space left on device; free space"),
    ):
        explanation = explained(error, settings, Path("here"))
        assert isinstance(explanation, Fault)
        assert words in str(explanation)
        assert "\n" not in str(explanation)
    bug = KeyError("x")
    assert explained(bug, settings, Path("here")) is bug
