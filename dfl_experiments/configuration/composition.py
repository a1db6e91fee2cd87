"""Compose a configuration with Hydra, convert it to plain values, and compute its digest and folder name."""

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Collection, Mapping
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
# the groups that identify a cell of the paper's tables
PLACES = ("dataset", "augmentation", "model", "method")
# Hydra 1.4 warns about changes in 1.5. This code ignores the warnings, because it must also run on Hydra 1.3.
MIGRATION = "register_new_resolver|The version_base parameter|ConfigStore config|hydra.utils.instantiate.. resolved"
warnings.filterwarnings("ignore", MIGRATION)
AUTO = "auto"  # value of `resume`: continue the run if it has a checkpoint
# Options that the digest leaves out, because they do not change what a run computes. `stop_collapsed` only ends runs
# that no longer learn. This option was added later. If the digest contained this option, the digests in the names of
# older folders would be wrong.
NOT_IN_DIGEST = (
    "data_dir", "device", "threads", "cuda_graph", "checkpoint", "tracking", "plugins", "sweep", "protocol", "resume",
    "repeat", "force", "stop_collapsed",
)  # fmt: skip
# Option of `dataset.source` that only says where the user's own data are. A run also records a digest of the data.
LOCATION = "path"
# options of `dataset` that only set `epochs` and `model.widths`
NOT_IN_DATASET_DIGEST = ("epochs", "fc_widths")


def compose(overrides: list[str], hydra: bool = False) -> DictConfig:
    """Return the configuration that `dfl-train` composes from overrides. hydra: whether to keep the key `hydra`."""
    application = GlobalHydra.instance()
    # the caller may itself be a Hydra application
    outer, application.hydra = application.hydra, None
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF_DIR)):
            return hydra_compose("config", overrides, return_hydra_config=hydra)
    finally:
        GlobalHydra.instance().hydra = outer


def group_options(group: str) -> list[str]:
    """Return the choices for a group, such as the methods: the names of its YAML files in conf/."""
    return sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))


def plain(cfg: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration as dictionaries, lists and scalars. Resolve interpolations, and omit the key `hydra`."""
    result: dict[str, Any] = {}
    for key in cfg:
        if key == "hydra":  # this key cannot be resolved before a job starts
            continue
        value = cfg[str(key)]
        if OmegaConf.is_config(value):
            value = OmegaConf.to_container(value, resolve=True)
        result[str(key)] = value
    return result


def names_of(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the names of a configuration's data set, augmentation, model, method and protocol."""
    names = {}
    for group in (*PLACES, "protocol"):
        names[group] = str(values[group]["name"])
    return names


def result_options(cfg: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that decide what a run computes, including names such as `model.name`."""
    values = plain(cfg)
    decisive = without_keys(values, NOT_IN_DIGEST)
    decisive["dataset"] = without_keys(values["dataset"], NOT_IN_DATASET_DIGEST)
    decisive = without_unrecorded_options(decisive)
    # All other options of the protocol are left out. They only set options in other groups, and those are included.
    protocol = values["protocol"]
    decisive["protocol"] = {"name": protocol["name"], "accuracy": protocol["accuracy"]}
    return decisive


def without_keys(values: Mapping[str, Any], omitted: Collection[str]) -> dict[str, Any]:
    """Return values without the omitted keys."""
    return {key: value for key, value in values.items() if key not in omitted}


def config_digest(cfg: DictConfig | Mapping[str, Any], with_location: bool = False) -> str:
    """Return a digest of the options that decide what a run computes.

    A configuration with older names of the options has the same digest.

    with_location: whether the digest also depends on `LOCATION`.
    """
    options = with_recorded_names(result_options(cfg))
    source = options["dataset"]["source"]
    if not with_location:
        options["dataset"]["source"] = without_keys(source, [LOCATION])
    values = changed(options, integer_if_whole)
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def integer_if_whole(value: Any) -> Any:
    """Return a whole float such as 1.0 as an integer, because a YAML file may contain 1 or 1.0 for the same value."""
    is_whole = isinstance(value, float) and value.is_integer()
    return int(value) if is_whole else value


def changed(value: Any, change: Callable[[Any], Any]) -> Any:
    """Apply a function to every key and every scalar of nested mappings and lists, and return the result."""
    if isinstance(value, Mapping):
        return {change(key): changed(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [changed(item, change) for item in value]
    return change(value)


def harmless(value: Any) -> Any:
    """Escape control characters in nested values, because somebody else may have written these values."""
    return changed(value, lambda item: printable(item) if isinstance(item, str) else item)


def literal(text: str) -> str:
    """Escape `${` in a text, so that OmegaConf does not read it as an interpolation."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def quoted(text: str) -> str:
    """Quote any text as the value of a Hydra override."""
    text = re.sub(r"(\\*)'", r"\1\1\'", literal(text))
    text = re.sub(r"(\\+)$", r"\1\1", text)
    return f"'{text}'"


def as_values(values: Mapping[str, Any]) -> DictConfig:
    """Return values as an OmegaConf configuration. `${` is escaped, so that no text is read as an interpolation."""
    escaped = changed(values, lambda item: literal(item) if isinstance(item, str) else item)
    config: Any = OmegaConf.create(escaped)
    return config


def point_name(cfg: DictConfig | Mapping[str, Any]) -> str:
    """Return a sweep point's folder name: method, model, data set, augmentation, seed and `config_digest`.

    The digest in the name depends on `LOCATION`, because a sweep may compare several data sets of the user.
    """
    groups = ("method", "model", "dataset", "augmentation")
    names = "-".join(str(cfg[group]["name"]) for group in groups)
    return f"{names}-seed{cfg['seed']}-{config_digest(cfg, with_location=True)}"


def _run_dir(stamp: str, *, _root_: DictConfig) -> str:
    """Return the directory of a single run. stamp: date and time. _root_: the configuration, which OmegaConf passes."""
    if _root_.get("resume") not in (None, AUTO):
        return str(Path(str(_root_.resume)).expanduser())
    if _root_.get("repeat") is not None:
        return f"{stamp}-repeat"
    names = "-".join(str(_root_[group].name) for group in ("method", "model", "dataset"))
    return f"{stamp}-{names}"


def register_resolvers() -> None:
    """Register two resolvers: `${point:}` is a sweep point's folder name, `${run_dir:}` a single run's directory."""
    OmegaConf.register_new_resolver("point", lambda *, _root_: point_name(_root_), replace=True)
    OmegaConf.register_new_resolver("run_dir", _run_dir, replace=True)
