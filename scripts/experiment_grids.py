"""Read the grids of the experiments in conf/experiment/."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from dfl_experiments.configuration.composition import CONF_DIR, PLACES, compose

# the experiments of each table in the paper
TABLES = {
    "fc_table": ("fc_mnist", "fc_cifar"),
    "cnn_table": ("cnn_cifar", "cnn_shallow", "cnn_resnet18", "cnn_tinyimagenet"),
}


@dataclass(frozen=True)
class Grid:
    """The grid of an experiment."""

    experiment: str
    """Name of the experiment in conf/experiment/."""
    axes: dict[str, list[str]]
    """The values of every swept key."""
    fixed: dict[str, str]
    """The value of every group in `PLACES` that is not swept."""

    def points(self) -> Iterator[dict[str, str]]:
        """Yield every point of the grid, with a value for each swept key and each fixed group."""
        for values in itertools.product(*self.axes.values()):
            yield {**self.fixed, **dict(zip(self.axes, values, strict=True))}


def grid_of(experiment: str) -> Grid:
    """Return the grid of an experiment in conf/experiment/."""
    node: Any = OmegaConf.load(CONF_DIR / "experiment" / f"{experiment}.yaml")
    axes = {key: str(value).split(",") for key, value in node.hydra.sweeper.params.items()}
    cfg = compose([f"experiment={experiment}"])
    fixed = {group: str(cfg[group].name) for group in PLACES if group not in axes}
    return Grid(experiment, axes, fixed)
