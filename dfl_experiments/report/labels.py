"""Name the setting and the method of each run by the options that differ between the runs."""

import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from dfl_experiments.configuration.composition import CONF_DIR
from dfl_experiments.report.run_record import as_text, flat

# Options are compared only between runs that are equal in these columns.
NAMES = ["smoke", "dataset", "model", "augmentation", "optimizer", "schedule", "protocol"]
OPTION = re.compile(r"(?:^|, )([^=,]+)=")  # the key of an option in the column `setting`
# This default depends on the rule. `options_of` leaves the option out at its default.
ACTIVATION = "model.activation"
UNRESOLVED = "${}"  # in place of a default that refers to another option
REFERENCE = re.compile(r"\$\{(dataset|protocol)\.(\w+)\}")


def labelled(frame: pd.DataFrame) -> pd.DataFrame:
    """Add the columns `setting`, `shared` and `method`, and a column for each option that `setting` or `method` names.

    `method` is a text with the rule and those of its options that differ from their default. An option without a
    default in conf/method/RULE.yaml is named if it differs between runs. `setting` is a text with all other options
    that differ between runs. `shared` is a text with the options that all runs share and that differ from their
    defaults. `is_default` says whether all options of a run except the method's have their defaults.
    """
    settings, methods = {}, {}
    shared: dict[Any, str] = {}
    is_default: dict[Any, bool] = {}
    columns: dict[Any, dict[str, str]] = {}
    for names, group in frame.groupby(NAMES, sort=False):
        keys = differing(group.options)
        defaults = defaults_of(dict(zip(NAMES, names, strict=True)))
        text = ", ".join(assignments(shared_options(defaults, group.options)))
        shared |= dict.fromkeys(group.index, text)
        for index, options in group.options.items():
            is_default[index] = has_defaults(options, defaults)
            shown = {key: options[key] for key in keys if key in options}
            settings[index] = ", ".join(assignments(shown))
            columns[index] = shown
    for (*_, protocol, rule), group in frame.groupby([*NAMES, "rule"], sort=False):
        defaults = as_texts(conf_values("method", str(rule)), {"protocol": str(protocol)})
        known = [key for key, value in defaults.items() if value != UNRESOLVED]
        named = {*known, *differing(group.method_options)}
        for index, options in group.method_options.items():
            shown = {
                key: value
                for key, value in options.items()
                if key in named and value != defaults.get(key)
            }
            methods[index] = ", ".join([str(rule), *assignments(shown)])
            columns[index] |= {f"method.{key}": value for key, value in shown.items()}
    frame = frame.assign(setting=settings, shared=shared, is_default=is_default, method=methods)
    frame = frame.drop(columns=["options", "method_options"])
    shown_options = pd.DataFrame.from_dict(columns, orient="index").fillna("")
    return frame.join(shown_options[sorted(shown_options.columns.difference(frame.columns))])


def has_defaults(options: Mapping[str, str], defaults: Mapping[str, str]) -> bool:
    """Return whether the options of a run are those of conf/. Digests and the place of δ do not count."""
    for key, value in options.items():
        is_identity = key in ("data", "delta_at") or key.endswith(".code")
        if not is_identity and defaults.get(key) not in (value, UNRESOLVED):
            return False
    return True


def assignments(options: Mapping[str, str]) -> list[str]:
    """Return options as texts such as "lr=0.1"."""
    return [f"{key}={value}" for key, value in options.items()]


def differing(all_options: Iterable[Mapping[str, str]]) -> list[str]:
    """Return the keys whose values differ between runs.

    Digests of data or code are compared only between the runs that recorded them.
    """
    all_options = list(all_options)
    keys = []
    for key in sorted(set().union(*all_options)):
        values = {options.get(key) for options in all_options}
        if key == "data" or key.endswith(".code"):
            values.discard(None)  # None: the run did not record the digest
        if len(values) > 1:
            keys.append(key)
    return keys


def defaults_of(names: Mapping[str, str]) -> dict[str, str]:
    """Return the values of the options in conf/, as texts.

    names: for each group of conf/, the name of the file that the runs use.
    """
    defaults = as_texts(conf_values(".", "config"), names)
    for group, name in names.items():
        values = as_texts(conf_values(group, name), names)
        defaults |= {f"{group}.{key}": value for key, value in values.items()}
    return defaults


def shared_options(
    defaults: Mapping[str, str], all_options: Iterable[Mapping[str, str]]
) -> dict[str, str]:
    """Return the options that have the same value in all runs, and another value in conf/.

    defaults: what `defaults_of` returns for the runs.
    """
    first, *others = all_options
    shared = {}
    for key, value in first.items():
        is_default = key != ACTIVATION and defaults.get(key, value) in (value, UNRESOLVED)
        if not is_default and all(options.get(key) == value for options in others):
            shared[key] = value
    return shared


def as_texts(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, str]:
    """Return the values of a file in conf/ as texts.

    A value that refers to a data set or a protocol is replaced by the value in their file. Other references become
    `UNRESOLVED`.

    names: name of the data set and of the protocol.
    """
    texts = {}
    for key, value in flat(values).items():
        if isinstance(value, str) and (link := REFERENCE.fullmatch(value)):
            value = conf_values(link[1], names.get(link[1], "")).get(link[2], "${}")
        texts[key] = UNRESOLVED if "${" in str(value) else as_text(value)
    return texts


@cache
def conf_values(group: str, option: str) -> dict[str, Any]:
    """Return the values of a YAML file in conf/; empty if there is no such file. Interpolations are not resolved."""
    path = Path(CONF_DIR) / group / f"{option}.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}


def option_names(frame: pd.DataFrame) -> list[str]:
    """Return the options that occur in the texts of the column `setting` and that have a column of their own."""
    keys = set(OPTION.findall(", ".join(set(frame.setting))))
    return sorted(keys.intersection(frame.columns))
