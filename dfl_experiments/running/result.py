"""Read, check and write `result.json`, and derive the status of a run from it."""

import csv
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dfl_experiments.configuration.composition import as_values, changed
from dfl_experiments.configuration.refusals import refusal
from dfl_experiments.errors import UserError, reason
from dfl_experiments.ranges import Cosine, NonNegative, Size
from dfl_experiments.ranges import Probability as Share
from dfl_experiments.running.locks import holder_of
from dfl_experiments.running.run_directory import (
    CONFIG,
    EPOCH_COLUMNS,
    LAST,
    PREVIOUS,
    write_atomically,
)
from dfl_experiments.seal import RESULT, complete_lines, read_bytes, read_sealed, sealed

# statuses of runs that have ended; running them again would give the same result
DONE = ("finished", "diverged", "collapsed", "stopped")
Layer = Annotated[str, Field(pattern=r"^\d{1,4}$")]


class Accuracies(BaseModel):
    """Test accuracies of a run."""

    model_config = ConfigDict(strict=True)
    last: Share | None = None
    """Test accuracy after the last epoch."""
    at_best_validation: Share | None = None
    """Test accuracy after the epoch with the best validation accuracy."""
    best: Share | None = None
    """Highest test accuracy of all epochs."""
    best_epoch: Size | None = None
    """Number of the epoch with the accuracy `best`."""


class Result(BaseModel):
    """The entries of result.json that this package reads. Other entries are allowed. Layers have numbers as keys."""

    model_config = ConfigDict(strict=True, extra="allow")
    status: Literal["finished", "diverged", "collapsed", "stopped", "failed", "interrupted"]
    config: dict[str, Any]
    """The resolved configuration."""
    reason: str | None = None
    """Reason for the status; None if finished."""
    epochs: Size = 0
    """Number of epochs trained."""
    accuracy: Share | None = None
    """The test accuracy that the protocol reports."""
    test_accuracy: Accuracies | None = None
    class_accuracy: dict[str, Share | None] = {}
    """Test accuracy of each class after the last epoch, by name; None for a class without test samples."""
    validation_accuracy: Share | None = None
    """Validation accuracy after the last epoch."""
    validation_loss: NonNegative | None = None
    """Validation loss after the last epoch."""
    cosine: dict[Layer, Cosine | None] = {}
    """Mean of `cosine_sample` over the last epoch with a measurement."""
    zeros: dict[Layer, NonNegative | None] = {}
    """Number of samples whose error signal is zero, in the last epoch with a measurement."""
    activation_rms: dict[Layer, NonNegative | None] = {}
    """Root mean square of the activations, after the last epoch."""
    dead: dict[Layer, Share | None] = {}
    """Fraction of dead units, after the last epoch."""
    norm_ratio: dict[Layer, NonNegative | None] = {}
    """Mean of ‖δ_i‖/‖δ_i^BP‖ over the last epoch with a measurement."""
    unstable: dict[str, Any] | None = None
    """The first sign of instability, see `stability.instability`."""
    cosine_by_construction: list[Layer] = []
    """Layers whose error signal equals BP's by construction."""
    weight_decay: NonNegative | None = None
    """Weight decay of W's optimizer; None if it has no such option."""
    seconds: NonNegative | None = None
    """Time of training, without evaluation."""
    samples_per_second: NonNegative | None = None
    """Training images per second of training."""


def read_result(run_dir: Path) -> dict[str, Any] | None:
    """Return the verified content of `result.json`; None if there is no such file.

    Raises `UserError` if `result.json` is damaged, or if another file has changed since the run. The message names the
    file.
    """
    content = read_sealed(run_dir)
    if content is not None:
        try:
            Result.model_validate(content)
        except ValidationError as error:
            raise UserError(f"{run_dir / RESULT}: {refusal(error, '', [])}") from None
    return content


