"""`result.json`: what a run says of itself, the one schema that it is read through, and the status that follows."""

import csv
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from omegaconf import OmegaConf
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dfl_experiments.configuration.composition import as_values, changed, names_of
from dfl_experiments.configuration.recorded import DEEPEST
from dfl_experiments.configuration.refusals import refusal
from dfl_experiments.errors import UserError, reason
from dfl_experiments.ranges import LARGEST_COSINE, Cosine, NonNegative, Size
from dfl_experiments.ranges import Probability as Share
from dfl_experiments.running.locks import holder_of
from dfl_experiments.running.run_directory import CONFIG, EPOCH_COLUMNS, HEADLINES, LAST, PREVIOUS, write_atomically
from dfl_experiments.seal import RESULT, read_bytes, read_sealed, sealed

DONE = ("finished", "diverged", "collapsed", "stopped")  # statuses that running it again would end in again
Layer = Annotated[str, Field(pattern=r"^\d{1,4}$")]


class Accuracies(BaseModel):
    """On the test set: after the last epoch, after that with the best validation accuracy, and at best."""

    model_config = ConfigDict(strict=True)
    last: Share | None = None
    at_best_validation: Share | None = None
    best: Share | None = None
    best_epoch: Size | None = None


class Result(BaseModel):
    """What is read of a result.json by any program here; a finished run has all the numbers that a report shows."""

    model_config = ConfigDict(strict=True, extra="allow")
    status: Literal["finished", "diverged", "collapsed", "stopped", "failed", "interrupted"]
    config: dict[str, Any]
    reason: str | None = None
    epochs: Size = 0
    accuracy: Share | None = None
    test_accuracy: Accuracies | None = None
    validation_accuracy: Share | None = None
    validation_loss: NonNegative | None = None
    cosine: dict[Layer, Cosine | None] = {}
    zeros: dict[Layer, NonNegative | None] = {}
    activation_rms: dict[Layer, NonNegative | None] = {}
    dead: dict[Layer, Share | None] = {}
    norm_ratio: dict[Layer, NonNegative | None] = {}
    unstable: dict[str, Any] | None = None
    cosine_by_construction: list[Layer] = []
    seconds: NonNegative | None = None
    samples_per_second: NonNegative | None = None
    input_shape: Annotated[list[Size], Field(min_length=3, max_length=3)] | None = None
    num_classes: Size | None = None
    data: str | None = None
    device: str | None = None
    git_commit: str | None = None
    versions: dict[str, str] = {}
    code: dict[str, str] = {}
    finished_at: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT[\d:.]{8,15}\+00:00$")] | None = None

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        config, tests = self.config, self.test_accuracy or Accuracies()
        if too_deep(config):
            raise UserError(f"config: has more than {DEEPEST} levels")
        names = {**names_of(config), "seed": config["seed"]}
        if any(value != names[key] for key, value in (self.model_extra or {}).items() if key in names):
            raise UserError("names, seed: are not those of the configuration")
        has_numbers = None not in (self.accuracy, self.seconds, self.samples_per_second)
        if self.status in ("finished", "collapsed") and not has_numbers:
            raise UserError(f"accuracy, seconds or samples_per_second: missing in a {self.status} run")
        if self.status == "finished" and self.epochs != config["epochs"]:
            raise UserError(f"epochs={self.epochs}: a finished run has {config['epochs']}")
        if tests.best is not None:
            highest = max(value or 0.0 for value in (tests.last, tests.at_best_validation))
            headline = getattr(tests, HEADLINES[config["protocol"]["accuracy"]])
            if highest > tests.best or self.accuracy != headline or not 1 <= (tests.best_epoch or 0) <= self.epochs:
                raise UserError("accuracy, test_accuracy: contradict one another")
        return self


