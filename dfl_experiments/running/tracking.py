"""Mirror the local files of a run in W&B or TensorBoard. A package is imported only if it is used.

A resumed run sends the rows in its files again. They replace the rows that the mirror received before. The run keeps
its W&B id. If the mirror of a finished run is incomplete, all rows are sent again when the run is started again.
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
from dfl_experiments.running.event_files import EventFiles, refuse_missing_package
from dfl_experiments.running.result import flat
from dfl_experiments.running.run_directory import Row, cell, header

log = logging.getLogger(__name__)

SECONDS_TO_START = 30
# The rows of this time are sent together, because W&B takes 1 ms for a single row, but 0.2 ms per row for many rows.
SECONDS_TOGETHER = 5
ROWS_AN_EPOCH = 200
WANDB, TENSORBOARD = "W&B", "TensorBoard"
# for each mirror, the file in the run directory that marks it as complete
MARKERS = {WANDB: ".mirrored", TENSORBOARD: ".mirrored_tensorboard"}
COUNTERS = ("iteration", "epoch")
# variables that would merge all points of a sweep into one W&B run
ONE_RUN_S = ("WANDB_RUN_ID", "WANDB_RESUME")
unreachable: set[str] = set()  # tracking modes in which W&B could not be reached by this process


class Tracker:
    """Send the rows of the CSV files to the mirror, and at the end the result as a summary.

    The rows of several seconds are sent together. If the mirror fails, one warning is logged and no more is sent.
    Training and writing the local files continue.
    """

    def __init__(self, run: Any, tables: Iterable[Sequence[str]], every: int) -> None:
        """Tell the mirror the columns of every table.

        run: the W&B run or the writer of event files; None if there is no mirror.
        tables: column names of each table; the first column counts its rows.
        every: send iterations 1, 1 + every, 1 + 2·every and so on.
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
            texts = {key: cell(value) for key, value in row.items()}  # as in the CSV file
            self._run.log({key: float(text) for key, text in texts.items() if text})
        self._sent = time.monotonic()

    def summarise(self, result: Mapping[str, Any]) -> None:
        """Send the content of result.json, without the configuration."""
        self._guarded(self._send)
        values = flat({key: value for key, value in result.items() if key != "config"}, "/")
        self._guarded(lambda: self._run.summary.update(values))

    def finish(self, exit_code: int) -> bool:
        """End the mirror's run; a code other than 0 marks it as failed. Return whether the mirror is complete."""
        self._guarded(self._send)
        self._guarded(lambda: self._run.finish(exit_code=exit_code))
        return self._run is not None

    def _guarded(self, action: Callable[..., Any], *arguments: Any) -> None:
        if self._run is None:
            return
        try:
            action(*arguments)
        except Exception as error:
            mirror = TENSORBOARD if isinstance(self._run, EventFiles) else WANDB
            self._run = None
            give_up(error, mirror)


def give_up(error: Exception, mirror: str) -> None:
    """Log a warning that the mirror failed. If the mirror is W&B, end its service."""
    log.warning("%s has failed (%s); the local files stay complete", mirror, reason(error))
    if mirror == WANDB:
        end_service()


def end_service() -> None:
    """End W&B's own process; the next run starts a new one."""
    import wandb

    with suppress(Exception):
        wandb.teardown(exit_code=1)


