"""Sweeps on a real SLURM and a real Ray, both on the loopback interface."""

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
    """Yield the environment variables for `dfl-train`. Skip if SLURM cannot run here."""
    if reason := slurm_cluster.missing():
        pytest.skip(reason)
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
    """Return the rows of summary.csv by their swept value, such as dataset=digits."""
    rows = {}
    for row in table(folder / "outputs" / "grid" / "summary.csv"):
        key = next(iter(row))
        rows[f"{key}={row[key]}"] = row
    return rows


def until(condition, process, folder, seconds=90):
    """Wait for a condition. Fail if the command ends before."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, output(folder)
        assert process.poll() is None, output(folder)
        time.sleep(0.1)


def output_of(environment, *command):
    variables = {**os.environ, **environment}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    return done.stdout


SLURM = ("hydra/launcher=submitit_slurm",)


def test_slurm_job_has_the_sweep_name_and_fails_with_its_point(slurm, tmp_path):
    process = start(tmp_path, slurm, "dataset=digits,mnist", *SLURM, "data_dir=nowhere", "epochs=2")
    until(lambda: "grid" in output_of(slurm, "squeue", "-h", "-o", "%j"), process, tmp_path)
    assert process.wait(timeout=120) == 1, output(tmp_path)
    statuses = {key: row["status"] for key, row in points(tmp_path).items()}
    assert statuses == {"dataset=digits": "finished", "dataset=mnist": "failed"}
    logs = [path.read_text() for path in tmp_path.glob("outputs/grid/.submitit/*/*log.out")]
    assert sorted("completed successfully" in text for text in logs) == [False, True]


def test_slurm_cancel_and_requeue_save_a_checkpoint_first(slurm, tmp_path):
    sweep = (*SLURM, "seed=0,1", "epochs=100000", "checkpoint.every_seconds=100000")
    process = start(tmp_path, slurm, *sweep)
    folder = tmp_path / "outputs" / "grid"

    def both_have_three_epochs():
        lengths = [len(table(path)) for path in folder.glob("*/epochs.csv")]
        return len(lengths) == 2 and min(lengths) > 2

    def both_are_queued():
        return output_of(slurm, "squeue", "-h", "-r", "-o", "%T").split() == ["PENDING"] * 2

    until(both_have_three_epochs, process, tmp_path)
    job, other = sorted(path.name for path in (folder / ".submitit").glob("[0-9]*_[0-9]"))
    output_of(slurm, "scancel", "--signal=USR2", job)
    log = folder / ".submitit" / job / f"{job}_0_log.out"
    until(lambda: "Requeued job" in log.read_text(), process, tmp_path)
    output_of(slurm, "scontrol", "requeue", other)
    until(lambda: len(list(folder.glob("*/last.pt"))) == 2, process, tmp_path)
    until(both_are_queued, process, tmp_path)
    output_of(slurm, "scancel", "--name=grid")
    assert process.wait(timeout=120) == 1
    printed = output(tmp_path)
    assert "dfl-train: error: hydra/launcher=submitit_slurm: " in printed
    assert "Traceback" not in printed
    assert "stay in the queue" not in printed  # scancel has emptied the queue
    assert {row["status"] for row in points(tmp_path).values()} == {"interrupted"}
    assert {row["reason"] for row in points(tmp_path).values()} == {
        "SIGTERM",
        "SIGUSR2",
    }
    before = {path: path.read_text() for path in folder.glob("*/epochs.csv")}
    assert min(text.count("\n") for text in before.values()) > 2
    again = start(tmp_path, slurm, *sweep)
    until(lambda: all(path.read_text() > text for path, text in before.items()), again, tmp_path)
    again.send_signal(signal.SIGINT)
    assert again.wait(timeout=60) == 130
    assert "stay in the queue" in output(tmp_path)
    assert output_of(slurm, "squeue", "-h", "-o", "%j").split() == ["grid", "grid"]
    output_of(slurm, "scancel", "--name=grid")
    assert all(path.read_text().startswith(text) for path, text in before.items())


def test_slurm_time_limit_without_time_to_save_is_refused(tmp_path):
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
    """Start a Ray cluster and yield the environment variables for `dfl-train`. Skip if Ray is not installed."""
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


def test_ray_sweep_saves_on_sigterm_and_writes_results_locally(ray, tmp_path):
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
    run_dirs = [path.parent for path in (tmp_path / "elsewhere").glob("*/result.json")]
    assert len(run_dirs) == 2
    for run_dir in run_dirs:
        assert json.loads((run_dir / "result.json").read_text())["status"] == "finished"
        assert len(table(run_dir / "epochs.csv")) == 2
