"""Read one run directory: its settings, its options and its results, as a row of the table of runs."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dfl_experiments.configuration.components import KINDS, NAME
from dfl_experiments.configuration.composition import (
    PLACES,
    changed,
    harmless,
    quoted,
    result_options,
)
from dfl_experiments.configuration.history import WITHOUT_EFFECT, with_current_names
from dfl_experiments.configuration.recorded import read_recorded
from dfl_experiments.errors import UserError
from dfl_experiments.running.result import DONE, flat, read_epochs, read_result, status_of
from dfl_experiments.running.run_directory import CONFIG

ENDED = ("finished", "collapsed")  # statuses of a run that has an accuracy
UNFIT = ("diverged", "collapsed", "stopped", "failed")  # statuses of a run that fails
GROUPS = (*PLACES, "optimizer", "schedule", "protocol")
ALL_IMAGES = "all"  # value in the column `limit` if a run trains on all training images
# Number of test images, for runs of early versions, which did not record it.
TEST_IMAGES = {
    "digits": 360,
    "mnist": 10_000,
    "fashion_mnist": 10_000,
    "cifar10": 10_000,
    "cifar100": 10_000,
    "tinyimagenet": 10_000,
}
PER_LAYER = ("cosine", "activation_rms", "dead", "norm_ratio", "zeros")
# Options that the column `setting` does not show. They have a column of their own, or do not change the results.
NOT_IN_SETTING = {
    "epochs",
    "precision",
    "seed",
    "smoke",
    "limit",
    "optimizer.lr",
    "optimizer.weight_decay",
    "alignment.every",
    "alignment.quantities",
    "memory_format",
    "protocol.accuracy",
    *(f"{group}.name" for group in GROUPS),
}
PLAIN_WORD = re.compile(r"[A-Za-z_][A-Za-z_\d-]*")


def record_of(run_dir: Path) -> dict[str, Any]:
    """Return the row of one run. Raises an error of any type if the directory holds no valid run."""
    result = harmless(read_result(run_dir) or {})
    config = with_current_names(result["config"] if result else recorded_config(run_dir))
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
        raise UserError(
            "epochs.csv is missing, but protocol.accuracy=best_validation needs its validation accuracies"
        )
    return {
        "folder": str(run_dir),
        "status": status,
        "reason": reason,
        **settings_of(config),
        "options": options_of(config, result),
        "method_options": method_options_of(config, result),
        **results_of(status, config, result, epochs),
        **layers_of(result),
    }


def read_config(run_dir: Path) -> dict[str, Any]:
    """Return the configuration in result.json, or in config.yaml if the run has no result yet."""
    result = read_result(run_dir)
    return harmless(result["config"]) if result else recorded_config(run_dir)


def recorded_config(run_dir: Path) -> dict[str, Any]:
    """Return the configuration in config.yaml."""
    return harmless(read_recorded(run_dir / CONFIG, str(run_dir)))


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns for the settings of a run."""
    return {
        "smoke": config.get("smoke") is not None,
        **{group: str(config[group]["name"]) for group in GROUPS},
        "rule": str(config["method"]["name"]),
        "epochs": int(config["epochs"]),
        "limit": ALL_IMAGES if config.get("limit") is None else str(config["limit"]),
        "precision": str(config.get("precision", "float32")),
        "lr": float(config["optimizer"]["lr"]),
        "weight_decay": float(config["optimizer"].get("weight_decay") or 0.0),
        "seed": int(config["seed"]),
        "images_per_batch": int(config["batch_size"]),
        "measured_every": int(config["alignment"]["every"]),
        "plugins": tuple(config.get("plugins") or ()),
    }


def options_of(config: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, str]:
    """Return the options that distinguish settings, as a mapping from key to text.

    Digests of the data and of the user's code count as options.
    """
    values = flat(result_options(config))
    values.pop("schedule._target_", None)
    by_rule = config["protocol"].get("activation_of") or {}
    if values.get("model.activation") == by_rule.get(config["method"]["name"], "relu"):
        values.pop("model.activation", None)  # the rule decides the activation
    options = {}
    for key, value in values.items():
        if key not in NOT_IN_SETTING and not key.startswith("method."):
            options[key] = as_text(value)
    if result.get("data"):
        options["data"] = result["data"]
    for group, digest in result.get("code", {}).items():
        if group in KINDS and group != "method":
            options[f"{group}.code"] = digest
    if result.get("delta_at"):
        options["delta_at"] = result["delta_at"]
    return options


