"""End to end on real images, through the real command line: every method of the paper where the paper has it."""

import csv
import json

import numpy as np
import pytest
from conftest import METHODS, dfl_train


def losses(path):
    with (path.parent / "iterations.csv").open() as file:
        return np.array([float(row["loss"]) for row in csv.DictReader(file)])


def sweep(folder, data_dir, *arguments):
    """The results of a sweep over every method, by method, and each one's losses by iteration."""
    settings = ("epochs=1", "tracking=disabled", f"data_dir={data_dir}", "sweep=all")
    done = dfl_train(folder, "--multirun", f"method={','.join(METHODS)}", *settings, *arguments)
    assert done.returncode == 0, done.stderr
    found = {}
    for path in (folder / "outputs" / "all").glob("*/result.json"):
        result = json.loads(path.read_text())
        found[result["method"]] = (result, losses(path))
    assert sorted(found) == METHODS
    for result, loss in found.values():
        assert result["status"] == "finished"
        assert np.isfinite(loss).all()
        assert result["config"]["data_dir"] == str(data_dir)
    return found


@pytest.mark.parametrize("protocol", ["fair", "authors"])
def test_mnist_is_learnt_by_every_method(protocol, tmp_path, data_dir):
    options = ("dataset=mnist", "limit=12000", f"protocol={protocol}", "model.widths=[256,256]", "optimizer.lr=1e-3")
    for result, loss in sweep(tmp_path, data_dir, *options).values():
        assert result["test_accuracy"]["last"] > 0.9
        assert loss[-20:].mean() < 0.5 * loss[:5].mean()


def test_cifar10_trains_conv3_with_every_method(tmp_path, data_dir):
    # a third of the published widths, so that two cores do it in seconds
    small = ("model=conv3_bn", "model.channels=[32,48,64]", "model.widths=[256,256]", "limit=3200", "batch_size=32")
    options = ("dataset=cifar10", "augmentation=randaugment_cutout_flip", "optimizer.lr=1e-3", *small)
    for result, loss in sweep(tmp_path, data_dir, *options).values():
        assert result["test_accuracy"]["last"] > 0.2
        assert loss[-20:].mean() < loss[:5].mean()


def test_tinyimagenet_trains_resnet18_with_every_method(tmp_path, data_dir):
    small = ("model.channels=[16,24,32,40]", "limit=640", "batch_size=64", "validation_fraction=0.01")
    options = ("dataset=tinyimagenet", "model=resnet18", "augmentation=flip", "optimizer.lr=1e-3", *small)
    for result, loss in sweep(tmp_path, data_dir, *options).values():
        assert len(loss) == 10
        assert loss[-3:].mean() < loss[:3].mean() + 0.2
        assert sorted(result["cosine"]) == ["1", "2", "3", "4", "5"]
