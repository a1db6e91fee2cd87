"""A grid on a bad day: twenty points, a tenth of them failing, the process that runs them killed twice."""

import os
import signal
import time
from collections import Counter

from processes import ended, forked
from test_sweeps import SWEEP, config_digest, output, statuses

POINTS = (*SWEEP, "method=dfa,las", "optimizer.lr=1e-3,1e-2", "seed=0,1,2,3,4")


def a_tenth_fails():
    """In the process that runs the sweep: its last seed fails at one of the learning rates, in the second epoch."""
    from dfl_experiments.running import epochs

    evaluate, calls = epochs.evaluate, Counter()

    def failing(parts, *arguments):
        calls[id(parts)] += 1
        if parts.settings.seed == 4 and parts.learner.rates[0] == 1e-2 and calls[id(parts)] == 3:
            raise RuntimeError("injected")
        return evaluate(parts, *arguments)

    epochs.evaluate = failing


def killed_after(folder, finished):
    """Start the sweep, and kill its process once so many points have finished."""
    process = forked(folder, *POINTS, before=a_tenth_fails)
    while sum(status == "finished" for status in statuses(folder).values()) < finished:
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    assert ended(process) == -signal.SIGKILL


def test_nothing_is_lost_and_the_rest_is_made_good(tmp_path):
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    undisturbed.mkdir()
    disturbed.mkdir()
    assert ended(forked(undisturbed, *POINTS, "seed=0,4")) == 0
    killed_after(disturbed, 5)
    killed_after(disturbed, 12)
    assert output(disturbed).count(": finished already") >= 5
    assert ended(forked(disturbed, *POINTS, before=a_tenth_fails)) == 1
    assert sorted(statuses(disturbed).values()) == ["failed"] * 2 + ["finished"] * 18
    assert "20 points, 18 finished, 2 failed" in output(disturbed)
    assert ended(forked(disturbed, *POINTS)) == 0
    expected = config_digest(undisturbed)
    assert len(expected) == 8
    assert config_digest(disturbed).items() >= expected.items()