def too_deep(value: Any, left: int = DEEPEST) -> bool:
    """Return whether lists and mappings lie deeper in one another than in any configuration."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return left < 0 or any(too_deep(part, left - 1) for part in parts)


def read_result(run_dir: Path) -> dict[str, Any] | None:
    """Return the content of `result.json`, verified; None where there is none.

    Raises `UserError`, naming the file, for one that is damaged, that contradicts itself or is none of a run, and where
    a file beside it is not what the run left.
    """
    content = read_sealed(run_dir)
    if content is not None:
        try:
            Result.model_validate(content)
        except ValidationError as error:
            raise UserError(f"{run_dir / RESULT}: {refusal(error, '', [])}") from None
        except (LookupError, TypeError, AttributeError, RecursionError) as error:  # of a foreign configuration
            raise UserError(f"{run_dir / RESULT}: is of no run ({type(error).__name__}: {reason(error)})") from None
    return content


def read_epochs(run_dir: Path, result: Mapping[str, Any]) -> dict[str, list[float | None]]:
    """Return the columns of `epochs.csv` by name, None for what was not measured or is infinite.

    A last line that is not whole is left out. result: the run's, empty where there is none yet. Raises `UserError`,
    naming the file, for columns, numbers and counts of rows that no such run has.
    """
    path, epochs = run_dir / "epochs.csv", result.get("epochs", 0)
    if not os.path.lexists(path):
        return {}
    content = read_bytes(path)
    try:
        names, *rows = [*csv.reader(content.decode().split("\n")[:-1])] or [[]]
        if not rows and not epochs:
            return {}
        found = {name: _numbers(name, cells) for name, cells in zip(names, zip(*rows, strict=True), strict=True)}
        needed = {*EPOCH_COLUMNS, *(f"cosine/{layer}" for layer in result.get("cosine", ()))} - {"validation_loss"}
        if missing := needed - found.keys():
            raise UserError(f"has no column {', '.join(sorted(missing))}")
        is_done = result.get("status") in DONE
        if len(rows) < epochs or (is_done and len(rows) > epochs) or found["epoch"] != [*range(1, len(rows) + 1)]:
            raise UserError(f"has other rows than those of {epochs} epochs")
        tests, last = found["test_accuracy"], (result.get("test_accuracy") or {}).get("last")
        if last is not None and not math.isclose(tests[epochs - 1] or 0.0, last, rel_tol=1e-6):
            raise UserError(f"has another test accuracy than {RESULT}, {last:g}, after epoch {epochs}")
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path}: is damaged ({reason(error)})") from None
    return found


def _numbers(name: str, cells: Sequence[str]) -> list[float | None]:
    if name not in EPOCH_COLUMNS and not re.fullmatch(r"[a-z_]+/\d{1,4}", name):
        raise UserError(f"{name!r} is no column of a run")
    low, high = 0.0, math.inf
    if "cosine" in name:
        low, high = -LARGEST_COSINE, LARGEST_COSINE
    elif re.search("accuracy|agreement|dead", name):
        high = 1.0
    values = [float(cell) if cell else None for cell in cells]
    for value in values:
        if value is not None and not low <= value <= high:
            raise UserError(f"{name}={value:g}, where it is from {low:g} to {high:g}")
    return [None if value is None or math.isinf(value) else value for value in values]


def made_with(result: Mapping[str, Any]) -> set[str]:
    """Name the commit, in short, and the version of torch that a run was made with."""
    commit, torch = result.get("git_commit") or "unknown", result.get("versions", {}).get("torch", "unknown")
    return {f"commit {commit[:7]}{commit[40:]}", f"torch {torch}"}


def write_result(run_dir: Path, result: Mapping[str, Any]) -> None:
    """Write `result.json`, atomically, with the seal of all that the run leaves.

    NaN and Inf become null, as JSON has no word for them.
    """
    finite = changed(result, lambda x: None if isinstance(x, float) and not math.isfinite(x) else x)
    text = json.dumps(sealed(run_dir, finite), indent=2, ensure_ascii=False)
    write_atomically(run_dir / RESULT, text + "\n")


def write_config(run_dir: Path, config: Mapping[str, Any]) -> None:
    """Write the resolved configuration to `config.yaml`: values, whatever they look like."""
    write_atomically(run_dir / CONFIG, OmegaConf.to_yaml(as_values(config)))


def status_left(run_dir: Path) -> str | None:
    """The status that a run left here, "interrupted" if it was killed; None where there is nothing to go on from."""
    result = read_result(run_dir)
    if result is not None and result["status"] in DONE:
        return result["status"]
    if any(os.path.lexists(run_dir / name) for name in (LAST, PREVIOUS)):
        return "interrupted" if result is None else result["status"]
    return None


def status_of(run_dir: Path) -> tuple[str, float | None, str]:
    """Status, accuracy and reason of a run as its directory tells them, which is only looked at; "damaged" and why."""
    if not run_dir.is_dir():
        return "not started", None, ""
    try:
        result = read_result(run_dir)
        if result is None or result["status"] not in DONE:
            if holder := holder_of(run_dir):
                return "running", None, str(holder)
            result = read_result(run_dir)  # it may have ended between the two looks
    except (UserError, OSError) as error:
        return "damaged", None, str(error)
    if result is None:
        return "interrupted", None, "its process ended without a word"
    return result["status"], result.get("accuracy"), result.get("reason") or ""
