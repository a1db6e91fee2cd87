"""Sweeps that survive: what is done is skipped, what was interrupted goes on, and one bad point stops no other."""

import csv
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

import dfl_experiments as dfl
from dfl_experiments.errors import UserError
from dfl_experiments.running import checkpoint
from dfl_experiments.running.locks import alive, lock_run
from dfl_experiments.running.result import status_of
from dfl_experiments.train import main

SWEEP = ("--multirun", "sweep=grid", "epochs=3", "limit=300", "tracking=disabled", "threads=1")


def points(folder, name="result.json"):
    """The content of a file of every point, by the point's folder."""
    return {
        path.parent.name: path.read_text()
        for path in sorted((folder / "outputs" / "grid").glob(f"*/{name}"))
    }


def statuses(folder):
    return {name: json.loads(text)["status"] for name, text in points(folder).items()}


def summary(folder):
    with (folder / "outputs" / "grid" / "summary.csv").open() as file:
        return {row["folder"]: row for row in csv.DictReader(file)}


def output(folder):
    return (folder / "output.txt").read_text()


def config_digest(folder):
    """Return the rows, weights and accuracy of every point."""
    grid = folder / "outputs" / "grid"
    results = {name: json.loads(text) for name, text in points(folder).items()}
    return {
        name: (
            (grid / name / "iterations.csv").read_bytes(),
            {
                key: value.numpy().tobytes()
                for key, value in checkpoint.load_checkpoint(grid / name)["net"].items()
            },
            results[name]["test_accuracy"],
        )
        for name in results
    }


def test_a_sweep_started_again_runs_only_what_is_left(tmp_path):
    assert ended(forked(tmp_path, *SWEEP, "seed=0,1")) == 0
    first = points(tmp_path)
    assert ended(forked(tmp_path, *SWEEP, "seed=0,1,2")) == 0
    assert output(tmp_path).count(": finished already") == 2
    assert points(tmp_path).items() >= first.items()
    assert list(statuses(tmp_path).values()) == ["finished"] * 3
    assert {row["status"] for row in summary(tmp_path).values()} == {"finished"}
    assert ended(forked(tmp_path, *SWEEP, "seed=0", "force=true")) == 0
    assert output(tmp_path).count(": finished already") == 2


def test_a_failed_point_is_retried_and_an_interrupted_one_goes_on(tmp_path):
    assert ended(forked(tmp_path, *SWEEP, "seed=0,1,2")) == 0
    whole = config_digest(tmp_path)
    grid = tmp_path / "outputs" / "grid"
    names = list(whole)
    for name in names:
        for path in grid.joinpath(name).iterdir():
            if path.is_file():
                path.unlink()
    (grid / names[0] / "iterations.csv").mkdir()  # a file in the way: the point cannot run
    pid = forked(tmp_path, *SWEEP, "seed=0,1,2", "checkpoint.every_seconds=0")
    while not (grid / names[1] / "last.pt").exists():
        time.sleep(0.005)
    os.kill(pid, signal.SIGTERM)
    assert ended(pid) == 143
    found = {name: row["status"] for name, row in summary(tmp_path).items()}
    assert found == {names[0]: "failed", names[1]: "interrupted", names[2]: "interrupted"}
    assert "iterations.csv" in summary(tmp_path)[names[0]]["reason"]
    (grid / names[0] / "iterations.csv").rmdir()
    assert ended(forked(tmp_path, *SWEEP, "seed=0,1,2")) == 0
    assert "continuing after epoch" in output(tmp_path)
    assert config_digest(tmp_path) == whole


def test_two_processes_on_one_sweep_never_run_a_point_twice(tmp_path):
    options = (*SWEEP, "seed=0,1,2,3,4,5")
    pids = [forked(tmp_path, *options) for _ in range(2)]
    assert [ended(pid) for pid in pids] == [0, 0]
    assert len(statuses(tmp_path)) == 6
    logs = points(tmp_path, "run.log")
    assert sum(text.count("of 6 finished") for text in logs.values()) == 6


def test_a_point_in_hand_elsewhere_is_left_to_the_other_and_a_dead_process_holds_none(tmp_path):
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