def rows_written(run_dir: Path, lengths: Mapping[str, int | None]) -> Iterator[Row]:
    """Yield the rows of a run's tables in the order of training: the iterations of an epoch, then the epoch.

    lengths: number of bytes to read from each table, by name; None reads the whole table.
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


def start(
    tracking: Tracking, run_dir: Path, config: Mapping[str, Any], group: str | None, go_on: bool
) -> Any:
    """Start a W&B run and return it. If W&B cannot be reached, log a warning and start an offline run.

    go_on: whether this run is resumed. Then its W&B run gets the id of the earlier one and replaces it.
    """
    import wandb

    names = names_of(config)
    smoke = ["smoke"] if config.get("smoke") else []
    before = [folder.name.partition("run-")[2] for folder in run_dir.glob("wandb/*run-*") if go_on]
    run_id = max(before).rpartition("-")[2] if before else secrets.token_hex(4)
    for variable in ONE_RUN_S:
        os.environ.pop(variable, None)

    def init(mode: Any) -> Any:
        return wandb.init(
            mode=mode,
            dir=run_dir,
            project=tracking.project,
            entity=tracking.entity,
            name=tracking.name or run_dir.name,
            group=group,
            job_type=names["method"],
            tags=[*dict.fromkeys([*names.values(), *smoke, *tracking.tags])],
            config=dict(config),
            id=run_id,
            # without this, W&B would continue an unfinished run of this process instead of starting a new one
            reinit="finish_previous",
            settings=wandb.Settings(console="off", silent=True, init_timeout=SECONDS_TO_START),
        )

    mode = "offline" if tracking.mode in unreachable else tracking.mode
    try:
        run = init(mode)
    except Exception as error:
        if mode == "offline":
            raise
        unreachable.add(mode)
        text = "W&B cannot be reached (%s); the run is kept offline; `wandb sync` uploads it"
        log.warning(text, reason(error))
        end_service()  # the service still holds the run's id
        run = init("offline")
    with suppress(OSError):  # the run has started, so its mirror must not be given up
        for folder in run_dir.glob(f"wandb/*run-*-{run_id}"):
            if not folder.samefile(Path(run.dir).parent):
                shutil.rmtree(folder, ignore_errors=True)
    return run


def mirror_of(tracking: Tracking) -> str:
    """Return the name of the mirror."""
    return TENSORBOARD if tracking.mode == "tensorboard" else WANDB


def rows_apart(tracking: Tracking, batches: int, measured: int) -> int:
    """Return a number n. The mirror receives every n-th row of iterations.csv.

    By default, n = 1 if an epoch has at least `ROWS_AN_EPOCH` batches. With fewer batches, a training step is usually
    faster than sending a row. Then n is larger, and the mirror receives only a part of the measured iterations.

    batches: number of batches per epoch.
    measured: the option `alignment.every`.
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
    """Provide a tracker for one job. The mirror's run ends with the block. An exception marks it as failed.

    config: the resolved configuration. Its `tracking.every` is the number that `rows_apart` returned.
    tables: column names by table, see `Tracker`.
    group: name of the job's sweep.
    written: table lengths of a resumed run, see `rows_written`; None for a new run.
    """
    for name in MARKERS.values():
        (run_dir / name).unlink(missing_ok=True)
    mirror, run = mirror_of(tracking), None
    try:
        if mirror == TENSORBOARD:
            run = EventFiles(run_dir)
        elif tracking.mode != "disabled":
            run = start(tracking, run_dir, config, group, written is not None)
    except Exception as error:  # an error of the mirror's package, its service, or the file system
        give_up(error, mirror)
    tracker = Tracker(run, tables.values(), config["tracking"].get("every") or 1)
    if written is not None and None not in written.values():
        tracker.log(rows_written(run_dir, written))
    # Do not use `with run`. W&B would print a traceback for every exception, even for an interruption.
    try:
        yield tracker
    except BaseException:
        tracker.finish(1)
        raise
    if tracker.finish(0):
        (run_dir / MARKERS[mirror]).touch()


def make_whole(
    tracking: Tracking, run_dir: Path, result: Mapping[str, Any], group: str | None
) -> None:
    """Send the rows and the result of an ended run to its mirror, if tracking is on and the mirror is incomplete."""
    paths = {name: run_dir / f"{name}.csv" for name in ("iterations", "epochs")}
    mirror = mirror_of(tracking)
    is_mirrored = tracking.mode == "disabled" or (run_dir / MARKERS[mirror]).exists()
    if is_mirrored or not all(map(Path.is_file, paths.values())):
        return
    lengths = {name: path.stat().st_size for name, path in paths.items()}
    tables = {name: header(path) for name, path in paths.items()}
    refuse_missing_package(tracking)
    log.info("%s: all rows are sent again to %s", run_dir.name, mirror)
    with track(tracking, run_dir, result["config"], tables, group, lengths) as tracker:
        tracker.summarise(result)
