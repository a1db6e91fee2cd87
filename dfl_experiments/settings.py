"""The run-level options, the check of a whole configuration before anything starts, and the name of a sweep's point."""

import hashlib
import json
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, cast, get_type_hints

from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from dfl_experiments.config import Count, Fraction, NonNegative, Size, UserError, check_node, checked, plain

DEVICE = r"auto|cpu|mps|cuda(:\d+)?"
GROUPS = {
    "method": ("net", "num_classes", "loss"),
    "model": ("input_shape", "num_classes"),
    "augmentation": (),
    "optimizer": (),
}
# what changes where or how a run is watched, not what it computes
NOT_SCIENTIFIC = ("data_dir", "device", "checkpoint", "tracking", "sweep", "protocol", "hydra")


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
    project: str
    entity: str | None
    tags: list[str]


@dataclass(frozen=True)
class Settings:
    """The run-level options of conf/config.yaml, typed and in range."""

    data_dir: str
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
    tracking: Tracking
    sweep: str


def check(cfg: DictConfig) -> Settings:
    """The run-level options of a composed configuration, every group's options checked on the way.

    Raises `UserError`, one line naming the key, the value and the choices; nothing is built, read or written.
    """
    values = {str(key): value for key, value in plain(cfg).items() if key != "hydra"}
    known = [*GROUPS, "dataset", "protocol", *_names(Settings)]
    for key in values:
        if key not in known:
            raise UserError(f"{key}: no such option; there are {', '.join(known)}")
    hints = get_type_hints(Settings, include_extras=True)
    flat = {name: _option(hints[name], name, values[name]) for name in _names(Settings)}
    for group, given in GROUPS.items():
        check_node(values[group], group, given)
    check_node(values["dataset"]["source"], "dataset.source")
    for key in ("mean", "std"):
        checked(list[float], values["dataset"][key], f"dataset.{key}")
    checked(Literal["last", "best_test", "best_validation"], values["protocol"]["accuracy"], "protocol.accuracy")
    if values["protocol"]["accuracy"] == "best_validation" and not flat["validation_fraction"]:
        raise UserError("protocol.accuracy='best_validation': there is no validation split; set validation_fraction")
    return Settings(**flat)


def _names(options: Any) -> list[str]:
    return [field.name for field in fields(options)]


def _option(hint: Any, name: str, value: Any) -> Any:
    """A checked value; a node of options as its dataclass, each field checked under its own name."""
    if not is_dataclass(hint):
        return checked(hint, value, name)
    hints = get_type_hints(hint, include_extras=True)
    return cast(Any, hint)(**{key: checked(hints[key], value[key], f"{name}.{key}") for key in _names(hint)})


def scientific(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration that decides what a run computes; a protocol acts through the other groups."""
    values = {key: value for key, value in plain(cfg).items() if key not in NOT_SCIENTIFIC}
    values["dataset"] = {key: value for key, value in values["dataset"].items() if key not in ("epochs", "fc_widths")}
    return values


def point_name(cfg: DictConfig) -> str:
    """A sweep point's folder: names people look for, then a digest of everything scientific."""
    digest = hashlib.sha256(json.dumps(scientific(cfg), sort_keys=True).encode()).hexdigest()[:8]
    names = [str(cfg[group].name) for group in ("method", "model", "dataset", "augmentation")]
    return "-".join([*names, f"seed{cfg.seed}", digest])


def _point(*, _root_: DictConfig) -> str:
    return point_name(OmegaConf.masked_copy(_root_, [str(key) for key in _root_ if key != "hydra"]))


def register_resolvers() -> None:
    """`${point:}`, the name of the point that the surrounding configuration describes."""
    OmegaConf.register_new_resolver("point", _point, replace=True)
