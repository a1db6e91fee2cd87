"""A run writes tables, result and checkpoint, prints a summary, and sends the same data to W&B."""

import json
import os
from contextlib import nullcontext
from statistics import fmean

import pytest
import torch
import wandb
from processes import dfl_train
from run_files import records, summary, table

from dfl_experiments.configuration.schema import Tracking
from dfl_experiments.running import checkpoint
from dfl_experiments.running.result import read_result
from dfl_experiments.running.run_directory import epoch_columns
from dfl_experiments.running.tracking import track

TRACKING = Tracking(mode="offline", project="test", entity=None, tags=[], every=1)
QUICK = ("epochs=2", "tracking=disabled")


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("default")
    done = dfl_train(folder, "epochs=2")
    assert done.returncode == 0, done.stderr
    (run_dir,) = (folder / "outputs").glob("*/*")
    return run_dir, done.stdout


def test_run_directory_holds_the_documented_files_and_columns(default_run):
    run_dir, _ = default_run
    rows, epochs = table(run_dir / "iterations.csv"), table(run_dir / "epochs.csv")
    layer_1 = ["cosine_sample/1", "cosine_batch/1", "norm/1", "norm_bp/1"]
    layer_2 = ["cosine_sample/2", "cosine_batch/2", "norm/2", "norm_bp/2"]
    assert list(rows[0]) == ["iteration", "epoch", "loss", *layer_1, *layer_2]
    assert list(epochs[0]) == epoch_columns(3)
    assert [int(row["iteration"]) for row in rows] == list(range(1, 43))
    assert [row["epoch"] for row in rows] == ["1"] * 21 + ["2"] * 21
    assert [row["epoch"] for row in epochs] == ["1", "2"]
    assert all(0 < float(row["cosine_sample/1"]) < 1 for row in rows)
    assert [float(row["cosine_sample/2"]) for row in rows] == pytest.approx([1.0] * 42)
    result = json.loads((run_dir / "result.json").read_text())
    assert result["status"] == "finished"
    assert result["test_accuracy"]["last"] == pytest.approx(float(epochs[-1]["test_accuracy"]))
    for name in ("validation_accuracy", "validation_loss"):
        assert result[name] == pytest.approx(float(epochs[-1][name]))
    mean = fmean(float(row["cosine_sample/1"]) for row in rows[21:])
    assert result["cosine"]["1"] == pytest.approx(mean, rel=1e-5)
    assert result["cosine"]["1"] == pytest.approx(float(epochs[-1]["cosine/1"]))
    assert result["cosine_by_construction"] == ["2"]
    assert result["config"]["optimizer"]["lr"] == 1e-4
    assert (run_dir / ".hydra" / "overrides.yaml").exists()
    assert "${" not in (run_dir / "config.yaml").read_text()
    assert not list(run_dir.glob(".*[0-9]"))  # no temporary files


def test_last_checkpoint_holds_weights_feedback_and_both_optimizers(default_run):
    state = checkpoint.load_checkpoint(default_run[0])
    assert (state["epoch"], state["batch"]) == (2, 0)
    assert state["method"]["feedback.0.weight"].shape == (10, 256)
    assert len(state["optimizers"]) == 2
    assert all(torch.isfinite(value).all() for value in state["net"].values())


def test_run_ends_with_a_summary(default_run):
    run_dir, printed = default_run
    for words in (
        "test accuracy",
        "layer 1",
        "layer 2   1.000 (BP's own signal, by construction)",
        str(run_dir),
    ):
        assert words in printed


def test_wandb_mirrors_the_local_files(default_run):
    run_dir, _ = default_run
    logged = [item["item"] for item in records(run_dir)["history"]]
    for name, key in (("iterations.csv", "loss"), ("epochs.csv", "lr")):
        rows = table(run_dir / name)
        # an epoch has 21 iterations, so W&B gets every 10th of them: 200 / 21, rounded up
        rows = rows[::10] if key == "loss" else rows
        mirrored = [item for item in logged if key in item]
        assert len(mirrored) == len(rows)
        for item, row in zip(mirrored, rows, strict=True):
            values = {column: float(value) for column, value in row.items() if value}
            assert {column: item[column] for column in values} == values


