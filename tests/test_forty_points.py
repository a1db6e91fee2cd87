"""A grid on a bad day: forty points, a tenth of them failing, the process that runs them killed twice."""

import os
import signal
import time

from processes import ended, forked
from test_sweeps import SWEEP, output, science, statuses

FORTY = (*SWEEP, "method=bp,dfa,las,ltas", "optimizer.lr=1e-3,1e-2", "seed=0,1,2,3,4")


def a_tenth_fails():
    """In the process that runs the sweep: its last seed fails at one of the learning rates, in the second epoch."""
    from dfl_experiments.training import Training

    one_epoch = Training._one_epoch

    def failing(training, stop):
        bad = training.settings.seed == 4 and training.experiment.schedule.lr == 1e-2
        if bad and training.epoch == 1:
            raise RuntimeError("injected")
        one_epoch(training, stop)

    Training._one_epoch = failing


def killed_after(folder, finished):
    """Start the sweep, and kill its process once so many points have finished."""
    process = forked(folder, *FORTY, before=a_tenth_fails)
    while sum(status == "finished" for status in statuses(folder).values()) < finished:
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    assert ended(process) == -signal.SIGKILL


def test_nothing_is_lost_and_the_rest_is_made_good(tmp_path):
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    undisturbed.mkdir()
    disturbed.mkdir()
    assert ended(forked(undisturbed, *FORTY, "seed=0,4")) == 0
    killed_after(disturbed, 9)
    killed_after(disturbed, 23)
    assert output(disturbed).count(": finished already") >= 9
    assert ended(forked(disturbed, *FORTY, before=a_tenth_fails)) == 1
    assert sorted(statuses(disturbed).values()) == ["failed"] * 4 + ["finished"] * 36
    assert "40 points, 36 finished, 4 failed" in output(disturbed)
    assert ended(forked(disturbed, *FORTY)) == 0
    expected = science(undisturbed)
    assert len(expected) == 16
    assert science(disturbed).items() >= expected.items()
