"""Runs as command lines of `dfl-train`, and tables across a key that was swept."""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from omegaconf import OmegaConf

from dfl_experiments.configuration.composition import group_options, plain, scientific
from dfl_experiments.configuration.refusals import did_you_mean, flat_keys
from dfl_experiments.errors import UserError, printable
from dfl_experiments.report.cells import Entry, Section, sections
from dfl_experiments.report.runs import Cell, Run
from dfl_experiments.report.setting import NAMED, as_override, compared, defaults, flat, options_told
from dfl_experiments.report.tables import ours_and_paper

KEY = re.compile(r"\w+(\.\w+)*")


def command(run: Run, seeds: Sequence[int] = ()) -> str:
    """`dfl-train …`: what computes this run's numbers again, by the choices of conf/ and what differs from them.

    seeds: in place of its own, as a multirun. Of a run with parts that conf/ does not have it is the command that
    repeats its configuration from its folder.
    """
    names = {group: str(run.config[group].name) for group in NAMED}
    values = plain(run.config)
    if any(name not in group_options(group) for group, name in names.items()) or not has_our_keys(values):
        plugins = [f"plugins={as_override([*run.config.plugins])}"] if run.config.get("plugins") else []
        repeat = printable(f"repeat={run.folder.resolve()}")
        return " ".join(["dfl-train", *map(shlex.quote, [repeat, *plugins])])
    choices = [f"{group}={name}" for group, name in names.items()]
    # a protocol's options first: others follow from them
    protocol = {f"protocol.{key}": value for key, value in values["protocol"].items()}
    wanted = flat(scientific(run.config))
    wanted |= {key: value for key, value in compared(run.config).items() if key == "method.feedback"}
    if "memory_format" in scientific({**values, "memory_format": "auto"}):  # it matters to this net
        wanted["memory_format"] = run.config.get("memory_format", "contiguous")
    if "stop_collapsed" in run.config:
        wanted["stop_collapsed"] = run.config.stop_collapsed
    if len(seeds) > 1:
        del wanted["seed"]
    own: list[str] = []
    for options in (protocol, wanted):
        usual = flat(defaults(*choices, *own))
        own += [
            f"{'' if key in usual else '++'}{key}={as_override(value)}"
            for key, value in options.items()
            if not isinstance(value, Mapping) and usual.get(key, ...) != value and key.partition(".")[2] != "name"
        ]
    flag, several = (["--multirun"], [f"seed={','.join(map(str, seeds))}"]) if len(seeds) > 1 else ([], [])
    return " ".join(["dfl-train", *map(shlex.quote, [*flag, *choices, *own, *several])])


def has_our_keys(values: Mapping[str, Any]) -> bool:
    """Whether every key is an option of a run's: as an override, one of Hydra's could name what Hydra is to call."""
    keys = flat(values)
    return values.keys() <= defaults().keys() and all(map(KEY.fullmatch, keys))


def mean_told(entry: Entry) -> str:
    """Its accuracy in a table's words, and over how many seeds."""
    return f"{ours_and_paper(replace(entry, paper=None))} (n {len(entry.counted)})"


def commands(all_sections: Iterable[Section]) -> str:
    """The chosen point of every cell, as a command line."""
    lines = []
    for section in all_sections:
        for entry in section.chosen:
            place = f"{section.setting.title}: {' '.join(entry.cell)}"
            found = dict.fromkeys(command(run, [run.seed for run in entry.shown]) for run in entry.shown)
            lines += [f"# {place}, {mean_told(entry)}", *found, ""]
    return "\n".join(lines)


def across(runs: Sequence[Run], key: str) -> list[list[str]]:
    """A table with a column for every value of a key of the configuration, its heading first.

    Each cell is a mean accuracy in percent, with its deviation and number of seeds, of the grid point chosen among that
    value's. Raises `UserError` for a key that no run has, or of which a table cell consists already.
    """
    values = {run.folder: OmegaConf.select(run.config, key, default=...) for run in runs}
    if all(value is ... for value in values.values()):
        there = {name for run in runs for name in flat_keys(plain(run.config))}
        raise UserError(f"--across {key}: no run has this key{did_you_mean(key, sorted(there))}")
    if key.endswith("name") or any(OmegaConf.is_dict(value) for value in values.values()):
        raise UserError(f"--across {key}: takes a single option, such as batch_size; tables have groups apart anyway")
    texts = {folder: "–" if value is ... else str(value) for folder, value in values.items()}
    swept = sorted(set(texts.values()), key=lambda text: (len(text), text))
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for text in swept:
        for section in sections(without(run, key) for run in runs if texts[run.folder] == text):
            for entry in section.chosen:
                rows.setdefault((section.setting.title, *entry.cell), {})[text] = mean_told(entry)
    heading = ["setting", *Cell._fields, *(f"{key}={text}" for text in swept)]
    return [heading, *([*place, *(cells.get(text, "") for text in swept)] for place, cells in rows.items())]


def without(run: Run, key: str) -> Run:
    """The run as if this key told no settings apart."""
    kept = [one for one in run.setting.differences if not one.startswith(f"{key}=")]
    name, options = options_told(run.cell.method)
    method = ", ".join([name, *(one for one in options if not f"method.{one}".startswith(f"{key}="))])
    setting = run.setting._replace(differences=tuple(kept))
    return replace(run, setting=setting, cell=run.cell._replace(method=method))
