"""How Hydra composes the jobs of a sweep here: those that choose the same files, once."""

import copy
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

Compose = Callable[[DictConfig, list[str]], DictConfig]


def use_quick_compositions() -> Compose:
    """Have Hydra compose this command's jobs quickly, in whatever process; return what composes one."""
    hydra: Any = GlobalHydra.instance().hydra
    loader = hydra.config_loader
    loader.load_sweep_config = partial(compose_job, partial(type(loader).load_sweep_config, loader), {})
    return loader.load_sweep_config


def compose_job(
    hydras: Compose, composed: dict[tuple[str, ...], DictConfig], master_config: DictConfig, sweep_overrides: list[str]
) -> DictConfig:
    """The configuration of one job, as Hydra composes it.

    Reading and merging files takes 0.13 s; setting values in a copy of what they give takes 0.01 s. hydras: Hydra's own
    way; composed: what the files give, kept; master_config: of the whole sweep; sweep_overrides: the job's.
    """
    overrides = [_parsed(text) for text in sweep_overrides]
    groups = master_config.hydra.runtime.choices
    files = [text for text, each in zip(sweep_overrides, overrides, strict=True) if each.key_or_group in groups]
    flags: Any = OmegaConf.to_container(master_config.hydra.overrides.hydra, resolve=False)
    key = (*flags, *files)
    try:
        if any(map(_is_unusual, overrides)):
            return hydras(master_config, sweep_overrides)
        if key not in composed:
            composed[key] = hydras(master_config, files)
        cfg = copy.deepcopy(composed[key])
        for each in overrides:
            if each.key_or_group not in groups:
                OmegaConf.update(cfg, each.key_or_group, each.value(), force_add=each.is_force_add())
    except OmegaConfBaseException:
        return hydras(master_config, sweep_overrides)  # which says it in Hydra's words
    names: Any = cfg.hydra.job.config.override_dirname
    lines = sorted(str(each.input_line) for each in overrides if each.key_or_group not in names.exclude_keys)
    with open_dict(cfg.hydra):
        cfg.hydra.overrides.task = sweep_overrides
        cfg.hydra.job.override_dirname = names.item_sep.join(lines).replace("=", names.kv_sep)
    OmegaConf.copy_cache(from_config=master_config, to_config=cfg)
    return cfg


@cache
def _parsed(text: str) -> Override:
    return OverridesParser.create().parse_override(text)


def _is_unusual(override: Override) -> bool:
    """Whether it matters when it is set, or where."""
    is_plain = not (override.is_add() or override.is_delete() or override.is_hydra_override())
    return not is_plain or override.package is not None or isinstance(override.value(), dict)


def validate_no_more() -> None:
    """Have Hydra not compose every job of a grid once more before the first begins: they have been checked."""
    setattr(Sweeper, "validate_batch_is_legal", lambda self, batch: None)  # noqa: B010
