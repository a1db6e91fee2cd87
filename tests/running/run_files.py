"""Read the files of a run directory."""

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
    lines = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=60
    ).stdout.splitlines()
    found = {}
    for record in map(json.loads, lines):
        found.setdefault(record["type"], []).append(record[record["type"]])
    return found


def summary(run_dir):
    """What W&B shows of a run in one row, with the keys under which it stores them."""
    values = {}
    for update in records(run_dir)["summary"]:
        values.update(update.get("update", {}))
    return values


def mirrored(run_dir):
    """The rows of both tables as the one offline W&B run there has them, each as {column: number}."""
    logged = [item["item"] for item in records(run_dir)["history"]]
    return {
        name: [item for item in logged if key in item]
        for name, key in (("iterations", "loss"), ("epochs", "lr"))
    }


def assert_mirrored(run_dir):
    """Every row of both tables, of iterations every n-th as recorded, is in the W&B run, once, in its order."""
    found = mirrored(run_dir)
    every = json.loads((run_dir / "result.json").read_text())["config"]["tracking"]["every"]
    for name, items in found.items():
        rows = [
            {key: float(value) for key, value in row.items() if value}
            for row in table(run_dir / f"{name}.csv")
        ]
        rows = rows[::every] if name == "iterations" else rows
        assert [
            {key: item[key] for key in row} for item, row in zip(items, rows, strict=True)
        ] == rows
