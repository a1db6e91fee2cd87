"""What happens before a job, or before the first job of a multirun: everything is checked."""

import itertools
import os
import sys
import traceback
from typing import Any, NoReturn

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from dfl_experiments.config import UserError, one_line
from dfl_experiments.settings import GROUPS, check, point_name

# what the user asked for when this process began: `train.main` sets the variable for its own ends
SHOW_TRACEBACKS = os.environ.get("HYDRA_FULL_ERROR") == "1"
MISTAKES = (HydraException, OmegaConfBaseException, UserError)


def sweep_points(overrides: list[str]) -> list[list[str]]:
    """The override list of every job of a grid, as `a=1,2 b=3` names them; continuous ranges are left out."""
    choices = {}
    for override in OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides(overrides):
        key = override.get_key_element()
        if not override.is_sweep_override():
            choices[key] = [f"{key}={override.get_value_element_as_str()}"]
        elif override.is_discrete_sweep():
            choices[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
    return [list(point) for point in itertools.product(*choices.values())]


def check_points(points: list[list[str]], config_name: str) -> None:
    """Raise one of `MISTAKES` for a sweep without jobs, a wrong job, or two jobs that would write to one folder."""
    if not points:
        raise UserError("the sweep has no job: one of its lists is empty")
    seen: dict[str, str] = {}
    for point in points:
        job = " ".join(point)
        try:
            cfg = compose(config_name, point)
            check(cfg)
        except MISTAKES as error:
            raise UserError(f"{one_line(error)} (in the job {job})") from error
        name = point_name(cfg)
        if name in seen:
            raise UserError(f"two jobs are the same run: {seen[name]} and {job}")
        seen[name] = job


class CheckEveryJob(Callback):
    """Refuses a run, or a multirun as a whole, before a directory is made or a job started."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Exit with code 2 and one line saying what is wrong."""
        try:
            check(config)
            for group in GROUPS:
                # Hydra merges the options of a list into one that nobody wrote
                if group not in config.hydra.runtime.choices:
                    raise UserError(f"{group}: takes one choice; --multirun {group}=a,b runs several, one by one")
        except MISTAKES as error:
            refuse(error)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Exit with code 2 and one line saying what is wrong with which job."""
        try:
            check_points(sweep_points(list(config.hydra.overrides.task)), kwargs.get("config_name") or "config")
        except MISTAKES as error:
            refuse(error)


def refuse(error: Exception) -> NoReturn:
    """Print the error's one line and leave the process: of an exception in a callback Hydra would only warn."""
    if SHOW_TRACEBACKS:
        traceback.print_exception(error)
    print(f"dfl-train: error: {one_line(error)}", file=sys.stderr)
    raise SystemExit(2) from None
