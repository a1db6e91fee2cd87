"""Translate the configurations that older versions recorded. Since then, options were renamed, moved and added.

The digest of a recorded run stays valid, because `composition.config_digest` uses the older names of options. The
digest leaves out an added option if the option has the value that all runs used before the option existed.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

# older name of an option: name today
RENAMED = {"method.held": "method.fixed_blocks"}
# options that moved from the optimizer to the schedule
MOVED = {"optimizer.milestones": "schedule.milestones", "optimizer.decay": "schedule.decay"}
# older versions had only this schedule, and did not record it
STEP = "dfl_experiments.schedules.Step"
# for each option that was added later, the value that all runs used before the option existed
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
# as `VALUES_BEFORE`, but for options that only one model has; the key is the model's `_target_`
MODEL_VALUES_BEFORE = {"dfl_experiments.models.conv3": {"model.activation": "relu"}}
# Options that have no effect in a model; the key is the model's `_target_`. In a fully connected net every h_i is a
# vector, so there is only one memory format and one shape of B.
WITHOUT_EFFECT = {"dfl_experiments.models.fc": ("memory_format", "method.feedback")}


def with_current_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recorded configuration with today's names of its options."""
    if "schedule" in config:
        return _renamed(config, RENAMED)
    schedule = {"name": "step", "_target_": STEP}
    return _renamed({**config, "schedule": schedule}, RENAMED | MOVED)


def with_recorded_names(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options under the names that older versions used. options: result of `without_unrecorded_options`."""
    has_default_schedule = "_target_" not in options.get("schedule", {})
    has_own_milestones = "milestones" in options["optimizer"] or "decay" in options["optimizer"]
    names = RENAMED
    if has_default_schedule and not has_own_milestones:
        names = RENAMED | MOVED
    older_names = {new: old for old, new in names.items()}
    result = _renamed(options, older_names)
    if not result.get("schedule"):
        result.pop("schedule", None)
    return result


def _renamed(config: Mapping[str, Any], new_names: Mapping[str, str]) -> dict[str, Any]:
    """Return a configuration with new names for some options. A new name may move the option to another group."""
    result = deepcopy(dict(config))
    for old, new in new_names.items():
        group, option = old.split(".")
        new_group, new_option = new.split(".")
        options = result.get(group)
        if isinstance(options, dict) and option in options:
            result.setdefault(new_group, {})[new_option] = options.pop(option)
    return result


def without_unrecorded_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without the added options that change nothing.

    An option that was added after the first version changes nothing in two cases: it has the value that all runs used
    before the option existed, or it has no effect in this model.
    """
    result = deepcopy(dict(config))
    # the name does not change what a run computes
    result.get("schedule", {}).pop("name", None)
    feedback = result["optimizer"].get("feedback")
    if isinstance(feedback, Mapping):
        result["optimizer"]["feedback"] = feedback_overrides(feedback)
    target = config["model"].get("_target_")
    values_before = VALUES_BEFORE | MODEL_VALUES_BEFORE.get(target, {})
    without_effect = WITHOUT_EFFECT.get(target, ())
    for key in {*values_before, *without_effect}:
        group, _, option = key.rpartition(".")
        options = result.get(group, {}) if group else result
        if key in without_effect or options.get(option) == values_before[key]:
            options.pop(option, None)
    return result


def feedback_overrides(feedback: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that are set for B's optimizer, without those that are None.

    B's optimizer takes the other options from W's optimizer.
    feedback: the options in `optimizer.feedback`.
    """
    return {
        key: value for key, value in feedback.items() if value is not None and key != "feedback"
    }
