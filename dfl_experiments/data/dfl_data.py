"""The console script `dfl-data`: fetch and pack data sets ahead of a run, and show which are there."""

import argparse
import logging
import os
import sys
from pathlib import Path

from omegaconf import OmegaConf

from dfl_experiments.configuration.composition import compose, group_options
from dfl_experiments.configuration.refusals import MISTAKES, one_line
from dfl_experiments.configuration.schema import check
from dfl_experiments.data.packs import is_packed, load, open_packed
from dfl_experiments.data.sources import Source, expanded
from dfl_experiments.errors import UserError

EPILOG = """examples:
  dfl-data list                                        what is there, in data_dir
  dfl-data prepare dataset=mnist                       download if need be, and pack
  dfl-data prepare dataset=cifar10 data_dir=/data      somewhere else (as does the variable DFL_DATA_DIR)
  dfl-data prepare dataset=folder dataset.source.path=$HOME/photos dataset.source.size=64
"""


def asked(overrides: list[str]) -> tuple[str, Source, Path]:
    """Name and source of the data set that the overrides describe, and data_dir. Raises `UserError`."""
    configuration = check(compose(overrides))
    settings = configuration.settings
    source: Source = configuration.components["dataset.source"].build()
    return settings.dataset.name, source, expanded(settings.data_dir, "data_dir")


def prepare(overrides: list[str]) -> None:
    """Fetch and pack the data set that `dataset=` names. Raises `UserError`."""
    if not any(override.startswith("dataset=") for override in overrides):
        raise UserError(f"prepare: name a data set, dataset=NAME; there are {', '.join(group_options('dataset'))}")
    name, source, data_dir = asked(overrides)
    arrays = load(name, source, data_dir)
    cache = source.cache_name(name)
    where = data_dir / cache if cache else "scikit-learn itself"
    shape = "x".join(str(length) for length in arrays.shape)
    print(
        f"{name}: {len(arrays.train_labels)} training and {len(arrays.test_labels)} test images of {shape} "
        f"in {arrays.num_classes} classes, in {where}"
    )


def row(overrides: list[str]) -> tuple[str, ...]:
    """One data set's line of the list: name, state, train, test, shape, classes, place."""
    dataset = compose(overrides).dataset
    if unset := sorted(OmegaConf.missing_keys(dataset)):
        return dataset.name, "unset", "", "", "", "", f"needs {', '.join(unset)}"
    name, source, data_dir = asked(overrides)
    cache = source.cache_name(name)
    try:
        if cache is not None and not is_packed(data_dir / cache):
            found = next((path for path in source.locations(data_dir) if os.path.exists(path)), None)
            return name, "raw" if found else "absent", "", "", "", "", str(found or data_dir)
        arrays = load(name, source, data_dir, download=False) if cache is None else open_packed(data_dir / cache)
    except UserError as error:
        return name, "damaged", "", "", "", "", str(error)
    sizes = (
        f"{len(arrays.train_labels)}",
        f"{len(arrays.test_labels)}",
        "x".join(str(length) for length in arrays.shape),
    )
    return (
        name,
        "packed" if cache else "bundled",
        *sizes,
        f"{arrays.num_classes}",
        str(data_dir / cache if cache else ""),
    )


def show(overrides: list[str]) -> None:
    """Print a table of the data sets, or of the one that `dataset=` names. Raises `UserError`."""
    named = any(override.startswith("dataset=") for override in overrides)
    choices = [overrides] if named else [[f"dataset={name}", *overrides] for name in group_options("dataset")]
    rows = [("name", "state", "train", "test", "shape", "classes", "where"), *(row(choice) for choice in choices)]
    widths = [max(len(line[column]) for line in rows) for column in range(len(rows[0]))]
    for line in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def main() -> None:
    """Run the script: a user's mistake ends it with one line on stderr and the status 2."""
    parser = argparse.ArgumentParser(
        "dfl-data", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="prepare | list")
    for command, text in (("prepare", "fetch and pack one data set"), ("list", "show what is there")):
        added = commands.add_parser(command, help=text, description=text)
        added.add_argument("overrides", nargs="*", metavar="key=value", help="as for dfl-train")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        (prepare if arguments.command == "prepare" else show)(arguments.overrides)
    except MISTAKES as error:
        print(f"dfl-data: {one_line(error)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
