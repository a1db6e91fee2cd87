"""The points of a sweep, and the outcome of each point in this command."""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dfl_experiments.configuration.composition import config_digest, harmless
from dfl_experiments.configuration.recorded import read_yaml
from dfl_experiments.configuration.schema import Configuration
from dfl_experiments.errors import UserError
from dfl_experiments.running.result import DONE, read_epochs, read_result, read_status
from dfl_experiments.running.run_directory import run_folders, write_atomically
from dfl_experiments.seal import read_json

OUTCOME = ".outcome"  # file in a run directory, written by the last command that worked there
COMMAND = "DFL_COMMAND"  # environment variable that passes the command's ID to its jobs


class SweepPoint(NamedTuple):
    """One job of a sweep."""

    overrides: list[str]
    """Overrides of the job, without those of Hydra's own options."""
    configuration: Configuration
    """The job's checked configuration."""


@dataclass
class Sweep:
    """The sweep that this process runs."""

    folder: Path
    """Folder of the sweep."""
    name: str
    """Name of the sweep, also its group in W&B."""
    command: str
    """ID of this command, which all its jobs receive and write into their outcomes."""
    launcher: str
    """Hydra's name of the launcher."""
    force: bool
    """Whether earlier results are replaced."""
    config_flags: list[str] = field(default_factory=list)
    """Arguments of the command that say where the user's own options are, such as `--config-dir my_conf`."""
    points: dict[str, SweepPoint] = field(default_factory=dict)
    """The points by folder name; empty if a sweeper chooses them during the sweep."""


class Ending(NamedTuple):
    """The status and result of one point of a sweep. All texts are printable."""

    folder: str
    """The point's folder, relative to the sweep's folder."""
    status: str
    """Status of the run, or `not started`, `running`, `damaged`."""
    reason: str
    """Reason for the status; empty for a finished run."""
    overrides: list[str]
    """Overrides of the job."""
    result: Mapping[str, Any]
    """Content of result.json; empty if the file is absent or does not hold the result of this point."""

    @property
    def is_finished(self) -> bool:
        """True if all epochs were trained."""
        return self.status == "finished"


def write_outcome(run_dir: Path, command: str, status: str, reason: str | None = None) -> None:
    """Write the status of a job to the file `.outcome`, for the command that started the job.

    status: status of the job's run. "running" means that the results of an earlier run are already deleted.
    """
    begun = status == "running" or has_begun(run_dir, command)
    outcome = {"command": command, "begun": begun, "status": status, "reason": reason or ""}
    write_atomically(run_dir / OUTCOME, json.dumps(outcome))


def read_outcome(run_dir: Path) -> dict[str, Any]:
    """Return the last outcome that `write_outcome` wrote; an empty mapping if the file is absent or damaged."""
    with suppress(UserError):
        return read_json(run_dir / OUTCOME) or {}
    return {}


def has_begun(run_dir: Path, command: str) -> bool:
    """Return whether this command has already started the run in this directory."""
    outcome = read_outcome(run_dir)
    return outcome.get("command") == command and outcome["begun"]


def ending(sweep: Sweep, name: str) -> Ending:
    """Return how a point ended in this command.

    A result of another configuration is ignored. With force=true, a result of an earlier command is also ignored.
    """
    run_dir, point = sweep.folder / name, sweep.points[name]
    outcome = read_outcome(run_dir)
    status, reason, result = read_status(run_dir)
    if outcome.get("command") == sweep.command:
        job_status, job_reason = outcome["status"], outcome["reason"]
        has_result = status in DONE and (outcome["begun"] or not sweep.force)
        # the signal arrived after the last epoch
        is_late_signal = job_status == "interrupted" and has_result
        is_other = (job_status, job_reason) != (status, reason)
        if is_other and not is_late_signal and job_status != "running":
            status, reason, result = job_status, job_reason, {}
    elif result and config_digest(result["config"]) != point.configuration.config_digest:
        why = "the folder has a run with another configuration"
        status, reason, result = "not started", why, {}
    elif sweep.force and status not in ("running", "not started", "damaged"):
        status, reason, result = "not started", "the folder has a run of an earlier command", {}
    return printable_ending(sweep, name, status, reason, point.overrides, result)


def other_endings(sweep: Sweep) -> Iterator[Ending]:
    """Yield the ending of every run below the sweep's folder that is not in `sweep.points`."""
    for run_dir in run_folders(sweep.folder):
        name = str(run_dir.relative_to(sweep.folder))
        if run_dir != sweep.folder and name not in sweep.points:
            status, reason, result = read_status(run_dir)
            overrides = overrides_of(run_dir)
            yield printable_ending(sweep, name, status, reason, overrides, result)


def printable_ending(
    sweep: Sweep,
    name: str,
    status: str,
    reason: str,
    overrides: list[str],
    result: dict[str, Any] | None,
) -> Ending:
    """Return an ending with printable texts.

    The validation accuracy of its result is that of the reported epoch, in place of the last epoch.
    """
    result = result or {}
    is_held_out = result.get("validation_accuracy") is not None and result["status"] == "finished"
    if is_held_out and result["config"]["protocol"]["accuracy"] != "last":
        with suppress(UserError):  # a damaged table is reported elsewhere
            result = result | {"validation_accuracy": objective(sweep.folder / name)}
    return Ending(*harmless([name, status, reason, overrides, result]))


def overrides_of(run_dir: Path) -> list[str]:
    """Return the overrides that a run was started with; an empty list if they cannot be read."""
    try:
        return [str(override) for override in read_yaml(run_dir / ".hydra" / "overrides.yaml")]
    except (UserError, OSError, TypeError):  # no error, because the overrides are only printed
        return []


def objective(run_dir: Path) -> float:
    """Return the value that an optimising sweeper maximises: the validation accuracy after the reported epoch.

    The value is 0 for a run that did not finish, so that the sweeper tries other points.
    """
    result = read_result(run_dir) or {}
    accuracies = [
        value or 0.0 for value in read_epochs(run_dir, result).get("validation_accuracy", [])
    ]
    if result.get("status") != "finished" or not accuracies:
        return 0.0
    kind = result["config"]["protocol"]["accuracy"]
    if kind == "best_validation":
        return max(accuracies)
    if kind == "best_test":
        return accuracies[result["test_accuracy"]["best_epoch"] - 1]
    return accuracies[-1]


def count_done(sweep: Sweep) -> int:
    """Return the number of points that have ended."""
    return sum(ending(sweep, name).status in DONE for name in sweep.points)
