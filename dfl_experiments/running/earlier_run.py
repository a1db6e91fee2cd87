"""Compare the run that is already in a directory with the configuration of a command."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dfl_experiments.configuration.composition import AUTO, config_digest
from dfl_experiments.configuration.schema import Configuration, Settings
from dfl_experiments.data.packs import digest
from dfl_experiments.errors import UserError
from dfl_experiments.running.checkpoint import discard_spent
from dfl_experiments.running.provenance import code_of
from dfl_experiments.running.result import DONE, read_result, status_left
from dfl_experiments.running.run_directory import relative, rerun_arguments
from dfl_experiments.running.summary import four_digits
from dfl_experiments.running.tracking import make_whole

log = logging.getLogger(__name__)
KEEP = "force=true replaces it, a new sweep= or hydra.run.dir= keeps both"


def advice_on_existing_run(settings: Settings, run_dir: Path, status: str) -> str:
    """Return what the user can do on the command line if a directory has a run. status: status of the run."""
    advice = "force=true replaces it, another hydra.run.dir= keeps both"
    if status in DONE:
        return advice
    resume = rerun_arguments("resume", relative(run_dir), settings.plugins)
    return f"{resume} continues it, {advice}"


def advice_on_changes(settings: Settings, run_dir: Path) -> str:
    """Return what the user can do on the command line if the data or the code of a run have changed."""
    if settings.resume in (None, AUTO):
        return KEEP
    repeat = rerun_arguments("repeat", relative(run_dir), settings.plugins)
    return f"restore them, or start a new run: dfl-train {repeat}"


def result_if_done(
    configuration: Configuration, run_dir: Path, group: str | None = None
) -> dict[str, Any] | None:
    """Return the result of the run in a directory if the run has ended, otherwise None.

    If the W&B run or the event files of an ended run are incomplete, all rows are sent again.

    group: name of the run's sweep.
    Raises `UserError` if the run in the directory has another configuration, other data or other code.
    """
    before = read_result(run_dir)
    if before is None:
        return None
    settings, status = configuration.settings, status_left(run_dir)
    refuse_configuration(run_dir, before, configuration)
    if status is None:  # the run will start again, so other code is allowed
        return None
    now = {"data": data_digest(configuration), "code": code_of(configuration.components)}
    refuse_changes(run_dir, before, now, advice_on_changes(settings, run_dir))
    if status not in DONE:
        return None
    advice = "" if status == "finished" else "; force=true trains it again"
    accuracy = four_digits(before["accuracy"])
    log.info("%s: %s already, accuracy %s%s", relative(run_dir), status, accuracy, advice)
    discard_spent(run_dir, before["config"])
    make_whole(settings.tracking, run_dir, before, group)
    return before


def data_digest(configuration: Configuration) -> str | None:
    """Return the digest of a configuration's data set, or None if the data set is absent."""
    settings = configuration.settings
    source = configuration.components["dataset.source"].build()
    return digest(settings.dataset.name, source, Path(settings.data_dir))


def refuse_configuration(
    run_dir: Path, before: Mapping[str, Any], configuration: Configuration
) -> None:
    """Raise `UserError` if a run has another configuration. before: content of the run's result.json."""
    if config_digest(before["config"]) != configuration.config_digest:
        raise UserError(f"{run_dir}: has a run with another configuration; force=true replaces it")


def refuse_changes(
    run_dir: Path, before: Mapping[str, Any], now: Mapping[str, Any], advice: str = KEEP
) -> None:
    """Raise `UserError` if the data or the user's own code have changed since a run.

    before: entries of the run's result or checkpoint.
    now: the current entries.
    advice: what the user can do.
    """
    recorded = {"data": before.get("data"), **before.get("code", {})}
    present = {"data": now.get("data"), **now.get("code", {})}
    for name, value in present.items():
        before_value = recorded.get(name)
        if None not in (value, before_value) and value != before_value:
            change = f"has a run with other data or code: {name} {before_value}, now {value}"
            raise UserError(f"{relative(run_dir)}: {change}; {advice}")
