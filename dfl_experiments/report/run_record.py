"""Read one run directory: its settings, its options and its results, as a row of the table of runs."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from pandas import DataFrame

from dfl_experiments.configuration.components import KINDS, NAME
from dfl_experiments.configuration.composition import (
    PLACES,
    changed,
    harmless,
    integer_if_whole,
    quoted,
    result_options,
)
from dfl_experiments.configuration.history import WITHOUT_EFFECT, with_current_names
from dfl_experiments.configuration.recorded import read_recorded
from dfl_experiments.errors import UserError
from dfl_experiments.running.result import (
    flat,
    has_failed_to_learn,
    read_epochs,
    read_status,
)
from dfl_experiments.running.run_directory import CONFIG

Values = Mapping[str, Any]
ENDED = ("finished", "collapsed")  # statuses of a run that has an accuracy
# Statuses of a run that fails because of its rule. In a run with the status "failed", an error ended the program.
UNFIT = ("diverged", "collapsed", "stopped")
GROUPS = (*PLACES, "optimizer", "schedule", "protocol")
ALL_IMAGES = "all"  # value in the column `limit` if a run trains on all training images
# number of test images, for runs of early versions, which did not record it
TEST_IMAGES = dict.fromkeys(("mnist", "cifar10", "cifar100"), 10_000)
PER_LAYER = ("cosine", "activation_rms", "dead", "norm_ratio", "zeros")
# configuration keys whose column has another name
ALIASES = {
    "optimizer.lr": "lr",
    "optimizer.weight_decay": "weight_decay",
    "method.name": "rule",
    **{f"{group}.name": group for group in GROUPS},
}
# Options that the column `setting` does not show. They have a column of their own, or do not change the results.
NOT_IN_SETTING = {
    *ALIASES, "epochs", "precision", "seed", "smoke", "limit", "alignment.every", "alignment.quantities",
    "memory_format",
}  # fmt: skip
# Prefixes of the keys of B's own optimizer and schedule. They belong to the method, because many methods learn no B.
OF_FEEDBACK = ("optimizer.feedback.", "schedule.feedback.")
PLAIN_WORD = re.compile(r"(?!(?i:null|true|false)$)[A-Za-z_][A-Za-z_\d-]*")


def record_of(run_dir: Path) -> dict[str, Any]:
    """Return the row of one run. Raises an error of any type if the directory holds no valid run."""
    status, reason, result = harmless(read_status(run_dir))
    if status == "damaged":
        raise UserError(reason)
    result = result or {}
    recorded = result.get("config") or harmless(read_recorded(run_dir / CONFIG, str(run_dir)))
    config = with_current_names(recorded)
    for group in GROUPS:
        NAME.validate_python(config[group]["name"], strict=True)
    layers = {name: result.get(name) or {} for name in PER_LAYER}
    epochs = DataFrame(read_epochs(run_dir, result), dtype=float)
    needs_epochs = config["protocol"]["accuracy"] == "best_validation" and status == "finished"
    if needs_epochs and epochs.empty:
        text = "epochs.csv is missing, but protocol.accuracy=best_validation needs it"
        raise UserError(text)
    return {
        "folder": str(run_dir),
        "status": status,
        "reason": reason,
        **settings_of(config, result),
        "config": flat(config),
        "options": options_of(config, result),
        "method_options": method_options_of(config, result),
        **results_of(status, config, result),
        **validation_of(config, result, epochs),
        "done_epochs": result.get("epochs", len(epochs)),
        **{name: number(value) for name, value in flat(layers, "/").items()},
    }


def settings_of(config: Values, result: Values) -> dict[str, Any]:
    """Return the columns for the settings of a run."""
    # the optimizer's own default counts if the configuration sets no value
    weight_decay = config["optimizer"].get("weight_decay", result.get("weight_decay"))
    return {
        "smoke": config.get("smoke") is not None,
        **{group: str(config[group]["name"]) for group in GROUPS},
        "rule": str(config["method"]["name"]),
        "epochs": int(config["epochs"]),
        "limit": limit_of(config),
        "precision": str(config.get("precision", "float32")),
        "lr": float(config["optimizer"]["lr"]),
        "weight_decay": float(weight_decay or 0.0),
        "seed": int(config["seed"]),
        "images_per_batch": int(config["batch_size"]),
        "measured_every": int(config["alignment"]["every"]),
        "plugins": tuple(config.get("plugins") or ()),
    }


def limit_of(config: Values) -> str:
    """Return the largest number of training images that a run may use, as text. A smoke run limits them too."""
    limits = [config.get("limit"), config.get("smoke")]
    numbers = [limit for limit in limits if limit is not None]
    return str(min(numbers)) if numbers else ALL_IMAGES


def options_of(config: Values, result: Values) -> dict[str, str]:
    """Return the options that distinguish settings, and the digests of the data and of the user's code, as texts."""
    values = flat(result_options(config))
    by_rule = config["protocol"].get("activation_of") or {}
    rule = config["method"]["name"]
    if values.get("model.activation") == by_rule.get(rule, "relu"):
        values.pop("model.activation", None)  # the rule decides the activation
    options = {}
    for key, value in values.items():
        is_of_method = key.startswith(("method.", *OF_FEEDBACK))
        if key not in NOT_IN_SETTING and not is_of_method:
            options[key] = as_text(value)
    for group, digest in result.get("code", {}).items():
        if group in KINDS and group != "method":
            options[f"{group}.code"] = digest
    if result.get("data"):
        options["data"] = result["data"]
    has_built_net = bool(result.get("parameters"))  # else δ's place is unknown
    if has_built_net:
        options["delta_at"] = result.get("delta_at", "pre-activation")
    return options


