"""A restarted sweep skips finished points and continues interrupted ones, and a failed point affects no other."""

import gc
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from processes import dfl_train, ended, forked
from run_files import table

import dfl_experiments as dfl
from dfl_experiments.errors import UserError
from dfl_experiments.running import checkpoint
from dfl_experiments.running.locks import alive, lock_run
from dfl_experiments.running.result import read_status
from dfl_experiments.train import main

SWEEP = ("--multirun", "sweep=grid", "epochs=3", "limit=300", "tracking=disabled", "threads=1")


def points(folder, name="result.json"):
    """Return the content of a file of every point, by the point's folder."""
    paths = sorted((folder / "outputs" / "grid").glob(f"*/{name}"))
    return {path.parent.name: path.read_text() for path in paths}


def statuses(folder):
    return {name: json.loads(text)["status"] for name, text in points(folder).items()}


def summary(folder):
    rows = table(folder / "outputs" / "grid" / "summary.csv")
    return {row["folder"]: row for row in rows}


def output(folder):
    return (folder / "output.txt").read_text()


def outcomes(folder):
    """Return the rows, weights and accuracy of every point."""
    by_point = {}
    for name, text in points(folder).items():
        point = folder / "outputs" / "grid" / name
        rows = (point / "iterations.csv").read_bytes()
        net = checkpoint.load_checkpoint(point)["net"]
        weights = {key: value.numpy().tobytes() for key, value in net.items()}
        by_point[name] = (rows, weights, json.loads(text)["test_accuracy"])
    return by_point


def test_restarted_sweep_runs_only_missing_points(tmp_path):
    assert ended(forked(tmp_path, *SWEEP, "seed=0,1")) == 0
    first = points(tmp_path)
    assert ended(forked(tmp_path, *SWEEP, "seed=0,1,2")) == 0
    assert output(tmp_path).count(": finished already") == 2
    assert points(tmp_path).items() >= first.items()
    assert list(statuses(tmp_path).values()) == ["finished"] * 3
    assert {row["status"] for row in summary(tmp_path).values()} == {"finished"}
    assert ended(forked(tmp_path, *SWEEP, "seed=0", "force=true")) == 0
    assert output(tmp_path).count(": finished already") == 2


def test_restarted_sweep_retries_failed_and_continues_interrupted_points(tmp_path):
    assert ended(forked(tmp_path, *SWEEP, "seed=0,1,2")) == 0
    expected = outcomes(tmp_path)
    grid = tmp_path / "outputs" / "grid"
    names = list(expected)
    for path in grid.glob("*/*"):
        if path.is_file():
            path.unlink()
    (grid / names[0] / "iterations.csv").mkdir()  # the point cannot write its table
    pid = forked(tmp_path, *SWEEP, "seed=0,1,2", "checkpoint.every_seconds=0")
    while not (grid / names[1] / "last.pt").exists():
        time.sleep(0.005)
    os.kill(pid, signal.SIGTERM)
    assert ended(pid) == 143
    rows = summary(tmp_path)
    assert [rows[name]["status"] for name in names] == ["failed", "interrupted", "interrupted"]
    assert "iterations.csv" in rows[names[0]]["reason"]
    (grid / names[0] / "iterations.csv").rmdir()
    assert ended(forked(tmp_path, *SWEEP, "seed=0,1,2")) == 0
    assert "continuing after epoch" in output(tmp_path)
    assert outcomes(tmp_path) == expected


def test_two_processes_on_one_sweep_never_run_a_point_twice(tmp_path):
    options = (*SWEEP, "seed=0,1,2,3,4,5")
    pids = [forked(tmp_path, *options) for _ in range(2)]
    assert [ended(pid) for pid in pids] == [0, 0]
    assert len(statuses(tmp_path)) == 6
    logs = points(tmp_path, "run.log")
    assert sum(text.count("of 6 finished") for text in logs.values()) == 6


def test_running_point_is_skipped_and_a_dead_process_holds_no_lock(tmp_path):
    long = (*SWEEP[:2], "epochs=100000", *SWEEP[3:], "seed=0")
    other = forked(tmp_path, *long)
    while not points(tmp_path, "epochs.csv"):
        time.sleep(0.01)
    assert ended(forked(tmp_path, *long)) == 0
    assert f"process {other} on {platform.node()} works in it" in output(tmp_path)
    assert [row["status"] for row in summary(tmp_path).values()] == ["running"]
    os.kill(other, signal.SIGKILL)
    ended(other)
    third = forked(tmp_path, *long)
    while "continuing after epoch" not in output(tmp_path):
        time.sleep(0.01)
    os.kill(third, signal.SIGTERM)
    assert ended(third) == 143


