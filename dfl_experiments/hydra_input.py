"""Hydra's flags and search path, its errors, and what a configuration may say to Hydra itself."""

import argparse
import contextlib
import io
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_automatic_config_search_path, get_args_parser, validate_config_path
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from dfl_experiments.config import CONF_DIR, Count, UserError, checked, locate, one_line, plain
from dfl_experiments.messages import clipped, shown

MISTAKES = (HydraException, OmegaConfBaseException, UserError)
MOST_BRACKETS = 100  # deeply nested ones exhaust the stack of Hydra's and OmegaConf's parsers
# launchers and sweepers are Hydra's own or installed as its plugins
PLUGINS = ("hydra._internal.core_plugins.", "hydra_plugins.")
HYDRA_CALLBACKS = "hydra.experimental.callbacks."
LOGGING_CLASS = r"logging\.(handlers\.)?\w*(Handler|Formatter)"
STREAMS = ("ext://sys.stdout", "ext://sys.stderr")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Hydra's flags and the overrides. Raises `UserError` where argparse would print how to use it, and then why."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            args = get_args_parser().parse_args(arguments)
    except SystemExit as end:
        if not end.code:  # --version
            raise
        why = said.getvalue().rpartition("error: ")[2].strip()
        raise UserError(f"{why}; options are written key=value, and --help lists flags and keys") from None
    modes = {
        "--run": args.run,
        "--multirun": args.multirun,
        "--cfg": args.cfg,
        "--info": args.info,
        "--shell-completion": args.shell_completion,
    }
    asked = [flag for flag, value in modes.items() if value]
    if len(asked) > 1:
        raise UserError(f"{' '.join(asked)}: one of them at a time")
    if args.resolve and not (args.cfg or args.help):
        raise UserError("--resolve: needs --cfg job, --cfg hydra or --cfg all")
    if args.experimental_rerun is not None:
        raise UserError(f"--experimental-rerun {args.experimental_rerun}: is not accepted, a pickle can hold any code")
    return args


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn what Hydra's and OmegaConf's parsers let through of a text that they cannot read into a `UserError`."""
    try:
        yield
    except MISTAKES:
        raise
    except Exception as error:
        raise UserError(f"{what}: cannot be read ({clipped(one_line(error), 400)})") from error


def parse_overrides(texts: list[str], loader: ConfigLoader) -> list[Override]:
    """Every `key=value`. Raises `UserError` naming the one that is none, or that gives a group something unnameable."""
    parser, overrides = OverridesParser.create(loader), []
    for text in texts:
        said = clipped(text, 200)
        if max(text.count("["), text.count("{")) > MOST_BRACKETS:
            raise UserError(f"{said}: holds more than {MOST_BRACKETS} brackets")
        try:
            with reading(said):
                (override,) = parser.parse_overrides([text])
                group, value = override.key_or_group, override.value()
                choices = loader.get_group_options(group) if group else []
        except HydraException as error:
            raise UserError(f"{said}: is not written as key=value ({one_line(error)})") from error
        if not group:
            raise UserError(f"{said}: has no key; options are written key=value")
        named = value if isinstance(value, list) else [value]
        plain_value = not override.is_delete() and not override.is_sweep_override()
        if choices and plain_value and not all(isinstance(name, str | QuotedString) for name in named):
            raise UserError(f"{said}: must be one of {', '.join(choices)}")
        overrides.append(override)
    return overrides


@contextlib.contextmanager
def composer(args: argparse.Namespace) -> Iterator[Hydra]:
    """Hydra with the search path that the flags name, as `hydra.main` sets it up."""
    with reading(f"--config-path {args.config_path}"):
        validate_config_path(args.config_path)
    script = Path(__file__).with_name("train.py")
    search_path = create_automatic_config_search_path(str(script), None, args.config_path or str(CONF_DIR))
    if args.config_dir is not None:
        folder = Path(args.config_dir).absolute()
        if not folder.is_dir():
            raise UserError(f"--config-dir {args.config_dir}: no such folder")
        search_path.prepend("command-line", f"file://{folder}", SearchPathQuery(provider="schema"))
    before = HydraConfig.instance().cfg
    try:
        yield Hydra.create_main_hydra2(script.stem, search_path)
    finally:
        HydraConfig.instance().cfg = before
        GlobalHydra.instance().clear()


def leaves(value: Any, where: str) -> Iterator[tuple[str, str, Any]]:
    """(full name, last key, value) of everything in nested mappings and lists that is neither."""
    if isinstance(value, Mapping | list):
        for key, child in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from leaves(child, f"{where}.{key}")
    else:
        yield where, where.rpartition(".")[2], value


def check_hydra_node(cfg: DictConfig) -> None:
    """Raise `UserError` where Hydra or the logging that it sets up would call what this project did not choose.

    Hydra makes callbacks, the launcher, the sweeper and the handlers of its logs from their names. It refuses names
    known to be dangerous; here only known names are accepted.
    """
    with read_write(cfg.hydra.runtime), open_dict(cfg.hydra.runtime):
        cfg.hydra.runtime.output_dir = "."  # Hydra sets it as a job begins, and a log's file may be named after it
    for group in ("launcher", "sweeper"):
        for name, key, value in leaves(plain(cfg.hydra[group]), f"hydra.{group}"):
            if key == "_target_" and not str(value).startswith(PLUGINS):
                raise UserError(f"{name}={shown(value)}: must be one of Hydra's plugins; choose with hydra/{group}=…")
    for _, key, value in leaves(plain(cfg.hydra.callbacks), "hydra.callbacks"):
        if key == "_target_" and not str(value).startswith(HYDRA_CALLBACKS):
            locate(value, "hydra.callbacks")
    for group in ("hydra_logging", "job_logging"):
        for name, key, value in leaves(plain(cfg.hydra[group]), f"hydra.{group}"):
            if key == "()" or (key == "class" and not re.fullmatch(LOGGING_CLASS, str(value))):
                raise UserError(f"{name}={shown(value)}: must be a handler or a formatter of Python's logging")
            if re.match(r"\w+://", str(value)) and value not in STREAMS:
                raise UserError(f"{name}={shown(value)}: must be {' or '.join(STREAMS)}")
            if key == "level" and not isinstance(value, int) and value not in logging.getLevelNamesMapping():
                raise UserError(f"{name}={shown(value)}: must be one of {', '.join(logging.getLevelNamesMapping())}")
    checked(Count | None, OmegaConf.select(cfg, "hydra.sweeper.max_batch_size"), "hydra.sweeper.max_batch_size")
    verbose = plain(cfg.hydra.verbose)
    if not isinstance(verbose, bool | str):
        checked(list[str], verbose, "hydra.verbose")