def method_options_of(config: Values, result: Values) -> dict[str, str]:
    """Return the options of the method and of B's own optimizer and schedule, and the digest of the user's code."""
    values = flat(config["method"])
    values.pop("name")
    net = config["model"].get("_target_")
    if "method.feedback" in WITHOUT_EFFECT.get(net, ()):
        values.pop("feedback", None)
    for key, value in flat(result_options(config)).items():
        if key.startswith(OF_FEEDBACK):
            values[key] = value
    options = {key: as_text(value) for key, value in values.items()}
    if "method" in result.get("code", {}):
        options["code"] = result["code"]["method"]
    return options


def results_of(status: str, config: Values, result: Values) -> dict[str, Any]:
    """Return the columns for the results of a run."""
    accuracy = result.get("accuracy") if status in ENDED else None
    failed_to_learn = accuracy is not None and has_failed_to_learn(result)
    is_whole = config.get("smoke") is None
    known_images = TEST_IMAGES.get(config["dataset"]["name"]) if is_whole else None
    return {
        "accuracy": number(accuracy),
        "balanced_accuracy": balanced(result) if status in ENDED else math.nan,
        "seconds": number(result.get("seconds")),
        "images_per_second": number(result.get("samples_per_second")),
        "device": result.get("device"),
        "finished_at": result.get("finished_at") or "",
        "test_images": number(result.get("test_images") or known_images),
        "exact_layers": tuple(sorted(set(result.get("cosine_by_construction", ())), key=int)),
        "boundaries": tuple(result.get("boundaries", ())),
        "unstable": instability_text(result.get("unstable")),
        "failed_to_learn": failed_to_learn,
        "fails": status in UNFIT or failed_to_learn,
        "has_ended": status in (*ENDED, *UNFIT),
    }


def balanced(result: Values) -> float:
    """Return the mean of the classes' test accuracies after the last epoch; NaN if a run did not record them."""
    accuracies = result.get("class_accuracy", {}).values()
    present = [value for value in accuracies if value is not None]
    return mean(present) if present else math.nan


def number(value: float | None) -> float:
    """Return the value as a float. None becomes NaN."""
    return math.nan if value is None else float(value)


def validation_of(config: Values, result: Values, epochs: DataFrame) -> dict[str, float]:
    """Return the validation accuracy and loss at the epoch that the protocol reports; NaN if not recorded."""
    names = ["validation_accuracy", "validation_loss"]
    kind = config["protocol"]["accuracy"]
    measured = epochs.reindex(columns=["epoch", *names]).dropna(subset="validation_accuracy")
    if kind == "best_validation":
        best = measured.nlargest(1, "validation_accuracy")
        return best[names].max().to_dict()
    test_accuracy = result.get("test_accuracy") or {}
    reported = measured[measured.epoch == test_accuracy.get("best_epoch")]
    if kind == "best_test" and not reported.empty:
        return reported[names].iloc[0].to_dict()
    return {name: number(result.get(name)) for name in names}


def instability_text(unstable: Values | None) -> str:
    """Return the first instability of a run as text, empty if there is none; see `running/stability.py`."""
    if not unstable:
        return ""
    value = unstable["value"]
    problem = f"activations grew {value:.0f}-fold"
    if unstable["measure"] == "dead":
        problem = f"{value:.0%} of units dead"
    return f"layer {unstable['layer']}, epoch {unstable['epoch']}: {problem}"


def as_text(value: Any) -> str:
    """Return the value of an option as text: a plain word, a quoted text, or JSON with 1 for 1.0."""
    if isinstance(value, str):
        return value if PLAIN_WORD.fullmatch(value) else quoted(value)
    return json.dumps(changed(value, integer_if_whole), separators=(",", ":"))
