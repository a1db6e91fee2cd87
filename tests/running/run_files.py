"""What lies in a run directory, read."""

import csv
import json
import subprocess
import sys


def table(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def records(run_dir):
    """The records of the one offline W&B run in a run directory, by type."""
    (folder,) = (run_dir / "wandb").glob("offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    found = {}
    for record in map(json.loads, lines):
        found.setdefault(record["type"], []).append(record[record["type"]])
    return found
