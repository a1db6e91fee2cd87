"""The grids that conf/experiment/ has: which cells of a table each fills, and with how many points."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from omegaconf import OmegaConf

from dfl_experiments.config import CONF_DIR, compose

PLACES = ("dataset", "augmentation", "model", "method")  # what names a cell of a table
TABLES = {
    "fc_table": ("fc_mnist", "fc_cifar"),
    "cnn_table": ("cnn_cifar", "cnn_shallow", "cnn_tinyimagenet"),
}


@dataclass(frozen=True)
class Grid:
    """An experiment's points. axes: the values of each; fixed: the places of a table that have one value only."""

    experiment: str
    axes: dict[str, list[str]]
    fixed: dict[str, str]

    def points(self) -> Iterator[dict[str, str]]:
        """Every point, its fixed places included."""
        for values in itertools.product(*self.axes.values()):
            yield {**self.fixed, **dict(zip(self.axes, values, strict=True))}


def grid_of(experiment: str) -> Grid:
    """The grid that conf/experiment/ has under this name."""
    node: Any = OmegaConf.load(CONF_DIR / "experiment" / f"{experiment}.yaml")
    axes = {key: str(value).split(",") for key, value in node.hydra.sweeper.params.items()}
    cfg = compose([f"experiment={experiment}"])
    return Grid(experiment, axes, {place: str(cfg[place].name) for place in PLACES if place not in axes})


@cache
def points_per_cell() -> dict[tuple[str, ...], int]:
    """How many grid points the experiments give each cell of the tables, seeds not counted."""
    counts: dict[tuple[str, ...], int] = {}
    for experiment in itertools.chain(*TABLES.values()):
        for point in grid_of(experiment).points():
            cell = tuple(point[place] for place in PLACES)
            counts[cell] = counts.get(cell, 0) + 1
    return counts
