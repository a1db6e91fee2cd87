"""W&B, as a mirror of the local files. It is imported only when tracking is on."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dfl_experiments.configuration.composition import names_of
from dfl_experiments.configuration.schema import Tracking
from dfl_experiments.errors import reason
from dfl_experiments.running.run_directory import Row, cell

log = logging.getLogger(__name__)

SECONDS_TO_START = 30


class Tracker:
    """Where a run's numbers go beside the local files. This one sends them nowhere."""

    def log(self, rows: Iterable[Row]) -> None:
        """Rows of iterations.csv or epochs.csv."""

    def summarise(self, result: Mapping[str, Any]) -> None:
        """The content of result.json."""


class WandbTracker(Tracker):
    """Sends every row as it stands in the CSV file, and the result as the run's summary.

    Where W&B fails, one warning says so, and from then on nothing is sent: training and the local files go on.
    """

    def __init__(self, run: Any, tables: Iterable[list[str]]) -> None:
        """tables: the columns of each whose rows are to come, the first of them the one that counts its rows."""
        self._run = run
        self._guarded(self._define, tables)

    def _define(self, tables: Iterable[list[str]]) -> None:
        counting = {columns[0]: columns for columns in tables}
        for step, columns in counting.items():
            self._run.define_metric(step, summary="none")
            for column in columns:
                if column not in counting:
                    self._run.define_metric(column, step_metric=step, summary="none")

    def log(self, rows: Iterable[Row]) -> None:
        self._guarded(self._log, rows)

    def _log(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self._run.log({key: _as_written(value) for key, value in row.items() if cell(value)})

    def summarise(self, result: Mapping[str, Any]) -> None:
        self._guarded(
            lambda: self._run.summary.update({key: value for key, value in result.items() if key != "config"})
        )

    def finish(self, exit_code: int) -> None:
        """End the run, as failed unless the code is 0."""
        self._guarded(lambda: self._run.finish(exit_code=exit_code))

    def _guarded(self, action: Callable[..., Any], *arguments: Any) -> None:
        if self._run is None:
            return
        try:
            action(*arguments)
        except Exception as error:
            self._run = None
            give_up(error)


def _as_written(value: float | int | None) -> float | int:
    assert value is not None
    return value if isinstance(value, int) else float(cell(value))


def give_up(error: Exception) -> None:
    """One warning; and W&B's service ended, so that a later run of this process starts another."""
    import wandb

    log.warning("W&B has failed (%s); the local files stay complete", reason(error))
    with suppress(Exception):
        wandb.teardown(exit_code=1)


def previous_id(run_dir: Path) -> str | None:
    """The id of the latest W&B run in a run directory, which a run that goes on continues."""
    folders = sorted(run_dir.glob("wandb/*run-*"), key=lambda folder: folder.name.partition("run-")[2])
    return folders[-1].name.rpartition("-")[2] if folders else None


def start(tracking: Tracking, run_dir: Path, config: Mapping[str, Any], group: str | None, go_on: bool) -> Any:
    """A W&B run; kept offline, with a warning, where it cannot be online, and None where not even that works."""
    import wandb

    names = names_of(config)
    smoke = ["smoke"] if config.get("smoke") else []
    last: Exception | None = None
    for mode in dict.fromkeys([tracking.mode, "offline"]):
        if last is not None:
            log.warning("W&B cannot be reached (%s); kept offline, for `wandb sync`", reason(last))
        try:
            return wandb.init(
                mode=mode,
                dir=run_dir,
                project=tracking.project,
                entity=tracking.entity,
                name=run_dir.name,
                group=group,
                job_type=names["method"],
                tags=[*dict.fromkeys([*names.values(), *smoke, *tracking.tags])],
                config=dict(config),
                id=previous_id(run_dir) if go_on else None,
                resume="allow" if go_on and mode == "online" else None,
                # without it, a second run in one process would be the first one again if that was not finished
                reinit="finish_previous",
                settings=wandb.Settings(console="off", silent=True, init_timeout=SECONDS_TO_START),
            )
        except Exception as error:  # wandb's own, and what its service and the file system raise
            last = error
    give_up(last or RuntimeError())
    return None


@contextmanager
def track(
    tracking: Tracking,
    run_dir: Path,
    config: Mapping[str, Any],
    tables: Iterable[list[str]],
    group: str | None,
    go_on: bool = False,
) -> Iterator[Tracker]:
    """A tracker for one job, its run ended when the block is left: as failed if an exception leaves it.

    config: the resolved configuration, nested; tables: see `WandbTracker`; group: the sweep the job belongs to;
    go_on: with the run that is there.
    """
    run = None if tracking.mode == "disabled" else start(tracking, run_dir, config, group, go_on)
    if run is None:
        yield Tracker()
        return
    tracker = WandbTracker(run, tables)
    # not `with run`: that prints the traceback of every exception, an interruption too
    try:
        yield tracker
    except BaseException:
        tracker.finish(1)
        raise
    tracker.finish(0)