def has_failed_to_learn(result: Mapping[str, Any]) -> bool:
    """Return whether the last test accuracy is below 0.8 × the run's best one, or at chance.

        at chance: accuracy < c + min(c/2, 0.02, (1 − c)/5)

    c is the accuracy of a net that always predicts the most frequent class. A smoke run is not judged.
    """
    if result.get("config", {}).get("smoke") is not None:
        return False
    accuracies = result.get("test_accuracy") or {}
    last = accuracies.get("last")
    if last is None:
        last = result["accuracy"]
    num_classes = result.get("num_classes") or math.inf
    chance = result.get("largest_class") or 1 / num_classes
    margin = min(chance / 2, 0.02, (1 - chance) / 5)
    return last < max(0.8 * (accuracies.get("best") or 0.0), chance + margin)


def read_epochs(run_dir: Path, result: Mapping[str, Any]) -> dict[str, list[float | None]]:
    """Return the columns of `epochs.csv` by name. A value is None if it is infinite or was not measured.

    An incomplete last line is left out.

    result: content of result.json; empty if there is none yet.
    Raises `UserError`, with the file's name, for missing columns, texts or a wrong number of rows.
    """
    path, epochs = run_dir / "epochs.csv", result.get("epochs", 0)
    if not os.path.lexists(path):
        return {}
    content = read_bytes(path)
    try:
        lines = complete_lines(content).decode().split("\n")[:-1]
        names, *rows = [*csv.reader(lines)] or [[]]
        if not rows and not epochs:
            return {}
        columns = {}
        for name, cells in zip(names, zip(*rows, strict=True), strict=True):
            numbers = [float(cell) if cell else None for cell in cells]
            columns[name] = [None if x is None or math.isinf(x) else x for x in numbers]
        cosines = [f"cosine/{layer}" for layer in result.get("cosine", ())]
        needed = {*EPOCH_COLUMNS, *cosines} - {"validation_loss"}
        if missing := needed - columns.keys():
            raise UserError(f"has no column {', '.join(sorted(missing))}")
        is_done = result.get("status") in DONE
        is_counted = columns["epoch"] == [*range(1, len(rows) + 1)]
        if len(rows) < epochs or (is_done and len(rows) > epochs) or not is_counted:
            raise UserError(f"does not have one row for each of {epochs} epochs")
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path}: is damaged ({reason(error)})") from None
    return columns


def without_nan(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the result with None in place of NaN and infinite values, which JSON does not have."""
    values: dict[str, Any] = changed(
        result, lambda x: None if isinstance(x, float) and not math.isfinite(x) else x
    )
    return values


def write_result(run_dir: Path, result: Mapping[str, Any]) -> None:
    """Write `result.json` atomically, with digests of the run's files."""
    content = sealed(run_dir, without_nan(result))
    text = json.dumps(content, indent=2, ensure_ascii=False)
    write_atomically(run_dir / RESULT, text + "\n")


def write_config(run_dir: Path, config: Mapping[str, Any]) -> None:
    """Write the resolved configuration to `config.yaml`. Each `${` in a text is escaped."""
    write_atomically(run_dir / CONFIG, OmegaConf.to_yaml(as_values(config)))


def status_left(run_dir: Path) -> str | None:
    """Return the status of a run that has ended or has a checkpoint, otherwise None.

    The status of a killed run with a checkpoint is "interrupted".
    """
    result = read_result(run_dir)
    if result is not None and result["status"] in DONE:
        return result["status"]
    if any(os.path.lexists(run_dir / name) for name in (LAST, PREVIOUS)):
        return "interrupted" if result is None else result["status"]
    return None


def read_status(run_dir: Path) -> tuple[str, str, dict[str, Any] | None]:
    """Return status, reason and result.json of a run without taking its lock. An unreadable run is "damaged"."""
    if not run_dir.is_dir():
        return "not started", "", None
    try:
        result = read_result(run_dir)
        if result is None or result["status"] not in DONE:
            if holder := holder_of(run_dir):
                return "running", str(holder), None
            result = read_result(run_dir)  # the run may have ended since the first reading
    except (UserError, OSError) as error:
        return "damaged", str(error), None
    if result is None:
        return "interrupted", "the process ended without writing a result", None
    return result["status"], result.get("reason") or "", result


def flat(node: Mapping[str, Any], separator: str = ".", prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one mapping. The separator joins the keys, such as `optimizer.lr` or `cosine/1`."""
    values: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            values |= flat(value, separator, f"{prefix}{key}{separator}")
        else:
            values[f"{prefix}{key}"] = value
    return values
