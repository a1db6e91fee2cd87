"""Read the recorded configuration of a run. With `resume` or `repeat`, it replaces the composed configuration."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dfl_experiments.configuration.composition import AUTO, changed, plain
from dfl_experiments.configuration.history import VALUES_BEFORE, with_current_names
from dfl_experiments.errors import UserError, reason
from dfl_experiments.seal import read_bytes, read_sealed

# groups that every recorded configuration has
GROUPS_OF_RUN = ("method", "model", "dataset", "optimizer")
INTERPOLATION = re.compile(r"(?<!\\)(?:\\\\)*\$\{")
# Options that the command line may set together with resume or repeat. All others come from the recorded configuration.
OPERATIONAL = ("data_dir", "device", "threads", "cuda_graph", "checkpoint", "tracking", "plugins")
# Options whose recorded values are not used, because somebody else may have made the run directory. There is one
# exception: if the command line sets no tracking option, a recorded mode `disabled` or `tensorboard` is used.
COMMAND_ONLY = ("tracking", "plugins")


def with_recorded(cfg: DictConfig, overrides: list[str]) -> dict[str, Any]:
    """Return the configuration to run: with `resume` or `repeat` the recorded one, otherwise the composed one.

    overrides: overrides of the command line. With `resume` or `repeat`, they may set `OPERATIONAL` options only.
    Raises `UserError` if an override sets another option, or if there is no recorded configuration.
    """
    values = plain(cfg)
    key = "resume"
    if values.get("repeat") is not None:
        key = "repeat"
    elif values.get("resume") in (None, AUTO):
        return values
    path = Path(str(values[key])).expanduser() / "config.yaml"
    keys = [override.lstrip("+~").partition("=")[0] for override in overrides]
    not_allowed = [name for name in keys if name.partition(".")[0] not in (*OPERATIONAL, key)]
    if not_allowed:
        advice = f"only these can be set: {', '.join(OPERATIONAL)}"
        problem = f"cannot be set, because {key}={values[key]} takes its configuration from {path}"
        raise UserError(f"{not_allowed[0]}: {problem}; {advice}")
    recorded = read_recorded(path, f"{key}={values[key]}")
    of_command = {name: values[name] for name in (*COMMAND_ONLY, "resume", "repeat")}
    mode = (recorded.get("tracking") or {}).get("mode")
    is_tracking_set = any(name.partition(".")[0] == "tracking" for name in keys)
    if mode in ("disabled", "tensorboard") and not is_tracking_set:
        of_command["tracking"] = values["tracking"] | {"mode": mode}
    merged = completed(recorded, values) | of_command
    for name in keys:
        group, _, option = name.partition(".")
        if group in OPERATIONAL and option:
            merged[group] = merged[group] | {option: values[group][option]}
        elif group in OPERATIONAL:
            merged[group] = values[group]
    return merged


def completed(recorded: Mapping[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return a recorded configuration with today's option names, and with the options that were added after the run.

    An added option that changes results gets the value that all runs used before the option existed. Any other added
    option gets the composed value.
    values: the composed configuration.
    """
    before = {key: value for key, value in VALUES_BEFORE.items() if "." not in key}
    before["stop_collapsed"] = False
    merged = {name: values[name] for name in OPERATIONAL} | before | with_current_names(recorded)
    today = values | {"protocol": values["protocol"] | {"stop_collapsed": False}}
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
    is_of_run = isinstance(values, dict) and all(
        isinstance(values.get(group), dict) for group in GROUPS_OF_RUN
    )
    # early versions did not record these groups
    others = [values.get(group) or {} for group in ("tracking", "checkpoint")] if is_of_run else []
    if not is_of_run or not all(isinstance(group, dict) for group in others):
        raise UserError(f"{source}: {path} is not the configuration of a run")
    return values


def read_yaml(path: Path) -> Any:
    """Return the values of a YAML file without resolving interpolations.

    Raises `UserError` for a file that cannot be read.
    """
    content = read_bytes(path)
    try:
        return OmegaConf.to_container(OmegaConf.create(content.decode("utf-8-sig")), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})") from None
