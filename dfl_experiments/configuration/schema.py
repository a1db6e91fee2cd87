"""Check the types and ranges of a run's options; `components` checks the options of methods, models and so on."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any, Literal, Self

from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from dfl_experiments import ranges
from dfl_experiments.configuration.components import (
    STRICT,
    Component,
    Name,
    component,
    options_of,
)
from dfl_experiments.configuration.composition import (
    CONF_DIR,
    config_digest,
    group_options,
    plain,
)
from dfl_experiments.configuration.history import feedback_overrides
from dfl_experiments.configuration.refusals import flat_keys, refusal
from dfl_experiments.errors import UserError, shown
from dfl_experiments.measured import EXTRA_QUANTITIES
from dfl_experiments.ranges import matching

# `components` checks the options of these groups
GROUPS = ("method", "model", "augmentation", "optimizer", "schedule")
SCHEDULES = ("schedule", "schedule.feedback")
ModuleName = Annotated[str, matching(r"[A-Za-z_][\w.]*", "the name of a module, such as my_rules")]
Folder = Annotated[str, matching(r"[^\x00]+", "the path of a folder")]
DEVICES = "auto, cpu, mps, cuda, or for one GPU cuda:0"
Device = Annotated[str, matching(r"auto|cpu|mps|cuda(:\d+)?", DEVICES)]
Project = Annotated[str, matching(r"[^/\\#?%:]{1,128}", "1 to 128 characters without / \\ # ? % :")]
Entity = Annotated[str, matching(r"[\w.-]{1,128}", "1 to 128 letters, digits and . _ -")]


class Options(BaseModel):
    """A part of the configuration. An unknown option is an error. A value of a wrong type is also an error."""

    model_config = STRICT


class Alignment(Options):
    """Options of the alignment measurement."""

    every: ranges.Size
    """Iterations between two measurements; 0: never measure."""
    quantities: list[str]
    """Extra quantities, from `measured.EXTRA_QUANTITIES`."""

    @field_validator("quantities")
    @classmethod
    def _are_known_and_unique(cls, quantities: list[str]) -> list[str]:
        option = f"alignment.quantities={shown(quantities)}"
        for name in quantities:
            if name not in EXTRA_QUANTITIES:
                choices = ", ".join(EXTRA_QUANTITIES)
                raise UserError(f"{option}: {shown(name)} is unknown; there are {choices}")
            if quantities.count(name) > 1:
                raise UserError(f"{option}: lists {name} twice")
        return quantities


class Checkpoint(Options):
    """Options of checkpoints."""

    every_seconds: ranges.NonNegative
    """Smallest number of seconds between two checkpoints within an epoch.

    A checkpoint is also written at the end of an epoch, if writing takes at most 5 % of the time.
    """
    keep: bool
    """Keep the last checkpoint after the run has finished."""


class Tracking(Options):
    """Options of W&B and TensorBoard (see conf/tracking)."""

    mode: Literal["offline", "online", "disabled", "tensorboard"]
    project: Project
    entity: Entity | None
    name: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    tags: list[Annotated[str, Field(min_length=1, max_length=64)]]
    every: ranges.Count | None


class Dataset(Options):
    """Options of a data set: its source, its normalisation, and the paper's settings for it (see conf/dataset)."""

    name: Name
    source: dict[str, Any]
    mean: Annotated[list[ranges.Probability], Field(min_length=1)]
    """Mean of each channel; pixels are from 0 to 1."""
    std: Annotated[list[ranges.Positive], Field(min_length=1)]
    standardise: bool = True
    """Standardise float features with the statistics of the training split. Images use `mean` and `std` instead."""
    epochs: ranges.Count
    fc_widths: ranges.Widths

    @model_validator(mode="after")
    def _has_std_for_each_mean(self) -> Self:
        if len(self.mean) != len(self.std):
            option = f"dataset.std={shown(self.std)}"
            raise UserError(
                f"{option}: must be as long as dataset.mean, which has {len(self.mean)}"
            )
        return self


class Model(Options):
    """Options that all models have (see conf/model). A model's function defines its other options."""

    init: ranges.WeightInit = "default"


