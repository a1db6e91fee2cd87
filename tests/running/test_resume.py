"""A run that was interrupted ends with the bits it would have had, however and however often it was."""

import csv
import json
import os
import random
import shutil
import signal
import sys
import time

import pytest
import torch
from processes import dfl_train, ended, forked

from dfl_experiments.running import checkpoint

# of each kind one: no B, B learnt before and after the signals are sent, drawn anew, mirrored, measured by tangents
KINDS = ("bp", "las", "kp", "brsf", "wm", "fdfa")
KILLS = 30 // len(KINDS)
OPTIONS = (
    "epochs=5",
    "limit=500",
    "threads=1",
    "tracking=disabled",
    "checkpoint.every_seconds=0.003",
)
TIMES = ("seconds", "samples_per_second", "finished_at", "seal")


def command(folder, *options):
    """Return the options that a user would type: resume a run if there is one, else start it."""
    begun = any(
        (folder / "here" / name).exists() for name in ("last.pt", "previous.pt", "result.json")
    )
    # the same place for all data: the default one is the folder's own, and recorded
    data = f"data_dir={folder.parent}"
    return ("resume=here",) if begun else (*options, *OPTIONS, data, "hydra.run.dir=here")


def outcome(run_dir):
    """Everything a run leaves but its times."""
    state = checkpoint.load_checkpoint(run_dir)
    result = json.loads((run_dir / "result.json").read_text())
    with (run_dir / "epochs.csv").open() as file:
        epochs = [
            {key: value for key, value in row.items() if key not in TIMES}
            for row in csv.DictReader(file)
        ]
    del result["config"]["sweep"]  # the time of the start
    kept = {
        key: state[key]
        for key in ("epoch", "batch", "net", "method", "optimizers", "random", "threads")
    }
    return (
        kept,
        (run_dir / "iterations.csv").read_bytes(),
        epochs,
        {k: v for k, v in result.items() if k not in TIMES},
    )


def assert_same(a, b):
    (state, iterations, epochs, result), (other_state, *others) = a, b
    assert [iterations, epochs, result] == others
    torch.testing.assert_close(state["net"], other_state["net"], rtol=0, atol=0)
    torch.testing.assert_close(state["method"], other_state["method"], rtol=0, atol=0)
    moments, other_moments = ([o["state"] for o in s["optimizers"]] for s in (state, other_state))
    torch.testing.assert_close(moments, other_moments, rtol=0, atol=0)
    assert str(state["random"]) == str(other_state["random"])
    assert (state["epoch"], state["batch"]) == (other_state["epoch"], other_state["batch"])


def killed_before_file_operation(number, name="here"):
    """Have this process killed just before it opens, renames or removes a file with this name for the n-th time."""
    count = 0

    def hook(event, arguments):
        nonlocal count
        if event in ("open", "os.rename", "os.remove") and name in str(arguments[0]):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@pytest.mark.parametrize("method", KINDS)
def test_killed_again_and_again_and_resumed_it_ends_with_the_same_bits(method, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    start = time.perf_counter()
    assert ended(forked(whole, *command(whole, f"method={method}"))) == 0
    duration = time.perf_counter() - start
    moments, kills = random.Random(f"{method} 1"), 0
    while kills < KILLS:
        arguments = command(broken, f"method={method}")
        if kills % 2:
            number = moments.randint(1, 25)
            pid = forked(
                broken, *arguments, before=lambda n=number: killed_before_file_operation(n)
            )
        else:
            pid = forked(broken, *arguments)
            time.sleep(moments.uniform(0.3, 0.8) * duration)
            os.kill(pid, signal.SIGKILL)
        killed = ended(pid) == -signal.SIGKILL
        kills += killed
        last = kills == KILLS
        if not killed or last:
            if killed:
                assert ended(forked(broken, *command(broken, f"method={method}"))) == 0
            assert_same(outcome(whole / "here"), outcome(broken / "here"))
            shutil.rmtree(broken / "here")


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
def test_each_optimizer_and_schedule_goes_on_with_the_same_bits(optimizer, tmp_path):
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


def test_resume_auto_begins_goes_on_and_leaves_a_finished_run_alone(tmp_path):
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


def test_a_run_is_not_continued_in_the_directory_of_another(tmp_path):
    for name in ("one", "two"):
        options = ("epochs=1", "limit=64", "tracking=disabled", f"hydra.run.dir={name}")
        assert dfl_train(tmp_path, *options).returncode == 0
    done = dfl_train(tmp_path, "resume=one", "hydra.run.dir=two")
    assert done.returncode == 2
    assert "hydra.run.dir=two: resume=one continues the run in its own directory" in done.stderr
    assert dfl_train(tmp_path, "resume=one", "hydra.run.dir=./one").returncode == 0
