"""An interrupted and resumed run ends bitwise equal to an uninterrupted run."""

import json
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from processes import dfl_train, ended, forked
from run_files import table

from dfl_experiments.configuration.composition import compose, plain
from dfl_experiments.configuration.recorded import with_recorded
from dfl_experiments.running import checkpoint

# one method of each kind: no B; B learnt before, or after, the signals are sent; drawn anew; mirrored; by tangents
KINDS = ("bp", "las", "kp", "brsf", "wm", "fdfa")
KILLS = 24 // len(KINDS)
OPTIONS = (
    "epochs=5",
    "limit=500",
    "threads=1",
    "tracking=disabled",
    "checkpoint.every_seconds=0.003",
)
TIMES = ("seconds", "samples_per_second", "finished_at", "seal")


def command(folder, *options):
    """Return the options that a user would type: resume the run if it exists, else start it."""
    for name in ("last.pt", "previous.pt", "result.json"):
        if (folder / "here" / name).exists():
            return ("resume=here",)
    # the default data_dir depends on the folder and is recorded, so it would differ between the two runs
    return (*options, *OPTIONS, f"data_dir={folder.parent}", "hydra.run.dir=here")


def without_times(row):
    return {key: value for key, value in row.items() if key not in TIMES}


@dataclass
class Outcome:
    """Everything that a run leaves, without its times."""

    state: dict
    iterations: bytes
    epochs: list
    result: dict


def outcome(run_dir):
    result = json.loads((run_dir / "result.json").read_text())
    del result["config"]["sweep"]  # it contains the start time
    return Outcome(
        state=checkpoint.load_checkpoint(run_dir),
        iterations=(run_dir / "iterations.csv").read_bytes(),
        epochs=[without_times(row) for row in table(run_dir / "epochs.csv")],
        result=without_times(result),
    )


def assert_same(first, second):
    """Assert that two outcomes are bitwise equal."""
    assert first.iterations == second.iterations
    assert first.epochs == second.epochs
    assert first.result == second.result
    for key in ("net", "method"):
        torch.testing.assert_close(first.state[key], second.state[key], rtol=0, atol=0)
    optimizers = zip(first.state["optimizers"], second.state["optimizers"], strict=True)
    for optimizer, other in optimizers:
        torch.testing.assert_close(optimizer["state"], other["state"], rtol=0, atol=0)
    assert str(first.state["random"]) == str(second.state["random"])
    for key in ("epoch", "batch"):
        assert first.state[key] == second.state[key]


def killed_before_file_operation(number, name="here"):
    """Kill this process just before it opens, renames or removes a file with this name for the n-th time."""
    count = 0

    def hook(event, arguments):
        nonlocal count
        if event in ("open", "os.rename", "os.remove") and name in str(arguments[0]):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@pytest.mark.parametrize("method", KINDS)
