"""Which runs belong together in a report: those of one setting."""

import hashlib
import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

from omegaconf import DictConfig

from dfl_experiments.configuration.composition import PLACES, compose, group_options, plain, scientific

NAMED = (*PLACES, "optimizer", "protocol")  # what a run's configuration has a name for
# what a cell's runs may differ in: the axes of its grid, what its place in the table says, and what changes no number
NOT_A_DIFFERENCE = {
    "optimizer.lr",
    "optimizer.weight_decay",
    "seed",
    "smoke",
    "alignment.every",
    "alignment.quantities",
    "memory_format",
}
NOT_A_DIFFERENCE |= {f"{place}.name" for place in PLACES}
LONGEST_SLUG = 90


class Setting(NamedTuple):
    """What the runs of one report section share. differences: from what the configuration has for such a run."""

    smoke: bool
    protocol: str
    differences: tuple[str, ...]

    @property
    def title(self) -> str:
        """For a heading."""
        smoke = ["SMOKE (a trial of the pipeline, no results)"] * self.smoke
        return ", ".join([*smoke, f"protocol {self.protocol}", *self.differences])

    @property
    def slug(self) -> str:
        """For a file's name."""
        words = [*["smoke"] * self.smoke, self.protocol, *self.differences]
        name = "-".join(re.sub(r"[^\w.-]", "-", word).strip("-") for word in words)
        if len(name) <= LONGEST_SLUG:
            return name
        return f"{name[:LONGEST_SLUG]}-{hashlib.sha256(self.title.encode()).hexdigest()[:8]}"


def flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    values: dict[str, Any] = {}
    for key, value in node.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return values


def compared(cfg: DictConfig) -> dict[str, Any]:
    """What settings differ in, with dotted keys: all that decides a run's numbers, and its protocol's options."""
    options = {key: value for key, value in plain(cfg)["protocol"].items() if not isinstance(value, Mapping)}
    values = flat(scientific(cfg) | {"protocol": options})
    return {key: value for key, value in values.items() if key not in NOT_A_DIFFERENCE}


@cache
def usual(*choices: str) -> dict[str, Any]:
    """What conf/ has for a run of these choices."""
    return compared(compose(list(choices)))


def setting_of(config: DictConfig) -> Setting:
    """The section that a run of this configuration belongs to.

    A group's option that conf/ does not have is not compared, everything else is.
    """
    names = {group: str(config[group].name) for group in NAMED}
    unknown = {group for group, name in names.items() if name not in group_options(group)}
    choices = [f"{group}={name}" for group, name in names.items() if group not in unknown]
    found = {key: value for key, value in compared(config).items() if key.partition(".")[0] not in unknown}
    own = {key: found.pop(key) for key in list(found) if key.startswith("protocol.")}
    default = usual(*choices)
    protocol = [f"{key}={json.dumps(value)}" for key, value in own.items() if default.get(key, value) != value]
    default = usual(*choices, *protocol)  # what follows from a protocol's option is no difference of its own
    rest = [f"{key}={value}" for key, value in found.items() if default.get(key, "") != value]
    if names["optimizer"] != "adam":
        rest.append(f"optimizer={names['optimizer']}")
    return Setting(config.get("smoke") is not None, names["protocol"], tuple(sorted([*protocol, *rest])))
