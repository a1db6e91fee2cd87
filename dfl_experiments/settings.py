"""The options that no group's constructor has, the check of a whole configuration, and the name of a sweep's point."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field
from yaml import YAMLError

from dfl_experiments.config import (
    CONF_DIR,
    Count,
    Fraction,
    NonNegative,
    Passes,
    Positive,
    Size,
    UnknownKey,
    UserError,
    Widths,
    build,
    check_node,
    checked,
    plain,
)
from dfl_experiments.messages import did_you_mean, flat_keys, shown

DEVICE = r"auto|cpu|mps|cuda(:\d+)?"
# the groups that are built, and what the program itself gives to each
GROUPS = {
    "method": ("net", "num_classes", "loss"),
    "model": ("input_shape", "num_classes"),
    "augmentation": (),
    "optimizer": (),
}
# what changes where or how a run is watched, not what it computes
NOT_SCIENTIFIC = (
    "data_dir", "device", "threads", "cuda_graph", "checkpoint", "tracking", "sweep", "protocol", "resume", "repeat",
    "force",
)  # fmt: skip
# and may therefore be given beside resume and repeat, whose configuration is the recorded one
OPERATIONAL = ("data_dir", "device", "threads", "cuda_graph", "checkpoint", "tracking")

# of a folder, of a part of one, and of a tag in W&B
Name = Annotated[str, Field(pattern=r"^\w[\w.+-]*$", max_length=64)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Init = Literal["product", "kaiming", "default"]
Options = TypeVar("Options")


@dataclass(frozen=True)
class Alignment:
    """every: iterations between two measurements, 0 for none."""

    every: Size


@dataclass(frozen=True)
class Checkpoint:
    """every_seconds: between two checkpoints within an epoch; epochs end with one where that costs little time.

    keep: the last one, when the run has come to its end.
    """

    every_seconds: NonNegative
    keep: bool


@dataclass(frozen=True)
class Tracking:
    """Where W&B keeps a run (see conf/tracking)."""

    mode: Literal["offline", "online", "disabled"]
    project: Annotated[str, Field(pattern=r"^[^/\\#?%:]{1,128}$")]
    entity: Annotated[str, Field(pattern=r"^[\w.-]{1,128}$")] | None
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
    dfa_init: Init
    las_init: Init
    dfa_top: Literal["backprop", "direct"]
    resnet18_skip: Literal["cut", "leak"]
    batch_norm_updates: Passes
    validation_fraction: Fraction
    accuracy: Literal["last", "best_test", "best_validation"]
    stop_untrainable: bool
    local_pooling_of: dict[str, Literal["average", "max"]] | None = None
    batch_norm_updates_of: dict[str, Passes] | None = None


@dataclass(frozen=True)
class Settings:
    """The run-level options of conf/config.yaml, typed and in range."""

    dataset: Dataset
    protocol: Protocol
    tracking: Tracking
    data_dir: Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]
    epochs: Count
    batch_size: Count
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    loss: Literal["cross_entropy", "squared_error"]
    device: Annotated[str, Field(pattern=f"^({DEVICE})$")]
    threads: Count | None
    precision: Literal["float32", "tf32", "bfloat16"]
    cuda_graph: bool
    deterministic: bool
    limit: Count | None
    smoke: Count | None
    validation_fraction: Fraction
    stop_untrainable: bool
    alignment: Alignment
    checkpoint: Checkpoint
    sweep: Name
    resume: str | None
    repeat: str | None
    force: bool


def options(kind: type[Options], values: Any, where: str = "") -> Options:
    """The dataclass of these values, nested ones included. Raises `UserError` for unknown, missing or wrong ones."""
    prefix = f"{where}." if where else ""
    hints = get_type_hints(kind, include_extras=True)
    if not isinstance(values, Mapping):
        raise UserError(f"{where}={shown(values)}: has options of its own: {', '.join(hints)}")
    for key in values:
        if key not in hints:
            raise UnknownKey(f"{prefix}{key}", hints)
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

    Raises `UserError`, one line naming the key, the value and the choices; nothing is read or written.
    """
    values = plain(without_hydra(cfg))
    try:
        return _settings(dict(values))
    except UnknownKey as error:
        raise UserError(f"{error}{did_you_mean(error.key, flat_keys(values))}") from None


