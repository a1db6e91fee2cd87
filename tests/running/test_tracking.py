"""W&B gets every row of the local files, even if the run or W&B was interrupted."""

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


def killed(folder, signum, to_group, *options):
    """Start a run, send a signal after a few epochs, and return its exit code. to_group: to its process group."""
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
    (os.killpg if to_group else os.kill)(process.pid, signum)
    return process.wait(timeout=60)


@pytest.mark.parametrize(
    ("signum", "to_group"),
    [(signal.SIGKILL, False), (signal.SIGTERM, True)],
    ids=["SIGKILL", "SIGTERM to the group"],
)
def test_resumed_run_has_every_row_once(signum, to_group, tmp_path):
    measured = ("method=kp", "alignment.quantities=[weight_cosine,gradient_cosine]")
    code = killed(tmp_path, signum, to_group, "epochs=100", *measured, "tracking.every=1")
    assert code in (-signal.SIGKILL, 143)
    assert ended(forked(tmp_path, "resume=here")) == 0
    assert len(table(tmp_path / "here" / "epochs.csv")) == 100
    assert_mirrored(tmp_path / "here")
    assert records(tmp_path / "here")["exit"][0].get("exit_code") == 0


def test_restarted_sweep_sends_finished_runs_that_wandb_lacks(tmp_path, monkeypatch):
    sweep = ("--multirun", "sweep=grid", "epochs=2", *RUN, "seed=0,1")
    assert dfl_train(tmp_path, *sweep, "tracking=disabled").returncode == 0
    monkeypatch.setenv("WANDB_RUN_ID", "one-for-all")
    monkeypatch.setenv("WANDB_RESUME", "must")
    again = dfl_train(tmp_path, *sweep)
    assert again.returncode == 0
    assert again.stdout.count("all rows are sent again to W&B") == 2
    points = [path.parent for path in (tmp_path / "outputs" / "grid").glob("*/result.json")]
    ids = set()
    for point in points:
        assert_mirrored(point)
        (run,) = records(point)["run"]
        ids.add(run["run_id"])
        assert run["run_group"] == "grid"
        assert json.loads((point / "result.json").read_text())["status"] == "finished"
    assert len(ids) == 2
    assert "sent again" not in dfl_train(tmp_path, *sweep).stdout


def test_wandb_shows_metrics_during_a_run(tmp_path):
    """W&B shows the last value of a metric unless its summary is "none"."""
    assert dfl_train(tmp_path, "hydra.run.dir=here", "epochs=1", *RUN).returncode == 0
    metrics = records(tmp_path / "here")["metric"]
    assert {"loss", "test_accuracy", "cosine/1"} <= {metric["name"] for metric in metrics}
    assert not [metric for metric in metrics if metric.get("summary", {}).get("none")]


def test_wandb_run_has_the_configured_name_or_that_of_its_directory(tmp_path):
    def display_name(run_dir, *options):
        command = (f"hydra.run.dir={run_dir}", "epochs=1", "optimizer.lr=0.01", *RUN)
        done = dfl_train(tmp_path, *command, *options)
        assert done.returncode == 0, done.stderr
        return records(tmp_path / run_dir)["run"][0]["display_name"]

    assert display_name("here") == "here"
    name = "tracking.name='${method.name} at ${optimizer.lr}'"
    assert display_name("there", name) == "las at 0.01"


def signal_at_the_end():
    """Send SIGTERM while W&B gets the end of the run (called in the training process)."""
    from dfl_experiments.running.tracking import Tracker

    finish = Tracker.finish

    def finish_after_a_signal(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return finish(*arguments)

    Tracker.finish = finish_after_a_signal


def test_signal_during_the_last_upload_keeps_the_run_finished(tmp_path):
    pid = forked(tmp_path, "hydra.run.dir=here", "epochs=2", *RUN, before=signal_at_the_end)
    assert ended(pid) == 143
    assert json.loads((tmp_path / "here" / "result.json").read_text())["status"] == "finished"
    again = dfl_train(tmp_path, "resume=here")
    assert again.returncode == 0
    assert "finished already" in again.stdout
    assert_mirrored(tmp_path / "here")
