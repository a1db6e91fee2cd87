"""Name the setting and the method of each run by the options that differ between the runs."""

import re
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from pandas import DataFrame, Series

from dfl_experiments.configuration.composition import CONF_DIR
from dfl_experiments.configuration.recorded import DATA_PATH
from dfl_experiments.report.run_record import OF_FEEDBACK, as_text, flat

# columns that identify a section of a report
SECTION = ["smoke", "dataset", "model", "augmentation"]
KIND = ["optimizer", "schedule", "protocol"]
NAMES = [*SECTION, *KIND]  # options are compared only between runs that are equal in these columns
OPTION = re.compile(r"(?:^|, )([^=,]+)=")  # the key of an option in the column `setting`
FOLDER = r"^('?).*/(?=.)"  # the part of a path, which may be quoted, before the file's name
# This default depends on the rule. `options_of` leaves the option out at its default.
ACTIVATION = "model.activation"
UNRESOLVED = "${}"  # in place of a default that refers to another option
# Files of conf/ on which a configuration with a name of the user's own may be based: group, file, key. It is based on
# the file if it has the file's value of the key.
OWN_NAMES = [
    ("dataset", "arrays", "source._target_"),
    ("dataset", "folder", "source._target_"),
    ("model", "torchvision", "_target_"),
    ("model", "module", "boundaries"),
]
REFERENCE = re.compile(r"\$\{(dataset|protocol)\.(\w+)\}")


Names = Mapping[str, str]


def labelled(frame: DataFrame) -> DataFrame:
    """Add the columns `setting`, `shared` and `method`, and a column for each option that they name.

    setting: text with the options that differ between runs, without the method's and without defaults.
    shared: text with the options that all runs share and that differ from their defaults. The user's own class is left
        out if the tables show it under the user's own name.
    is_default: whether all options except the method's have their defaults, and B has no optimizer of its own.
    method: text with the rule and those of its options that differ from their defaults.
    feedback_options: text with the options of B's own optimizer and schedule that all runs of the rule share.
    """
    settings, methods = [], []
    for values, runs in frame.groupby(NAMES, sort=False):
        names = dict(zip(NAMES, values, strict=True))
        options = with_one_identity_of_data(as_columns(runs.options))
        settings.append(setting_columns(names, options))
        for rule, part in runs.groupby("rule", sort=False):
            of_method = as_columns(part.method_options)
            methods.append(method_columns(names["protocol"], rule, of_method))
    frame = frame.drop(columns=["options", "method_options", "method"])
    labels = pd.concat(settings).join(pd.concat(methods)).fillna("")
    labels["is_default"] &= labels.feedback_options == ""
    new_names = labels.columns.difference(frame.columns)
    return frame.join(labels[new_names])


def as_columns(mappings: Series) -> DataFrame:
    """Return a table with one row for each mapping and one column for each key."""
    return DataFrame(list(mappings), mappings.index)


def with_one_identity_of_data(options: DataFrame) -> DataFrame:
    """Return the options with either the digest of the user's data or their path.

    The digest identifies the data, but a reader knows the path. So all runs on the same data get the path of the first
    of them. If the data at one path have changed, the runs get digests instead. A run that still trains has not
    recorded the digest. It gets the digest of the other runs on the same path, if all of them have the same one.
    """
    if not {"data", DATA_PATH} <= set(options):
        return options
    known = options[["data", DATA_PATH]].dropna().drop_duplicates()
    digests = known.drop_duplicates(DATA_PATH, keep=False).set_index(DATA_PATH).data
    data = options.data.fillna(options[DATA_PATH].map(digests))
    paths = known.drop_duplicates("data").set_index("data")[DATA_PATH]
    if paths.is_unique:
        path = data.map(paths).fillna(options[DATA_PATH])
        return options.drop(columns="data").assign(**{DATA_PATH: path})
    path = options[DATA_PATH].mask(data.notna())
    return options.assign(**{"data": data, DATA_PATH: path})


def setting_columns(names: Names, options: DataFrame) -> DataFrame:
    """Return for each run the columns of `labelled` that do not depend on the method.

    names: for each column of `NAMES`, the value that the runs share.
    """
    defaults = defaults_of(file_names(names, options))
    differs = options[differing(options)]
    # an option that another run did not record is named, because its value there is unknown
    recorded_by_all = options.columns[options.notna().all()]
    usual = {key: defaults.get(key) for key in recorded_by_all}
    named = unusual(differs, usual)
    defaults.pop(ACTIVATION, None)
    with_default = []
    for key in options:
        is_resolved = defaults.get(key) != UNRESOLVED
        if is_resolved and not is_identity(key):
            with_default.append(key)
    changed = unusual(options[with_default], defaults)
    named_by_user = [f"{group}._target_" for group in names if not conf_values(group, names[group])]
    hidden = [*differs.columns, *named_by_user]
    shared = changed.drop(columns=hidden, errors="ignore")
    if DATA_PATH in shared:  # a caption needs only the name of the file
        shared[DATA_PATH] = shared[DATA_PATH].str.replace(FOLDER, r"\1", regex=True)
    is_default = changed.isna().all(axis="columns")
    return differs.assign(setting=joined(named), shared=joined(shared), is_default=is_default)


