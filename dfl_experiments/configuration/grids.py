"""Grids: the one that an experiment of conf/ is, and the points of any command line."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from dfl_experiments.configuration.composition import CONF_DIR, PLACES, compose
from dfl_experiments.errors import UserError

TABLES = {
    "fc_table": ("fc_mnist", "fc_cifar"),
    "cnn_table": ("cnn_cifar", "cnn_shallow", "cnn_tinyimagenet"),
}
BASIC = "basic"  # Hydra's own sweeper, of grids


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


def sweep_points(texts: Sequence[str], sweeper: str) -> Iterator[list[str]]:
    """The override list of every job of a grid, as `a=1,2 b=3` names them; the later of two for one key counts.

    Continuous ranges are left out: a sweeper such as Optuna's chooses from them as it goes. Raises `UserError` for a
    range that Hydra's basic sweeper is given, and for a choice of nothing.
    """
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())  # which knows what glob(*) chooses from
    choices: dict[str, list[str]] = {}
    for override in parser.parse_overrides(list(texts)):
        key = override.get_key_element()
        if not override.is_sweep_override():
            choices[key] = [f"{key}={override.get_value_element_as_str()}"]
        elif override.is_discrete_sweep():
            choices[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
            if not choices[key]:
                raise UserError(f"{override.input_line}: there is no such choice, so the sweep has no job")
        elif sweeper == BASIC:
            raise UserError(f"{override.input_line}: a range to choose from needs hydra/sweeper=optuna")
    return (list(point) for point in itertools.product(*choices.values()))