def test_reading_a_status_takes_no_lock_and_writes_nothing(tmp_path):
    point = tmp_path / "point"
    with lock_run(point):
        (point / ".lock").unlink()  # taking the lock would create this file again
        assert read_status(point)[0] == "running"
        assert not (point / ".lock").exists()
    assert read_status(point) == ("interrupted", "the process ended without writing a result", None)
    # a killed process leaves .running; a process of another host cannot be checked, so the file is trusted
    (point / ".running").write_text(json.dumps({"host": platform.node(), "pid": 2**22 + 1}))
    assert read_status(point)[0] == "interrupted"
    (point / ".running").write_text(json.dumps({"host": "another", "pid": 1}))
    assert read_status(point)[0] == "running"
    (point / ".running").write_text("half a li")
    status, reason, _ = read_status(point)
    assert status == "damaged"
    assert "point/.running: cannot be read" in reason


@pytest.fixture(scope="module")
def basic(tmp_path_factory):
    """Return the outcomes of a small sweep with the basic launcher."""
    folder = tmp_path_factory.mktemp("basic")
    assert ended(forked(folder, *SWEEP, "method=bp,las", "seed=0,1")) == 0
    return outcomes(folder)


@pytest.mark.parametrize(
    "variant",
    [
        ("hydra/launcher=joblib",),
        ("hydra/launcher=submitit_local",),
        ("tracking=offline",),
        ("checkpoint.every_seconds=0",),
    ],
    ids=str,
)
def test_results_do_not_depend_on_launcher_tracking_or_checkpoints(variant, basic, tmp_path):
    done = dfl_train(tmp_path, *SWEEP, "method=bp,las", "seed=0,1", *variant)
    assert done.returncode == 0, done.stderr
    assert outcomes(tmp_path) == basic


def test_results_do_not_depend_on_the_order_of_points(basic, tmp_path):
    assert ended(forked(tmp_path, *SWEEP, "seed=1,0", "method=las,bp")) == 0
    assert outcomes(tmp_path) == basic


def test_repeated_run_is_bitwise_equal(tmp_path):
    data = ("augmentation=crop_flip", "validation_split=stratified")
    options = (*SWEEP[2:], *data, "hydra.run.dir=first", "method=ltas", "seed=7")
    assert ended(forked(tmp_path, *options)) == 0
    first, second = tmp_path / "first", tmp_path / "second"
    recorded = (first / "config.yaml").read_text()
    assert recorded.count("  keep: ") == 1
    # early versions had no option checkpoint.keep
    (first / "config.yaml").write_text(re.sub(r"  keep: \w+\n", "", recorded))
    (first / "result.json").unlink()
    assert ended(forked(tmp_path, "repeat=first", "hydra.run.dir=second")) == 0
    assert (first / "iterations.csv").read_bytes() == (second / "iterations.csv").read_bytes()
    state, repeated = (checkpoint.load_checkpoint(folder) for folder in (first, second))
    for key in ("net", "method"):
        torch.testing.assert_close(state[key], repeated[key], rtol=0, atol=0)
    assert state["science"] == repeated["science"]


def start(folder, *options, count=1):
    """Start `dfl-train` in its own process group and wait until `count` points have a first epoch.

    Return its process, and the process id of the worker of one of these points.
    """
    command = [sys.executable, "-m", "dfl_experiments.train", *options]
    with (folder / "output.txt").open("w") as file:
        variables = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, cwd=folder, stdout=file, stderr=file, env=variables, start_new_session=True
        )
    while len(points(folder, "epochs.csv")) < count:
        assert process.poll() is None, output(folder)
        time.sleep(0.02)
    point = folder / "outputs" / "grid" / next(iter(points(folder, "epochs.csv")))
    return process, json.loads((point / ".running").read_text())["pid"]


ENDLESS = (*SWEEP[:2], "epochs=1000000", *SWEEP[3:], "seed=0,1", "checkpoint.every_seconds=1000000")


def assert_all_rows_are_saved(folder):
    """Assert that the last checkpoint of both points includes all rows that they have written."""
    tables = list((folder / "outputs" / "grid").glob("*/iterations.csv"))
    assert len(tables) == 2
    for path in tables:
        training = checkpoint.load_checkpoint(path.parent)["training"]
        assert training["lengths"]["iterations"] == path.stat().st_size