def method_options_of(config: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, str]:
    """Return the options of the method, as a mapping from key to text, with a digest of the user's code."""
    values = result_options(config)["method"]
    feedback = config["method"].get("feedback")
    without_effect = WITHOUT_EFFECT.get(config["model"].get("_target_"), ())
    if feedback is not None and "method.feedback" not in without_effect:
        # added because `result_options` omits the value conv
        values = values | {"feedback": feedback}
    options = {key: as_text(value) for key, value in flat(values).items() if key != "name"}
    if "method" in result.get("code", {}):
        options["code"] = result["code"]["method"]
    return options


def results_of(
    status: str,
    config: Mapping[str, Any],
    result: Mapping[str, Any],
    epochs: Mapping[str, Sequence[float | None]],
) -> dict[str, Any]:
    """Return the columns for the results of a run."""
    accuracy = result.get("accuracy") if status in ENDED else None
    validation, validation_loss = validation_of(config, result, epochs)
    failed_to_learn = False
    if accuracy is not None and config.get("smoke") is None:
        accuracies = result.get("test_accuracy") or {}
        last = accuracies.get("last")
        num_classes = result.get("num_classes")
        chance = result.get("largest_class") or (1 / num_classes if num_classes else 0.0)
        failed_to_learn = has_failed_to_learn(
            accuracy if last is None else last, accuracies.get("best") or 0.0, chance
        )
    test_images = result.get("test_images")
    if test_images is None and config.get("smoke") is None:
        test_images = TEST_IMAGES.get(config["dataset"]["name"])
    return {
        "accuracy": number(accuracy),
        "validation_accuracy": number(validation),
        "validation_loss": number(validation_loss),
        "score": number(accuracy if validation is None else validation),
        "seconds": number(result.get("seconds")),
        "images_per_second": number(result.get("samples_per_second")),
        "device": result.get("device"),
        "finished_at": result.get("finished_at") or "",
        "test_images": number(test_images),
        "done_epochs": result.get("epochs", len(epochs.get("epoch", ()))),
        "exact_layers": tuple(sorted(set(result.get("cosine_by_construction", ())), key=int)),
        "unstable": instability_text(result.get("unstable")),
        "failed_to_learn": failed_to_learn,
        "fails": status in UNFIT or failed_to_learn,
    }


def layers_of(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the columns for the values of each layer, such as `cosine/1`."""
    columns = {}
    for name in PER_LAYER:
        for layer, value in (result.get(name) or {}).items():
            columns[f"{name}/{layer}"] = number(value)
    return columns


def number(value: float | None) -> float:
    """Return the value as a float. None becomes NaN."""
    return math.nan if value is None else float(value)


def validation_of(
    config: Mapping[str, Any],
    result: Mapping[str, Any],
    epochs: Mapping[str, Sequence[float | None]],
) -> tuple[float | None, float | None]:
    """Return the validation accuracy and the validation loss at the epoch that the protocol reports.

    A value that was not recorded is None.
    """
    if config["protocol"]["accuracy"] != "best_validation":
        return result.get("validation_accuracy"), result.get("validation_loss")
    accuracies = [number(value) for value in epochs.get("validation_accuracy", ())]
    measured = [value for value in accuracies if not math.isnan(value)]
    if not measured:
        return None, None
    best = accuracies.index(max(measured))
    losses = epochs.get("validation_loss")
    return accuracies[best], losses[best] if losses else None


def has_failed_to_learn(accuracy: float, best: float, chance: float) -> bool:
    """Return whether a run ends below 0.8 × its best test accuracy, or at chance.

    accuracy: test accuracy after the last epoch.
    best: highest test accuracy of all epochs.

    An accuracy is at chance if it is below c + min(c/2, 0.02, (1 − c)/5).

    chance: c, the accuracy of a network that always predicts the most frequent class. It is 1/K for K classes of the
        same size.
    """
    margin = min(chance / 2, 0.02, (1 - chance) / 5)
    return accuracy < max(0.8 * best, chance + margin)


def instability_text(unstable: Mapping[str, Any] | None) -> str:
    """Return the first instability of a run as text, empty if there is none; see `running/stability.py`."""
    if not unstable:
        return ""
    value, layer, epoch = unstable["value"], unstable["layer"], unstable["epoch"]
    problem = (
        f"{value:.0%} of units dead"
        if unstable["measure"] == "dead"
        else f"activations grew {value:.0f}-fold"
    )
    return f"layer {layer}, epoch {epoch}: {problem}"


def as_text(value: Any) -> str:
    """Return the value of an option as text: a plain word, a quoted text, or JSON with 1 for 1.0."""
    if isinstance(value, str):
        is_plain = PLAIN_WORD.fullmatch(value) and value.lower() not in ("null", "true", "false")
        return value if is_plain else quoted(value)
    value = changed(value, lambda x: int(x) if isinstance(x, float) and x.is_integer() else x)
    return json.dumps(value, separators=(",", ":"))
