"""Read the files of a run directory."""

import csv
import json
import subprocess
import sys


def table(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def records(run_dir):
    """Return the records of the only offline W&B run in a run directory, as {type: list of records}."""
    (folder,) = (run_dir / "wandb").glob("offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    inspected = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    by_type = {}
    for line in inspected.stdout.splitlines():
        record = json.loads(line)
        by_type.setdefault(record["type"], []).append(record[record["type"]])
    return by_type


def summary(run_dir):
    """Return the summary of a W&B run, as {key: value} with W&B's keys."""
    values = {}
    for update in records(run_dir)["summary"]:
        values.update(update.get("update", {}))
    return values


def mirrored(run_dir):
    """Return the rows of both tables in the only offline W&B run of a run directory, each as {column: number}."""
    logged = [item["item"] for item in records(run_dir)["history"]]
    iterations = [item for item in logged if "loss" in item]
    epochs = [item for item in logged if "lr" in item]
    return {"iterations": iterations, "epochs": epochs}


def assert_mirrored(run_dir):
    """Assert that W&B has every row of both tables once, in order. It has every n-th iteration (tracking.every)."""
    every = json.loads((run_dir / "result.json").read_text())["config"]["tracking"]["every"]
    for name, items in mirrored(run_dir).items():
        rows = table(run_dir / f"{name}.csv")
        if name == "iterations":
            rows = rows[::every]
        for item, row in zip(items, rows, strict=True):
            values = {key: float(value) for key, value in row.items() if value}
            assert {key: item[key] for key in values} == values
