"""Run directories as one table: a row for each run, with its settings, its results and its audit."""

import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from dfl_experiments.configuration.components import KINDS, NAME
from dfl_experiments.configuration.composition import (
    CONF_DIR,
    PLACES,
    harmless,
    quoted,
    result_options,
)
from dfl_experiments.configuration.history import WITHOUT_EFFECT, with_current_names
from dfl_experiments.configuration.recorded import read_recorded
from dfl_experiments.configuration.refusals import did_you_mean, one_line
from dfl_experiments.errors import UserError, printable
from dfl_experiments.running.result import DONE, made_with, read_epochs, read_result, status_of
from dfl_experiments.running.run_directory import CONFIG, LAST, RESULT
from dfl_experiments.seal import opened

log = logging.getLogger(__name__)

#: The columns that a row of a table stands for. `setting`: whatever else differs, as text.
ROW = ["smoke", "dataset", "model", "augmentation", "epochs", "optimizer", "precision", "protocol", "setting"]
CELL = [*ROW, "method"]  # all runs of one method in a row
POINT = [*CELL, "lr", "weight_decay"]  # of these, all runs at one point of the grid, a run for each seed

ENDED = ("finished", "collapsed")  # statuses of a run that has an accuracy
UNFIT = ("diverged", "collapsed", "stopped", "failed")  # statuses that speak against a run's grid point
GROUPS = (*PLACES, "optimizer", "protocol")
PER_LAYER = ("cosine", "activation_rms", "dead", "norm_ratio", "zeros")
# Columns of their own, the axes of a grid, and what changes no number.
NOT_IN_SETTING = {
    "epochs",
    "precision",
    "seed",
    "smoke",
    "optimizer.lr",
    "optimizer.weight_decay",
    "alignment.every",
    "alignment.quantities",
    "memory_format",
    "protocol.accuracy",
    *(f"{group}.name" for group in GROUPS),
}
OPTION = re.compile(r"(?:^|, )([^=,]+)=")  # a key in the column `setting`
PLAIN_WORD = re.compile(r"[A-Za-z_][A-Za-z_\d-]*")
OF_PROTOCOL = re.compile(r"\$\{protocol\.(\w+)\}")


def runs(*folders: str | Path) -> pd.DataFrame:
    """Return one row for each run in and below the folders.

    Columns: `folder`, `status`, `reason`; the settings (`ROW`, `method`, `rule`, `lr`, `weight_decay`, `seed`, and
    every configuration key that differs between runs of one data set and net); the results (`accuracy`,
    `validation_accuracy`, `score`, `seconds`, `cosine/1`, `dead/1`, …); and the audit (`unstable`, `failed_to_learn`,
    `fails`). Accuracies are fractions. A folder that cannot be read is named in a warning and left out.

    Raises:
        UserError: a folder does not exist, or there is no run in any of them.
    """
    records: dict[str, dict[str, Any]] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
        for run_dir in run_folders(folder):
            try:
                records[os.path.realpath(run_dir)] = record_of(run_dir)
            except Exception as error:  # a stranger's files can be wrong in any way
                log.warning("left out: %s", printable(f"{run_dir} ({type(error).__name__}: {one_line(error)})"))
    if not records:
        raise UserError(f"{', '.join(map(str, folders))}: no run directory there (they hold a {CONFIG})")
    frame = labelled(pd.DataFrame(list(records.values())))
    warn_of_repeats(frame)
    return frame


def run_folders(folder: Path) -> Iterator[Path]:
    """Yield the run directories in and below a folder, through symbolic links too, each once."""
    seen = set()
    for path, below, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(path)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if name not in ("wandb", ".hydra"))
        # a directory with only a part of these files is a damaged run, and its reader says what is missing
        if {CONFIG, RESULT, LAST, "epochs.csv"} & {*files, *below}:
            below.clear()
            yield Path(path)


def record_of(run_dir: Path) -> dict[str, Any]:
    """Return the row of one run. Raises an error of any kind where the directory holds something else."""
    result = harmless(read_result(run_dir) or {})
    config = result["config"] if result else harmless(read_recorded(run_dir / CONFIG, str(run_dir)))
    config = with_current_names(config)
    for group in GROUPS:
        NAME.validate_python(config[group]["name"], strict=True)
    status, reason = result.get("status", ""), result.get("reason") or ""
    if status not in DONE:
        status, _, reason = harmless(status_of(run_dir))
    if status == "damaged":
        raise UserError(reason)
    epochs = read_epochs(run_dir, result)
    needs_epochs = config["protocol"]["accuracy"] == "best_validation"
    if status == "finished" and needs_epochs and not epochs:
        raise UserError("there is no epochs.csv, which protocol.accuracy=best_validation needs to choose a grid point")
    return {
        "folder": str(run_dir),
        "status": status,
        "reason": reason,
        **settings_of(config, result),
        **results_of(status, config, result, epochs),
    }


