"""The console script `dfl-data`: fetch and pack data sets ahead of a run, and show which are there."""

import logging
import os
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from dfl_experiments.configuration.composition import compose, group_options
from dfl_experiments.configuration.refusals import refusing
from dfl_experiments.configuration.schema import check
from dfl_experiments.data.packs import CLASSES, is_packed, load, open_packed
from dfl_experiments.data.sources import Arrays, Source, expanded
from dfl_experiments.errors import Fault, UserError, printable, reason

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
        sizes = sizes_of(load(name, source, data_dir, download=False))
    except UserError as error:
        return name, "damaged", *NO_SIZES, str(error)
    return name, "packed" if cache else "bundled", *sizes, str(data_dir / cache if cache else "dfl-experiments")


def sizes_of(arrays: Arrays) -> tuple[str, ...]:
    """Images to train on and to test, their shape, and the number of classes."""
    shape = "x".join(str(length) for length in arrays.shape)
    return str(len(arrays.train_labels)), str(len(arrays.test_labels)), shape, str(arrays.num_classes)


def packs_beside(data_dir: Path, shown: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The lines of whole packs in a folder that are none of the data sets shown: those of one's own images."""
    for folder in sorted(path.parent for path in data_dir.glob(f"*/{CLASSES}")):
        with suppress(UserError):
            if folder.name not in shown and is_packed(folder):
                yield folder.name, "packed", *sizes_of(open_packed(folder)), str(folder)


def show(choices: list[list[str]], beside: Path | None = None) -> None:
    """Print a table of data sets, each chosen by its overrides, and of packs in a folder. Raises `UserError`."""
    rows = [("name", "state", "train", "test", "shape", "classes", "where"), *(row(choice) for choice in choices)]
    if beside is not None:
        rows += packs_beside(beside, [name for name, *_ in rows])
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for line in rows:
        print(printable("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()))


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
    with refusing("dfl-data"):
        if arguments.command == "prepare" and not named:
            raise UserError(f"prepare: name a data set, dataset=NAME; there are {', '.join(names)}")
        try:
            if arguments.command == "prepare":
                load(*asked(compose(overrides)))
            if named:
                show([overrides])
            else:
                show([[f"dataset={name}", *overrides] for name in names], asked(compose(overrides))[2])
        except MemoryError as error:
            raise Fault(f"the data do not fit into memory ({reason(error)})") from error


if __name__ == "__main__":
    from dfl_experiments.console import data

    data()
