"""Tables for configurations that older versions recorded: renamed options, and options that did not exist then.

A recorded run keeps its digest: `composition.config_digest` uses the recorded names, and omits an option that has the
value of the runs recorded before the option existed.
"""

from collections.abc import Mapping
from typing import Any

# the recorded name of an option, and its name today
RENAMED = {"method.held": "method.fixed_blocks"}
# options that were the optimizer's before there were schedules
MOVED = {"optimizer.milestones": "schedule.milestones", "optimizer.decay": "schedule.decay"}
STEP = "dfl_experiments.schedules.Step"  # the schedule of all runs then
# the value that every run had before the option existed
VALUES_BEFORE: dict[str, Any] = {
    "memory_format": "contiguous",
    "alignment.quantities": [],
    "method.feedback": "conv",
    "model.init": "default",
    "validation_split": "random",
    "optimizer.clip_norm": None,
    "optimizer.feedback": {},
    "schedule._target_": STEP,
    "schedule.warmup": 0,
    "schedule.per": "epoch",
}
# the same for the models with this `_target_` only
MODEL_VALUES_BEFORE = {"dfl_experiments.models.conv3": {"model.activation": "relu"}}
# options that change nothing in models with this `_target_`: hidden vectors have one memory format and one shape of B
WITHOUT_EFFECT = {"dfl_experiments.models.fc": ("memory_format", "method.feedback")}


def with_current_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recorded configuration with today's names of its options."""
    if "schedule" in config:
        return _renamed(config, RENAMED)
    return _renamed({**config, "schedule": {"name": "step", "_target_": STEP}}, RENAMED | MOVED)


def with_recorded_names(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without unrecorded options, with the names that its options were first recorded with."""
    is_step = "_target_" not in options.get("schedule", {}) and not {"milestones", "decay"} & {*options["optimizer"]}
    names = RENAMED | MOVED if is_step else RENAMED
    result = _renamed(options, {new: old for old, new in names.items()})
    if not result.get("schedule"):
        result.pop("schedule", None)
    return result


def _renamed(config: Mapping[str, Any], new_names: Mapping[str, str]) -> dict[str, Any]:
    """Return a configuration with new names for some options, which may move to another group."""
    result = {key: dict(value) if isinstance(value, Mapping) else value for key, value in config.items()}
    for old, new in new_names.items():
        (group, option), (new_group, new_option) = old.split("."), new.split(".")
        options = result.get(group)
        if isinstance(options, dict) and option in options:
            result.setdefault(new_group, {})[new_option] = options.pop(option)
    return result


def without_unrecorded_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a plain configuration without options that older runs lack, where they have the value of those runs."""
    result = {key: dict(value) if isinstance(value, dict) else value for key, value in config.items()}
    result.get("schedule", {}).pop("name", None)  # its class and its options say what it computes
    if isinstance(feedback := result["optimizer"].get("feedback"), Mapping):
        result["optimizer"]["feedback"] = given(feedback)
    target = config["model"].get("_target_")
    values_before = {**VALUES_BEFORE, **MODEL_VALUES_BEFORE.get(target, {})}
    for key in {*values_before, *WITHOUT_EFFECT.get(target, ())}:
        group, _, option = key.rpartition(".")
        options = result.get(group, {}) if group else result
        if key in WITHOUT_EFFECT.get(target, ()) or options.get(option) == values_before[key]:
            options.pop(option, None)
    return result


def given(feedback: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `optimizer.feedback` that are not as those of W's optimizer."""
    return {key: value for key, value in feedback.items() if value is not None and key != "feedback"}
