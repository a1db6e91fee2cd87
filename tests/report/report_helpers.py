"""Small runs to make reports from."""

import contextlib
import csv
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import dfl_train
from sklearn.datasets import load_digits

from dfl_experiments.report.dfl_report import main

SMALL = ("model.widths=[16,16]", "tracking=disabled", "threads=1", "sweep=grid")
GRID = ("--multirun", "experiment=fc_mnist", "epochs=3", *SMALL)


def write_packs(data_dir: Path, **channels: int) -> Path:
    """Write scikit-learn's digits as packs with the names of other data sets, and return their folder.

    channels: number of channels by name.
    """
    digits = load_digits()
    images = (digits.images * 15.9).astype(np.uint8)[:, None]
    for name, planes in channels.items():
        (data_dir / name).mkdir(parents=True)
        for split, part in (("train", slice(0, 400)), ("test", slice(400, 600))):
            np.save(data_dir / name / f"{split}_images.npy", images[part].repeat(planes, axis=1))
            np.save(data_dir / name / f"{split}_labels.npy", digits.target[part])
        (data_dir / name / "classes.json").write_text(
            json.dumps([str(digit) for digit in range(10)])
        )
    return data_dir


def altered(source: Path, destination: Path, config: dict[str, Any] = {}, **result: Any) -> Path:  # noqa: B006
    """Copy a run directory and change its result. The copy has no seal, like runs of early versions.

    Entries of the result that repeat the configuration are removed, so the configuration alone decides.
    config: dotted keys of the configuration with new values. result: keys of result.json with new values.
    """
    shutil.copytree(source, destination)
    content = json.loads((destination / "result.json").read_text())
    for key in ("seal", "seed", "method", "model", "dataset", "augmentation", "protocol"):
        content.pop(key, None)
    for key, value in config.items():
        node = content["config"]
        *path, last = key.split(".")
        for name in path:
            node = node[name]
        node[last] = value
    if "epochs" in config:
        content["epochs"] = config["epochs"]
        (destination / "epochs.csv").unlink()
    content |= result
    (destination / "result.json").write_text(json.dumps(content))
    return destination


def finished(accuracy, lr, seed, **config):
    """Return the entries of a finished run's result, for `altered`."""
    names = ("last", "best", "at_best_validation")
    return {
        "config": {"optimizer.lr": lr, "seed": seed, **config},
        "accuracy": accuracy,
        "validation_accuracy": accuracy,
        "test_accuracy": dict.fromkeys(names, accuracy) | {"best_epoch": 1},
    }


def dfl_report(folder, *arguments):
    """Run `dfl-report` in a folder as a user would, but in this process, which avoids new imports."""
    out, err = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, ["dfl-report", *map(str, arguments)]
    code = 0
    try:
        with (
            contextlib.chdir(folder),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            main()
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = before
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def csv_rows(folder, *arguments, chosen="True"):
    """Return the rows of `dfl-report --format csv` on a folder's outputs, or on the given arguments."""
    done = dfl_report(folder, *(arguments or ["outputs"]), "--format", "csv")
    assert done.returncode == 0, done.stderr
    rows = csv.DictReader(io.StringIO(done.stdout))
    return [row for row in rows if row["chosen"] == chosen]


@pytest.fixture(scope="session")
def reported(tmp_path_factory):
    """Return a folder with a grid over seeds, a point that diverged, one that was killed, and a smoke run."""
    folder = tmp_path_factory.mktemp("report")
    data = f"data_dir={write_packs(folder / 'data', mnist=1)}"
    grid = dfl_train(folder, *GRID, data, "method=bp,dfa,las", "optimizer.lr=1e-2,1e-3", "seed=0,1")
    assert grid.returncode == 0, grid.stderr
    assert dfl_train(folder, *GRID, data, "method=las", "optimizer.lr=1e30").returncode == 0
    smoke = dfl_train(folder, *GRID, data, "method=dfa", "optimizer.lr=1e-2", "smoke=32")
    assert smoke.returncode == 0, smoke.stderr
    stuck = dfl_train(folder, *GRID, data, "method=ltas", "optimizer.lr=1e-2")
    assert stuck.returncode == 0, stuck.stderr
    (result,) = (folder / "outputs" / "grid").glob("ltas-*/result.json")
    result.unlink()  # as if the run had been killed
    return folder


@pytest.fixture(scope="session")
def finished_point(reported):
    """Return the directory of a finished run of BP."""
    return next(
        path.parent
        for path in sorted((reported / "outputs" / "grid").glob("bp-*seed0*/result.json"))
    )


def results(folder, method, lr, smoke=None):
    """Return the results of a grid's runs of one method and rate."""
    selected = []
    for path in (folder / "outputs" / "grid").glob("*/result.json"):
        result = json.loads(path.read_text())
        rate = result["config"]["optimizer"]["lr"]
        if (result["method"], rate, result["config"]["smoke"]) == (method, lr, smoke):
            selected.append(result)
    return selected
