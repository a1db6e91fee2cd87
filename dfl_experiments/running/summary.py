"""How the points of a sweep ended: what this command's jobs did, or found done, and never what merely lies there."""

import json
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dfl_experiments.configuration.composition import harmless, science
from dfl_experiments.configuration.recorded import read_yaml
from dfl_experiments.errors import UserError, printable
from dfl_experiments.running.result import DONE, made_with, read_epochs, read_result, status_of
from dfl_experiments.running.run_directory import CONFIG, csv_text, write_atomically
from dfl_experiments.seal import read_json

OUTCOME = ".outcome"  # of the last command that was at work in the directory
COMMAND = "DFL_COMMAND"  # the variable that a job finds its command's id in
ROWS_SHOWN = 50


class Point(NamedTuple):
    """A job of the sweep. overrides: what it was asked for, in one line; science: the digest of what it computes."""

    overrides: str
    science: str


@dataclass
class Sweep:
    """The sweep of this process: its folder and name, its points by their folders' names, none where they are chosen as
    it goes. command: what its jobs know it by; launcher: Hydra's name for what starts them; force: whether what was
    there before counts for nothing."""

    folder: Path
    name: str
    command: str
    launcher: str
    force: bool
    points: dict[str, Point] = field(default_factory=dict)


class Ending(NamedTuple):
    """How a point ended, a row of summary.csv."""

    point: str
    status: str
    accuracy: float | None
    reason: str
    overrides: str


def write_outcome(run_dir: Path, command: str, status: str, reason: str | None = None) -> None:
    """Note what a command's job did here: "running" once it has given up what was there before."""
    begun = status == "running" or has_begun(run_dir, command)
    outcome = {"command": command, "begun": begun, "status": status, "reason": reason or ""}
    write_atomically(run_dir / OUTCOME, json.dumps(outcome))


def read_outcome(run_dir: Path) -> dict[str, Any]:
    """What `write_outcome` noted last; nothing where there is none."""
    with suppress(UserError):
        found = read_json(run_dir / OUTCOME) or {}
        return found if {"command", "begun", "status", "reason"} <= found.keys() else {}
    return {}


def has_begun(run_dir: Path, command: str) -> bool:
    """Whether the run that is here is one of this command's, whose force=true has been obeyed."""
    outcome = read_outcome(run_dir)
    return outcome.get("command") == command and outcome["begun"]


def ending(sweep: Sweep, name: str) -> Ending:
    """How a point of the sweep ended."""
    run_dir, point = sweep.folder / name, sweep.points[name]
    outcome = read_outcome(run_dir)
    status, accuracy, reason = status_of(run_dir)
    if outcome.get("command") == sweep.command:
        told = outcome["status"], outcome["reason"]
        if told[0] == "interrupted" and status in DONE and (outcome["begun"] or not sweep.force):
            told = status, reason  # the signal came when all was done
        if told[0] != "running" and told != (status, reason):
            (status, reason), accuracy = told, None
    elif status not in ("running", "not started", "damaged"):
        result = read_result(run_dir)
        if result is not None and science(result["config"]) != point.science:
            status, accuracy, reason = "not started", None, "the run there has another configuration"
        elif sweep.force:
            status, accuracy, reason = "not started", None, "the run there is an earlier one"
    return Ending(*harmless([name, status, accuracy, reason, point.overrides]))


def others(sweep: Sweep) -> Iterator[Ending]:
    """The points of the sweep's folder that this command did not name."""
    for run_dir in sorted(path.parent for path in sweep.folder.glob(f"*/{CONFIG}")):
        if run_dir.name not in sweep.points:
            yield Ending(*harmless([run_dir.name, *status_of(run_dir), " ".join(overrides_of(run_dir))]))


def overrides_of(run_dir: Path) -> list[str]:
    """What the command line said that made a run; nothing where that cannot be read."""
    try:
        return [str(override) for override in read_yaml(run_dir / ".hydra" / "overrides.yaml")]
    except (UserError, OSError, TypeError):  # the command line is for a reader only
        return []


def objective(run_dir: Path) -> float:
    """What a sweeper that chooses as it goes maximises: the validation accuracy of the epoch that the protocol reports.

    Returns 0 where there is none, as of a run that diverged or failed: it is to look elsewhere.
    """
    result = read_result(run_dir) or {}
    held_out = [value or 0.0 for value in read_epochs(run_dir, result).get("validation_accuracy", [])]
    if result.get("status") != "finished" or not held_out:
        return 0.0
    kind = result["config"]["protocol"]["accuracy"]
    if kind == "best_validation":
        return max(held_out)
    return held_out[result["test_accuracy"]["best_epoch"] - 1 if kind == "best_test" else -1]


def print_best(folder: Path, endings: Sequence[Ending]) -> None:
    """Print the best of a sweep's finished points, as a command line."""
    values = {row.point: objective(folder / row.point) for row in endings if row.status == "finished"}
    if best := max(values, key=values.__getitem__, default=None):
        command = ["dfl-train", *(one for one in overrides_of(folder / best) if not one.startswith("sweep="))]
        print(f"  best validation accuracy {four_digits(values[best])}: {printable(shlex.join(command))}")


def done(sweep: Sweep) -> int:
    """How many points have come to their end."""
    return sum(ending(sweep, name).status in DONE for name in sweep.points)


def of_other_versions(sweep: Sweep, endings: Iterable[Ending]) -> list[str]:
    """The commits and versions of torch, other than now, of the points that this command found done."""
    from dfl_experiments.running.provenance import git_commit, versions

    found = set[str]()
    for run_dir in (sweep.folder / row.point for row in endings if row.status in DONE):
        if read_outcome(run_dir).get("command") != sweep.command:
            found |= made_with(read_result(run_dir) or {})
    return sorted(found - made_with({"git_commit": git_commit(), "versions": versions()}))


def four_digits(accuracy: float | None) -> str:
    """An accuracy with four digits, a dash where there is none."""
    return "-" if accuracy is None else f"{accuracy:.4f}"


def summary(sweep: Sweep) -> int:
    """Write how every point of the folder ended to `summary.csv`, print this command's, and return the exit code.

    It is 1 unless all of them have come to an end, or are in another process's hands.
    """
    named, rest = [ending(sweep, name) for name in sweep.points], list(others(sweep))
    place, problem = sweep.folder / "summary.csv", None
    try:
        if sweep.folder.is_dir():
            write_atomically(place, csv_text([Ending._fields, *named, *rest]))
    except OSError as error:
        problem = error.strerror
    shown = named or rest
    counts = Counter(row.status for row in shown)
    told = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    print(f"\nsweep {sweep.folder.name}: {len(shown)} points, {told}")
    # of a long table the part that asks for attention comes first
    shown.sort(key=lambda row: row.status == "finished")
    width = max((len(row.point) for row in shown), default=0)
    for row in shown[:ROWS_SHOWN]:
        words = row.reason or row.overrides
        print(f"  {row.point:{width}}  {row.status:11} {four_digits(row.accuracy):>6}  {words}")
    if len(shown) > ROWS_SHOWN:
        print(f"  … and {len(shown) - ROWS_SHOWN} more")
    if not sweep.force and (versions := of_other_versions(sweep, named)):
        print(f"  some points were done before, with {', '.join(versions)}; force=true runs them anew")
    if not named:
        print_best(sweep.folder, rest)
    beside = f", with {len(rest)} points of other commands" if named and rest else ""
    print(f"  {place}{beside}" if problem is None else f"dfl-train: {place}: {problem}")
    return 1 if counts.keys() & {"failed", "interrupted", "not started", "damaged"} else 0
