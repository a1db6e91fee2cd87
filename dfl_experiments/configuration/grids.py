"""List the points of a grid. An experiment in conf/ or the command line of a sweep defines the grid."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from dfl_experiments.configuration.composition import CONF_DIR, PLACES, compose
from dfl_experiments.errors import UserError

# the experiments of each table in the paper
TABLES = {
    "fc_table": ("fc_mnist", "fc_cifar"),
    "cnn_table": ("cnn_cifar", "cnn_shallow", "cnn_resnet18", "cnn_tinyimagenet"),
}
BASIC = "basic"  # name of Hydra's default sweeper


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


@cache
def points_per_cell() -> dict[tuple[str, ...], int]:
    """Return the number of grid points in each cell of the tables. A point with several seeds counts as one."""
    counts: dict[tuple[str, ...], int] = {}
    for experiment in itertools.chain(*TABLES.values()):
        for point in grid_of(experiment).points():
            cell = tuple(point[group] for group in PLACES)
            counts[cell] = counts.get(cell, 0) + 1
    return counts


def sweep_points(texts: Sequence[str], sweeper: str) -> Iterator[list[str]]:
    """Yield the overrides of every job of a grid such as `a=1,2 b=3`.

    A later override of the same key replaces an earlier one. Continuous ranges are omitted: a sweeper such as Optuna
    chooses their values during the sweep.
    texts: the overrides of the command line. sweeper: name of Hydra's sweeper.
    Raises `UserError` for a continuous range with the basic sweeper, for several seeds with another sweeper, and for a
    `glob(…)` that matches nothing.
    """
    # the parser needs the loader for glob(*)
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())
    choices: dict[str, list[str]] = {}
    seed: Override | None = None
    for override in parser.parse_overrides(list(texts)):
        key = override.get_key_element()
        if not override.is_sweep_override():
            choices[key] = [f"{key}={override.get_value_element_as_str()}"]
        elif override.is_discrete_sweep():
            choices[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
            if not choices[key]:
                raise UserError(
                    f"{override.input_line}: matches no option, so the sweep has no job"
                )
        elif sweeper == BASIC:
            raise UserError(f"{override.input_line}: a continuous range needs hydra/sweeper=optuna")
        if key == "seed":
            seed = override
    if sweeper != BASIC and seed is not None:
        is_range = seed.is_sweep_override() and not seed.is_discrete_sweep()
        if is_range or len(set(choices["seed"])) > 1:
            raise UserError(
                f"{seed.input_line}: hydra/sweeper={sweeper} would choose a lucky seed; set one seed, then train the "
                f"best point with several"
            )
    return (list(point) for point in itertools.product(*choices.values()))
