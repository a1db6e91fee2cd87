"""`result.json`: what a run says of itself, the one schema that it is read through, and the status that follows."""

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from omegaconf import OmegaConf
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dfl_experiments.configuration.composition import as_values, changed
from dfl_experiments.configuration.refusals import refusal
from dfl_experiments.errors import UserError
from dfl_experiments.ranges import NonNegative, Size
from dfl_experiments.running.locks import holder_of
from dfl_experiments.running.run_directory import CONFIG, LAST, PREVIOUS, RESULT, write_atomically

DONE = ("finished", "diverged", "stopped")  # statuses that running it again would end in again
LARGEST, DEEPEST = 2**22, 20  # characters of a result, and its nested lists and mappings
Share = Annotated[float, Field(ge=0, le=1)]
ByLayer = dict[Annotated[str, Field(pattern=r"^\d{1,4}$")], float | None]


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
    status: Literal["finished", "diverged", "stopped", "failed", "interrupted"]
    config: dict[str, Any]
    reason: str | None = None
    epochs: Size = 0
    accuracy: Share | None = None
    test_accuracy: Accuracies | None = None
    validation_accuracy: Share | None = None
    validation_loss: NonNegative | None = None
    cosine: ByLayer = {}
    zeros: ByLayer = {}
    cosine_by_construction: list[str] = []
    seconds: NonNegative | None = None
    samples_per_second: NonNegative | None = None
    input_shape: Annotated[list[Size], Field(min_length=3, max_length=3)] | None = None
    num_classes: Size | None = None
    data: str | None = None
    device: str | None = None
    git_commit: str | None = None
    versions: dict[str, str] = {}

    @field_validator("config")
    @classmethod
    def _is_no_abyss(cls, config: dict[str, Any]) -> dict[str, Any]:
        level: list[Any] = [config]
        for _ in range(DEEPEST):
            level = [x for item in level for x in (item.values() if isinstance(item, dict) else item)]
            level = [x for x in level if isinstance(x, dict | list)]
        if level:
            raise UserError(f"config: has more than {DEEPEST} levels")
        return config

    @model_validator(mode="after")
    def _a_finished_run_has_its_numbers(self) -> Self:
        for name in ("accuracy", "seconds", "samples_per_second"):
            if self.status == "finished" and getattr(self, name) is None:
                raise UserError(f"{name}: missing in a finished run")
        return self


def parsed(path: Path) -> dict[str, Any] | None:
    """The content of a result.json, None where it is absent or breaks off. Raises `UserError` for one that is none."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LARGEST + 1)
        content = json.loads(text)
        Result.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path}: {refusal(error, '', [])}") from None
    except (OSError, ValueError, RecursionError):
        return None
    return content


def read_result(run_dir: Path) -> dict[str, Any] | None:
    """The content of `result.json`; None where there is none that is whole."""
    with suppress(UserError):
        return parsed(run_dir / RESULT)
    return None


def write_result(run_dir: Path, result: Mapping[str, Any]) -> None:
    """Write `result.json`, atomically. NaN and Inf become null, as JSON has no word for them."""
    finite = changed(result, lambda x: None if isinstance(x, float) and not math.isfinite(x) else x)
    write_atomically(run_dir / RESULT, json.dumps(finite, indent=2, ensure_ascii=False) + "\n")


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
    """Status, accuracy and reason of a run as its directory tells them, which is only looked at."""
    if not run_dir.is_dir():
        return "not started", None, ""
    result = read_result(run_dir)
    if result is None or result["status"] not in DONE:
        if holder := holder_of(run_dir):
            return "running", None, str(holder)
        result = read_result(run_dir)  # it may have ended between the two looks
    if result is None:
        return "interrupted", None, "its process ended without a word"
    return result["status"], result.get("accuracy"), result.get("reason") or ""