def test_repeatedly_killed_and_resumed_run_is_bitwise_equal(method, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    start = time.perf_counter()
    assert ended(forked(whole, *command(whole, f"method={method}"))) == 0
    duration = time.perf_counter() - start
    moments, kills = random.Random(f"{method} 1"), 0
    while kills < KILLS:
        arguments = command(broken, f"method={method}")
        if kills % 2:  # at a file operation
            number = moments.randint(1, 25)
            pid = forked(
                broken, *arguments, before=lambda n=number: killed_before_file_operation(n)
            )
        else:  # at any time
            pid = forked(broken, *arguments)
            time.sleep(moments.uniform(0.3, 0.8) * duration)
            os.kill(pid, signal.SIGKILL)
        is_killed = ended(pid) == -signal.SIGKILL
        kills += is_killed
        if is_killed and kills < KILLS:
            continue
        if is_killed:
            assert ended(forked(broken, *command(broken, f"method={method}"))) == 0
        assert_same(outcome(whole / "here"), outcome(broken / "here"))
        shutil.rmtree(broken / "here")  # the run has finished: start another


LEARNING = {
    "adamw": (
        "optimizer.weight_decay=0.1",
        "schedule=cosine",
        "schedule.per=iteration",
        "schedule.warmup=1.5",
    ),
    "rmsprop": (
        "optimizer.momentum=0.5",
        "schedule=exponential",
        "schedule.warmup=2",
        "optimizer.feedback.lr=1e-3",
    ),
    "sgd": (
        "optimizer.momentum=0.9",
        "optimizer.clip_norm=0.5",
        "schedule.per=iteration",
        "method=pfa",
    ),
    "torch": (
        "optimizer._target_=torch.optim.NAdam",
        "schedule=constant",
        "+optimizer@optimizer.feedback=adam",
        "+schedule@schedule.feedback=exponential",
    ),
}


@pytest.mark.parametrize("optimizer", LEARNING)
def test_each_optimizer_and_schedule_resumes_bitwise_equal(optimizer, tmp_path):
    options = (f"optimizer={optimizer}", "method=ltas", *LEARNING[optimizer])
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    assert ended(forked(whole, *command(whole, *options))) == 0
    pid = forked(
        broken,
        *command(broken, *options),
        before=lambda: killed_before_file_operation(9, "last.pt"),
    )
    assert ended(pid) == -signal.SIGKILL
    state = checkpoint.load_checkpoint(broken / "here")
    assert state["epoch"] < 5
    assert ended(forked(broken, *command(broken))) == 0
    assert_same(outcome(whole / "here"), outcome(broken / "here"))


def test_resume_auto_starts_continues_and_keeps_a_finished_run(tmp_path):
    auto = (
        "resume=auto",
        "hydra.run.dir=here",
        "epochs=40",
        "limit=300",
        "tracking=disabled",
        "threads=1",
    )
    pid = forked(tmp_path, *auto)
    while not (tmp_path / "here" / "epochs.csv").exists():
        time.sleep(0.01)
    time.sleep(0.3)
    os.kill(pid, signal.SIGTERM)
    assert ended(pid) == 143
    second = dfl_train(tmp_path, *auto)
    assert second.returncode == 0, second.stderr
    assert "continuing after epoch" in second.stdout
    assert len((tmp_path / "here" / "epochs.csv").read_text().splitlines()) == 41
    third = dfl_train(tmp_path, *auto)
    assert third.returncode == 0
    assert "here: finished already" in third.stdout
    other = dfl_train(tmp_path, *auto, "seed=1")
    assert other.returncode == 2
    assert "another configuration" in other.stderr
    assert "hydra.run.dir=<directory>" in dfl_train(tmp_path, "resume=auto").stderr


def write_arrays(path, seed):
    random = np.random.default_rng(seed)
    train, test = random.random((2, 40, 4))
    labels = np.arange(40) % 2
    np.savez(path, X_train=train, y_train=labels, X_test=test, y_test=labels)


def test_resume_and_repeat_find_moved_data_and_refuse_other_data(tmp_path):
    """A run accepts only the data that it had, wherever they are now."""
    for name, seed in (("mine.npz", 0), ("other.npz", 1)):
        write_arrays(tmp_path / name, seed)
    (tmp_path / "new").mkdir()
    data = ("dataset=arrays", "dataset.source.path=mine.npz")
    small = ("epochs=1", "tracking=disabled", "data_dir=packs")
    assert dfl_train(tmp_path, *data, *small, "hydra.run.dir=run").returncode == 0
    result = tmp_path / "run" / "result.json"
    before = json.loads(result.read_text())
    result.unlink()  # as if the run had been killed
    # the path was relative, but it is valid in another folder
    assert dfl_train(tmp_path / "new", "resume=../run").returncode == 0
    result.unlink()
    (tmp_path / "mine.npz").rename(tmp_path / "new" / "moved.npz")
    lost = dfl_train(tmp_path, "resume=run")
    assert lost.returncode == 2
    assert f"dataset.source.path={tmp_path / 'mine.npz'}: no such file" in lost.stderr
    other = dfl_train(tmp_path, "resume=run", "dataset.source.path=other.npz")
    assert other.returncode == 2
    assert f"other data or code: data {before['data']}, now " in other.stderr.splitlines()[-1]
    assert "restore them, or start a new run: dfl-train " in other.stderr
    moved = "dataset.source.path=new/moved.npz"
    assert dfl_train(tmp_path, "resume=run", moved).returncode == 0
    resumed = json.loads(result.read_text())
    assert resumed["test_accuracy"] == before["test_accuracy"]
    assert resumed["config"]["dataset"]["source"]["path"] == str(tmp_path / "new" / "moved.npz")
    assert dfl_train(tmp_path, "repeat=run", moved, "hydra.run.dir=again").returncode == 0
    size = dfl_train(tmp_path, "resume=run", "dataset.mean=[0.1]")
    assert size.returncode == 2
    assert "dataset.mean: cannot be set" in size.stderr


def test_recorded_data_dir_that_no_longer_exists_is_replaced_by_that_of_the_machine(
    tmp_path, monkeypatch
):
    old, new = tmp_path / "old", tmp_path / "new"
    values = plain(compose([])) | {"data_dir": str(old)}
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(values))
    monkeypatch.setenv("DFL_DATA_DIR", str(new))
    resume = [f"resume={tmp_path}"]
    assert with_recorded(compose(resume), resume)["data_dir"] == str(new)
    old.mkdir()
    assert with_recorded(compose(resume), resume)["data_dir"] == str(old)


def test_a_run_is_not_continued_in_the_directory_of_another(tmp_path):
    for name in ("one", "two"):
        options = ("epochs=1", "limit=64", "tracking=disabled", f"hydra.run.dir={name}")
        assert dfl_train(tmp_path, *options).returncode == 0
    done = dfl_train(tmp_path, "resume=one", "hydra.run.dir=two")
    assert done.returncode == 2
    assert "hydra.run.dir=two: resume=one continues the run in its own directory" in done.stderr
    assert dfl_train(tmp_path, "resume=one", "hydra.run.dir=./one").returncode == 0