class Optimizer(Options):
    """Options that all optimizers have (see conf/optimizer). An optimizer's class defines its other options."""

    clip_norm: ranges.Positive | None = None
    feedback: dict[str, Any] = Field(default_factory=dict)


class Schedule(Options):
    """Options that all schedules have (see conf/schedule). A schedule's class defines its other options."""

    feedback: dict[str, Any] | None = None


SHARED: dict[str, type[Options]] = {"model": Model, "optimizer": Optimizer, "schedule": Schedule}


class Protocol(Options):
    """Choices in which the paper's text, the published code and this project differ (see conf/protocol)."""

    name: Name
    conv3_downsampling: ranges.Downsampling
    local_pooling: ranges.LocalPooling
    local_reduction: ranges.LocalReduction
    dfa_init: ranges.FeedbackInit
    las_init: ranges.FeedbackInit
    fa_init: ranges.SequentialInit
    dfa_top: ranges.Top
    resnet18_skip: ranges.Skip
    batch_norm_updates: ranges.Passes
    validation_fraction: ranges.Fraction
    accuracy: Literal["last", "best_test", "best_validation"]
    stop_untrainable: bool
    stop_collapsed: bool = False
    local_pooling_of: dict[str, ranges.LocalPooling] | None = None
    batch_norm_updates_of: dict[str, ranges.Passes] | None = None
    batch_norm_updates_top_of: dict[str, ranges.Passes] | None = None
    activation_of: dict[str, ranges.Activation] | None = None


class Settings(Options):
    """The options of conf/config.yaml, without the groups that `components` checks."""

    dataset: Dataset
    protocol: Protocol
    tracking: Tracking
    plugins: list[ModuleName]
    data_dir: Folder
    epochs: ranges.Count
    batch_size: ranges.Count
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    loss: ranges.LossName
    device: Device
    threads: ranges.Threads | None
    precision: ranges.Precision
    memory_format: ranges.MemoryFormat
    cuda_graph: bool
    deterministic: bool
    limit: ranges.Count | None
    smoke: ranges.Count | None
    validation_fraction: ranges.Fraction
    validation_split: ranges.ValidationSplit
    stop_untrainable: bool
    stop_collapsed: bool
    alignment: Alignment
    checkpoint: Checkpoint
    sweep: Name
    resume: str | None
    repeat: str | None
    force: bool

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.force and self.resume is not None:
            raise UserError("force=true: starts a new run, but resume continues a run; choose one")
        if self.protocol.accuracy == "best_validation" and not self.validation_fraction:
            raise UserError(
                "protocol.accuracy='best_validation': needs a validation split; set validation_fraction"
            )
        return self


@dataclass(frozen=True)
class Configuration:
    """The checked configuration of a run."""

    values: dict[str, Any]
    """All options as plain values, as config.yaml records them."""
    settings: Settings
    """The options that do not belong to a component."""
    components: dict[str, Component]
    """Components by key: `GROUPS`, dataset.source, and optimizer.feedback and schedule.feedback if they are set."""
    weight_init: ranges.WeightInit
    """The option `model.init`."""
    clip_norm: float | None
    """The option `optimizer.clip_norm`."""

    @property
    def config_digest(self) -> str:
        """Return a digest of everything that decides what the run computes, except the content of the data."""
        return config_digest(self.values)


def _options_of_group(key: tuple[Any, ...]) -> list[str]:
    """Return the known options of the group that contains a key. key: the parts of the key's full name."""
    if len(key) < 2:
        return [*GROUPS, *Settings.model_fields]
    group = Settings.model_fields.get(key[0])
    if group is None:
        return []
    return list(getattr(group.annotation, "model_fields", ()))


def check_name(dataset: Dataset) -> None:
    """Raise `UserError` if other data have the name of a data set in conf/, because tables would confuse the two."""
    if dataset.name not in group_options("dataset"):
        return
    named: Any = OmegaConf.load(CONF_DIR / "dataset" / f"{dataset.name}.yaml")
    keys = ("_target_", "classes")
    if any(dataset.source.get(key) != named.source.get(key) for key in keys):
        problem = "this name does not belong to the data source; choose a data set with dataset=…"
        raise UserError(f"dataset.name={shown(dataset.name)}: {problem}")


