"""Check the options of a run: their types, their ranges, and whether they fit together.

The options of a method, model, optimizer, schedule, augmentation or source are checked in `components`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Annotated, Any, Literal, Self

from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from dfl_experiments import ranges
from dfl_experiments.configuration.components import STRICT, Component, Name, component
from dfl_experiments.configuration.composition import CONF_DIR, config_digest, group_options, plain
from dfl_experiments.configuration.history import given
from dfl_experiments.configuration.refusals import flat_keys, refusal
from dfl_experiments.errors import UserError, shown
from dfl_experiments.measured import EXTRA_QUANTITIES

GROUPS = ("method", "model", "augmentation", "optimizer", "schedule")  # groups whose options `components` checks


class Options(BaseModel):
    """A part of the configuration. It refuses unknown options, and converts no types."""

    model_config = STRICT


class Alignment(Options):
    """The measurement of alignment."""

    every: ranges.Size
    """Iterations between two measurements; 0 for none."""
    quantities: list[str]
    """Extra quantities, from `measured.EXTRA_QUANTITIES`."""

    @field_validator("quantities")
    @classmethod
    def _known_and_each_once(cls, quantities: list[str]) -> list[str]:
        option = f"alignment.quantities={shown(quantities)}"
        for name in quantities:
            if name not in EXTRA_QUANTITIES:
                raise UserError(f"{option}: there is no {shown(name)}; there are {', '.join(EXTRA_QUANTITIES)}")
            if quantities.count(name) > 1:
                raise UserError(f"{option}: names {name} twice")
        return quantities


class Checkpoint(Options):
    """The checkpoints of a run."""

    every_seconds: ranges.NonNegative
    """Seconds between two checkpoints within an epoch. An epoch also ends with one, unless that takes too long."""
    keep: bool
    """Keep the last checkpoint when the run has finished."""


class Tracking(Options):
    """The options of W&B (see conf/tracking)."""

    mode: Literal["offline", "online", "disabled"]
    project: Annotated[str, Field(pattern=r"^[^/\\#?%:]{1,128}$")]
    entity: Annotated[str, Field(pattern=r"^[\w.-]{1,128}$")] | None
    tags: list[Annotated[str, Field(min_length=1, max_length=64)]]
    every: ranges.Count | None


class Dataset(Options):
    """A data set: its source, its normalisation, and the paper's settings for it (see conf/dataset)."""

    name: Name
    source: dict[str, Any]
    mean: Annotated[list[ranges.Finite], Field(min_length=1)]
    std: Annotated[list[ranges.Positive], Field(min_length=1)]
    standardise: bool = True
    """Standardise float features on the training split; `mean` and `std` are those of uint8 images."""
    epochs: ranges.Count
    fc_widths: ranges.Widths

    @model_validator(mode="after")
    def _as_many(self) -> Self:
        if len(self.mean) != len(self.std):
            raise UserError(
                f"dataset.std={shown(self.std)}: needs as many values as dataset.mean, which has {len(self.mean)}"
            )
        return self


class Model(Options):
    """The options that every model has (see conf/model); the others are those of its function."""

    init: ranges.WeightInit = "default"


class Optimizer(Options):
    """The options that every optimizer has (see conf/optimizer); the others are those of its class."""

    clip_norm: ranges.Positive | None = None
    feedback: dict[str, Any] = Field(default_factory=dict)


SHARED: dict[str, type[Options]] = {"model": Model, "optimizer": Optimizer}


class Protocol(Options):
    """The choices in which the paper's text, its published code and this project differ (see conf/protocol)."""

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
    """The options of conf/config.yaml that belong to the run as a whole."""

    dataset: Dataset
    protocol: Protocol
    tracking: Tracking
    plugins: list[Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*$")]]
    data_dir: Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]
    epochs: ranges.Count
    batch_size: ranges.Count
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    loss: ranges.LossName
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")]
    threads: ranges.Count | None
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
    def _goes_together(self) -> Self:
        if self.force and self.resume is not None:
            raise UserError("force=true: begins anew, but resume continues a run; choose one")
        if self.protocol.accuracy == "best_validation" and not self.validation_fraction:
            raise UserError("protocol.accuracy='best_validation': needs a validation split; set validation_fraction")
        return self