def test_a_status_is_read_without_the_lock_and_leaves_no_trace(tmp_path):
    point = tmp_path / "point"
    with lock_run(point):
        (point / ".lock").unlink()  # whoever took the lock now would make it again
        assert status_of(point)[0] == "running"
        assert not (point / ".lock").exists()
    assert status_of(point) == ("interrupted", None, "the process ended without writing a result")
    # what a killed process leaves, on this machine and on another
    (point / ".running").write_text(json.dumps({"host": platform.node(), "pid": 2**22 + 1}))
    assert status_of(point)[0] == "interrupted"
    (point / ".running").write_text(json.dumps({"host": "another", "pid": 1}))
    assert status_of(point)[0] == "running"
    (point / ".running").write_text("half a li")
    status, _, reason = status_of(point)
    assert status == "damaged"
    assert "point/.running: cannot be read" in reason


@pytest.fixture(scope="module")
def basic(tmp_path_factory):
    """The outcome of a small sweep by the basic launcher."""
    folder = tmp_path_factory.mktemp("basic")
    assert ended(forked(folder, *SWEEP, "method=bp,las", "seed=0,1")) == 0
    return config_digest(folder)


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
def test_the_same_bits_whatever_the_launcher_the_tracking_and_the_checkpoints(
    variant, basic, tmp_path
):
    done = dfl_train(tmp_path, *SWEEP, "method=bp,las", "seed=0,1", *variant)
    assert done.returncode == 0, done.stderr
    assert config_digest(tmp_path) == basic


def test_the_same_bits_in_another_order(basic, tmp_path):
    assert ended(forked(tmp_path, *SWEEP, "seed=1,0", "method=las,bp")) == 0
    assert config_digest(tmp_path) == basic


def test_a_repeated_run_has_the_same_bits(tmp_path):
    assert ended(forked(tmp_path, *SWEEP[2:], "hydra.run.dir=first", "method=ltas", "seed=7")) == 0
    first, second = tmp_path / "first", tmp_path / "second"
    recorded = (first / "config.yaml").read_text()
    assert recorded.count("  keep: ") == 1
    # as a run of before there was such an option has it
    (first / "config.yaml").write_text(re.sub(r"  keep: \w+\n", "", recorded))
    (first / "result.json").unlink()
    assert ended(forked(tmp_path, "repeat=first", "hydra.run.dir=second")) == 0
    assert (first / "iterations.csv").read_bytes() == (second / "iterations.csv").read_bytes()
    a, b = (checkpoint.load_checkpoint(folder) for folder in (first, second))
    torch.testing.assert_close((a["net"], a["method"]), (b["net"], b["method"]), rtol=0, atol=0)
    assert a["science"] == b["science"]


def begun(folder, *options, count=1):
    """A `dfl-train` in a process group of its own, and the number of the process at work on one of its first points."""
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


def saved(folder):
    """Of every point: whether its last checkpoint has all the rows that it has written."""
    runs = [path.parent for path in (folder / "outputs" / "grid").glob("*/iterations.csv")]
    lengths = [checkpoint.load_checkpoint(run)["training"]["lengths"]["iterations"] for run in runs]
    return [
        length == (run / "iterations.csv").stat().st_size
        for length, run in zip(lengths, runs, strict=True)
    ]