def with_deleted_options(group: str, node: Mapping[str, Any], target: Any) -> dict[str, Any]:
    """Return a group with the options of its file in conf/ that a command such as `~method.init` deleted.

    The run uses the default of the class for such an option. It is recorded, because a report reads a missing option as
    the value in the file.

    target: the class or function that the group names.
    """
    result = dict(node)
    path = CONF_DIR / group / f"{node['name']}.yaml"
    if not path.exists():
        return result
    fields = dict(options_of(target, group).model_fields)
    if group in SHARED:
        fields |= SHARED[group].model_fields
    file: Any = OmegaConf.load(path)
    for name in file:
        if name in result or name not in fields:
            continue
        default = fields[name].get_default(call_default_factory=True)
        if isinstance(default, tuple):
            default = list(default)
        # PyTorch's own default of an optimizer's option is a marker without a value
        if isinstance(default, bool | int | float | str | list | dict | None):
            result[name] = default
    return result


def _import_plugin(plugin: str) -> None:
    """Import a package or a file of the user, so that `_target_` can name its classes.

    Raises `UserError` if Python does not find it or cannot read it, or if one of its own imports fails.
    """
    try:
        import_module(plugin)
    except (ImportError, SyntaxError) as error:
        problem = f"cannot be imported ({error})"
        if isinstance(error, ModuleNotFoundError) and error.name == plugin.split(".")[0]:
            problem += "; add its folder to PYTHONPATH, for example: export PYTHONPATH=."
        raise UserError(f"plugins=[{plugin}]: {problem}") from error


def check(cfg: DictConfig | Mapping[str, Any]) -> Configuration:
    """Check a composed configuration and return it with its components. Nothing is written.

    Raises `UserError` with the key, the value and the choices, in one line.
    """
    values = plain(cfg)
    every_key = flat_keys(values)
    for group in (*GROUPS, "dataset"):
        node = values.get(group)
        if not isinstance(node, Mapping) or "name" not in node:
            problem = "missing" if node is None else f"{shown(node)} is not an option of this group"
            raise UserError(
                f"{group}: {problem}; set {group}=…, there are {', '.join(group_options(group))}"
            )
    options = {key: value for key, value in values.items() if key not in GROUPS}
    try:
        settings = Settings.model_validate(options)
    except ValidationError as error:
        raise refusal(error, "", _options_of_group(error.errors()[0]["loc"]), every_key) from None
    for plugin in settings.plugins:
        _import_plugin(plugin)
    nodes = {group: dict(values[group]) for group in GROUPS}
    shared: dict[str, Any] = {}
    for group, kind in SHARED.items():
        options = {
            name: nodes[group].pop(name) for name in kind.model_fields if name in nodes[group]
        }
        try:
            shared[group] = kind.model_validate(options)
        except ValidationError as error:
            raise refusal(error, group, list(kind.model_fields), every_key) from None
    feedback = feedback_overrides(shared["optimizer"].feedback)
    if feedback and "_target_" not in feedback:
        feedback = nodes["optimizer"] | feedback
    if feedback:
        nodes["optimizer.feedback"] = feedback
    if shared["schedule"].feedback:
        nodes["schedule.feedback"] = shared["schedule"].feedback
    nodes["dataset.source"] = settings.dataset.source
    components = {}
    for key, node in nodes.items():
        components[key] = component(node, key, settings.plugins, every_key)
    for group in GROUPS:
        values[group] = with_deleted_options(group, values[group], components[group].target)
    for key in SCHEDULES:
        warmup = components[key].options.get("warmup", 0) if key in components else 0
        if warmup >= settings.epochs:
            raise UserError(f"{key}.warmup={warmup}: must be shorter than epochs={settings.epochs}")
    check_name(settings.dataset)
    return Configuration(
        values, settings, components, shared["model"].init, shared["optimizer"].clip_norm
    )
