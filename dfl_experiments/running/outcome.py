"""The points of a sweep, and what this command's jobs did with each of them."""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dfl_experiments.configuration.composition import config_digest, harmless
from dfl_experiments.configuration.recorded import read_yaml
from dfl_experiments.errors import UserError
from dfl_experiments.running.result import DONE, made_with, read_epochs, read_result, read_status
from dfl_experiments.running.run_directory import CONFIG, write_atomically
from dfl_experiments.seal import read_json

OUTCOME = ".outcome"  # written by the last command that worked in the directory
COMMAND = "DFL_COMMAND"  # environment variable: the command's id, for its jobs


class SweepPoint(NamedTuple):
    """One job of a sweep."""

    overrides: list[str]
    """Its overrides, without Hydra's own."""
    config_digest: str
    """Digest of its configuration."""


@dataclass
class Sweep:
    """The sweep that this process runs."""

    folder: Path
    """Folder of the sweep."""
    name: str
    """Its name, also its group in W&B."""
    command: str
    """Id of this command, by which jobs and results are recognised."""
    launcher: str
    """Hydra's name of the launcher."""
    force: bool
    """Whether earlier results are replaced."""
    points: dict[str, SweepPoint] = field(default_factory=dict)
    """The points by folder name; empty if a sweeper chooses them one by one."""


class Ending(NamedTuple):
    """The end of one point of a sweep; all texts are safe to print."""

    folder: str
    """Name of its folder in the sweep's."""
    status: str
    """Status of the run, or `not started`, `running`, `damaged`."""
    reason: str
    """Reason for the status; empty for a finished run."""
    overrides: list[str]
    """Overrides of the job."""
    result: Mapping[str, Any]
    """Content of result.json; empty if that is not this command's result."""

    @property
    def is_finished(self) -> bool:
        """True if all epochs were trained."""
        return self.status == "finished"


def write_outcome(run_dir: Path, command: str, status: str, reason: str | None = None) -> None:
    """Write what a command's job did here: "running" once it has given up what was there before."""
    begun = status == "running" or has_begun(run_dir, command)
    outcome = {"command": command, "begun": begun, "status": status, "reason": reason or ""}
    write_atomically(run_dir / OUTCOME, json.dumps(outcome))


def read_outcome(run_dir: Path) -> dict[str, Any]:
    """Return what `write_outcome` wrote last; an empty mapping if there is nothing or it is damaged."""
    with suppress(UserError):
        outcome = read_json(run_dir / OUTCOME) or {}
        if {"command", "begun", "status", "reason"} <= outcome.keys():
            return outcome
    return {}


def has_begun(run_dir: Path, command: str) -> bool:
    """Return whether this command has already started the run in this directory."""
    outcome = read_outcome(run_dir)
    return outcome.get("command") == command and outcome["begun"]


def ending(sweep: Sweep, name: str) -> Ending:
    """Return how a point ended: the work of this command, or a result that it accepted, never another run's result."""
    run_dir, point = sweep.folder / name, sweep.points[name]
    outcome = read_outcome(run_dir)
    status, reason, result = read_status(run_dir)
    if outcome.get("command") == sweep.command:
        written = outcome["status"], outcome["reason"]
        if written[0] == "interrupted" and status in DONE and (outcome["begun"] or not sweep.force):
            written = status, reason  # the signal arrived after the last epoch
        if written[0] != "running" and written != (status, reason):
            (status, reason), result = written, {}
    elif result and config_digest(result["config"]) != point.config_digest:
        status, reason, result = "not started", "the run there has another configuration", {}
    elif sweep.force and status not in ("running", "not started", "damaged"):
        status, reason, result = "not started", "the run there is an earlier one", {}
    return Ending(*harmless([name, status, reason, point.overrides, result or {}]))


def others(sweep: Sweep) -> Iterator[Ending]:
    """Yield the points in the sweep's folder that belong to other commands."""
    for run_dir in sorted(path.parent for path in sweep.folder.glob(f"*/{CONFIG}")):
        if run_dir.name not in sweep.points:
            status, reason, result = read_status(run_dir)
            yield Ending(*harmless([run_dir.name, status, reason, overrides_of(run_dir), result or {}]))


def overrides_of(run_dir: Path) -> list[str]:
    """Return the overrides that a run was started with; an empty list if they cannot be read."""
    try:
        return [str(override) for override in read_yaml(run_dir / ".hydra" / "overrides.yaml")]
    except (UserError, OSError, TypeError):  # they are only shown
        return []


def objective(run_dir: Path) -> float:
    """Return what an optimising sweeper maximises: validation accuracy after the epoch that the protocol reports.

    Returns 0 if there is none, as for a failed or diverged run, so that the sweeper searches elsewhere.
    """
    result = read_result(run_dir) or {}
    accuracies = [value or 0.0 for value in read_epochs(run_dir, result).get("validation_accuracy", [])]
    if result.get("status") != "finished" or not accuracies:
        return 0.0
    kind = result["config"]["protocol"]["accuracy"]
    if kind == "best_validation":
        return max(accuracies)
    return accuracies[result["test_accuracy"]["best_epoch"] - 1 if kind == "best_test" else -1]


def count_done(sweep: Sweep) -> int:
    """Return the number of points that have ended."""
    return sum(ending(sweep, name).status in DONE for name in sweep.points)


def other_versions(sweep: Sweep, endings: list[Ending]) -> list[str]:
    """Return the commits and torch versions, if not today's, of the points that this command found done."""
    from dfl_experiments.running.provenance import git_commit, versions

    used = set[str]()
    for end in endings:
        if end.status in DONE and read_outcome(sweep.folder / end.folder).get("command") != sweep.command:
            used |= made_with(end.result)
    return sorted(used - made_with({"git_commit": git_commit(), "versions": versions()}))
