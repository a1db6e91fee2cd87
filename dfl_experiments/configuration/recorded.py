"""Read a recorded configuration, which `resume` and `repeat` run in place of the composed one."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dfl_experiments.configuration.composition import AUTO, changed, plain
from dfl_experiments.configuration.history import with_current_names
from dfl_experiments.errors import UserError, reason
from dfl_experiments.seal import read_bytes, read_sealed

log = logging.getLogger(__name__)
DEEPEST = 20  # levels of nested lists and mappings in a configuration
INTERPOLATION = re.compile(r"(?<!\\)(?:\\\\)*\$\{")
# Options that may stand beside resume and repeat. All others come from the recorded configuration.
OPERATIONAL = ("data_dir", "device", "threads", "cuda_graph", "checkpoint", "tracking", "plugins")
# The recorded values of these are not used: the folder may come from somebody else.
OF_THE_COMMAND = ("tracking", "plugins")


def with_recorded(cfg: DictConfig, overrides: list[str]) -> dict[str, Any]:
    """Return the values to run: those of the run that `resume` or `repeat` names, else the composed ones.

    overrides: of the command line. Beside resume and repeat only `OPERATIONAL` ones are allowed.
    Raises `UserError` for other overrides, and where no configuration is recorded.
    """
    values = plain(cfg)
    key = next((key for key in ("resume", "repeat") if values.get(key) not in (None, AUTO)), None)
    if key is None:
        return values
    path = Path(str(values[key])).expanduser() / "config.yaml"
    keys = [override.lstrip("+~").partition("=")[0] for override in overrides]
    not_allowed = [name for name in keys if name.partition(".")[0] not in (*OPERATIONAL, key)]
    if not_allowed:
        raise UserError(
            f"{not_allowed[0]}: {key}={values[key]} takes its configuration from {path}; beside it there may be "
            f"{', '.join(OPERATIONAL)}"
        )
    recorded = read_recorded(path, f"{key}={values[key]}")
    own = {name: values[name] for name in (*OF_THE_COMMAND, "resume", "repeat")}
    is_tracking_chosen = any(name.partition(".")[0] == "tracking" for name in keys)
    own["tracking"] = _tracking(values["tracking"], recorded.get("tracking"), is_tracking_chosen, path.parent)
    merged = completed(recorded, values) | own
    for group, _, option in (name.partition(".") for name in keys):
        if group in OPERATIONAL:
            merged[group] = merged[group] | {option: values[group][option]} if option else values[group]
    return merged


def _tracking(composed: dict[str, Any], recorded: Any, is_chosen: bool, folder: Path) -> dict[str, Any]:
    """Return the command's tracking options; a recorded `disabled`, which sends nothing, is kept.

    is_chosen: the command line has a tracking option.
    """
    mode = recorded.get("mode") if isinstance(recorded, dict) else None
    if mode == "disabled" and not is_chosen:
        return composed | {"mode": mode}
    if mode == "online" and composed["mode"] != mode:
        log.warning("tracking: as this command says; the run in %s had tracking=online", folder)
    return composed


def completed(recorded: Mapping[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return a recorded configuration with today's names, and with the options that were added since.

    An added option has the value that the recorded run had without it, or else today's.
    values: today's composed configuration.
    """
    before: dict[str, Any] = {"memory_format": "contiguous", "stop_collapsed": False, "validation_split": "random"}
    merged = {name: values[name] for name in OPERATIONAL} | before | with_current_names(recorded)
    today = values | {"protocol": values["protocol"] | {"stop_collapsed": False}}
    for name in ("checkpoint", "alignment", "protocol", "tracking"):  # groups to which options were added
        if isinstance(merged.get(name), dict):
            merged[name] = today[name] | merged[name]
    return merged


def read_recorded(path: Path, source: str) -> dict[str, Any]:
    """Read a recorded configuration.

    source: the option or folder that names it, for messages.
    Raises `UserError` where there is none, and for an interpolation: it would copy values of this machine into a run.
    """
    try:
        content = read_yaml(path)
        texts: list[str] = []
        changed(content, lambda item: texts.append(str(item)))
        if any(map(INTERPOLATION.search, texts)):
            raise UserError(f"{path} has an interpolation; a recorded configuration must have values only")
        values: Any = OmegaConf.to_container(OmegaConf.create(content), resolve=True)  # removes escapes from texts
        read_sealed(path.parent)
    except FileNotFoundError:
        raise UserError(f"{source}: is no run directory, there is no {path}") from None
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    if not isinstance(values, dict) or not isinstance(values.get("checkpoint", {}), dict):
        raise UserError(f"{source}: {path} is no configuration of a run")
    return values


def read_yaml(path: Path) -> Any:
    """Return the values of a YAML file, with its interpolations unresolved.

    Raises `UserError` for a file that cannot be read, for deep nesting, and for aliases, which can expand without end.
    """
    content, depth = read_bytes(path), 0
    try:
        text = content.decode("utf-8-sig")
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST or isinstance(event, yaml.AliasEvent):
                raise UserError(f"more than {DEEPEST} levels, or an alias")
        return OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})") from None
