"""Copy what a report needs of finished runs, and nothing large: a folder small enough to be kept with the code.

    python scripts/keep_results.py outputs/fc_table outputs/reference/fc_table

Of every run directory `result.json`, `epochs.csv` and `config.yaml` are taken, once they are verified; the copies get a
seal of their own. `dfl-report` reads the copy as it reads the original, and `dfl-train repeat=<copy>` runs it anew. The
data's place, which is of this machine only, becomes the default one.
"""

import argparse
import shutil
import sys
from pathlib import Path

from dfl_experiments.errors import UserError
from dfl_experiments.report.runs import run_folders
from dfl_experiments.running.result import DONE, read_epochs, read_result, write_config, write_result


def keep(source: Path, destination: Path) -> int:
    """Copy every finished run below a folder, and return how many there were."""
    count = 0
    for folder in run_folders(source):
        try:
            result = read_result(folder)
            read_epochs(folder, result or {})
        except UserError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        if result is None or result["status"] not in DONE:
            print(f"left out, not finished: {folder}")
            continue
        place = destination / folder.relative_to(source)
        place.mkdir(parents=True, exist_ok=True)
        config = {**result["config"], "data_dir": "data"}
        write_config(place, config)
        (place / "epochs.csv").unlink(missing_ok=True)
        if (folder / "epochs.csv").exists():
            shutil.copyfile(folder / "epochs.csv", place / "epochs.csv")
        write_result(place, {**result, "config": config})
        count += 1
    return count


def main() -> None:
    """Read the command line and copy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("destination", type=Path)
    asked = parser.parse_args()
    if not asked.source.is_dir():
        raise SystemExit(f"error: {asked.source}: no such folder")
    print(f"{keep(asked.source, asked.destination)} runs kept in {asked.destination}")


if __name__ == "__main__":
    main()
