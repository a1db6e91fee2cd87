"""End to end on real images, from the command line: all methods on MNIST, those of the paper on harder images too."""

import csv
import json
import subprocess
import sys

import numpy as np
from conftest import METHODS
from processes import dfl_train
from run_files import table

from dfl_experiments.measured import EXTRA_QUANTITIES

PAPER = ["bp", "dfa", "las", "ltas", "shallow"]


def sweep(folder, data_dir, methods, *arguments):
    """Train these methods. Return {method: (result, losses by iteration)}."""
    settings = ("epochs=1", "tracking=disabled", f"data_dir={data_dir}", "sweep=all")
    done = dfl_train(folder, "--multirun", f"method={','.join(methods)}", *settings, *arguments)
    assert done.returncode == 0, done.stderr
    runs = {}
    for path in (folder / "outputs" / "all").glob("*/result.json"):
        result = json.loads(path.read_text())
        loss = np.array([float(row["loss"]) for row in table(path.parent / "iterations.csv")])
        assert result["status"] == "finished"
        assert np.isfinite(loss).all()
        assert result["config"]["data_dir"] == str(data_dir)
        runs[result["method"]] = (result, loss)
    assert sorted(runs) == methods
    return runs


def test_every_method_of_the_paper_learns_mnist_as_its_authors_trained_it(tmp_path, data_dir):
    options = (
        "dataset=mnist",
        "limit=12000",
        "validation_fraction=0.01",
        "protocol=authors",
        "model.widths=[256,256]",
        "optimizer.lr=1e-3",
    )
    accuracy = {}
    for method, (result, loss) in sweep(tmp_path, data_dir, PAPER, *options).items():
        accuracy[method] = result["test_accuracy"]["last"]
        # after one epoch on a fifth of the images; chance is 0.1
        assert accuracy[method] > 0.8
        assert loss[-20:].mean() < 0.5 * loss[:5].mean()
    assert accuracy["bp"] > 0.9
    assert min(accuracy["las"], accuracy["ltas"]) > accuracy["shallow"]


def test_every_method_learns_mnist_and_is_measured_and_reported(tmp_path, data_dir):
    small = (
        "model=fc_ln",
        "model.widths=[64,64]",
        "limit=4000",
        "validation_fraction=0.01",
        "optimizer.lr=3e-3",
    )
    measured = ("alignment.every=9", f"alignment.quantities=[{','.join(EXTRA_QUANTITIES)}]")
    runs = sweep(tmp_path, data_dir, METHODS, "dataset=mnist", *small, *measured)
    for result, loss in runs.values():
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
    done = subprocess.run(report, cwd=tmp_path, capture_output=True, text=True, check=True)
    rows = {row["method"]: row for row in csv.DictReader(done.stdout.splitlines())}
    assert sorted(rows) == METHODS
    assert {row["smoke"] for row in rows.values()} == {"False"}
    cosine = {method: float(rows[method]["cosine/1"]) for method in ("fa", "usf", "bp")}
    assert cosine["fa"] < cosine["usf"] < cosine["bp"] == 1


def test_every_method_of_the_paper_trains_conv3_on_cifar10(tmp_path, data_dir):
    # a sixth of the published widths, to run in seconds on one core
    sizes = ("model.channels=[16,24,32]", "model.widths=[128,128]", "smoke=2400", "batch_size=16")
    small = ("model=conv3_bn", "validation_fraction=0.01", *sizes)
    options = (
        "dataset=cifar10",
        "augmentation=randaugment_cutout_flip",
        "optimizer.lr=1e-3",
        "alignment.every=10",
        *small,
    )
    for result, loss in sweep(tmp_path, data_dir, PAPER, *options).values():
        assert result["test_accuracy"]["last"] > 0.15
        assert loss[-20:].mean() < loss[:5].mean()


def test_every_method_of_the_paper_trains_resnet18_on_tinyimagenet(tmp_path, data_dir):
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
