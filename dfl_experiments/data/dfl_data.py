"""The console script `dfl-data`: fetch and pack data sets ahead of a run, and show which are there."""

import logging
import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from dfl_experiments.configuration.composition import compose, group_options
from dfl_experiments.configuration.refusals import MISTAKES, one_line
from dfl_experiments.configuration.schema import check
from dfl_experiments.data.packs import is_packed, load
from dfl_experiments.data.sources import Source, expanded
from dfl_experiments.errors import UserError

EPILOG = """examples:
  dfl-data list                                        what is there, in data_dir
  dfl-data prepare dataset=mnist                       download if need be, and pack
  dfl-data prepare dataset=cifar10 data_dir=/data      somewhere else (as does the variable DFL_DATA_DIR)
  dfl-data prepare dataset=folder dataset.source.path=$HOME/photos dataset.source.size=64
"""
NO_SIZES = ("", "", "", "")


def asked(cfg: DictConfig) -> tuple[str, Source, Path]:
    """Name and source of the data set that a configuration names, and data_dir. Raises `UserError`."""
    configuration = check(cfg)
    settings = configuration.settings
    source: Source = configuration.components["dataset.source"].build()
    return settings.dataset.name, source, expanded(settings.data_dir, "data_dir")


def row(overrides: list[str]) -> tuple[str, ...]:
    """One data set's line of the list: name, state, train, test, shape, classes, place."""
    cfg = compose(overrides)
    if unset := sorted(OmegaConf.missing_keys(cfg.dataset)):
        return cfg.dataset.name, "unset", *NO_SIZES, f"needs {', '.join(unset)}"
    name, source, data_dir = asked(cfg)
    cache = source.cache_name(name)
    try:
        if cache is not None and not is_packed(data_dir / cache):
            found = next((path for path in source.locations(data_dir) if os.path.exists(path)), None)
            return name, "raw" if found else "absent", *NO_SIZES, str(found or data_dir)
        arrays = load(name, source, data_dir, download=False)
    except UserError as error:
        return name, "damaged", *NO_SIZES, str(error)
    shape = "x".join(str(length) for length in arrays.shape)
    sizes = (str(size) for size in (len(arrays.train_labels), len(arrays.test_labels), shape, arrays.num_classes))
    return name, "packed" if cache else "bundled", *sizes, str(data_dir / cache if cache else "scikit-learn")


def show(choices: list[list[str]]) -> None:
    """Print a table of data sets, each chosen by its overrides. Raises `UserError`."""
    rows = [("name", "state", "train", "test", "shape", "classes", "where"), *(row(choice) for choice in choices)]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for line in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def main() -> None:
    """Run the script: a user's mistake ends it with one line on stderr and the status 2."""
    layout = RawDescriptionHelpFormatter
    parser = ArgumentParser("dfl-data", description=__doc__, epilog=EPILOG, formatter_class=layout)
    parser.add_argument("command", choices=("prepare", "list"), help="fetch and pack one data set, or show all or one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for dfl-train")
    arguments = parser.parse_args()
    overrides, names = arguments.overrides, group_options("dataset")
    named = any(override.startswith("dataset=") for override in overrides)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if arguments.command == "prepare":
            if not named:
                raise UserError(f"prepare: name a data set, dataset=NAME; there are {', '.join(names)}")
            load(*asked(compose(overrides)))
        show([overrides] if named else [[f"dataset={name}", *overrides] for name in names])
    except MISTAKES as error:
        print(f"dfl-data: {one_line(error)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
