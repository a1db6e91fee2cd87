"""TensorBoard's event files hold every row of the CSV files once, even if the run was interrupted."""

import os
import signal
import time
from importlib.util import find_spec

import pytest
from processes import dfl_train, ended, forked
from run_files import table

from dfl_experiments.running import event_files, tracking

RUN = (
    "hydra.run.dir=here",
    "limit=300",
    "threads=1",
    "model.widths=[16]",
    "tracking=tensorboard",
    "tracking.every=1",
)
needs_tensorboard = pytest.mark.skipif(
    find_spec("tensorboard") is None, reason="tensorboard is not installed"
)


def reader(run_dir):
    """Return TensorBoard's own reader of the event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()


def series_of(events):
    """Return the points (step, value) of every metric in a reader."""
    series = {}
    for tag in events.Tags()["scalars"]:
        series[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    return series


def assert_same(series, run_dir):
    """Assert that the metrics, steps and values are those of the CSV files, each once."""
    expected = {}
    for name, step in (("iterations", "iteration"), ("epochs", "epoch")):
        for row in table(run_dir / f"{name}.csv"):
            for column, text in row.items():
                if text and column not in ("iteration", "epoch"):
                    point = int(row[step]), pytest.approx(float(text), rel=1e-6)
                    expected.setdefault(column, []).append(point)
    assert series == expected


@needs_tensorboard
def test_event_files_hold_the_csv_rows_and_nothing_is_kept_for_wandb(tmp_path):
    options = ("method=kp", "alignment.every=3", "alignment.quantities=[weight_cosine]", "epochs=2")
    assert dfl_train(tmp_path, *RUN, *options).returncode == 0
    assert dfl_train(tmp_path, *RUN, *options, "force=true").returncode == 0
    run_dir = tmp_path / "here"
    series = series_of(reader(run_dir))
    metrics = {"loss", "cosine_sample/1", "weight_cosine/1", "test_accuracy", "cosine/1"}
    assert metrics <= series.keys()
    assert_same(series, run_dir)
    assert not (run_dir / "wandb").exists()


def write_at_once():
    """Write each epoch's events as soon as it ends (called in the training process)."""
    tracking.SECONDS_TOGETHER = 0
    event_files.SECONDS_TO_FLUSH = 0


@needs_tensorboard
def test_resumed_run_has_every_step_once_even_for_a_live_reader(tmp_path):
    pid = forked(tmp_path, *RUN, "epochs=60", "checkpoint.every_seconds=0.05", before=write_at_once)
    run_dir = tmp_path / "here"
    deadline = time.monotonic() + 60
    while not (run_dir / "epochs.csv").exists() or len(table(run_dir / "epochs.csv")) < 8:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    assert ended(pid) == -signal.SIGKILL
    (path,) = run_dir.glob("events.out.tfevents.*")
    with path.open("ab") as file:
        file.write(b"\x18\x00")  # an incomplete event
    live_reader = reader(run_dir)
    assert len(series_of(live_reader)["test_accuracy"]) > 4
    resumed = dfl_train(tmp_path, "resume=here", "tracking.every=1", "tracking=tensorboard")
    assert resumed.returncode == 0
    assert len(table(run_dir / "epochs.csv")) == 60
    assert_same(series_of(reader(run_dir)), run_dir)
    assert_same(series_of(live_reader.Reload()), run_dir)


@needs_tensorboard
def test_restarted_sweep_adds_event_files_and_repeat_keeps_tensorboard(
    tmp_path,
):
    sweep = ("--multirun", "hydra.sweep.dir=grid", "epochs=2", *RUN[1:], "seed=0,1")
    assert dfl_train(tmp_path, *sweep, "tracking=disabled").returncode == 0
    assert dfl_train(tmp_path, *sweep).stdout.count("all rows are sent again to TensorBoard") == 2
    points = [path.parent for path in (tmp_path / "grid").glob("*/result.json")]
    for point in points:
        assert_same(series_of(reader(point)), point)
    assert "sent again" not in dfl_train(tmp_path, *sweep).stdout
    assert dfl_train(tmp_path, *RUN, "epochs=1").returncode == 0
    assert dfl_train(tmp_path, "repeat=here", "hydra.run.dir=there").returncode == 0
    assert list((tmp_path / "there").glob("events.out.tfevents.*"))


@pytest.mark.parametrize(
    "command", [RUN, ("--multirun", *RUN[1:], "seed=0,1")], ids=["run", "sweep"]
)
def test_without_tensorboard_nothing_is_trained_and_the_extra_is_named(command, tmp_path):
    def hide_the_package():
        event_files.find_spec = lambda name: None

    files = tmp_path / "out", tmp_path / "err"
    folder = tmp_path / "work"
    folder.mkdir()
    assert ended(forked(folder, *command, before=hide_the_package, files=files)) == 2
    (line,) = files[1].read_text().splitlines()
    assert "tracking=tensorboard" in line
    assert 'pip install "dfl-experiments[tensorboard]"' in line
    assert not list(folder.rglob("*.csv"))
    assert not (folder / "here").exists()
