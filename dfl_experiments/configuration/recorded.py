"""Read the recorded configuration of a run. With `resume` or `repeat`, it replaces the composed configuration."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dfl_experiments.configuration.composition import AUTO, LOCATION, changed, plain
from dfl_experiments.configuration.history import VALUES_BEFORE, with_current_names
from dfl_experiments.errors import UserError, reason
from dfl_experiments.seal import read_bytes, read_sealed

# groups that every recorded configuration has
GROUPS_OF_RUN = ("method", "model", "dataset", "optimizer")
INTERPOLATION = re.compile(r"(?<!\\)(?:\\\\)*\$\{")
# Options that the command line may set together with resume or repeat. All others come from the recorded configuration.
OPERATIONAL = ("data_dir", "device", "threads", "cuda_graph", "checkpoint", "tracking", "plugins")
# It can be set too, because the user may have moved the data. A run refuses other data than it had before.
DATA_PATH = f"dataset.source.{LOCATION}"
# Options whose recorded values are not used, because somebody else may have made the run directory. There is one
# exception: if the command line sets no tracking option, a recorded mode `disabled` or `tensorboard` is used.
COMMAND_ONLY = ("tracking", "plugins")


def with_recorded(cfg: DictConfig, overrides: list[str]) -> dict[str, Any]:
    """Return the configuration to run: with `resume` or `repeat` the recorded one, otherwise the composed one.

    overrides: overrides of the command line. With `resume` or `repeat`, they may set only `OPERATIONAL` options and
        `DATA_PATH`.
    Raises `UserError` if an override sets another option, or if there is no recorded configuration.
    """
    values = plain(cfg)
    key = "resume"
    if values.get("repeat") is not None:
        key = "repeat"
    elif values.get("resume") in (None, AUTO):
        return values
    path = Path(str(values[key])).expanduser() / "config.yaml"
    names = [override.lstrip("+~").partition("=")[0] for override in overrides]
    for name in names:
        if name != DATA_PATH and group_of(name) not in (*OPERATIONAL, key):
            problem = (
                f"cannot be set, because {key}={values[key]} takes its configuration from {path}"
            )
            advice = f"only these can be set: {', '.join(OPERATIONAL)}, {DATA_PATH}"
            raise UserError(f"{name}: {problem}; {advice}")
    recorded = read_recorded(path, f"{key}={values[key]}")
    merged = completed(recorded, values)
    for name in (*COMMAND_ONLY, "resume", "repeat"):
        merged[name] = values[name]
    recorded_tracking = recorded.get("tracking") or {}
    mode = recorded_tracking.get("mode")
    if mode in ("disabled", "tensorboard") and "tracking" not in map(group_of, names):
        merged["tracking"] = values["tracking"] | {"mode": mode}
    for name in names:
        group, _, option = name.partition(".")
        if group in OPERATIONAL and option:
            merged[group] = merged[group] | {option: values[group][option]}
        elif group in OPERATIONAL:
            merged[group] = values[group]
    if DATA_PATH in names:
        dataset = merged["dataset"]
        source = dataset["source"] | {LOCATION: values["dataset"]["source"][LOCATION]}
        merged["dataset"] = dataset | {"source": source}
    return merged


def composable(overrides: Sequence[str]) -> list[str]:
    """Return the overrides such that Hydra can compose them.

    With `resume` or `repeat`, Hydra composes the default data set before `with_recorded` replaces it. The default data
    set has no `DATA_PATH`, so `DATA_PATH` is added to it.
    """
    if not any(override.startswith(("resume=", "repeat=")) for override in overrides):
        return [*overrides]
    return [
        f"++{override}" if override.startswith(f"{DATA_PATH}=") else override
        for override in overrides
    ]


def group_of(name: str) -> str:
    """Return the group of an option: "tracking" for "tracking.mode", but "device" for "device"."""
    return name.partition(".")[0]


def completed(recorded: Mapping[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return a recorded configuration with today's option names, and with the options that were added after the run.

    An added option that changes results gets the value that all runs used before the option existed. Any other added
    option gets the composed value. So does `data_dir`, if the recorded folder no longer exists.
    values: the composed configuration.
    """
    merged = {name: values[name] for name in OPERATIONAL}
    merged |= {key: value for key, value in VALUES_BEFORE.items() if "." not in key}
    merged["stop_collapsed"] = False
    merged |= with_current_names(recorded)
    if not os.path.isdir(os.path.expanduser(str(merged["data_dir"]))):  # the folder was moved
        merged["data_dir"] = values["data_dir"]
    protocol = values["protocol"] | {"stop_collapsed": False}
    today = values | {"protocol": protocol}
    # groups to which options were added later
    for name in ("checkpoint", "alignment", "protocol", "tracking"):
        if isinstance(merged.get(name), dict):
            merged[name] = today[name] | merged[name]
    return merged


def read_recorded(path: Path, source: str) -> dict[str, Any]:
    """Read a recorded configuration.

    source: name of the option or folder, for the error messages of this function.
    Raises `UserError` if the file is absent, or if it has an interpolation. An interpolation could read environment
    variables.
    """
    try:
        content = read_yaml(path)
        texts: list[str] = []
        changed(content, lambda item: texts.append(str(item)))
        if any(INTERPOLATION.search(text) for text in texts):
            raise UserError(f"{path} has an interpolation, but must contain values only")
        # also removes escapes of `${`
        values: Any = OmegaConf.to_container(OmegaConf.create(content), resolve=True)
        read_sealed(path.parent)
    except FileNotFoundError:
        raise UserError(f"{source}: is not a run directory, {path} does not exist") from None
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    if not is_of_run(values):
        raise UserError(f"{source}: {path} is not the configuration of a run")
    return values


def is_of_run(values: Any) -> bool:
    """Return whether values are the configuration of a run."""
    if not isinstance(values, dict):
        return False
    groups = [values.get(name) for name in GROUPS_OF_RUN]
    # early versions did not record these groups
    groups += [values.get(name) or {} for name in ("tracking", "checkpoint")]
    return all(isinstance(group, dict) for group in groups)


def read_yaml(path: Path) -> Any:
    """Return the values of a YAML file without resolving interpolations.

    Raises `UserError` for a file that cannot be read.
    """
    content = read_bytes(path)
    try:
        config = OmegaConf.create(content.decode("utf-8-sig"))
        return OmegaConf.to_container(config, resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})") from None
