"""Faults of the disk, files, W&B or memory do not destroy results, and one line states the cause."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from processes import ended, forked

from dfl_experiments.running import checkpoint

QUICK = ("epochs=3", "limit=300", "tracking=disabled", "threads=1")
HERE = "hydra.run.dir=here"


def result(folder):
    return json.loads((folder / "here" / "result.json").read_text())


def rows(folder, name="epochs.csv"):
    return (folder / "here" / name).read_text().count("\n") - 1


def last_line(folder):
    return (folder / "output.txt").read_text().strip().splitlines()[-1]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Return a folder with a run that was killed in its third epoch and left last.pt and previous.pt."""
    folder = tmp_path_factory.mktemp("killed")

    def kill_before_the_fourteenth_checkpoint():
        count = 0

        def hook(event, arguments):
            nonlocal count
            if event == "open" and str(arguments[0]).endswith(".last.pt.new"):
                count += 1
                if count == 14:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)

    options = (HERE, *QUICK, "epochs=4", "checkpoint.every_seconds=0")
    pid = forked(folder, *options, before=kill_before_the_fourteenth_checkpoint)
    assert ended(pid) == -signal.SIGKILL
    return folder


@pytest.fixture
def interrupted(killed, tmp_path):
    """Return a copy of the folder `killed`."""
    return shutil.copytree(killed, tmp_path / "killed")


def test_full_disk_ends_the_run_with_one_line_and_keeps_its_results(tmp_path):
    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, 120_000))

    # the rows of iterations.csv alone reach the limit
    options = (HERE, *QUICK, "epochs=200", "limit=1200", "model.widths=[16,16]")
    assert ended(forked(tmp_path, *options, before=small_disk)) == 1
    assert "here/iterations.csv" in last_line(tmp_path)
    assert "Traceback" not in (tmp_path / "output.txt").read_text()
    assert result(tmp_path)["status"] == "failed"
    state = checkpoint.load_checkpoint(tmp_path / "here")
    assert 1 <= state["epoch"] <= rows(tmp_path)


def test_failed_checkpoint_write_leaves_no_partial_file(tmp_path):
    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    assert ended(forked(tmp_path, HERE, *QUICK, before=small_disk)) == 1
    assert "last.pt: cannot be written" in last_line(tmp_path)
    assert result(tmp_path)["status"] == "failed"
    assert not list((tmp_path / "here").glob("*.pt"))
    assert not list((tmp_path / "here").glob(".last*"))
    assert ended(forked(tmp_path, HERE, *QUICK)) == 0
    assert result(tmp_path)["status"] == "finished"


class Exploit:
    def __reduce__(self):
        return os.system, ("touch executed",)


def rewrite(path, **changes):
    """Replace entries of a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save_checkpoint(Path(folder), checkpoint.read_checkpoint(path) | changes)
        shutil.move(Path(folder) / "last.pt", path)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-2000])


def exploit(path):
    rewrite(path, random=Exploit())


def another_run(path):
    rewrite(path, science="00000000")


def another_format(path):
    rewrite(path, format=99)


def missing(path):
    path.unlink()


DAMAGE = [truncated, exploit, another_run, another_format, missing]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda d: d.__name__)
def test_resume_uses_the_previous_checkpoint_if_the_last_is_damaged(damage, interrupted):
    damage(interrupted / "here" / "last.pt")
    assert ended(forked(interrupted, "resume=here")) == 0
    assert "continuing from previous.pt" in (interrupted / "output.txt").read_text()
    assert result(interrupted)["status"] == "finished"
    assert rows(interrupted) == 4
    assert rows(interrupted, "iterations.csv") == 4 * 5
    assert not (interrupted / "executed").exists()


@pytest.mark.parametrize("damage", DAMAGE[:2], ids=lambda d: d.__name__)
def test_two_damaged_checkpoints_are_refused_and_kept(damage, interrupted):
    for name in ("last.pt", "previous.pt"):
        damage(interrupted / "here" / name)
    files = [path for path in (interrupted / "here").iterdir() if path.suffix in (".pt", ".csv")]
    before = {path: path.read_bytes() for path in files}
    assert ended(forked(interrupted, "resume=here")) == 2
    line = last_line(interrupted)
    assert line.startswith("dfl-train: error: ")
    assert "last.pt" in line
    assert "remove last.pt and previous.pt" in line
    assert {path: path.read_bytes() for path in files} == before
    assert not (interrupted / "executed").exists()


def test_out_of_memory_names_the_batch_size(tmp_path):
    def little_memory():
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 700_000_000, size + 700_000_000))

    # the weights take 580 MB, so there is no memory for their gradients
    options = (HERE, *QUICK, "model.widths=[12000,12000]")
    assert ended(forked(tmp_path, *options, before=little_memory)) == 1
    assert "dfl-train: error: batch_size=64: out of memory on device=" in last_line(tmp_path)
    assert "Traceback" not in (tmp_path / "output.txt").read_text()
    assert result(tmp_path)["status"] == "failed"


def assert_complete_with_one_warning(folder):
    output = (folder / "output.txt").read_text()
    assert output.count("W&B ") == 1, output
    assert "Traceback" not in output
    assert result(folder)["status"] == "finished"
    assert rows(folder) == result(folder)["epochs"]


@pytest.mark.parametrize("network", ["no key", "no network"])
def test_unreachable_wandb_is_one_warning(network, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("dfl_experiments.running.tracking.SECONDS_TO_START", 3)
    if network == "no network":
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    assert ended(forked(tmp_path, HERE, "tracking=online", *QUICK[:2], "threads=1")) == 0
    assert_complete_with_one_warning(tmp_path)
    assert list((tmp_path / "here" / "wandb").glob("offline-run-*"))


def test_unwritable_wandb_folder_is_one_warning(tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "wandb").write_text("in the way")
    assert ended(forked(tmp_path, HERE, *QUICK[:2], "threads=1")) == 0
    assert_complete_with_one_warning(tmp_path)


def test_killed_wandb_service_is_one_warning_and_the_next_point_has_a_new_one(tmp_path):
    options = (
        "seed=0,1",
        "epochs=60",
        "limit=600",
        "threads=1",
        "sweep=grid",
        "hydra.sweep.subdir=seed${seed}",
    )
    command = [sys.executable, "-m", "dfl_experiments.train", "--multirun", *options]
    with (tmp_path / "output.txt").open("w") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=output, stderr=output
        )
    first = tmp_path / "outputs" / "grid" / "seed0" / "epochs.csv"
    while not first.exists() or first.read_text().count("\n") < 4:
        assert process.poll() is None, (tmp_path / "output.txt").read_text()
        time.sleep(0.02)
    children = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(process.pid)], capture_output=True, text=True
    )
    (service,) = (line.split()[0] for line in children.stdout.splitlines() if "wandb-core" in line)
    os.kill(int(service), signal.SIGKILL)
    assert process.wait(timeout=120) == 0
    output = (tmp_path / "output.txt").read_text()
    assert output.count("W&B has failed") == 1
    assert "Traceback" not in output
    for seed in "01":
        point = tmp_path / "outputs" / "grid" / f"seed{seed}"
        assert json.loads((point / "result.json").read_text())["status"] == "finished"
        assert (point / "epochs.csv").read_text().count("\n") == 61
