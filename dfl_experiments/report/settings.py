"""Which runs belong together in a report: those of one setting."""

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from dfl_experiments.config import CONF_DIR, compose
from dfl_experiments.report.runs import GROUPS, Run
from dfl_experiments.settings import scientific

# what a cell's runs may differ in: the axes of its grid, what its place in the table says, and what changes no number
NOT_A_DIFFERENCE = (
    "optimizer.lr", "optimizer.weight_decay", "seed", "smoke", "alignment.every", "dataset.name", "augmentation.name",
    "model.name", "method.name",
)  # fmt: skip
LONGEST_SLUG = 90


class Setting(NamedTuple):
    """What the runs of one report section share. differences: from what the configuration has for such a run."""

    smoke: bool
    protocol: str
    differences: tuple[str, ...]

    @property
    def title(self) -> str:
        """For a heading."""
        words = ["SMOKE (a trial of the pipeline, no results)"] if self.smoke else []
        return ", ".join([*words, f"protocol {self.protocol}", *self.differences])

    @property
    def slug(self) -> str:
        """For a file's name."""
        words = [*(["smoke"] if self.smoke else []), self.protocol, *self.differences]
        kept = ("".join(c if c.isalnum() or c in ".-_" else "-" for c in word) for word in words)
        name = "-".join(word.strip("-") for word in kept)
        if len(name) <= LONGEST_SLUG:
            return name
        return f"{name[:LONGEST_SLUG]}-{hashlib.sha256(self.title.encode()).hexdigest()[:8]}"


def flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    values: dict[str, Any] = {}
    for key, value in node.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return values


@cache
def usual(choices: tuple[str, ...]) -> dict[str, Any] | None:
    """The flat configuration of these choices, protocol options included; None where they cannot be composed."""
    try:
        cfg = compose(list(choices))
        return flat(scientific(cfg)) | {f"protocol.{key}": value for key, value in cfg.protocol.items()}
    except (HydraException, OmegaConfBaseException):
        return None


def setting_of(run: Run) -> Setting:
    """The section a run belongs to.

    A group's option that conf/ does not have is not compared, everything else is.
    """
    config = run.config
    known = {group: (CONF_DIR / group / f"{config[group].name}.yaml").is_file() for group in GROUPS}
    names = [f"{group}={config[group].name}" for group in GROUPS if known[group]]
    found = flat(scientific(config)) | {f"protocol.{key}": value for key, value in config.protocol.items()}
    found = {key: value for key, value in found.items() if known.get(key.partition(".")[0], True)}
    found = {key: value for key, value in found.items() if not isinstance(value, Mapping)}
    default = usual(tuple(names))
    if default is None:
        return Setting(run.smoke is not None, str(config.protocol.name), ("a configuration not known here",))
    protocol = [
        f"{key}={json.dumps(value)}"
        for key, value in found.items()
        if key.startswith("protocol.") and key in default and default[key] != value
    ]
    if protocol:  # other options follow from a protocol's: those are no differences of their own
        default = usual((*names, *protocol)) or default
    rest = [
        f"{key}={value}"
        for key, value in found.items()
        if key not in NOT_A_DIFFERENCE and not key.startswith("protocol.") and default.get(key, "") != value
    ]
    if config.optimizer.name != "adam":
        rest.append(f"optimizer={config.optimizer.name}")
    return Setting(run.smoke is not None, str(config.protocol.name), tuple(sorted([*protocol, *rest])))