@pytest.mark.parametrize(
    ("launcher", "signum", "to_all"),
    [
        ("joblib", signal.SIGTERM, False),
        ("joblib", signal.SIGINT, True),
        ("submitit_local", signal.SIGTERM, False),
        ("submitit_local", signal.SIGHUP, True),
    ],
)
def test_signal_to_the_command_or_its_process_group_loses_no_work(
    launcher, signum, to_all, tmp_path
):
    process, _ = start(tmp_path, *ENDLESS, f"hydra/launcher={launcher}", count=2)
    (os.killpg if to_all else os.kill)(process.pid, signum)
    assert process.wait(timeout=60) == 128 + signum
    assert_all_rows_are_saved(tmp_path)
    assert set(statuses(tmp_path).values()) == {"interrupted"}
    assert {row["status"] for row in summary(tmp_path).values()} == {"interrupted"}
    assert "Traceback" not in output(tmp_path)


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_workers_of_a_killed_command_save_and_end(launcher, tmp_path):
    process, worker = start(tmp_path, *ENDLESS, f"hydra/launcher={launcher}", count=2)
    process.kill()
    process.wait(timeout=10)
    deadline = time.monotonic() + 30
    while alive(worker) or list((tmp_path / "outputs" / "grid").glob("*/.running")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert_all_rows_are_saved(tmp_path)


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_killed_worker_does_not_affect_other_points(launcher, tmp_path):
    options = (*SWEEP[:2], "epochs=40", *SWEEP[3:], "seed=0,1,2", f"hydra/launcher={launcher}")
    process, worker = start(tmp_path, *options)
    os.kill(worker, signal.SIGKILL)
    code = process.wait(timeout=150)
    if launcher == "joblib":
        assert code == 0, output(tmp_path)
        assert "the sweep continues" in output(tmp_path)
    elif code:  # the command may end with an error; then it is started again
        assert ended(forked(tmp_path, *options[:-1])) == 0, output(tmp_path)
    assert list(statuses(tmp_path).values()) == ["finished"] * 3
    for text in points(tmp_path, "epochs.csv").values():
        assert text.count("\n") == 41


def test_preempted_job_is_requeued_and_continues(tmp_path):
    options = (*SWEEP[:2], "epochs=60", *SWEEP[3:], "seed=0", "hydra/launcher=submitit_local")
    process, worker = start(tmp_path, *options)
    os.kill(worker, signal.SIGUSR2)
    assert process.wait(timeout=150) == 0, output(tmp_path)
    assert list(statuses(tmp_path).values()) == ["finished"]
    (epochs,) = points(tmp_path, "epochs.csv").values()
    assert epochs.count("\n") == 61
    (log,) = points(tmp_path, "run.log").values()
    assert "continuing after epoch" in log


@pytest.mark.usefixtures("clean_logging")
def test_finished_and_failed_points_release_their_tensors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    counts = []
    for seeds in ("0,1", "2,3,4,5,6,7,8,9"):
        sizes = ("model.widths=[16,16]", "dataset=digits,mnist", "data_dir=nowhere")
        monkeypatch.setattr(sys, "argv", ["dfl-train", *SWEEP, *sizes, f"seed={seeds}"])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 1
        gc.collect()
        counts.append(sum(isinstance(item, torch.Tensor) for item in gc.get_objects()))
    assert counts[1] <= counts[0]
    assert sorted(statuses(tmp_path).values()) == ["failed"] * 10 + ["finished"] * 10


def test_run_and_sweep_are_refused_in_one_folder(tmp_path):
    """In one folder the run would hide the points of the sweep."""
    small = ("epochs=1", "limit=64", "tracking=disabled")
    run = ("hydra.run.dir=outputs/run", *small)
    sweep = ("--multirun", "seed=0,1", *small)

    def times():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    assert dfl_train(tmp_path, *run).returncode == 0
    assert dfl_train(tmp_path, *sweep, "sweep=grid").returncode == 0
    before = times()
    for dry in ([], ["--dry-run"]):
        for extra in ([], ["force=true"], ["resume=auto"]):
            in_sweep = dfl_train(tmp_path, "hydra.run.dir=outputs/grid", *small, *extra, *dry)
            assert in_sweep.returncode == 2
            assert "outputs/grid: is a folder of runs, such as las-fc-" in in_sweep.stderr
        in_run = dfl_train(tmp_path, *sweep, "sweep=run", *dry)
        assert in_run.returncode == 2
        assert in_run.stderr.startswith("dfl-train: error: outputs/run: is a run, and would hide")
    with pytest.raises(UserError, match=r"grid: is a folder of runs.* choose another folder"):
        dfl.run(dfl.compose([*small]), tmp_path / "outputs" / "grid")
    assert times() == before
    for again in ([*sweep, "sweep=grid"], [*run, "force=true"], ["resume=outputs/run"]):
        assert dfl_train(tmp_path, *again).returncode == 0
    # earlier versions allowed a point inside a run: such a run can be resumed and replaced
    (point,) = (tmp_path / "outputs" / "grid").glob("*-seed1-*")
    point.rename(tmp_path / "outputs" / "run" / point.name)
    assert dfl_train(tmp_path, "resume=outputs/run").returncode == 0
    assert dfl_train(tmp_path, *run, "force=true").returncode == 0