@dataclass(frozen=True)
class Configuration:
    """The checked configuration of a run."""

    values: dict[str, Any]
    """The whole configuration, resolved and plain, as config.yaml records it."""
    settings: Settings
    """The options of the run as a whole."""
    components: dict[str, Component]
    """By key: `GROUPS`, dataset.source, and optimizer.feedback where B's optimizer differs from W's."""
    weight_init: ranges.WeightInit
    """`model.init`."""
    clip_norm: float | None
    """`optimizer.clip_norm`."""

    @property
    def config_digest(self) -> str:
        """Return a digest of everything that decides what the run computes."""
        return config_digest(self.values)


def _options_beside(key: tuple[Any, ...]) -> list[str]:
    """Return the known options of the group that a key belongs to. key: its parts."""
    fields: dict[str, Any] = dict(Settings.model_fields)
    for part in key[:-1]:
        field = fields.get(part)
        fields = dict(getattr(field.annotation, "model_fields", {})) if field else {}
    return [*(GROUPS if len(key) == 1 else ()), *fields]


def _kind(source: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the options that identify the data set of a source."""
    return source.get("_target_"), source.get("classes")


@cache
def sources() -> dict[tuple[Any, Any], str]:
    """Return the names of the data sets in conf/, by the `_kind` of their sources."""
    name_of = {}
    for name in group_options("dataset"):
        node: Any = OmegaConf.load(CONF_DIR / "dataset" / f"{name}.yaml")
        name_of[_kind(node.source)] = name
    return name_of


def check_name(dataset: Dataset) -> None:
    """Raise `UserError` for a data set with the name of another one: tables would show it under that name."""
    known = sources()
    own = known.get(_kind(dataset.source))
    if dataset.name != own and (own not in (None, "folder", "arrays") or dataset.name in known.values()):
        raise UserError(
            f"dataset.name={shown(dataset.name)}: is not the name of this source; choose a data set with dataset=…"
        )


def check(cfg: DictConfig | Mapping[str, Any]) -> Configuration:
    """Return the checked configuration of a composed one. Nothing is written.

    Raises `UserError` with the key, the value and the choices, in one line.
    """
    values = plain(cfg)
    every_key = flat_keys(values)
    for group in (*GROUPS, "dataset"):
        node = values.get(group)
        if not isinstance(node, Mapping) or "name" not in node:
            what = "missing" if node is None else f"{shown(node)} is no option of the group"
            raise UserError(f"{group}: {what}; choose with {group}=…, there are {', '.join(group_options(group))}")
    try:
        settings = Settings.model_validate({key: value for key, value in values.items() if key not in GROUPS})
    except ValidationError as error:
        raise refusal(error, "", _options_beside(error.errors()[0]["loc"]), every_key) from None
    for plugin in settings.plugins:
        try:
            import_module(plugin)
        except ImportError as error:
            raise UserError(f"plugins=[{plugin}]: cannot be imported ({error})") from error
    nodes = {group: dict(values[group]) for group in GROUPS}
    shared: dict[str, Any] = {}
    for group, kind in SHARED.items():
        options = {name: nodes[group].pop(name) for name in kind.model_fields if name in nodes[group]}
        try:
            shared[group] = kind.model_validate(options)
        except ValidationError as error:
            raise refusal(error, group, list(kind.model_fields), every_key) from None
    if own := given(shared["optimizer"].feedback):
        nodes["optimizer.feedback"] = own if "_target_" in own else nodes["optimizer"] | own
    nodes["dataset.source"] = settings.dataset.source
    components = {}
    for key, node in nodes.items():
        components[key] = component(node, key, settings.plugins, every_key)
    warmup = components["schedule"].options.get("warmup", 0)
    if warmup >= settings.epochs:
        raise UserError(f"schedule.warmup={warmup}: must be shorter than epochs={settings.epochs}")
    check_name(settings.dataset)
    return Configuration(values, settings, components, shared["model"].init, shared["optimizer"].clip_norm)
