"""Signals, and what several jobs at once may use of a machine."""

import signal
from pathlib import Path

import pytest
import torch

from dfl_experiments.configuration.composition import compose
from dfl_experiments.configuration.launchers import register_launchers
from dfl_experiments.configuration.schema import check
from dfl_experiments.errors import Fault
from dfl_experiments.running.device import cores, device_of_job, threads_of_job
from dfl_experiments.running.run import explained
from dfl_experiments.running.signals import ENDING, WARNING, Interrupted, Stop, pass_on

SIGNALS = [*ENDING, *WARNING]


@pytest.mark.parametrize("looks", [True, False])
@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_is_obeyed_when_the_run_looks_for_it_and_at_its_end_at_the_latest(signum, looks):
    before, reached = signal.getsignal(signum), []

    def steps():
        with Stop() as stop:
            stop.raise_if_asked()
            signal.raise_signal(signum)
            reached.append("the step's end")
            if looks:
                stop.raise_if_asked()
            reached.append("the block's end")

    with pytest.raises(Interrupted) as end:
        steps()
    assert len(reached) == (1 if looks else 2)
    assert end.value.signum == signum
    assert signal.getsignal(signum) is before


def test_a_second_sigint_ends_at_once():
    def twice():
        with Stop():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as end:
        twice()
    assert not isinstance(end.value, Interrupted)


def test_a_scheduler_s_handler_gets_its_signal_once_the_run_is_safe_whatever_comes_with_it():
    calls = []
    before = {
        signum: signal.signal(signum, lambda *_: calls.append(_[0]))
        for signum in (signal.SIGTERM, signal.SIGUSR2)
    }

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


def test_a_signal_that_another_library_has_a_use_for_is_left_to_it():
    calls = []
    before = signal.signal(signal.SIGUSR1, lambda *_: calls.append(_[0]))
    try:
        with Stop() as stop:
            signal.raise_signal(signal.SIGUSR1)
            stop.raise_if_asked()
        assert calls == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop() as stop:
            signal.raise_signal(signal.SIGHUP)
            stop.raise_if_asked()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_jobs_share_the_cores_and_take_the_gpus_in_turn(monkeypatch):
    monkeypatch.setattr("dfl_experiments.running.device.ALL_THREADS", 8)
    monkeypatch.setattr("dfl_experiments.running.device.cores", lambda: 16)
    assert [threads_of_job(jobs) for jobs in (1, 2, 3, 16, 40, -1, -2)] == [8, 8, 5, 1, 1, 1, 1]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert [device_of_job("auto", job) for job in range(4)] == [
        "cuda:0",
        "cuda:1",
        "cuda:2",
        "cuda:0",
    ]
    assert device_of_job("cpu", 1) == "cpu"
    assert cores() >= 1


def test_launchers_are_bounded():
    register_launchers()
    joblib = compose(["hydra/launcher=joblib"], hydra=True).hydra.launcher
    assert joblib.n_jobs == 2
    slurm = compose(["hydra/launcher=submitit_slurm"], hydra=True).hydra.launcher
    assert slurm.timeout_min == 24 * 60
    assert slurm.max_num_timeout > 0


def test_what_a_device_cannot_do_is_one_line_that_says_what_to_change():
    settings = check(compose(["batch_size=32"])).settings
    for error, words in (
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n2 GiB"),
            "batch_size=32: out of memory",
        ),
        (
            OSError(28, "No space left on device", "epochs.csv"),
            "epochs.csv: No space left on device; make room",
        ),
    ):
        told = explained(error, settings, Path("here"))
        assert isinstance(told, Fault)
        assert words in str(told)
        assert "\n" not in str(told)
    bug = KeyError("x")
    assert explained(bug, settings, Path("here")) is bug
