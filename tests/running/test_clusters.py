"""Sweeps on a real SLURM and a real Ray, both on this machine's loopback."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import slurm_cluster
from run_files import table

SMALL = ("tracking=disabled", "threads=1", "model.widths=[16]", "limit=300", "sweep=grid")


@pytest.fixture(scope="module")
def slurm():
    """The environment to run `dfl-train` in; skips, saying so, where no SLURM can be brought up."""
    if why := slurm_cluster.missing():
        pytest.skip(why)
    with slurm_cluster.cluster() as configuration:
        yield {"SLURM_CONF": str(configuration)}


def start(folder, environment, *options):
    command = [sys.executable, "-m", "dfl_experiments.train", "--multirun", *options, *SMALL]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    with (folder / "output.txt").open("w") as output:
        return subprocess.Popen(command, cwd=folder, env=variables, stdout=output, stderr=output)


def output(folder):
    return (folder / "output.txt").read_text()


def points(folder):
    with (folder / "outputs" / "grid" / "summary.csv").open() as file:
        return {"{}={}".format(*next(iter(row.items()))): row for row in csv.DictReader(file)}


def until(found, process, folder, seconds=90):
    """Wait for something, as long as the command goes on."""
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, output(folder)
        assert process.poll() is None, output(folder)
        time.sleep(0.1)


def ask(environment, *command):
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout


SLURM = ("hydra/launcher=submitit_slurm",)


def test_slurm_runs_a_sweep_under_its_name_and_calls_no_failed_point_a_success(slurm, tmp_path):
    process = start(tmp_path, slurm, "dataset=digits,mnist", *SLURM, "data_dir=nowhere", "epochs=2")
    until(lambda: "grid" in ask(slurm, "squeue", "-h", "-o", "%j"), process, tmp_path)
    assert process.wait(timeout=120) == 1, output(tmp_path)
    found = points(tmp_path)
    assert {key: row["status"] for key, row in found.items()} == {
        "dataset=digits": "finished",
        "dataset=mnist": "failed",
    }
    logs = {
        path.name: path.read_text()
        for path in (tmp_path / "outputs/grid/.submitit").glob("*/*log.out")
    }
    assert sorted("completed successfully" in text for text in logs.values()) == [False, True]


def test_what_slurm_ends_or_queues_again_is_saved_first(slurm, tmp_path):
    process = start(
        tmp_path, slurm, *SLURM, "seed=0,1", "epochs=100000", "checkpoint.every_seconds=100000"
    )
    folder = tmp_path / "outputs" / "grid"
    until(
        lambda: sum(len(table(path)) > 2 for path in folder.glob("*/epochs.csv")) == 2,
        process,
        tmp_path,
    )
    job, other = sorted(path.name for path in (folder / ".submitit").glob("[0-9]*_[0-9]"))
    ask(slurm, "scancel", "--signal=USR2", job)
    logs = folder / ".submitit" / job / f"{job}_0_log.out"
    until(lambda: "Requeued job" in logs.read_text(), process, tmp_path)
    ask(slurm, "scontrol", "requeue", other)
    until(lambda: len(list(folder.glob("*/last.pt"))) == 2, process, tmp_path)
    until(
        lambda: ask(slurm, "squeue", "-h", "-r", "-o", "%T").split() == ["PENDING"] * 2,
        process,
        tmp_path,
    )
    ask(slurm, "scancel", "--name=grid")
    assert process.wait(timeout=120) == 1
    said = output(tmp_path)
    assert "dfl-train: error: hydra/launcher=submitit_slurm: " in said
    assert "Traceback" not in said
    assert "stay in the queue" not in said  # which is empty
    assert {row["status"] for row in points(tmp_path).values()} == {"interrupted"}
    assert {row["reason"] for row in points(tmp_path).values()} == {
        "Interrupted SIGTERM",
        "Interrupted SIGUSR2",
    }
    before = {path: path.read_text() for path in folder.glob("*/epochs.csv")}
    assert min(text.count("\n") for text in before.values()) > 2
    again = start(
        tmp_path, slurm, *SLURM, "seed=0,1", "epochs=100000", "checkpoint.every_seconds=100000"
    )
    until(lambda: all(path.read_text() > text for path, text in before.items()), again, tmp_path)
    again.send_signal(signal.SIGINT)
    assert again.wait(timeout=60) == 130
    assert "stay in the queue" in output(tmp_path)
    assert ask(slurm, "squeue", "-h", "-o", "%j").split() == ["grid", "grid"]
    ask(slurm, "scancel", "--name=grid")
    assert all(path.read_text().startswith(text) for path, text in before.items())


def test_a_time_limit_that_leaves_no_time_to_save_is_refused(tmp_path):
    pytest.importorskip(
        "hydra_plugins.hydra_submitit_launcher", reason="the extra [slurm] is not installed"
    )
    process = start(tmp_path, {}, *SLURM, "seed=0,1", "hydra.launcher.timeout_min=2")
    assert process.wait(timeout=120) == 2
    (line,) = output(tmp_path).splitlines()
    assert line.startswith("dfl-train: error: hydra.launcher.timeout_min=2: ")
    assert "hydra.launcher.signal_delay_s=120" in line


@pytest.fixture
def ray():
    """The environment of a Ray that was started elsewhere; skips, saying so, where there is none installed."""
    pytest.importorskip(
        "hydra_plugins.hydra_ray_launcher", reason="the extra [ray] is not installed"
    )
    command = [sys.executable, "-m", "ray.scripts.scripts"]
    options = (
        "--head",
        "--port=0",
        "--num-cpus=2",
        "--include-dashboard=false",
        "--disable-usage-stats",
    )
    subprocess.run(
        [*command, "start", *options], cwd="/", check=True, capture_output=True, timeout=120
    )
    yield {}
    subprocess.run([*command, "stop"], check=False, capture_output=True, timeout=60)


def test_ray_joins_a_cluster_that_is_there_leaves_results_here_and_loses_nothing_when_stopped(
    ray, tmp_path
):
    join = ("hydra/launcher=ray", "hydra.launcher.ray.init.address=auto", "seed=0,1")
    process = start(tmp_path, ray, *join, "epochs=100000", "checkpoint.every_seconds=100000")
    folder = tmp_path / "outputs" / "grid"
    until(lambda: len(list(folder.glob("*/epochs.csv"))) == 2, process, tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    assert {row["status"] for row in points(tmp_path).values()} == {"interrupted"}
    assert len(list(folder.glob("*/last.pt"))) == 2
    other = start(tmp_path, ray, *join, "epochs=2", "hydra.sweep.dir=elsewhere")
    assert other.wait(timeout=120) == 0, output(tmp_path)
    results = [
        json.loads(path.read_text()) for path in (tmp_path / "elsewhere").glob("*/result.json")
    ]
    assert [result["status"] for result in results] == ["finished"] * 2
    assert all(len(table(path)) == 2 for path in (tmp_path / "elsewhere").glob("*/epochs.csv"))
