"""The options that no group's constructor has, the check of a whole configuration, and the name of a sweep's point."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, TypeVar, cast, get_type_hints

from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from dfl_experiments.config import (
    Count,
    Fraction,
    NonNegative,
    Positive,
    Size,
    UserError,
    Widths,
    check_node,
    checked,
    plain,
)

DEVICE = r"auto|cpu|mps|cuda(:\d+)?"
# the groups that are built, and what the program itself gives to each
GROUPS = {
    "method": ("net", "num_classes", "loss"),
    "model": ("input_shape", "num_classes"),
    "augmentation": (),
    "optimizer": (),
}
# what changes where or how a run is watched, not what it computes
NOT_SCIENTIFIC = ("data_dir", "device", "checkpoint", "tracking", "sweep", "protocol")

Name = Annotated[str, Field(pattern=r"^[\w.+-]+$")]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Options = TypeVar("Options")


@dataclass(frozen=True)
class Alignment:
    """every: iterations between two measurements, 0 for none."""

    every: Size


@dataclass(frozen=True)
class Checkpoint:
    """every_seconds: the least time between two checkpoints."""

    every_seconds: NonNegative


@dataclass(frozen=True)
class Tracking:
    """Where W&B keeps a run (see conf/tracking)."""

    mode: Literal["offline", "online", "disabled"]
    project: Annotated[str, Field(pattern=r"^[^/\\#?%:]{1,128}$")]
    entity: str | None
    tags: list[Annotated[str, Field(min_length=1, max_length=64)]]


@dataclass(frozen=True)
class Dataset:
    """A data set's source, its normalisation, and what the paper does with it (see conf/dataset)."""

    name: Name
    source: dict[str, Any]
    mean: Annotated[list[Finite], Field(min_length=1)]
    std: Annotated[list[Positive], Field(min_length=1)]
    epochs: Count
    fc_widths: Widths


@dataclass(frozen=True)
class Protocol:
    """Every choice in which the paper's text, its published code and this project differ (see conf/protocol)."""

    name: Name
    conv3_downsampling: Literal["max_pool", "stride"]
    local_pooling: Literal["average", "max"]
    local_reduction: Literal["sum", "mean"]
    dfa_init: Literal["product", "kaiming"]
    las_init: Literal["product", "kaiming"]
    dfa_top: Literal["backprop", "direct"]
    resnet18_skip: Literal["cut", "leak"]
    batch_norm_updates: Literal[1, 2]
    validation_fraction: Fraction
    accuracy: Literal["last", "best_test", "best_validation"]
    stop_untrainable: bool
    local_pooling_of: dict[str, Literal["average", "max"]] | None = None
    batch_norm_updates_of: dict[str, Literal[1, 2]] | None = None


@dataclass(frozen=True)
class Settings:
    """The run-level options of conf/config.yaml, typed and in range."""

    dataset: Dataset
    protocol: Protocol
    tracking: Tracking
    data_dir: Annotated[str, Field(min_length=1)]
    epochs: Count
    batch_size: Count
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    loss: Literal["cross_entropy", "squared_error"]
    device: Annotated[str, Field(pattern=f"^({DEVICE})$")]
    deterministic: bool
    limit: Count | None
    validation_fraction: Fraction
    stop_untrainable: bool
    alignment: Alignment
    checkpoint: Checkpoint
    sweep: Name


def options(kind: type[Options], values: Any, where: str = "") -> Options:
    """The dataclass of these values, nested ones included. Raises `UserError` for unknown, missing or wrong ones."""
    prefix = f"{where}." if where else ""
    hints = get_type_hints(kind, include_extras=True)
    if not isinstance(values, Mapping):
        raise UserError(f"{where}={values!r}: has options of its own: {', '.join(hints)}")
    for key in values:
        if key not in hints:
            raise UserError(f"{prefix}{key}: no such option; there are {', '.join(hints)}")
    for field in fields(cast(Any, kind)):
        if field.name not in values and field.default is MISSING:
            raise UserError(f"{prefix}{field.name}: missing")
    return kind(**{
        key: options(hints[key], value, f"{prefix}{key}")
        if is_dataclass(hints[key])
        else checked(hints[key], value, f"{prefix}{key}")
        for key, value in values.items()
    })  # fmt: skip


def without_hydra(cfg: DictConfig) -> DictConfig:
    """The configuration without Hydra's own node, which before a job cannot be resolved yet."""
    return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])


def check(cfg: DictConfig) -> Settings:
    """The run-level options of a composed configuration, every group's options checked on the way.

    Raises `UserError`, one line naming the key, the value and the choices; nothing is built, read or written.
    """
    values = plain(without_hydra(cfg))
    for group, given in GROUPS.items():
        node = values.pop(group, None)
        if not isinstance(node, Mapping) or "name" not in node:
            raise UserError(f"{group}: missing; choose one with {group}=…")
        checked(Name, node["name"], f"{group}.name")
        check_node(node, group, given)
    settings = options(Settings, values)
    check_node(settings.dataset.source, "dataset.source")
    if settings.protocol.accuracy == "best_validation" and not settings.validation_fraction:
        raise UserError("protocol.accuracy='best_validation': there is no validation split; set validation_fraction")
    return settings


def scientific(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration that decides what a run computes and what it is called by."""
    values = {key: value for key, value in plain(without_hydra(cfg)).items() if key not in NOT_SCIENTIFIC}
    values["dataset"] = {key: value for key, value in values["dataset"].items() if key not in ("epochs", "fc_widths")}
    # the rest of a protocol acts through the other groups
    values["protocol"] = {key: cfg.protocol[key] for key in ("name", "accuracy")}
    return values


def point_name(cfg: DictConfig) -> str:
    """A sweep point's folder: names people look for, then a digest of everything scientific."""
    digest = hashlib.sha256(json.dumps(scientific(cfg), sort_keys=True).encode()).hexdigest()[:8]
    names = [str(cfg[group].name) for group in ("method", "model", "dataset", "augmentation")]
    return "-".join([*names, f"seed{cfg.seed}", digest])


def _point(*, _root_: DictConfig) -> str:
    return point_name(_root_)


def register_resolvers() -> None:
    """`${point:}`, the name of the point that the surrounding configuration describes."""
    OmegaConf.register_new_resolver("point", _point, replace=True)