def test_wandb_run_has_steps_configuration_and_exit_code(default_run):
    run_records = records(default_run[0])
    steps = {metric["name"]: metric.get("step_metric") for metric in run_records["metric"]}
    assert steps["loss"] == steps["cosine_sample/1"] == "iteration"
    assert steps["test_accuracy"] == steps["cosine/1"] == "epoch"
    assert [end.get("exit_code") for end in run_records["exit"]] == [0]
    (run,) = run_records["run"]
    assert run["config"]["update"]["optimizer"]["betas"] == [0.9, 0.999]
    assert run["job_type"] == "las"


def test_wandb_summary_holds_the_result(default_run):
    run_dir, _ = default_run
    result = json.loads((run_dir / "result.json").read_text())
    shown = summary(run_dir)
    # W&B would show entries of a dictionary as cosine.1
    assert not [key for key, value in shown.items() if isinstance(value, dict)]
    assert shown["test_accuracy"] == pytest.approx(result["test_accuracy"]["last"])
    for key in set(result) - {"config", "seal"}:
        value = result[key]
        if isinstance(value, dict):
            assert {name: shown[f"{key}/{name}"] for name in value} == value
        else:
            assert shown[key] == value, key


def test_crashed_job_ends_its_wandb_run_as_failed_and_the_next_job_has_its_own(tmp_path):
    groups = ("method", "model", "dataset", "augmentation", "protocol")
    config = {group: {"name": group} for group in groups} | {"tracking": {}}
    tables = {"iterations": ["iteration", "loss"]}
    ids, codes = [], []
    for name in ("crashed", "fine"):
        folder = tmp_path / name
        folder.mkdir()
        expectation = pytest.raises(RuntimeError) if name == "crashed" else nullcontext()
        with expectation, track(TRACKING, folder, config, tables, "sweep") as tracker:
            tracker.log([{"iteration": 1, "loss": 0.5}])
            if name == "crashed":
                raise RuntimeError
        run_records = records(folder)
        assert run_records["run"][0]["run_group"] == "sweep"
        ids.append(run_records["run"][0]["run_id"])
        codes.append(run_records["exit"][0].get("exit_code"))
    wandb.teardown()  # otherwise the processes that later tests start would share W&B's service
    assert codes == [1, 0]
    assert ids[0] != ids[1]


def test_alignment_every_k_leaves_other_rows_empty_and_weights_unchanged(tmp_path):
    states = []
    for every in (0, 4):
        folder = tmp_path / str(every)
        folder.mkdir()
        done = dfl_train(folder, f"alignment.every={every}", "method=dfa", *QUICK)
        assert done.returncode == 0, done.stderr
        (run_dir,) = (folder / "outputs").glob("*/*")
        rows = table(run_dir / "iterations.csv")
        measured = [int(row["iteration"]) for row in rows if row["cosine_sample/1"]]
        assert measured == (list(range(1, 43, every)) if every else [])
        states.append(checkpoint.load_checkpoint(run_dir)["net"])
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def test_training_loss_is_the_mean_over_images(tmp_path):
    done = dfl_train(tmp_path, "epochs=1", "limit=65", "tracking=disabled", "alignment.every=7")
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "outputs").glob("*/*/epochs.csv")
    first, second = (float(row["loss"]) for row in table(path.parent / "iterations.csv"))
    assert float(table(path)[0]["train_loss"]) == pytest.approx((64 * first + second) / 65)


def test_class_whose_name_is_not_utf_8_is_in_the_result_and_the_log(folder, tmp_path):
    for split in ("train", "test"):
        try:
            os.rename(folder / split / "cats", os.fsencode(folder / split) + b"/\xff")
        except OSError:
            pytest.skip("this file system refuses names that are not valid UTF-8")
    source = ["dataset=folder", f"dataset.source.path={folder}", "hydra.run.dir=here"]
    options = ["model=fc", "model.widths=[4,4]", "validation_fraction=0.25", *QUICK]
    done = dfl_train(tmp_path, *source, *options)
    assert done.returncode == 0, done.stderr
    written = read_result(tmp_path / "here")
    assert list(written["class_accuracy"]) == ["dogs", os.fsdecode(b"\xff")]
    log = (tmp_path / "here" / "run.log").read_text(encoding="utf-8")
    assert "ignored files: 1, such as train/?/notes.txt" in log
