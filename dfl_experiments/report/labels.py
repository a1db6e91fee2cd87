"""Name the setting and the method of each run by the options that differ between the runs."""

import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pandas import DataFrame, Series

from dfl_experiments.configuration.composition import CONF_DIR
from dfl_experiments.report.run_record import as_text, flat

# columns that identify a section of a report
SECTION = ["smoke", "dataset", "model", "augmentation"]
KIND = ["optimizer", "schedule", "protocol"]
NAMES = [*SECTION, *KIND]  # options are compared only between runs that are equal in these columns
OPTION = re.compile(r"(?:^|, )([^=,]+)=")  # the key of an option in the column `setting`
# This default depends on the rule. `options_of` leaves the option out at its default.
ACTIVATION = "model.activation"
UNRESOLVED = "${}"  # in place of a default that refers to another option
REFERENCE = re.compile(r"\$\{(dataset|protocol)\.(\w+)\}")


Options = Mapping[str, str]


def labelled(frame: DataFrame) -> DataFrame:
    """Add the columns `setting`, `shared` and `method`, and a column for each option that they name.

    setting: text with the options that differ between runs, without the method's and without defaults.
    shared: text with the options that all runs share and that differ from their defaults.
    is_default: whether all options except the method's have their defaults.
    method: text with the rule and those of its options that differ from their defaults.
    """
    columns: dict[Any, dict[str, Any]] = {}
    for names, runs in frame.groupby(NAMES, sort=False):
        columns |= setting_columns(dict(zip(NAMES, names, strict=True)), runs.options)
    for (*_, protocol, rule), runs in frame.groupby([*NAMES, "rule"], sort=False):
        for index, named in method_columns(protocol, rule, runs.method_options).items():
            columns[index] |= named
    frame = frame.drop(columns=["options", "method_options", "method"])
    new = DataFrame.from_dict(columns, orient="index").fillna("")
    return frame.join(new[new.columns.difference(frame.columns)])


def setting_columns(names: Options, all_options: Series) -> dict[Any, dict[str, Any]]:
    """Return for each run the columns of `labelled` that do not depend on the method.

    names: for each column of `NAMES`, the value that the runs share.
    """
    defaults = defaults_of(names)
    keys = differing(all_options)
    recorded_by_all = set.intersection(*map(set, all_options))
    columns = {}
    for index, options in all_options.items():
        differs = {key: options[key] for key in keys if key in options}
        named = {
            key: value
            for key, value in differs.items()
            # an option that another run did not record is named, because its value there is unknown
            if value != defaults.get(key) or key not in recorded_by_all
        }
        unusual = [key for key, value in options.items() if not is_usual(key, value, defaults)]
        shared = {key: options[key] for key in unusual if key not in keys}
        texts = {"setting": joined(named), "shared": joined(shared), "is_default": not unusual}
        columns[index] = differs | texts
    return columns


def method_columns(protocol: str, rule: str, all_options: Series) -> dict[Any, dict[str, str]]:
    """Return for each run the column `method`, and a column for each option that it names.

    An option without a default in conf/method/RULE.yaml is named if it differs between the runs.
    """
    keys = differing(all_options)
    shared = {key: value for key, value in all_options.iloc[0].items() if key not in keys}
    defaults = as_texts(conf_values("method", rule), {"protocol": protocol})
    usual = shared | {key: value for key, value in defaults.items() if value != UNRESOLVED}
    columns = {}
    for index, options in all_options.items():
        named = {key: value for key, value in options.items() if value != usual.get(key)}
        method = ", ".join(filter(None, [rule, joined(named)]))
        columns[index] = {f"method.{key}": value for key, value in named.items()}
        columns[index]["method"] = method
    return columns


def joined(options: Options) -> str:
    """Return options as one text, such as "batch_size=32, loss=mse"."""
    return ", ".join(f"{key}={value}" for key, value in options.items())


def is_usual(key: str, value: str, defaults: Options) -> bool:
    """Return whether an option has the value in conf/. Digests and the place of δ do not count."""
    if key == ACTIVATION:
        return False
    is_identity = key in ("data", "delta_at") or key.endswith(".code")
    return is_identity or defaults.get(key) in (value, UNRESOLVED)


def differing(all_options: Iterable[Options]) -> list[str]:
    """Return the keys whose values differ between runs, sorted.

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


def defaults_of(names: Options) -> dict[str, str]:
    """Return the values of the options in conf/, as texts.

    names: for each group of conf/, the name of the file that the runs use.
    """
    defaults = as_texts(conf_values(".", "config"), names)
    for group, name in names.items():
        values = as_texts(conf_values(group, name), names)
        defaults |= {f"{group}.{key}": value for key, value in values.items()}
    return defaults


def as_texts(values: Mapping[str, Any], names: Options) -> dict[str, str]:
    """Return the values of a file in conf/ as texts.

    A reference to the data set or the protocol is replaced by the value there, any other one by `UNRESOLVED`.

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


def option_names(frame: DataFrame) -> list[str]:
    """Return the options that occur in the texts of the column `setting` and that have a column of their own."""
    keys = set(OPTION.findall(", ".join(set(frame.setting))))
    return sorted(keys.intersection(frame.columns))
