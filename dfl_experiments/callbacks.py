"""What happens around the jobs of a multirun: every one is checked before the first one starts."""

import itertools
import sys
from typing import Any

from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from dfl_experiments.config import UserError, one_line
from dfl_experiments.settings import check


def sweep_points(overrides: list[str]) -> list[list[str]]:
    """The override list of every job of a grid, as `a=1,2 b=3` names them; ranges that are no lists are left out."""
    choices = {}
    for override in OverridesParser.create().parse_overrides(overrides):
        key = override.get_key_element()
        if not override.is_sweep_override():
            choices[key] = [f"{key}={override.get_value_element_as_str()}"]
        elif override.is_discrete_sweep():
            choices[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
    return [list(point) for point in itertools.product(*choices.values())]


class CheckEveryJob(Callback):
    """Refuses a multirun as a whole if any of its jobs has a wrong group, key, type or value."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Exit with code 2 and one line naming the job and what is wrong with it."""
        for point in sweep_points(list(config.hydra.overrides.task)):
            try:
                check(compose(kwargs.get("config_name") or "config", point))
            except (HydraException, OmegaConfBaseException, UserError) as error:
                print(f"dfl-train: error: {one_line(error)} (in the job {' '.join(point)})", file=sys.stderr)
                # Hydra turns a callback's exceptions into warnings; leaving the process is no exception to it
                raise SystemExit(2) from None
