"""The configuration as Hydra composes it, its plain values, and the names that follow from what a run computes."""

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from dfl_experiments.errors import printable

# `conf/` is inside an installed wheel, and beside the package in a checkout.
_HERE = Path(__file__).resolve().parent.parent
CONF_DIR = next((path for path in (_HERE / "conf", _HERE.parent / "conf") if path.is_dir()), _HERE.parent / "conf")
PLACES = ("dataset", "augmentation", "model", "method")  # what names a cell of a table
FULLY_CONNECTED = ("fc", "fc_ln")  # models of conf/ whose hidden layers are vectors
LONGEST = 200  # bytes of names in a folder's name
# how Hydra 1.4 says what 1.5 will want and 1.3 does not know
MIGRATION = "register_new_resolver|The version_base parameter|ConfigStore config|hydra.utils.instantiate.. resolved"
warnings.filterwarnings("ignore", MIGRATION)
AUTO = "auto"  # of resume: go on if there is something to go on from
# what changes where or how a run is watched, not what it computes; and stop_collapsed, which changes no number of a run
# that learns: the points of sweeps from before there was the option keep their names
NOT_SCIENTIFIC = (
    "data_dir", "device", "threads", "cuda_graph", "checkpoint", "tracking", "plugins", "sweep", "protocol", "resume",
    "repeat", "force", "stop_collapsed",
)  # fmt: skip


def compose(overrides: list[str], hydra: bool = False) -> DictConfig:
    """The configuration that `dfl-train` would compose from these overrides, with Hydra's own node or without."""
    application = GlobalHydra.instance()
    outer, application.hydra = application.hydra, None  # of a caller that is a Hydra application itself
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF_DIR)):
            return hydra_compose("config", overrides, return_hydra_config=hydra)
    finally:
        GlobalHydra.instance().hydra = outer


def group_options(group: str) -> list[str]:
    """The choices that conf/ has for a group."""
    return sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))


def plain(cfg: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as resolved dictionaries, lists and scalars, without Hydra's own node."""
    names = [str(key) for key in cfg if key != "hydra"]  # before a job Hydra's node cannot be resolved
    values = {name: cfg[name] for name in names}
    return {
        key: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        for key, value in values.items()
    }


def names_of(values: Mapping[str, Any]) -> dict[str, str]:
    """What the data set, augmentation, model, method and protocol of a configuration are called."""
    return {group: str(values[group]["name"]) for group in (*PLACES, "protocol")}


def scientific(cfg: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """The values that decide what a run computes and what it is called by."""
    values = plain(cfg)
    kept = {key: value for key, value in values.items() if key not in NOT_SCIENTIFIC}
    # Runs of before the option existed are contiguous. A fully connected net has one format, and one shape of B.
    is_flat = kept["model"]["name"] in FULLY_CONNECTED
    if kept.get("memory_format") == "contiguous" or is_flat:
        kept.pop("memory_format", None)
    kept["dataset"] = {key: value for key, value in kept["dataset"].items() if key not in ("epochs", "fc_widths")}
    # options that there have not always been, at what every run had without them: a sweep of before keeps its names
    added = [("alignment", "quantities", []), ("method", "feedback", "conv")]
    if is_flat:
        added.append(("method", "feedback", "dense"))
    if kept["model"]["name"] in ("conv3", "conv3_bn"):
        added.append(("model", "activation", "relu"))
    for group, option, value in added:
        if kept[group].get(option) == value:
            kept[group] = {key: other for key, other in kept[group].items() if key != option}
    # the rest of a protocol acts through the other groups
    kept["protocol"] = {key: values["protocol"][key] for key in ("name", "accuracy")}
    return kept


def science(cfg: DictConfig | Mapping[str, Any]) -> str:
    """A digest of everything in a configuration that decides what a run computes; 0 and 0.0 are one number."""
    values = changed(scientific(cfg), lambda x: int(x) if isinstance(x, float) and x.is_integer() else x)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def changed(value: Any, change: Callable[[Any], Any]) -> Any:
    """Nested mappings and lists with every key and every other scalar in them changed."""
    if isinstance(value, Mapping):
        return {change(key): changed(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [changed(item, change) for item in value]
    return change(value)


def harmless(value: Any) -> Any:
    """Make every text in nested values printable: whatever somebody else's files hold can be shown."""
    return changed(value, lambda x: printable(x) if isinstance(x, str) else x)


def literal(text: str) -> str:
    """A text as OmegaConf has it, where one that looks like an interpolation stands for itself."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def quoted(text: str) -> str:
    """A text as the value of an override of Hydra's, whatever it holds."""
    text = re.sub(r"(\\*)'", r"\1\1\'", literal(text))
    return "'" + re.sub(r"(\\+)$", r"\1\1", text) + "'"


def as_values(values: Mapping[str, Any]) -> DictConfig:
    """A configuration of values only: none of its texts is an interpolation."""
    found: Any = OmegaConf.create(changed(values, lambda x: literal(x) if isinstance(x, str) else x))
    return found


def point_name(cfg: DictConfig | Mapping[str, Any]) -> str:
    """A sweep point's folder: names people look for, then a digest of everything scientific."""
    names = "-".join(str(cfg[group]["name"]) for group in ("method", "model", "dataset", "augmentation"))
    return f"{shortened(names)}-seed{cfg['seed']}-{science(cfg)}"


def shortened(names: str) -> str:
    """Names as the part of a folder's name that there is room for: file systems allow 255 bytes."""
    return names.encode()[:LONGEST].decode(errors="ignore")


def _run_dir(stamp: str, *, _root_: DictConfig) -> str:
    if _root_.get("resume") not in (None, AUTO):
        return str(Path(str(_root_.resume)).expanduser())
    if _root_.get("repeat") is not None:
        return f"{stamp}-repeat"
    names = "-".join(str(_root_[group].name) for group in ("method", "model", "dataset"))
    return f"{stamp}-{shortened(names)}"


def register_resolvers() -> None:
    """`${point:}`, the name of the point that the surrounding configuration describes, and a single run's directory."""
    OmegaConf.register_new_resolver("point", lambda *, _root_: point_name(_root_), replace=True)
    OmegaConf.register_new_resolver("run_dir", _run_dir, replace=True)
