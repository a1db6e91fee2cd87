"""A run writes its tables, result and checkpoint, prints a summary, and sends the same data to W&B."""

import json
from contextlib import nullcontext

import pytest
import torch
import wandb
from processes import dfl_train
from run_files import records, summary, table

from dfl_experiments.configuration.schema import Tracking
from dfl_experiments.running import checkpoint
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


def test_the_run_directory_holds_what_the_contract_names(default_run):
    run_dir, _ = default_run
    rows, epochs = table(run_dir / "iterations.csv"), table(run_dir / "epochs.csv")
    layer = ["cosine_sample/{}", "cosine_batch/{}", "norm/{}", "norm_bp/{}"]
    expected = ["iteration", "epoch", "loss", *(name.format(i) for i in (1, 2) for name in layer)]
    assert list(rows[0]) == expected
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
    mean = sum(float(row["cosine_sample/1"]) for row in rows[21:]) / 21
    assert (
        float(epochs[-1]["cosine/1"])
        == pytest.approx(result["cosine"]["1"])
        == pytest.approx(mean, rel=1e-5)
    )
    assert result["cosine_by_construction"] == ["2"]
    assert result["config"]["optimizer"]["lr"] == 1e-4
    assert (run_dir / ".hydra" / "overrides.yaml").exists()
    assert (run_dir / "config.yaml").read_text().count("${") == 0
    assert not list(run_dir.glob(".*[0-9]"))


def test_the_last_checkpoint_holds_weights_feedback_and_both_optimizers(default_run):
    state = checkpoint.load_checkpoint(default_run[0])
    assert (state["epoch"], state["batch"]) == (2, 0)
    assert state["method"]["feedback.0.weight"].shape == (10, 256)
    assert len(state["optimizers"]) == 2
    assert all(torch.isfinite(value).all() for value in state["net"].values())


def test_the_end_of_a_run_is_a_readable_summary(default_run):
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
    found = records(run_dir)
    logged = [item["item"] for item in found["history"]]
    for name, key in (("iterations.csv", "loss"), ("epochs.csv", "lr")):
        rows = table(run_dir / name)
        # of an epoch of 21 iterations every 10th: 200 / 21
        rows = rows[::10] if key == "loss" else rows
        mirrored = [item for item in logged if key in item]
        assert len(mirrored) == len(rows)
        for item, row in zip(mirrored, rows, strict=True):
            values = {column: float(value) for column, value in row.items() if value}
            assert {column: item[column] for column in values} == values
    steps = {metric["name"]: metric.get("step_metric") for metric in found["metric"]}
    assert steps["loss"] == steps["cosine_sample/1"] == "iteration"
    assert steps["test_accuracy"] == steps["cosine/1"] == "epoch"
    assert [end.get("exit_code") for end in found["exit"]] == [0]
    config = found["run"][0]["config"]["update"]
    assert config["optimizer"]["betas"] == [0.9, 0.999]
    assert found["run"][0]["job_type"] == "las"
    result = json.loads((run_dir / "result.json").read_text())
    shown = summary(run_dir)
    # W&B would show it as cosine.1
    assert not [key for key, value in shown.items() if isinstance(value, dict)]
    assert shown["test_accuracy"] == pytest.approx(result["test_accuracy"]["last"])
    for key in set(result) - {"config", "seal"}:
        value = result[key]
        if isinstance(value, dict):
            assert {name: shown[f"{key}/{name}"] for name in value} == value
        else:
            assert shown[key] == value, key


def test_a_crashed_job_s_run_ends_as_failed_and_the_next_one_is_another(tmp_path):
    config = {
        key: {"name": key} for key in ("method", "model", "dataset", "augmentation", "protocol")
    }
    config["tracking"] = {}
    tables, ends = {"iterations": ["iteration", "loss"]}, []
    for name in ("crashed", "fine"):
        folder = tmp_path / name
        folder.mkdir()
        expectation = pytest.raises(RuntimeError) if name == "crashed" else nullcontext()
        with (
            expectation,
            track(TRACKING, folder, config, tables, "sweep") as tracker,
        ):
            tracker.log([{"iteration": 1, "loss": 0.5}])
            if name == "crashed":
                raise RuntimeError
        found = records(folder)
        assert found["run"][0]["run_group"] == "sweep"
        ends.append((found["run"][0]["run_id"], found["exit"][0].get("exit_code")))
    wandb.teardown()  # its service would serve every process that this one starts
    assert [code for _, code in ends] == [1, 0]
    assert ends[0][0] != ends[1][0]


def test_alignment_every_k_leaves_the_other_rows_empty_and_the_weights_alone(tmp_path):
    states = []
    for every in (0, 4):
        folder = tmp_path / str(every)
        folder.mkdir()
        done = dfl_train(folder, f"alignment.every={every}", "method=dfa", *QUICK)
        assert done.returncode == 0, done.stderr
        (run_dir,) = (folder / "outputs").glob("*/*")
        measured = [
            row["iteration"] for row in table(run_dir / "iterations.csv") if row["cosine_sample/1"]
        ]
        assert measured == [str(i) for i in range(1, 43, 4) if every]
        states.append(checkpoint.load_checkpoint(run_dir)["net"])
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_the_training_loss_is_the_mean_over_images(tmp_path):
    done = dfl_train(tmp_path, "epochs=1", "limit=65", "tracking=disabled", "alignment.every=7")
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "outputs").glob("*/*/epochs.csv")
    first, second = (float(row["loss"]) for row in table(path.parent / "iterations.csv"))
    assert float(table(path)[0]["train_loss"]) == pytest.approx((64 * first + second) / 65)
