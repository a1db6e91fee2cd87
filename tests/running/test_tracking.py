"""W&B gets all rows from the local files, whatever it was when its process or its service was killed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from processes import dfl_train, ended, forked
from run_files import assert_mirrored, records, table

RUN = ("limit=300", "threads=1", "model.widths=[16]", "checkpoint.every_seconds=0")


def killed(folder, signum, group, *options):
    """The exit code of a run that a signal ended after a few epochs, alone or with its whole process group."""
    command = [sys.executable, "-m", "dfl_experiments.train", "hydra.run.dir=here", *RUN, *options]
    with (folder / "output.txt").open("w") as output:
        variables = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, cwd=folder, env=variables, stdout=output, stderr=output, start_new_session=True
        )
    path = folder / "here" / "epochs.csv"
    while not path.exists() or len(table(path)) < 6:
        assert process.poll() is None, (folder / "output.txt").read_text()
        time.sleep(0.01)
    (os.killpg if group else os.kill)(process.pid, signum)
    return process.wait(timeout=60)


@pytest.mark.parametrize(
    ("signum", "group"),
    [(signal.SIGKILL, False), (signal.SIGTERM, True)],
    ids=["SIGKILL", "SIGTERM to the group"],
)
def test_a_run_that_goes_on_has_every_row_once(signum, group, tmp_path):
    more = ("method=kp", "alignment.quantities=[weight_cosine,gradient_cosine]", "tracking.every=1")
    assert killed(tmp_path, signum, group, "epochs=100", *more) in (-signal.SIGKILL, 143)
    assert ended(forked(tmp_path, "resume=here")) == 0
    assert len(table(tmp_path / "here" / "epochs.csv")) == 100
    assert_mirrored(tmp_path / "here")
    assert records(tmp_path / "here")["exit"][0].get("exit_code") == 0


def test_a_run_that_ended_without_its_mirror_gets_it_when_its_sweep_is_started_again(
    tmp_path, monkeypatch
):
    sweep = ("--multirun", "sweep=grid", "epochs=2", *RUN, "seed=0,1")
    assert dfl_train(tmp_path, *sweep, "tracking=disabled").returncode == 0
    monkeypatch.setenv("WANDB_RUN_ID", "one-for-all")
    monkeypatch.setenv("WANDB_RESUME", "must")
    again = dfl_train(tmp_path, *sweep)
    assert again.returncode == 0
    assert again.stdout.count("all rows are sent again to W&B") == 2
    points = [path.parent for path in (tmp_path / "outputs" / "grid").glob("*/result.json")]
    names = set()
    for point in points:
        assert_mirrored(point)
        found = records(point)
        names.add(found["run"][0]["run_id"])
        assert found["run"][0]["run_group"] == "grid"
        assert json.loads((point / "result.json").read_text())["status"] == "finished"
    assert len(names) == 2
    assert "sent again" not in dfl_train(tmp_path, *sweep).stdout


def test_numbers_show_while_a_run_is_under_way(tmp_path):
    """W&B shows the last value of whatever is not told to have none."""
    assert dfl_train(tmp_path, "hydra.run.dir=here", "epochs=1", *RUN).returncode == 0
    metrics = records(tmp_path / "here")["metric"]
    assert {"loss", "test_accuracy", "cosine/1"} <= {metric["name"] for metric in metrics}
    assert not [metric for metric in metrics if metric.get("summary", {}).get("none")]


def test_a_w_and_b_run_has_the_name_that_is_asked_for_or_that_of_its_directory(tmp_path):
    names = {}
    for place, options in (
        ("plain", ()),
        ("named", ("tracking.name='${method.name} at ${optimizer.lr}'",)),
    ):
        done = dfl_train(
            tmp_path, f"hydra.run.dir={place}", "epochs=1", "optimizer.lr=0.01", *RUN, *options
        )
        assert done.returncode == 0, done.stderr
        names[place] = records(tmp_path / place)["run"][0]["display_name"]
    assert names == {"plain": "plain", "named": "las at 0.01"}


def signal_at_the_end():
    """In the process that runs: SIGTERM comes while W&B is given the end of the run."""
    from dfl_experiments.running.tracking import Tracker

    finish = Tracker.finish
    Tracker.finish = lambda *arguments: (signal.raise_signal(signal.SIGTERM), finish(*arguments))[1]


def test_a_signal_while_w_and_b_gets_the_rest_leaves_a_finished_run_finished(tmp_path):
    assert (
        ended(forked(tmp_path, "hydra.run.dir=here", "epochs=2", *RUN, before=signal_at_the_end))
        == 143
    )
    assert json.loads((tmp_path / "here" / "result.json").read_text())["status"] == "finished"
    again = dfl_train(tmp_path, "resume=here")
    assert (again.returncode, "finished already" in again.stdout) == (0, True)
    assert_mirrored(tmp_path / "here")
