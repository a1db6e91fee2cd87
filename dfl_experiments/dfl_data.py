"""Download and pack data sets before a run, and list the data sets in data_dir."""

import logging
import os
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from tabulate import tabulate

from dfl_experiments.configuration.composition import compose, group_options, harmless
from dfl_experiments.configuration.refusals import refusing
from dfl_experiments.configuration.schema import check
from dfl_experiments.data.packs import is_packed, load_pack
from dfl_experiments.data.sources import Arrays, Digits, Source
from dfl_experiments.errors import UserError

EPILOG = """examples:
  dfl-data list                                        the state of every data set in data_dir
  dfl-data prepare dataset=mnist                       download if absent, and pack
  dfl-data prepare dataset=cifar10 data_dir=/data      in another folder (or set the variable DFL_DATA_DIR)
  dfl-data prepare dataset=folder dataset.source.path=$HOME/photos dataset.source.size=64
"""
COLUMNS = ("name", "state", "train", "test", "shape", "classes", "where")
NO_SIZES = ("", "", "", "")


def data_set_of(cfg: DictConfig) -> tuple[str, Source, Path]:
    """Return the name and the source of a configuration's data set, and the path data_dir.

    Raises `UserError` for a wrong option.
    """
    configuration = check(cfg)
    settings = configuration.settings
    source: Source = configuration.components["dataset.source"].build()
    return settings.dataset.name, source, Path(settings.data_dir).expanduser()


def row(overrides: list[str]) -> tuple[str, ...]:
    """Return a data set's row of the table. The last cell is a path, or the reason why the data set cannot be used."""
    cfg = compose(overrides)
    if unset := sorted(OmegaConf.missing_keys(cfg.dataset)):
        return cfg.dataset.name, "unset", *NO_SIZES, f"needs {', '.join(unset)}"
    name, source, data_dir = data_set_of(cfg)
    cache = source.cache_name(name)
    try:
        if cache is not None and not is_packed(data_dir / cache):
            raw = next((path for path in source.locations(data_dir) if os.path.exists(path)), None)
            return name, "raw" if raw else "absent", *NO_SIZES, str(raw or data_dir)
        sizes = sizes_of(load_pack(name, source, data_dir, download=False))
    except UserError as error:
        return name, "damaged", *NO_SIZES, str(error)
    if isinstance(source, Digits):
        return name, "bundled", *sizes, "dfl-experiments"
    if cache is None:
        paths = source.locations(data_dir)
        return name, "unpacked", *sizes, str(paths[0]) if paths else type(source).__qualname__
    return name, "packed", *sizes, str(data_dir / cache)


def sizes_of(arrays: Arrays) -> tuple[str, ...]:
    """Return the numbers of training and test samples, the shape of a sample, and the number of classes."""
    shape = "x".join(map(str, arrays.shape))
    sizes = (len(arrays.train_labels), len(arrays.test_labels), shape, arrays.num_classes)
    return tuple(map(str, sizes))


def show(choices: list[list[str]]) -> None:
    """Print a table of data sets.

    choices: for each data set, the list of overrides that selects it.
    Raises `UserError` for wrong overrides.
    """
    rows = [harmless(row(choice)) for choice in choices]
    print(tabulate(rows, COLUMNS, tablefmt="plain", disable_numparse=True))


def refuse_several_values(overrides: list[str]) -> None:
    """Raise `UserError` for an override with several values, because this command has no --multirun."""
    for override in OverridesParser.create().parse_overrides(overrides):
        if override.is_sweep_override():
            raise UserError(
                f"{override.input_line}: has several values; call dfl-data once for each"
            )


def main() -> None:
    """Run the script. After a user's mistake, print one line on stderr and exit with code 2."""
    layout = RawDescriptionHelpFormatter
    parser = ArgumentParser("dfl-data", description=__doc__, epilog=EPILOG, formatter_class=layout)
    parser.add_argument(
        "command",
        choices=("prepare", "list"),
        help="prepare: download and pack one data set; list: show one or all data sets",
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="as for dfl-train"
    )
    arguments = parser.parse_args()
    overrides, names = arguments.overrides, group_options("dataset")
    is_named = any(override.startswith("dataset=") for override in overrides)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with refusing("dfl-data"):
        refuse_several_values(overrides)
        if arguments.command == "prepare" and not is_named:
            raise UserError(
                f"prepare: needs a data set; add dataset=NAME with one of the names {', '.join(names)}"
            )
        if arguments.command == "prepare":
            load_pack(*data_set_of(compose(overrides)))
        if is_named:
            show([overrides])
        else:
            show([[f"dataset={name}", *overrides] for name in names])


if __name__ == "__main__":
    from dfl_experiments.console import data

    data()