def _settings(values: dict[str, Any]) -> Settings:
    unknown = [key for key in values if key not in GROUPS and key not in get_type_hints(Settings)]
    if unknown:
        raise UnknownKey(unknown[0], [*GROUPS, *get_type_hints(Settings)])
    for group, given in GROUPS.items():
        node = values.pop(group, None)
        if not isinstance(node, Mapping) or "name" not in node:
            names = ", ".join(sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml")))
            what = "missing" if node is None else f"is no choice of the group but {shown(node)}"
            raise UserError(f"{group}: {what}; choose with {group}=…, there are {names}")
        checked(Name, node["name"], f"{group}.name")
        if given:
            check_node(node, group, given)
        else:
            build(node, group)  # costs nothing, and knows which options do not go together
    settings = options(Settings, values)
    dataset = settings.dataset
    build(dataset.source, "dataset.source")
    if len(dataset.mean) != len(dataset.std):
        raise UserError(
            f"dataset.std={shown(dataset.std)}: must be as long as dataset.mean, which has {len(dataset.mean)}"
        )
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


def science(cfg: DictConfig) -> str:
    """A digest of everything that decides what a run computes."""
    return hashlib.sha256(json.dumps(scientific(cfg), sort_keys=True).encode()).hexdigest()[:8]


def point_name(cfg: DictConfig) -> str:
    """A sweep point's folder: names people look for, then a digest of everything scientific."""
    names = [str(cfg[group].name) for group in ("method", "model", "dataset", "augmentation")]
    return "-".join([*names, f"seed{cfg.seed}", science(cfg)])


def recorded(cfg: DictConfig, hydra: Any) -> DictConfig:
    """The configuration to run: the composed one, or the one recorded by the run that `resume` or `repeat` names.

    hydra: Hydra's own node. Of the command line's overrides, which it knows, only `OPERATIONAL` ones may stand beside
    resume and repeat. Raises `UserError` for others, and where nothing is recorded.
    """
    key = next((key for key in ("resume", "repeat") if cfg.get(key) is not None), None)
    if key is None:
        return cfg
    path = Path(str(cfg[key])).expanduser() / "config.yaml"
    overrides: Any = OmegaConf.to_container(hydra.overrides.task, resolve=False)
    given = [str(override).lstrip("+~").partition("=")[0] for override in overrides]
    beside = [name for name in given if name.partition(".")[0] not in (*OPERATIONAL, key)]
    if beside:
        raise UserError(
            f"{beside[0]}: {key}={cfg[key]} takes its configuration from {path}; beside it there may be "
            f"{', '.join(OPERATIONAL)}"
        )
    try:
        found = OmegaConf.load(path)
    except OSError:
        raise UserError(f"{key}={cfg[key]}: is no run directory, there is no {path}") from None
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"{key}={cfg[key]}: {path} cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(found, DictConfig):
        raise UserError(f"{key}={cfg[key]}: {path} is no configuration of a run")
    if isinstance(found.get("checkpoint"), DictConfig):  # an older run lacks what has been added since
        found.checkpoint = OmegaConf.merge(cfg.checkpoint, found.checkpoint)
    found.update({name: cfg[name] for name in given if name in OPERATIONAL})
    for name in given:
        if "." in name:
            OmegaConf.update(found, name, OmegaConf.select(cfg, name))
    found.update({"resume": cfg.resume, "repeat": cfg.repeat})
    return found


def _point(*, _root_: DictConfig) -> str:
    return point_name(_root_)


def _run_dir(stamp: str, *, _root_: DictConfig) -> str:
    if _root_.get("resume") is not None:
        return str(Path(str(_root_.resume)).expanduser())
    if _root_.get("repeat") is not None:
        return f"{stamp}-repeat"
    return "-".join([stamp, *(str(_root_[group].name) for group in ("method", "model", "dataset"))])


def register_resolvers() -> None:
    """`${point:}`, the name of the point that the surrounding configuration describes, and a single run's directory."""
    OmegaConf.register_new_resolver("point", _point, replace=True)
    OmegaConf.register_new_resolver("run_dir", _run_dir, replace=True)