@pytest.mark.parametrize(
    ("launcher", "signum", "to_all"),
    [
        ("joblib", signal.SIGTERM, False),
        ("joblib", signal.SIGINT, True),
        ("submitit_local", signal.SIGTERM, False),
        ("submitit_local", signal.SIGHUP, True),
    ],
)
def test_a_signal_to_the_command_or_to_all_its_processes_costs_no_work(
    launcher, signum, to_all, tmp_path
):
    process, _ = begun(tmp_path, *ENDLESS, f"hydra/launcher={launcher}", count=2)
    (os.killpg if to_all else os.kill)(process.pid, signum)
    assert process.wait(timeout=60) == 128 + signum
    assert saved(tmp_path) == [True, True]
    assert set(statuses(tmp_path).values()) == {"interrupted"}
    assert {row["status"] for row in summary(tmp_path).values()} == {"interrupted"}
    assert "Traceback" not in output(tmp_path)


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_the_processes_of_a_killed_command_save_and_end(launcher, tmp_path):
    process, worker = begun(tmp_path, *ENDLESS, f"hydra/launcher={launcher}", count=2)
    process.kill()
    process.wait(timeout=10)
    end = time.monotonic() + 30
    while alive(worker) or list((tmp_path / "outputs" / "grid").glob("*/.running")):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert saved(tmp_path) == [True, True]


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_a_killed_worker_costs_no_other_point(launcher, tmp_path):
    options = (*SWEEP[:2], "epochs=40", *SWEEP[3:], "seed=0,1,2", f"hydra/launcher={launcher}")
    process, worker = begun(tmp_path, *options)
    os.kill(worker, signal.SIGKILL)
    code = process.wait(timeout=150)
    if launcher == "joblib":
        assert code == 0, output(tmp_path)
        assert "the sweep continues" in output(tmp_path)
    elif code:
        assert ended(forked(tmp_path, *options[:-1])) == 0, output(tmp_path)
    assert list(statuses(tmp_path).values()) == ["finished"] * 3
    rows = points(tmp_path, "epochs.csv")
    assert [text.count("\n") for text in rows.values()] == [41] * 3


def test_a_job_that_its_scheduler_preempts_is_queued_again_and_goes_on(tmp_path):
    options = (*SWEEP[:2], "epochs=60", *SWEEP[3:], "seed=0", "hydra/launcher=submitit_local")
    process, worker = begun(tmp_path, *options)
    os.kill(worker, signal.SIGUSR2)
    assert process.wait(timeout=150) == 0, output(tmp_path)
    assert list(statuses(tmp_path).values()) == ["finished"]
    assert [text.count("\n") for text in points(tmp_path, "epochs.csv").values()] == [61]
    assert "continuing after epoch" in "".join(points(tmp_path, "run.log").values())


@pytest.mark.usefixtures("clean_logging")
def test_neither_finished_nor_failed_points_leave_tensors_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    counts = []
    for seeds in ("0,1", "2,3,4,5,6,7,8,9"):
        sizes = ("model.widths=[16,16]", "dataset=digits,mnist", "data_dir=nowhere")
        monkeypatch.setattr(sys, "argv", ["dfl-train", *SWEEP, *sizes, f"seed={seeds}"])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 1
        gc.collect()
        counts.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()))
    assert counts[1] <= counts[0]
    assert sorted(statuses(tmp_path).values()) == ["failed"] * 10 + ["finished"] * 10


def test_no_run_hides_a_sweep_and_no_sweep_hides_in_a_run(tmp_path):
    small = ("epochs=1", "limit=64", "tracking=disabled")
    alone, sweep = ("hydra.run.dir=outputs/one", *small), ("--multirun", "seed=0,1", *small)
    assert dfl_train(tmp_path, *alone).returncode == 0
    assert dfl_train(tmp_path, *sweep, "sweep=grid").returncode == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for is_dry in ([], ["--dry-run"]):
        for extra in ([], ["force=true"], ["resume=auto"]):
            inside = dfl_train(tmp_path, "hydra.run.dir=outputs/grid", *small, *extra, *is_dry)
            assert inside.returncode == 2
            assert "outputs/grid: is a folder of runs, such as las-fc-" in inside.stderr
        inside = dfl_train(tmp_path, *sweep, "sweep=one", *is_dry)
        assert inside.returncode == 2
        assert inside.stderr.startswith("dfl-train: error: outputs/one: is a run, and would hide")
    with pytest.raises(UserError, match=r"grid: is a folder of runs.* choose another folder"):
        dfl.run(dfl.compose([*small]), tmp_path / "outputs" / "grid")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    for again in ([*sweep, "sweep=grid"], [*alone, "force=true"], ["resume=outputs/one"]):
        assert dfl_train(tmp_path, *again).returncode == 0
    # a run may have folders of other kinds, and an earlier version may have put runs there
    (point,) = (tmp_path / "outputs" / "grid").glob("*-seed1-*")
    point.rename(tmp_path / "outputs" / "one" / point.name)
    assert dfl_train(tmp_path, "resume=outputs/one").returncode == 0
    assert dfl_train(tmp_path, *alone, "force=true").returncode == 0
