"""End to end on real images, through the real command line: every method, and the paper's where the paper has them."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import METHODS
from processes import dfl_train

from dfl_experiments.measured import EXTRA_QUANTITIES

PAPER = ["bp", "dfa", "las", "ltas", "shallow"]


def losses(path):
    with (path.parent / "iterations.csv").open() as file:
        return np.array([float(row["loss"]) for row in csv.DictReader(file)])


def sweep(folder, data_dir, methods, *arguments):
    """The results of a sweep over these methods, by method, and each one's losses by iteration."""
    settings = ("epochs=1", "tracking=disabled", f"data_dir={data_dir}", "sweep=all")
    done = dfl_train(folder, "--multirun", f"method={','.join(methods)}", *settings, *arguments)
    assert done.returncode == 0, done.stderr
    found = {}
    for path in (folder / "outputs" / "all").glob("*/result.json"):
        result = json.loads(path.read_text())
        found[result["method"]] = (result, losses(path))
    assert sorted(found) == methods
    for result, loss in found.values():
        assert result["status"] == "finished"
        assert np.isfinite(loss).all()
        assert result["config"]["data_dir"] == str(data_dir)
    return found


@pytest.mark.parametrize("protocol", ["fair", "authors"])
def test_mnist_is_learnt_by_every_method_of_the_paper(protocol, tmp_path, data_dir):
    options = (
        "dataset=mnist",
        "limit=12000",
        "validation_fraction=0.01",
        f"protocol={protocol}",
        "model.widths=[256,256]",
        "optimizer.lr=1e-3",
    )
    found = sweep(tmp_path, data_dir, PAPER, *options)
    for result, loss in found.values():
        # after one epoch on a fifth of the images; chance is 0.1
        assert result["test_accuracy"]["last"] > 0.8
        assert loss[-20:].mean() < 0.5 * loss[:5].mean()
    accuracy = {method: result["test_accuracy"]["last"] for method, (result, _) in found.items()}
    assert accuracy["bp"] > 0.9
    assert min(accuracy["las"], accuracy["ltas"]) > accuracy["shallow"]


def test_the_whole_family_learns_mnist_and_is_measured_and_reported(tmp_path, data_dir):
    small = (
        "model=fc_ln",
        "model.widths=[64,64]",
        "limit=4000",
        "validation_fraction=0.01",
        "optimizer.lr=3e-3",
    )
    every = ("alignment.every=9", f"alignment.quantities=[{','.join(EXTRA_QUANTITIES)}]")
    for result, loss in sweep(
        tmp_path, data_dir, METHODS, "dataset=mnist", *small, *every
    ).values():
        # after 63 steps; chance is 0.1
        assert result["test_accuracy"]["last"] > 0.5, result["method"]
        assert loss[-20:].mean() < 0.7 * loss[:5].mean()
    report = [
        sys.executable,
        "-m",
        "dfl_experiments.report.dfl_report",
        "outputs/all",
        "--format",
        "csv",
    ]
    told = subprocess.run(report, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    rows = {row["method"]: row for row in csv.DictReader(told.splitlines())}
    assert sorted(rows) == METHODS
    assert {row["smoke"] for row in rows.values()} == {"False"}
    assert (
        float(rows["fa"]["cosine/1"])
        < float(rows["usf"]["cosine/1"])
        < float(rows["bp"]["cosine/1"])
        == 1
    )


def test_cifar10_trains_conv3_with_every_method_of_the_paper(tmp_path, data_dir):
    # a sixth of the published widths, so that one core does it in seconds
    sizes = ("model.channels=[16,24,32]", "model.widths=[128,128]", "smoke=2400", "batch_size=16")
    small = ("model=conv3_bn", "validation_fraction=0.01", *sizes)
    options = (
        "dataset=cifar10",
        "augmentation=randaugment_cutout_flip",
        "optimizer.lr=1e-3",
        *small,
    )
    for result, loss in sweep(tmp_path, data_dir, PAPER, *options).values():
        assert result["test_accuracy"]["last"] > 0.15
        assert loss[-20:].mean() < loss[:5].mean()


def test_tinyimagenet_trains_resnet18_with_every_method_of_the_paper(tmp_path, data_dir):
    small = (
        "model.channels=[8,12,16,20]",
        "smoke=640",
        "batch_size=64",
        "validation_fraction=0.01",
    )
    options = (
        "dataset=tinyimagenet",
        "model=resnet18",
        "augmentation=flip",
        "optimizer.lr=1e-3",
        *small,
    )
    for result, loss in sweep(tmp_path, data_dir, PAPER, *options).values():
        assert len(loss) == 10
        assert loss[-3:].mean() < loss[:3].mean() + 0.2
        assert sorted(result["cosine"]) == ["1", "2", "3", "4", "5"]
