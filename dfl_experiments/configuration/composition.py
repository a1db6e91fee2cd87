"""Compose a configuration with Hydra, turn it into plain values, and name a run by what it computes."""

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

from dfl_experiments.configuration.history import with_recorded_names, without_unrecorded_options
from dfl_experiments.errors import printable

# An installed wheel has `conf/` inside the package, a checkout has it beside the package.
_PACKAGE = Path(__file__).resolve().parent.parent
_CONF_DIRS = (_PACKAGE / "conf", _PACKAGE.parent / "conf")
CONF_DIR = next((path for path in _CONF_DIRS if path.is_dir()), _CONF_DIRS[-1])
PLACES = ("dataset", "augmentation", "model", "method")  # the groups that identify a cell of a table
LONGEST = 200  # bytes of the names in a folder's name
# Hydra 1.4 warns of changes in 1.5; code that also runs on 1.3 cannot follow them.
MIGRATION = "register_new_resolver|The version_base parameter|ConfigStore config|hydra.utils.instantiate.. resolved"
warnings.filterwarnings("ignore", MIGRATION)
AUTO = "auto"  # value of `resume`: continue if there is a checkpoint
# Options that do not change what a run computes. `stop_collapsed` changes no value of a run that learns, and the points
# of sweeps recorded before the option existed keep their names.
NOT_IN_DIGEST = (
    "data_dir", "device", "threads", "cuda_graph", "checkpoint", "tracking", "plugins", "sweep", "protocol", "resume",
    "repeat", "force", "stop_collapsed",
)  # fmt: skip
NOT_IN_DATASET_DIGEST = ("epochs", "fc_widths")  # they act through `epochs` and `model.widths`


def compose(overrides: list[str], hydra: bool = False) -> DictConfig:
    """Return the configuration that `dfl-train` composes from these overrides.

    hydra: keep Hydra's own node.
    """
    application = GlobalHydra.instance()
    outer, application.hydra = application.hydra, None  # the caller may itself be a Hydra application
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF_DIR)):
            return hydra_compose("config", overrides, return_hydra_config=hydra)
    finally:
        GlobalHydra.instance().hydra = outer


def group_options(group: str) -> list[str]:
    """Return the options that conf/ has for a group."""
    return sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))


def plain(cfg: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration as resolved dictionaries, lists and scalars, without Hydra's own node."""
    result: dict[str, Any] = {}
    for key in cfg:
        if key != "hydra":  # Hydra's node cannot be resolved before a job
            value = cfg[str(key)]
            is_node = OmegaConf.is_config(value)
            result[str(key)] = OmegaConf.to_container(value, resolve=True) if is_node else value
    return result


def names_of(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the names of a configuration's data set, augmentation, model, method and protocol."""
    return {group: str(values[group]["name"]) for group in (*PLACES, "protocol")}


def result_options(cfg: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that decide what a run computes, and its names."""
    values = plain(cfg)
    decisive = {key: value for key, value in values.items() if key not in NOT_IN_DIGEST}
    dataset = values["dataset"].items()
    decisive["dataset"] = {key: value for key, value in dataset if key not in NOT_IN_DATASET_DIGEST}
    decisive = without_unrecorded_options(decisive)
    # The other options of a protocol act through the other groups.
    decisive["protocol"] = {key: values["protocol"][key] for key in ("name", "accuracy")}
    return decisive


def config_digest(cfg: DictConfig | Mapping[str, Any]) -> str:
    """Return a digest of everything in a configuration that decides what a run computes.

    A configuration that was recorded under older names of options has the digest of the same one under today's names.
    """
    values = changed(with_recorded_names(result_options(cfg)), _one_type_of_number)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def _one_type_of_number(value: Any) -> Any:
    """Return 0 for 0.0: they are one number, and YAML may write it either way."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def changed(value: Any, change: Callable[[Any], Any]) -> Any:
    """Apply a function to every key and every scalar of nested mappings and lists."""
    if isinstance(value, Mapping):
        return {change(key): changed(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [changed(item, change) for item in value]
    return change(value)


def harmless(value: Any) -> Any:
    """Make every text in nested values printable: files of other people may hold control characters."""
    return changed(value, lambda item: printable(item) if isinstance(item, str) else item)


def literal(text: str) -> str:
    """Escape a text for OmegaConf, so that no part of it is an interpolation."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def quoted(text: str) -> str:
    """Quote a text as the value of a Hydra override, whatever it contains."""
    text = re.sub(r"(\\*)'", r"\1\1\'", literal(text))
    return "'" + re.sub(r"(\\+)$", r"\1\1", text) + "'"


def as_values(values: Mapping[str, Any]) -> DictConfig:
    """Return a configuration of values only: none of its texts is an interpolation."""
    config: Any = OmegaConf.create(changed(values, lambda item: literal(item) if isinstance(item, str) else item))
    return config


def point_name(cfg: DictConfig | Mapping[str, Any]) -> str:
    """Return the name of a sweep point's folder: method, model, data set, augmentation, seed and `config_digest`."""
    names = "-".join(str(cfg[group]["name"]) for group in ("method", "model", "dataset", "augmentation"))
    return f"{shortened(names)}-seed{cfg['seed']}-{config_digest(cfg)}"


def shortened(names: str) -> str:
    """Shorten names to `LONGEST` bytes: file systems allow 255 for a folder's name."""
    return names.encode()[:LONGEST].decode(errors="ignore")


def _run_dir(stamp: str, *, _root_: DictConfig) -> str:
    if _root_.get("resume") not in (None, AUTO):
        return str(Path(str(_root_.resume)).expanduser())
    if _root_.get("repeat") is not None:
        return f"{stamp}-repeat"
    names = "-".join(str(_root_[group].name) for group in ("method", "model", "dataset"))
    return f"{stamp}-{shortened(names)}"


def register_resolvers() -> None:
    """Register `${point:}`, the name of a sweep point's folder, and `${run_dir:}`, the directory of a single run."""
    OmegaConf.register_new_resolver("point", lambda *, _root_: point_name(_root_), replace=True)
    OmegaConf.register_new_resolver("run_dir", _run_dir, replace=True)
