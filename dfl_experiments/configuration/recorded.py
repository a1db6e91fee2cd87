"""A configuration that a run has recorded: what `resume` and `repeat` run in place of the composed one."""

import logging
import re
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dfl_experiments.configuration.composition import AUTO, changed, plain
from dfl_experiments.errors import UserError, reason
from dfl_experiments.seal import read_bytes, read_sealed

log = logging.getLogger(__name__)
DEEPEST = 20  # nested lists and mappings of a configuration
INTERPOLATION = re.compile(r"(?<!\\)(?:\\\\)*\$\{")
# may be given beside resume and repeat, whose configuration is otherwise the recorded one
OPERATIONAL = ("data_dir", "device", "threads", "cuda_graph", "checkpoint", "tracking", "plugins")
OF_THE_COMMAND = ("tracking", "plugins")


def with_recorded(cfg: DictConfig, overrides: list[str]) -> dict[str, Any]:
    """The values to run: the composed ones, or those recorded by the run that `resume` or `repeat` names.

    overrides: the command line's, of which only `OPERATIONAL` ones may stand beside resume and repeat. Which plugins
    are loaded and where W&B sends a run is for the command alone to say: the folder may be somebody else's. Raises
    `UserError` for other overrides, and where nothing is recorded.
    """
    values = plain(cfg)
    key = next((key for key in ("resume", "repeat") if values.get(key) not in (None, AUTO)), None)
    if key is None:
        return values
    path = Path(str(values[key])).expanduser() / "config.yaml"
    given = [override.lstrip("+~").partition("=")[0] for override in overrides]
    beside = [name for name in given if name.partition(".")[0] not in (*OPERATIONAL, key)]
    if beside:
        raise UserError(
            f"{beside[0]}: {key}={values[key]} takes its configuration from {path}; beside it there may be "
            f"{', '.join(OPERATIONAL)}"
        )
    recorded = read_recorded(path, f"{key}={values[key]}")
    own = {name: values[name] for name in (*OF_THE_COMMAND, "resume", "repeat")}
    before = recorded.get("tracking")
    mode = before.get("mode") if isinstance(before, dict) else None
    if mode == "disabled" and not any(name.partition(".")[0] == "tracking" for name in given):
        own["tracking"] = values["tracking"] | {"mode": mode}  # which sends nothing
    elif mode == "online" and values["tracking"]["mode"] != mode:
        log.warning("tracking: as this command says; the run in %s had tracking=online", path.parent)
    merged = completed(recorded, values) | own
    for place, _, option in (name.partition(".") for name in given):
        if place in OPERATIONAL:
            merged[place] = merged[place] | {option: values[place][option]} if option else values[place]
    return merged


def completed(recorded: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """A recorded configuration with what has been added since it was recorded: as that run had it, or else today's."""
    before: dict[str, Any] = {"memory_format": "contiguous", "stop_collapsed": False}
    merged = {name: values[name] for name in OPERATIONAL} | before | recorded
    values = values | {"protocol": values["protocol"] | {"stop_collapsed": False}}
    grown = {name: merged.get(name) for name in ("checkpoint", "alignment", "protocol", "tracking")}
    return merged | {name: values[name] | part for name, part in grown.items() if isinstance(part, dict)}


def read_recorded(path: Path, said: str) -> dict[str, Any]:
    """A recorded configuration. Raises `UserError` where there is none, or one that holds anything but values.

    said: what names it. Nothing of it is resolved: an interpolation would copy what is this machine's into a run.
    """
    try:
        found = read_yaml(path)
        texts: list[str] = []
        changed(found, lambda x: texts.append(str(x)))
        if any(map(INTERPOLATION.search, texts)):
            raise UserError(f"{path} holds an interpolation, a recorded configuration holds values")
        values: Any = OmegaConf.to_container(OmegaConf.create(found), resolve=True)  # an escaped one is a text
        read_sealed(path.parent)
    except FileNotFoundError:
        raise UserError(f"{said}: is no run directory, there is no {path}") from None
    except UserError as error:
        raise UserError(f"{said}: {error}") from None
    if not isinstance(values, dict) or not isinstance(values.get("checkpoint", {}), dict):
        raise UserError(f"{said}: {path} is no configuration of a run")
    return values


def read_yaml(path: Path) -> Any:
    """The values of a YAML file, its interpolations as they stand.

    Raises `UserError` for what cannot be read, and for what would grow without end, as aliases of aliases do.
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