def settings_of(config: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns that say what a run was asked to do."""
    options, own_options = compared_options(config, result)
    return {
        "smoke": config.get("smoke") is not None,
        **{group: str(config[group]["name"]) for group in (*PLACES, "optimizer", "protocol")},
        "rule": str(config["method"]["name"]),
        "epochs": int(config["epochs"]),
        "precision": str(config.get("precision", "float32")),
        "lr": float(config["optimizer"]["lr"]),
        "weight_decay": float(config["optimizer"].get("weight_decay") or 0.0),
        "seed": int(config["seed"]),
        "headline": config["protocol"]["accuracy"],
        "measured_every": int(config["alignment"]["every"]),
        "plugins": tuple(config.get("plugins") or ()),
        "options": options,
        "own_options": own_options,
    }


def compared_options(config: Mapping[str, Any], result: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the options that tell runs of the same names apart, and of these the method's own, as text by key."""
    method = config["method"]
    values = flat(result_options(config))
    without_effect = WITHOUT_EFFECT.get(config["model"].get("_target_"), ())
    if method.get("feedback") is not None and "method.feedback" not in without_effect:
        values["method.feedback"] = method["feedback"]  # the digest leaves it out where it is conv
    if values.pop("schedule._target_", None):  # the digest leaves it out where it is the step schedule
        values["schedule"] = config["schedule"]["name"]
    by_rule = config["protocol"].get("activation_of") or {}
    if values.get("model.activation") == by_rule.get(method["name"], "relu"):
        values.pop("model.activation", None)  # a rule's own net is no difference between settings
    options, own_options = {}, {}
    for key, value in values.items():
        if key.startswith("method.") and key not in NOT_IN_SETTING:
            own_options[key.removeprefix("method.")] = as_override(value)
        elif key not in NOT_IN_SETTING:
            options[key] = as_override(value)
    code = result.get("code", {})
    if result.get("data"):
        options["data"] = result["data"]
    for group in KINDS:
        if group in code and group != "method":
            options[f"{group}.code"] = code[group]
    if result.get("delta_at"):
        options["delta_at"] = result["delta_at"]
    if "method" in code:
        own_options["code"] = code["method"]
    return options, own_options


def results_of(
    status: str, config: Mapping[str, Any], result: Mapping[str, Any], epochs: Mapping[str, Sequence[float | None]]
) -> dict[str, Any]:
    """Return the columns that say how a run ended."""
    has_accuracy = status in ENDED
    accuracy = result.get("accuracy") if has_accuracy else None
    validation, validation_loss = held_out(config, result, epochs)
    tests = result.get("test_accuracy") or {}
    exact = set(result.get("cosine_by_construction", ()))
    failed_to_learn = False
    if accuracy is not None and config.get("smoke") is None:
        failed_to_learn = has_failed_to_learn(accuracy, tests.get("best") or 0.0, result.get("num_classes"))
    row: dict[str, Any] = {
        "accuracy": number(accuracy),
        "validation_accuracy": number(validation),
        "validation_loss": number(validation_loss),
        "score": number(accuracy if validation is None else validation),
        "at_best_validation": number(tests.get("at_best_validation")),
        "seconds": number(result.get("seconds")),
        "images_per_second": number(result.get("samples_per_second")),
        "num_classes": result.get("num_classes"),
        "device": result.get("device"),
        "versions": tuple(sorted(made_with(result))) if result else (),
        "finished_at": result.get("finished_at") or "",
        "done_epochs": result.get("epochs", len(epochs.get("epoch", ()))),
        "exact_layers": tuple(sorted(exact, key=int)),
        "unstable": in_words(result.get("unstable")),
        "collapsed": status == "collapsed",
        "failed_to_learn": failed_to_learn,
        "fails": status in UNFIT or failed_to_learn,
    }
    for name in PER_LAYER:
        for layer, value in (result.get(name) or {}).items():
            row[f"{name}/{layer}"] = number(value)
    return row


def number(value: float | None) -> float:
    """Return a number, NaN for None."""
    return math.nan if value is None else float(value)


def held_out(
    config: Mapping[str, Any], result: Mapping[str, Any], epochs: Mapping[str, Sequence[float | None]]
) -> tuple[float | None, float | None]:
    """Return validation accuracy and loss of the epoch that the protocol reports; None where not recorded."""
    if config["protocol"]["accuracy"] != "best_validation":
        return result.get("validation_accuracy"), result.get("validation_loss")
    accuracies = [number(value) for value in epochs.get("validation_accuracy", ())]
    measured = [value for value in accuracies if not math.isnan(value)]
    if not measured:
        return None, None
    best = accuracies.index(max(measured))
    losses = epochs.get("validation_loss")
    return accuracies[best], losses[best] if losses else None


def has_failed_to_learn(accuracy: float, best: float, num_classes: int | None) -> bool:
    """Return whether a run ends a fifth under its best test accuracy, or at chance, 1/K, and half or 2 % above it."""
    chance = 1 / num_classes if num_classes else 0.0
    return accuracy < max(0.8 * best, min(1.5 * chance, chance + 0.02))


def in_words(unstable: Mapping[str, Any] | None) -> str:
    """Return the first instability of a run as text, empty where there was none (spec of `running/stability.py`)."""
    if not unstable:
        return ""
    value, layer, epoch = unstable["value"], unstable["layer"], unstable["epoch"]
    what = f"{value:.0%} of units dead" if unstable["measure"] == "dead" else f"activations grew {value:.0f}-fold"
    return f"layer {layer}, epoch {epoch}: {what}"


def labelled(frame: pd.DataFrame) -> pd.DataFrame:
    """Name each run's setting and method by the options that differ, and add a column for each of these options."""
    names = [name for name in ROW if name not in ("epochs", "precision", "setting")]
    settings, methods = {}, {}
    columns: dict[Any, dict[str, str]] = {}
    for _, group in frame.groupby(names, sort=False):
        keys = differing(group.options)
        for index, options in group.options.items():
            shown = {key: options[key] for key in keys if key in options}
            settings[index] = ", ".join(f"{key}={value}" for key, value in shown.items())
            columns[index] = shown
    for _, group in frame.groupby([*names, "rule"], sort=False):
        rule, protocol = group.rule.iloc[0], group.protocol.iloc[0]
        keys = differing(group.own_options)
        for index, options in group.own_options.items():
            shown = own_label(rule, protocol, options, keys)
            methods[index] = ", ".join([rule, *(f"{key}={value}" for key, value in shown.items())])
            columns[index] |= {f"method.{key}": value for key, value in shown.items()}
    frame = frame.assign(setting=settings, method=methods).drop(columns=["options", "own_options"])
    options_shown = pd.DataFrame.from_dict(columns, orient="index").fillna("")
    return frame.join(options_shown[sorted(options_shown.columns.difference(frame.columns))])


def differing(options: Iterable[Mapping[str, str]]) -> list[str]:
    """Return the keys whose values are not the same in all runs; of data and code only values that were recorded."""
    options = list(options)
    keys = []
    for key in sorted(set().union(*options)):
        values = {values.get(key) for values in options}
        if key == "data" or key.endswith(".code"):
            values.discard(None)  # an older run did not record it
        if len(values) > 1:
            keys.append(key)
    return keys


def own_label(rule: str, protocol: str, options: Mapping[str, str], differing_keys: Iterable[str]) -> dict[str, str]:
    """Return those of a method's options that are not as conf/ has them; without a known default, that differ."""
    defaults = method_defaults(rule, protocol)
    changed = {key: value for key, value in options.items() if value != defaults.get(key)}
    return {key: value for key, value in changed.items() if key in defaults or key in differing_keys}


@cache
def method_defaults(rule: str, protocol: str) -> dict[str, str]:
    """Return the options of conf/method/RULE.yaml under a protocol, as text; without those that depend on others."""
    values, choices = conf_values("method", rule), conf_values("protocol", protocol)
    defaults = {}
    for key, value in values.items():
        if isinstance(value, str) and (link := OF_PROTOCOL.fullmatch(value)):
            value = choices.get(link[1], "${}")
        if "${" not in str(value):
            defaults[key] = as_override(value)
    return defaults


@cache
def conf_values(group: str, option: str) -> dict[str, Any]:
    """Return the values of a file in conf/, interpolations as they are; nothing for an option of the user's own."""
    path = Path(CONF_DIR) / group / f"{option}.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}


def flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with dotted keys."""
    values: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[f"{prefix}{key}"] = value
    return values


def as_override(value: Any) -> str:
    """Return a value as Hydra reads it on a command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(map(as_override, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}:{as_override(item)}' for key, item in value.items())}}}"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if not isinstance(value, str):
        return str(value)
    is_plain = PLAIN_WORD.fullmatch(value) and value.lower() not in ("null", "true", "false")
    return value if is_plain else quoted(value)


def option_names(frame: pd.DataFrame) -> list[str]:
    """Return the columns of the options that the column `setting` names."""
    keys = set(OPTION.findall(", ".join(set(frame.setting))))
    return sorted(keys.intersection(frame.columns))


def layer_names(frame: pd.DataFrame, quantity: str) -> list[str]:
    """Return the columns of a quantity in the order of layers: `cosine/1`, `cosine/2`, …"""
    names = [name for name in frame if name.startswith(f"{quantity}/")]
    return sorted(names, key=lambda name: int(name.partition("/")[2]))


def by_precedence(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the runs so that of two of one configuration and seed the one that counts comes first.

    That is the finished one, then the one that is done, that measured alignment, that finished later.
    """
    order = frame.assign(
        is_finished=frame.status == "finished",
        is_done=frame.status.isin(DONE),
        measured=frame.measured_every > 0,
        path=frame.folder.map(os.path.abspath),
    )
    keys = ["is_finished", "is_done", "measured", "finished_at", "path"]
    return order.sort_values(keys, ascending=False, kind="stable")[frame.columns]


def distinct(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the runs with one row for each grid point and seed: the first of `by_precedence`."""
    return by_precedence(frame).drop_duplicates([*POINT, "seed"]).sort_index()


def warn_of_repeats(frame: pd.DataFrame) -> None:
    """Warn of runs of one configuration and seed that ended with different numbers."""
    done = by_precedence(frame[frame.status.isin(DONE)])
    repeated = done[done.duplicated([*POINT, "seed"], keep=False)]
    for _, same in repeated.groupby([*POINT, "seed"], sort=False):
        numbers = same[["status", "accuracy", "validation_accuracy"]].astype(str).agg(" ".join, axis="columns")
        first = same.iloc[0]
        for _, other in same[numbers != numbers.iloc[0]].iterrows():
            ends = " and ".join(run.finished_at or "at an unknown time" for run in (first, other))
            text = "one configuration and seed, other numbers: %s is shown, not %s (finished %s)"
            log.warning(text, first.folder, other.folder, ends)


def curves(frame: pd.DataFrame, table: str = "epochs") -> pd.DataFrame:
    """Return the rows of `epochs.csv` or `iterations.csv` of all these runs, with the run's `folder` beside each.

    A last line that is not whole, as of a run that is still training, is left out. A run without that file has no rows.
    """
    tables = []
    for folder in frame.folder:
        path = Path(folder) / f"{table}.csv"
        if not path.exists():
            continue
        with opened(path) as file:
            content = file.read()
        lines = content[: content.rfind(b"\n") + 1]
        if not lines:
            continue
        try:
            rows = pd.read_csv(BytesIO(lines), dtype=float)
        except ValueError as error:  # a stranger's file can hold anything
            log.warning("left out: %s", printable(f"{path} ({one_line(error)})"))
            continue
        tables.append(rows.assign(folder=folder))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame({"folder": []})


def with_key(frame: pd.DataFrame, key: str) -> pd.DataFrame:
    """Return the frame with a column for a configuration key, read from each run's configuration.

    The values are numbers where all are, else text, empty for a run that has no such key. A frame that has a column of
    this name stays as it is.

    Raises:
        UserError: no run has the key.
    """
    if key in frame:
        return frame
    configs = [flat(read_config(Path(folder))) for folder in frame.folder]
    keys = set().union(*configs)
    if key not in keys:
        names = sorted(keys.union(frame.columns))
        raise UserError(f"{printable(key)}: no run has this key{did_you_mean(key, names)}")
    values = [config.get(key, "") for config in configs]
    is_numeric = all(type(value) in (int, float) for value in values)
    if not is_numeric:
        values = [value if value == "" else as_override(value) for value in values]
    return frame.assign(**{key: values})


def read_config(run_dir: Path) -> dict[str, Any]:
    """Return a run's configuration: that of its result, or of config.yaml where it has none yet."""
    result = read_result(run_dir)
    return harmless(result["config"] if result else read_recorded(run_dir / CONFIG, str(run_dir)))
