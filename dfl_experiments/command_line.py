"""What happens to a command line before Hydra begins: it is read, composed and checked, and nothing is written."""

import itertools
import math
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import NoReturn

from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from dfl_experiments.config import UserError, one_line
from dfl_experiments.hydra_input import MISTAKES, check_hydra_node, composer, parse, parse_overrides, reading
from dfl_experiments.messages import shown
from dfl_experiments.settings import GROUPS, Settings, check, point_name, recorded
from dfl_experiments.sweep import Sweep, check_directory

# what the user asked for when this process began: `train.main` sets the variable for its own ends
SHOW_TRACEBACKS = os.environ.get("HYDRA_FULL_ERROR") == "1"
MOST_JOBS = 10_000
MANY_JOBS = 50  # from which on checking them takes long enough to be told
BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
BASIC_LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"


def refuse(error: BaseException, code: int | None = None) -> NoReturn:
    """Print the error's one line and leave the process with the code, or else the error's own, or 2."""
    if SHOW_TRACEBACKS:
        traceback.print_exception(error)
    print(f"dfl-train: error: {one_line(error)}", file=sys.stderr)
    raise SystemExit(code or getattr(error, "exit_code", 2)) from None


def sweep_points(texts: list[str], loader: ConfigLoader, only_lists: bool) -> list[list[str]]:
    """The override list of every job of a grid, as `a=1,2 b=3` names them.

    Continuous ranges, which some sweepers choose from, are left out, or refused where `only_lists` is set.
    """
    choices = {}
    for override in parse_overrides(texts, loader):
        key = override.get_key_element()
        if not override.is_sweep_override():
            choices[key] = [f"{key}={override.get_value_element_as_str()}"]
        elif override.is_discrete_sweep():
            values = itertools.islice(override.sweep_string_iterator(), MOST_JOBS + 1)
            choices[key] = [f"{key}={value}" for value in values]
            if not choices[key]:
                raise UserError(f"{override.input_line}: there is no such choice, so the sweep has no job")
        elif only_lists:
            raise UserError(f"{override.input_line}: the basic sweeper needs the values themselves, {key}=a,b")
        if math.prod(map(len, choices.values())) > MOST_JOBS:
            raise UserError(f"{override.input_line}: makes more than {MOST_JOBS} jobs of the sweep")
    return [list(point) for point in itertools.product(*choices.values())]


def check_job(cfg: DictConfig) -> Settings:
    """The settings of one job. Raises one of `MISTAKES`."""
    HydraConfig.instance().set_config(cfg)
    settings = check(recorded(cfg, cfg.hydra))
    for group in GROUPS:
        # Hydra merges the options of a list into one that nobody wrote
        if group not in cfg.hydra.runtime.choices:
            raise UserError(f"{group}: takes one choice; --multirun {group}=a,b runs several, one by one")
    if OmegaConf.select(cfg, "hydra.launcher._target_") == BASIC_LAUNCHER:
        # another launcher's jobs run elsewhere, perhaps with another device
        from dfl_experiments.experiment import resolve_device

        resolve_device(settings.device)
    return settings


def check_sweep(cfg: DictConfig, loader: ConfigLoader) -> Sweep:
    """The points of a sweep.

    Raises one of `MISTAKES` for a sweep without jobs, a wrong job, or two jobs that would write to one folder.
    """
    params = (OmegaConf.select(cfg, "hydra.sweeper.params") or {}).items()
    basic = OmegaConf.select(cfg, "hydra.sweeper._target_") == BASIC_SWEEPER
    texts = [*(f"{key}={value}" for key, value in params), *cfg.hydra.overrides.task]
    points = sweep_points(texts, loader, only_lists=basic)
    if len(points) > MANY_JOBS:
        print(f"checking {len(points)} jobs")
    seen: dict[str, str] = {}
    folders: dict[str, str] = {}
    for number, point in enumerate(points):
        job = " ".join(point)
        try:
            with reading(job):
                one = loader.load_sweep_config(cfg, point)
            one.hydra.job.num, one.hydra.job.id = number, str(number)
            if one.get("resume") is not None or one.get("repeat") is not None:
                raise UserError("resume and repeat are for a single run; a sweep started again goes on by itself")
            check_job(one)
            check_hydra_node(one)
            name, folder = point_name(one), str(one.hydra.sweep.subdir)
            check_folder("hydra.sweep.dir", Path(str(one.hydra.sweep.dir), folder))
        except MISTAKES as error:
            raise UserError(f"{one_line(error)} (in the job {job})") from error
        if name in seen:
            raise UserError(f"two jobs are the same run: {seen[name]} and {job}")
        if folder in folders:
            raise UserError(f"hydra.sweep.subdir={folder}: two jobs would write there: {folders[folder]} and {job}")
        seen[name] = folders[folder] = job
    return Sweep(Path(str(cfg.hydra.sweep.dir)), str(cfg.sweep), folders)


def check_folder(key: str, folder: Path) -> None:
    """Raise `UserError` unless the folder can be made, or is there and can be written to; it stays as it is."""
    try:
        # the limits of every file system in use, less what is put below the folder
        if len(os.fsencode(folder)) > 3800 or any(len(os.fsencode(part)) > 255 for part in folder.parts):
            raise UserError(f"{key}={shown(str(folder))}: the name is too long")
        if "\0" in str(folder):
            raise UserError(f"{key}={shown(str(folder))}: holds a zero byte")
        absolute = folder.absolute()
        existing = next(place for place in (absolute, *absolute.parents) if os.path.lexists(place))
        with tempfile.TemporaryDirectory(dir=existing):
            pass
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{key}={folder}: nothing can be written there ({why})") from error


def check_command_line(arguments: list[str]) -> Settings | Sweep | None:
    """Check a run, or a multirun as a whole, before a directory is made or a job started.

    Returns the settings of the one job, or the points of a multirun; None for what trains nothing (`--help`, `--cfg`,
    …), of which Hydra takes care. Raises one of `MISTAKES`.
    """
    args = parse(arguments)
    if args.help or args.hydra_help or args.info or args.shell_completion:
        return None
    with composer(args) as hydra:
        overrides = parse_overrides(args.overrides, hydra.config_loader)
        if args.cfg:
            return None
        with reading("the configuration"):
            # as Hydra does it to find out the mode, which a configuration may set too
            cfg = hydra.compose_config(
                args.config_name or "config", args.overrides, RunMode.MULTIRUN, validate_sweep_overrides=False
            )
        if args.multirun or cfg.hydra.mode == RunMode.MULTIRUN:
            sweep = check_sweep(cfg, hydra.config_loader)
            check_hydra_node(cfg)
            return sweep
        for override in overrides:
            if override.is_sweep_override():
                raise UserError(
                    f"{override.input_line}: names several values; --multirun runs them one by one, [a,b] is a list"
                )
        settings, run_dir = check_job(cfg), Path(str(cfg.hydra.run.dir))
        check_folder("hydra.run.dir", run_dir)
        check_directory(settings, run_dir)
        check_hydra_node(cfg)
        return settings


def accepted(arguments: list[str]) -> Settings | Sweep | None:
    """The same for the user: a mistake ends the process with one line on stderr and code 2."""
    try:
        return check_command_line(arguments)
    except MISTAKES as error:
        refuse(error)
