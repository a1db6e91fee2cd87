"""Copy the files of finished runs that a report needs. The copies are small enough to keep with the code.

    python scripts/keep_results.py outputs/fc_table outputs/reference/fc_table

The script checks `result.json`, `epochs.csv` and `config.yaml` of every run directory and copies them. It stores the
SHA-256 of the copied files in the new `result.json`. `dfl-report` reads a copy like the original, and
`dfl-train repeat=<copy>` repeats its run. In a copy, the option `data_dir` has its default value, because the original
path is valid on this machine only.
"""

import argparse
import shutil
import sys
from pathlib import Path

from dfl_experiments.errors import UserError
from dfl_experiments.running.result import (
    DONE,
    read_epochs,
    read_result,
    write_config,
    write_result,
)
from dfl_experiments.running.run_directory import run_folders


def keep(source: Path, destination: Path) -> int:
    """Copy every finished run below a folder, and return the number of runs."""
    count = 0
    for folder in run_folders(source):
        try:
            result = read_result(folder)
            read_epochs(folder, result or {})
        except UserError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        if result is None or result["status"] not in DONE:
            print(f"left out: {folder} is not finished")
            continue
        copy = destination / folder.relative_to(source)
        copy.mkdir(parents=True, exist_ok=True)
        config = {**result["config"], "data_dir": "data"}
        write_config(copy, config)
        (copy / "epochs.csv").unlink(missing_ok=True)
        if (folder / "epochs.csv").exists():
            shutil.copyfile(folder / "epochs.csv", copy / "epochs.csv")
        write_result(copy, {**result, "config": config})
        count += 1
    return count


def main() -> None:
    """Read the command line, and copy the runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="folder with run directories")
    parser.add_argument("destination", type=Path, help="folder for the copies")
    options = parser.parse_args()
    if not options.source.is_dir():
        parser.error(f"{options.source}: no such folder")
    if options.destination.resolve() == options.source.resolve():
        parser.error(f"{options.destination}: is the source; choose another folder for the copies")
    print(f"{keep(options.source, options.destination)} runs kept in {options.destination}")


if __name__ == "__main__":
    main()
