"""Which runs belong together in a report: those of one setting."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from omegaconf import DictConfig

from dfl_experiments.configuration.composition import (
    FULLY_CONNECTED,
    PLACES,
    compose,
    group_options,
    plain,
    quoted,
    scientific,
)

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
    "protocol.stop_collapsed",
}
NOT_A_DIFFERENCE |= {f"{place}.name" for place in PLACES}
LONGEST_NAME = 90
WORD = re.compile(r"[A-Za-z_][A-Za-z_\d-]*")


class Setting(NamedTuple):
    """What the runs of one report section share. differences: from what the configuration has for such a run."""

    smoke: bool
    protocol: str
    differences: tuple[str, ...]

    @property
    def title(self) -> str:
        """For a heading."""
        smoke = ["SMOKE (a trial of the pipeline, no results)"] * self.smoke
        return ", ".join([*smoke, f"protocol {self.protocol}", *map(in_words, self.differences)])

    @property
    def told(self) -> tuple[str, ...]:
        """What tells it from the usual setting, for a sentence."""
        return (*[f"protocol {self.protocol}"] * (self.protocol != "fair"), *map(in_words, self.differences))

    @property
    def words(self) -> str:
        """For a file's name: what tells it from the usual setting, an optimizer's own options left out."""
        minor = [one for one in self.differences if one.startswith("optimizer.")]
        differences = [in_words(one) for one in self.differences if one not in minor]
        return file_name([*["smoke"] * self.smoke, *[self.protocol] * (self.protocol != "fair"), *differences])


def of_method(setting: Setting, method: str) -> tuple[Setting, str]:
    """The setting without its method's own options, and the method's name with them: "las, held=2".

    So a method stands beside the others in one table, however many of its options are swept.
    """
    own = [one for one in setting.differences if one.startswith("method.")]
    rest = tuple(one for one in setting.differences if one not in own)
    return setting._replace(differences=rest), ", ".join([method, *(one.partition(".")[2] for one in own)])


def options_told(method: str) -> tuple[str, list[str]]:
    """What `of_method` made one: the method's name, and its options."""
    name, *options = re.split(r", (?=[\w.]+=)", method)
    return name, options


def rule_of(method: str) -> str:
    """Return the method without the shape of its B, which is a choice within a rule and not another rule."""
    name, options = options_told(method)
    return ", ".join([name, *(option for option in options if not option.startswith("feedback="))])


def words_of(settings: Sequence[Setting]) -> list[str]:
    """The `words` of each setting of a report, made different where they are not."""
    counts = Counter(setting.words for setting in settings)
    digests = [hashlib.sha256(setting.title.encode()).hexdigest()[:8] for setting in settings]
    return [
        setting.words if counts[setting.words] == 1 else file_name([*filter(None, [setting.words]), digest])
        for setting, digest in zip(settings, digests, strict=True)
    ]


def in_words(difference: str) -> str:
    """A difference as people say it: "3 epochs"."""
    key, _, value = difference.partition("=")
    if key == "optimizer":
        return value.upper()
    if key == "epochs":
        return f"{value} epoch" + "s" * (value != "1")
    if difference == "optimizer.milestones=[]":
        return "constant learning rate"
    return value if key == "precision" else difference


def file_name(words: Iterable[str]) -> str:
    """Words as a name for files, no longer than names may be."""
    whole = "-".join(words).lower()
    name = re.sub(r"[^\w.]+", "-", whole).strip("-")
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[:LONGEST_NAME]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    values: dict[str, Any] = {}
    for key, value in node.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return values


def compared(cfg: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """What settings differ in, with dotted keys: all that decides a run's numbers, and its protocol's options."""
    recorded = plain(cfg)
    options = {key: value for key, value in recorded["protocol"].items() if not isinstance(value, Mapping)}
    values = flat(scientific(cfg) | {"protocol": options})
    # The digest leaves out a B in the shape of a convolution, which is not every rule's default; tables name it.
    shape = recorded["method"].get("feedback")
    if shape is not None and recorded["model"]["name"] not in FULLY_CONNECTED:
        values["method.feedback"] = shape
    return {key: value for key, value in values.items() if key not in NOT_A_DIFFERENCE}


def as_override(value: Any) -> str:
    """A value as Hydra reads it on a command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(map(as_override, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}:{as_override(item)}' for key, item in value.items())}}}"
    plain_word = isinstance(value, str) and WORD.fullmatch(value) and value.lower() not in ("null", "true", "false")
    return quoted(value) if isinstance(value, str) and not plain_word else str(value)


@cache
def defaults(*choices: str) -> dict[str, Any]:
    """What conf/ has for a run of these choices."""
    return plain(compose(list(choices)))


@cache
def compared_defaults(*choices: str) -> dict[str, Any]:
    """What is compared of it."""
    return compared(defaults(*choices))


def unknown_groups(names: Mapping[str, str]) -> set[str]:
    """The groups whose option conf/ does not have."""
    return {group for group, name in names.items() if name not in group_options(group)}


def own_options(config: DictConfig) -> dict[str, str]:
    """What is not compared of the groups whose option conf/ does not have, by dotted key."""
    unknown = unknown_groups({group: str(config[group].name) for group in NAMED})
    found = compared(config) if unknown else {}
    return {key: str(value) for key, value in found.items() if key.partition(".")[0] in unknown - {"protocol"}}


def setting_of(config: DictConfig) -> Setting:
    """The section that a run of this configuration belongs to.

    A group's option that conf/ does not have is not compared here (see `own_options`), everything else is.
    """
    names = {group: str(config[group].name) for group in NAMED}
    unknown = unknown_groups(names)
    choices = [f"{group}={name}" for group, name in names.items() if group not in unknown]
    found = {key: value for key, value in compared(config).items() if key.partition(".")[0] not in unknown}
    own = {key: found.pop(key) for key in list(found) if key.startswith("protocol.")}
    default = compared_defaults(*choices)
    protocol = [f"{key}={as_override(value)}" for key, value in own.items() if default.get(key, value) != value]
    # what follows from a protocol's option is no difference of its own
    default = compared_defaults(*choices, *protocol)
    rest = [f"{key}={value}" for key, value in found.items() if default.get(key, "") != value]
    if names["optimizer"] != "adam":
        rest.append(f"optimizer={names['optimizer']}")
    return Setting(config.get("smoke") is not None, names["protocol"], tuple(sorted([*protocol, *rest])))
