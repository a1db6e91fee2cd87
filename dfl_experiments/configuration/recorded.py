"""A configuration that a run has recorded: what `resume` and `repeat` run in place of the composed one."""

import itertools
import re
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dfl_experiments.configuration.composition import AUTO, changed, plain
from dfl_experiments.errors import UserError, reason

LARGEST, DEEPEST = 2**20, 20  # characters of a recorded configuration, and its nested parts
INTERPOLATION = re.compile(r"(?<!\\)(?:\\\\)*\$\{")
# may be given beside resume and repeat, whose configuration is otherwise the recorded one
OPERATIONAL = ("data_dir", "device", "threads", "cuda_graph", "checkpoint", "tracking", "plugins")


def with_recorded(cfg: DictConfig, overrides: list[str]) -> dict[str, Any]:
    """The values to run: the composed ones, or those recorded by the run that `resume` or `repeat` names.

    overrides: the command line's, of which only `OPERATIONAL` ones may stand beside resume and repeat. Which plugins
    are loaded is for the command line alone to say. Raises `UserError` for other overrides, and where nothing is
    recorded.
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
    merged = completed(read_recorded(path, f"{key}={values[key]}"), values)
    for place, _, option in (name.partition(".") for name in given):
        if place in OPERATIONAL:
            merged[place] = merged[place] | {option: values[place][option]} if option else values[place]
    return merged | {name: values[name] for name in ("plugins", "resume", "repeat")}


def completed(recorded: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """A recorded configuration with today's values for what has been added since it was recorded."""
    merged = {name: values[name] for name in OPERATIONAL} | {"memory_format": "contiguous"} | recorded
    grown = {name: merged.get(name) for name in ("checkpoint", "alignment", "protocol", "tracking")}
    return merged | {name: values[name] | part for name, part in grown.items() if isinstance(part, dict)}


def read_recorded(path: Path, said: str) -> dict[str, Any]:
    """A recorded configuration. Raises `UserError` where there is none, or one that holds anything but values.

    said: what names it. Nothing of it is resolved: an interpolation would copy what is this machine's into a run.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LARGEST + 1)
        # the parser goes through nested parts one by one, what is made of them would grow without end
        depths = itertools.accumulate(_step(event) for event in yaml.parse(text, yaml.SafeLoader))
        if len(text) > LARGEST or any(depth > DEEPEST for depth in depths):
            raise UserError(f"{said}: {path} is no configuration of a run, it is larger than any")
        found = OmegaConf.create(text)
    except OSError:
        raise UserError(f"{said}: is no run directory, there is no {path}") from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"{said}: {path} cannot be read ({reason(error)})") from None
    values: Any = OmegaConf.to_container(found, resolve=False)
    texts: list[str] = []
    changed(values, lambda x: texts.append(str(x)))
    if any(map(INTERPOLATION.search, texts)):
        raise UserError(f"{said}: {path} holds an interpolation, a recorded configuration holds values")
    values = OmegaConf.to_container(found, resolve=True)  # an escaped one is a text
    if not isinstance(values, dict) or not isinstance(values.get("checkpoint", {}), dict):
        raise UserError(f"{said}: {path} is no configuration of a run")
    return values


def _step(event: yaml.Event) -> int:
    """How many levels of nesting a YAML event goes down. An alias, which no run writes, goes too far."""
    if isinstance(event, yaml.AliasEvent):
        return DEEPEST + 1
    return isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
