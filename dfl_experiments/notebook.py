"""A run from Python, in four calls: compose a configuration, run it, read its rows, get the trained network back."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dfl_experiments.configuration import composition
from dfl_experiments.configuration.recorded import completed, with_recorded
from dfl_experiments.configuration.schema import Configuration, check
from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.errors import UserError
from dfl_experiments.running import checkpoint
from dfl_experiments.running.device import usual_torch
from dfl_experiments.running.result import read_result
from dfl_experiments.running.run import run_alone
from dfl_experiments.seal import opened


def compose(overrides: Sequence[str] = ()) -> Configuration:
    """The checked configuration that `dfl-train` would run with these overrides, such as "method=ltas".

    Its `values` are all of it, as config.yaml records them. Raises `UserError`, or Hydra's own errors, for a mistake.
    """
    composition.register_resolvers()
    return check(with_recorded(composition.compose([*overrides]), [*overrides]))


def run(configuration: Configuration, run_dir: str | Path) -> dict[str, Any]:
    """Train one run in its directory, and return the content of its `result.json`.

    Raises `UserError` where the directory holds a run already, unless the configuration says force=true.
    """
    return run_alone(configuration, Path(run_dir))


def read_rows(run_dir: str | Path, table: Literal["epochs", "iterations"] = "epochs") -> dict[str, np.ndarray]:
    """The columns of a run's table by name, (rows,) each, NaN for an empty cell: `pandas.DataFrame` takes them."""
    read_result(Path(run_dir))  # a damaged table is refused
    with opened(Path(run_dir) / f"{table}.csv") as file:
        names = file.readline().decode().strip().split(",")
        rows = np.genfromtxt(file, delimiter=",", ndmin=2)
    return dict(zip(names, rows.reshape(-1, len(names)).T, strict=True))  # of no row as well


@usual_torch()
def load_net(run_dir: str | Path, plugins: Sequence[str] = ()) -> BlockNet:
    """The trained network of a run directory, on the CPU, in evaluation mode.

    plugins: packages that the recorded configuration may name beside this one. Raises `UserError` where there is no
    result or no checkpoint.
    """
    result = read_result(Path(run_dir))
    if result is None or "input_shape" not in result:
        raise UserError(f"{run_dir}: has no result.json that says what its network is")
    values = completed(result["config"], composition.plain(composition.compose([]))) | {"plugins": [*plugins]}
    model = check(values).components["model"]
    net: BlockNet = model.build(input_shape=tuple(result["input_shape"]), num_classes=result["num_classes"])
    net.load_state_dict(checkpoint.load(Path(run_dir))["net"])
    return net.eval()
