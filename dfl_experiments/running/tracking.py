"""W&B as a mirror of the local files. It is imported only if tracking is on.

A resumed run is sent again from its files under its old id, which replaces what W&B received before the process was
killed. A finished run whose mirror is incomplete is sent again when the run is next started.
"""

import csv
import heapq
import io
import logging
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dfl_experiments.configuration.composition import names_of
from dfl_experiments.configuration.schema import Tracking
from dfl_experiments.errors import reason
from dfl_experiments.running.run_directory import Row, cell, header

log = logging.getLogger(__name__)

SECONDS_TO_START = 30
SECONDS_TOGETHER = 5  # W&B takes 0.2 ms per row for many rows at once, 1 ms for a single row
ROWS_AN_EPOCH = 200
MIRRORED = ".mirrored"  # file in the run directory: its W&B run is complete
COUNTERS = ("iteration", "epoch")
ONE_RUN_S = ("WANDB_RUN_ID", "WANDB_RESUME")  # variables that would merge all points of a sweep into one W&B run
unreachable: set[str] = set()  # modes that failed in this process


class Tracker:
    """Send rows as they are in the CSV files, several seconds' rows at once, and the result as the run's summary.

    If W&B fails, there is one warning, and nothing more is sent. Training and the local files go on.
    """

    def __init__(self, run: Any, tables: Iterable[Sequence[str]], every: int) -> None:
        """Tell W&B the columns of every table.

        run: of W&B, None if there is none.
        tables: column names of each table; the first column counts its rows.
        every: send one of so many iterations.
        """
        self._run, self._every = run, every
        self._waiting: list[Row] = []
        self._sent = time.monotonic()
        self._guarded(self._define, tables)

    def _define(self, tables: Iterable[Sequence[str]]) -> None:
        for step, *columns in tables:
            self._run.define_metric(step)
            for column in columns:
                if column not in COUNTERS:
                    self._run.define_metric(column, step_metric=step)

    def log(self, rows: Iterable[Row]) -> None:
        """Send rows of iterations.csv or epochs.csv."""
        if self._run is None:  # tracking is off or has failed
            return
        for row in rows:
            iteration = int(row.get("iteration") or 1)
            if (iteration - 1) % self._every == 0:
                self._waiting.append(row)
        if time.monotonic() - self._sent >= SECONDS_TOGETHER:
            self._guarded(self._send)

    def _send(self) -> None:
        waiting, self._waiting = self._waiting, []
        for row in waiting:
            texts = {key: cell(value) for key, value in row.items()}  # as they are written
            self._run.log({key: float(text) for key, text in texts.items() if text})
        self._sent = time.monotonic()

    def summarise(self, result: Mapping[str, Any]) -> None:
        """Send the content of result.json, without the configuration."""
        self._guarded(self._send)
        values = {key: value for key, value in result.items() if key != "config"}
        self._guarded(lambda: self._run.summary.update(values))

    def finish(self, exit_code: int) -> bool:
        """End the W&B run, as failed unless the code is 0, and return whether W&B received everything."""
        self._guarded(self._send)
        self._guarded(lambda: self._run.finish(exit_code=exit_code))
        return self._run is not None

    def _guarded(self, action: Callable[..., Any], *arguments: Any) -> None:
        if self._run is None:
            return
        try:
            action(*arguments)
        except Exception as error:
            self._run = None
            give_up(error)


def give_up(error: Exception) -> None:
    """Warn once, and end W&B's service."""
    log.warning("W&B has failed (%s); the local files stay complete", reason(error))
    end_service()


def end_service() -> None:
    """End W&B's own process; the next run starts a new one."""
    import wandb

    with suppress(Exception):
        wandb.teardown(exit_code=1)


def rows_written(run_dir: Path, lengths: Mapping[str, int | None]) -> Iterator[Row]:
    """Yield the rows of a run's tables as they were written: an epoch's iterations, then the epoch.

    lengths: bytes to read of each table by name, None for all.
    """
    tables = []
    for name, length in lengths.items():
        with (run_dir / f"{name}.csv").open("rb") as file:
            content = file.read(-1 if length is None else length)
        tables.append(csv.DictReader(io.StringIO(content.decode())))
    for texts in heapq.merge(*tables, key=lambda row: int(row["epoch"])):
        row: Row = {}
        for key, text in texts.items():
            if text:
                row[key] = int(text) if key in COUNTERS else float(text)
        yield row


