"""The options of a run, typed and in range, and the one object that a checked configuration is from then on.

Options of a method, model, optimizer, augmentation or source are their constructors' own: `components` checks those.
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
from dfl_experiments.configuration.composition import CONF_DIR, group_options, plain, science
from dfl_experiments.configuration.refusals import flat_keys, refusal
from dfl_experiments.errors import UserError, shown
from dfl_experiments.measured import EXTRA_QUANTITIES

GROUPS = ("method", "model", "augmentation", "optimizer")  # those whose options are their target's own


class Options(BaseModel):
    """A part of the configuration: nothing unknown, nothing converted."""

    model_config = STRICT


class Alignment(Options):
    """every: iterations between two measurements, 0 for none; quantities: what is measured beside the δ-cosine."""

    every: ranges.Size
    quantities: list[str]

    @field_validator("quantities")
    @classmethod
    def _known_and_each_once(cls, quantities: list[str]) -> list[str]:
        said, there = f"alignment.quantities={shown(quantities)}", ", ".join(EXTRA_QUANTITIES)
        for name in quantities:
            if name not in EXTRA_QUANTITIES:
                raise UserError(f"{said}: there is no {shown(name)}; there are {there}")
            if quantities.count(name) > 1:
                raise UserError(f"{said}: names {name} twice")
        return quantities


class Checkpoint(Options):
    """every_seconds: between two checkpoints within an epoch; epochs end with one where that costs little time.

    keep: the last one, when the run has come to its end.
    """

    every_seconds: ranges.NonNegative
    keep: bool


class Tracking(Options):
    """Where W&B keeps a run, and of how many iterations it gets one (see conf/tracking)."""

    mode: Literal["offline", "online", "disabled"]
    project: Annotated[str, Field(pattern=r"^[^/\\#?%:]{1,128}$")]
    entity: Annotated[str, Field(pattern=r"^[\w.-]{1,128}$")] | None
    tags: list[Annotated[str, Field(min_length=1, max_length=64)]]
    every: ranges.Count | None


class Dataset(Options):
    """A data set's source, its normalisation, and what the paper does with it (see conf/dataset)."""

    name: Name
    source: dict[str, Any]
    mean: Annotated[list[ranges.Finite], Field(min_length=1)]
    std: Annotated[list[ranges.Positive], Field(min_length=1)]
    epochs: ranges.Count
    fc_widths: ranges.Widths

    @model_validator(mode="after")
    def _as_many(self) -> Self:
        if len(self.mean) != len(self.std):
            raise UserError(f"dataset.std={shown(self.std)}: not as long as dataset.mean, which has {len(self.mean)}")
        return self


class Protocol(Options):
    """Every choice in which the paper's text, its published code and this project differ (see conf/protocol)."""

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
    """The run-level options of conf/config.yaml."""

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
            raise UserError("force=true: begins anew, resume goes on; choose one")
        if self.protocol.accuracy == "best_validation" and not self.validation_fraction:
            raise UserError("protocol.accuracy='best_validation': needs a validation split; set validation_fraction")
        return self


@dataclass(frozen=True)
class Configuration:
    """A run, composed and checked: nobody composes or checks it again.

    values: all of it, resolved and plain, as config.yaml records it; settings: the run-level options; components: what
    is built, by its place: method, model, augmentation, optimizer and dataset.source.
    """

    values: dict[str, Any]
    settings: Settings
    components: dict[str, Component]

    @property
    def science(self) -> str:
        """A digest of everything that decides what the run computes."""
        return science(self.values)


def _options_beside(key: tuple[Any, ...]) -> list[str]:
    """The options that there are where this key is."""
    model: Any = Settings
    for part in key[:-1]:
        model = model.model_fields[part].annotation if part in getattr(model, "model_fields", ()) else None
    return [*(GROUPS if len(key) == 1 else ()), *getattr(model, "model_fields", ())]


def _kind(source: Mapping[str, Any]) -> tuple[Any, Any]:
    return source.get("_target_"), source.get("classes")


@cache
def sources() -> dict[tuple[Any, Any], str]:
    """The data sets of conf/, by what their sources are."""
    nodes: Any = {name: OmegaConf.load(CONF_DIR / "dataset" / f"{name}.yaml") for name in group_options("dataset")}
    return {_kind(node.source): name for name, node in nodes.items()}


def named_as_it_is(dataset: Dataset) -> None:
    """Raise `UserError` for a data set under the name of another one, which tables would show it as."""
    known = sources()
    own = known.get(_kind(dataset.source))
    if dataset.name != own and (own not in (None, "folder") or dataset.name in known.values()):
        raise UserError(f"dataset.name={shown(dataset.name)}: is not what this source is; choose one with dataset=…")


def check(cfg: DictConfig | Mapping[str, Any]) -> Configuration:
    """The checked configuration.

    Raises `UserError`, one line naming the key, the value and the choices; nothing is read or written.
    """
    values = plain(cfg)
    every_key = flat_keys(values)
    for group in (*GROUPS, "dataset"):
        node = values.get(group)
        if not isinstance(node, Mapping) or "name" not in node:
            what = "missing" if node is None else f"is no choice of the group but {shown(node)}"
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
    nodes = {**{group: values[group] for group in GROUPS}, "dataset.source": settings.dataset.source}
    components = {place: component(node, place, settings.plugins, every_key) for place, node in nodes.items()}
    named_as_it_is(settings.dataset)
    return Configuration(values, settings, components)