def method_columns(protocol: str, rule: str, options: DataFrame) -> DataFrame:
    """Return for each run the columns `method`, `feedback_options`, and one for each option that `method` names.

    An option without a default in conf/method/RULE.yaml is named if it differs between the runs.
    """
    equal = options.drop(columns=differing(options))
    of_feedback = equal[[key for key in equal if key.startswith(OF_FEEDBACK)]]
    usual = equal.bfill().iloc[0].to_dict()  # a run without a result has no digest of the code
    values = conf_values("method", rule)
    for key, value in as_texts(values, {"protocol": protocol}).items():
        if value != UNRESOLVED:
            usual[key] = value
    named = unusual(options, usual).dropna(axis="columns", how="all")
    methods = [f"{rule}, {text}" if text else rule for text in joined(named)]
    columns = named.add_prefix("method.")
    return columns.assign(method=methods, feedback_options=joined(of_feedback))


def unusual(options: DataFrame, usual: Mapping[str, Any]) -> DataFrame:
    """Return the options with NaN in place of usual values."""
    values = Series(usual, dtype=object).reindex(options.columns)
    return options.mask(options.eq(values, axis="columns"))


def joined(options: DataFrame) -> list[str]:
    """Return for each run its options as one text, such as "batch_size=32, loss=mse"."""
    texts = []
    for _, row in options.iterrows():
        parts = [f"{key}={value}" for key, value in row.dropna().items()]
        texts.append(", ".join(parts))
    return texts


def layers_sentence(runs: DataFrame, layers: Collection[int] | None = None) -> str:
    """Return the names of a user's net for its layers: "Layers: 1 conv, 2 pool."

    Return "" for a net without boundaries, or if the runs differ in their boundaries.

    layers: numbers of the layers to name, from 1. Default: all.
    """
    if runs.boundaries.nunique() > 1:
        return ""
    names = dict(enumerate(runs.boundaries.iloc[0], start=1))
    texts = [
        f"{layer} {name}" for layer, name in names.items() if layers is None or layer in layers
    ]
    return f"Layers: {', '.join(texts)}." if texts else ""


def is_identity(key: str) -> bool:
    """Return whether an option is a digest of data or code, or the place of δ. These have no default."""
    return key in ("data", "delta_at", "code") or key.endswith(".code")


def differing(options: DataFrame) -> list[str]:
    """Return the keys whose values differ between runs, sorted.

    Digests of data or code, and the place of δ, are compared only between the runs that recorded them.
    """
    return [key for key in sorted(options) if options[key].nunique(dropna=is_identity(key)) > 1]


def file_names(names: Names, options: DataFrame) -> Names:
    """Return for each group of conf/ the name of the file that the runs started from, see `OWN_NAMES`."""
    files = dict(names)
    for group, file, key in OWN_NAMES:
        has_no_file = not conf_values(group, files[group])
        column = f"{group}.{key}"
        if has_no_file and column in options:
            value = as_text(flat(conf_values(group, file))[key])
            if options[column].eq(value).all():
                files[group] = file
    return files


def defaults_of(names: Names) -> dict[str, str]:
    """Return the values of the options in conf/, as texts.

    names: for each group of conf/, the name of the file that the runs use.
    """
    defaults = as_texts(conf_values(".", "config"), names)
    for group, name in names.items():
        values = conf_values(group, name)
        for key, text in as_texts(values, names).items():
            defaults[f"{group}.{key}"] = text
    return defaults


def as_texts(values: Mapping[str, Any], names: Names) -> dict[str, str]:
    """Return the values of a file in conf/ as texts.

    A reference to the data set or the protocol is replaced by the value there, any other one by `UNRESOLVED`.

    names: name of the data set and of the protocol.
    """
    texts = {}
    for key, value in flat(values).items():
        link = REFERENCE.fullmatch(str(value))
        if link:
            group, option = link.groups()
            linked_values = conf_values(group, names.get(group, ""))
            value = linked_values.get(option, UNRESOLVED)
        is_resolved = "${" not in str(value)
        texts[key] = as_text(value) if is_resolved else UNRESOLVED
    return texts


@cache
def conf_values(group: str, option: str) -> dict[str, Any]:
    """Return the values of a YAML file in conf/; empty if there is no such file. Interpolations are not resolved."""
    path = Path(CONF_DIR, group, f"{option}.yaml")
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8")
    return yaml.safe_load(text)


def option_names(frame: DataFrame) -> list[str]:
    """Return the options that occur in the texts of the column `setting` and that have a column of their own."""
    settings = ", ".join(frame.setting.unique())
    keys = OPTION.findall(settings)
    return sorted(set(keys).intersection(frame.columns))