def start(tracking: Tracking, run_dir: Path, config: Mapping[str, Any], group: str | None, go_on: bool) -> Any:
    """Start a W&B run; offline with a warning if W&B cannot be reached, None if that fails too.

    go_on: replace the W&B run that the directory already has; an online one keeps its id.
    """
    import wandb

    names = names_of(config)
    smoke = ["smoke"] if config.get("smoke") else []
    before = [folder.name.partition("run-")[2] for folder in run_dir.glob("wandb/*run-*") if go_on]
    run_id = max(before).rpartition("-")[2] if before else secrets.token_hex(4)
    for variable in ONE_RUN_S:
        os.environ.pop(variable, None)
    for mode in dict.fromkeys(["offline" if tracking.mode in unreachable else tracking.mode, "offline"]):
        try:
            run = wandb.init(
                mode=mode,
                dir=run_dir,
                project=tracking.project,
                entity=tracking.entity,
                name=run_dir.name,
                group=group,
                job_type=names["method"],
                tags=[*dict.fromkeys([*names.values(), *smoke, *tracking.tags])],
                config=dict(config),
                id=run_id,
                # otherwise a second run in this process would continue an unfinished first one
                reinit="finish_previous",
                settings=wandb.Settings(console="off", silent=True, init_timeout=SECONDS_TO_START),
            )
        except Exception as error:  # of wandb, its service, or the file system
            if mode == "offline":
                give_up(error)
                return None
            unreachable.add(mode)
            log.warning("W&B cannot be reached (%s); kept offline, for `wandb sync`", reason(error))
            end_service()  # it holds the id
            continue
        for folder in run_dir.glob(f"wandb/*run-*-{run_id}"):
            if not folder.samefile(Path(run.dir).parent):
                shutil.rmtree(folder, ignore_errors=True)
        return run
    return None


def rows_apart(tracking: Tracking, batches: int, measured: int) -> int:
    """Return how many iterations apart the rows are that W&B gets; each of them is a measured one.

    By default every iteration in epochs of at least `ROWS_AN_EPOCH` batches, else fewer: with so few batches a step is
    usually faster than W&B with a row.

    batches: per epoch.
    measured: `alignment.every`.
    """
    if tracking.every is not None or batches >= ROWS_AN_EPOCH:
        return tracking.every or 1
    return max(1, measured) * math.ceil(ROWS_AN_EPOCH / batches)


@contextmanager
def track(
    tracking: Tracking,
    run_dir: Path,
    config: Mapping[str, Any],
    tables: Mapping[str, Sequence[str]],
    group: str | None,
    written: Mapping[str, int | None] | None = None,
) -> Iterator[Tracker]:
    """Give a tracker for one job. The W&B run ends with the block, as failed if an exception leaves it.

    tracking: with `every` set, see `rows_apart`.
    config: the resolved configuration.
    tables: column names by table, see `Tracker`.
    group: name of the job's sweep.
    written: table lengths of a resumed run, see `rows_written`.
    """
    (run_dir / MIRRORED).unlink(missing_ok=True)
    run = None if tracking.mode == "disabled" else start(tracking, run_dir, config, group, written is not None)
    tracker = Tracker(run, tables.values(), tracking.every or 1)
    if written is not None and None not in written.values():
        tracker.log(rows_written(run_dir, written))
    # not `with run`: W&B prints the traceback of every exception, even of an interruption
    try:
        yield tracker
    except BaseException:
        tracker.finish(1)
        raise
    if tracker.finish(0):
        (run_dir / MIRRORED).touch()


def make_whole(tracking: Tracking, run_dir: Path, result: Mapping[str, Any], group: str | None) -> None:
    """Send an ended run to W&B from its files, unless its W&B run is complete or tracking is off."""
    paths = {name: run_dir / f"{name}.csv" for name in ("iterations", "epochs")}
    if tracking.mode == "disabled" or (run_dir / MIRRORED).exists() or not all(map(Path.is_file, paths.values())):
        return
    lengths = {name: path.stat().st_size for name, path in paths.items()}
    tables = {name: header(path) for name, path in paths.items()}
    log.info("%s: W&B is made whole", run_dir.name)
    settled = tracking.model_copy(update={"every": result["config"]["tracking"].get("every")})
    with track(settled, run_dir, result["config"], tables, group, lengths) as tracker:
        tracker.summarise(result)
