"""W&B, as a mirror of the local files. It is imported only when tracking is on.

A run that goes on is mirrored anew from its files, under the id that it had: whatever W&B had got of it, or not, before
its process was killed is replaced. One that has ended and whose mirror is not whole gets it when it is next started.
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
SECONDS_TOGETHER = 5  # W&B takes 0.2 ms for one of many rows, 1 ms for one that comes alone
ROWS_AN_EPOCH = 200
MIRRORED = ".mirrored"  # in the run directory: its W&B run is whole
COUNTERS = ("iteration", "epoch")
ONE_RUN_S = ("WANDB_RUN_ID", "WANDB_RESUME")  # variables that would make all points of a sweep one W&B run
unreachable: set[str] = set()  # modes that W&B could not be started in, in this process


class Tracker:
    """Sends rows as they stand in the CSV files, those of some seconds together, and the result as the run's summary.

    Where W&B fails, one warning says so, and from then on nothing is sent: training and the local files go on.
    """

    def __init__(self, run: Any, tables: Iterable[Sequence[str]], every: int) -> None:
        """run: W&B's, None for nobody's. tables: the columns of each whose rows are to come, the first of them the one
        that counts its rows. every: of so many iterations only the first is sent.
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
        """Rows of iterations.csv or epochs.csv."""
        if self._run is None:  # W&B has failed, and nothing is to wait for it
            return
        self._waiting += [row for row in rows if (int(row.get("iteration") or 1) - 1) % self._every == 0]
        if time.monotonic() - self._sent >= SECONDS_TOGETHER:
            self._guarded(self._send)

    def _send(self) -> None:
        waiting, self._waiting = self._waiting, []
        for row in waiting:
            texts = {key: cell(value) for key, value in row.items()}  # as they are written
            self._run.log({key: float(text) for key, text in texts.items() if text})
        self._sent = time.monotonic()

    def summarise(self, result: Mapping[str, Any]) -> None:
        """The content of result.json."""
        self._guarded(self._send)
        self._guarded(
            lambda: self._run.summary.update({key: value for key, value in result.items() if key != "config"})
        )

    def finish(self, exit_code: int) -> bool:
        """End the run, as failed unless the code is 0, and return whether W&B has got all of it."""
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
    """One warning, and W&B's service ended."""
    log.warning("W&B has failed (%s); the local files stay complete", reason(error))
    end_service()


def end_service() -> None:
    """End W&B's own process; the next run starts another."""
    import wandb

    with suppress(Exception):
        wandb.teardown(exit_code=1)


def rows_written(run_dir: Path, lengths: Mapping[str, int | None]) -> Iterator[Row]:
    """The rows of a run's tables in the order that they were written in: an epoch's iterations, then the epoch.

    lengths: of each table by name, in bytes, None for all of it.
    """
    tables = []
    for name, length in lengths.items():
        with (run_dir / f"{name}.csv").open("rb") as file:
            tables.append(csv.DictReader(io.StringIO(file.read(-1 if length is None else length).decode())))
    for row in heapq.merge(*tables, key=lambda row: int(row["epoch"])):
        yield {key: int(text) if key in COUNTERS else float(text) for key, text in row.items() if text}


def start(tracking: Tracking, run_dir: Path, config: Mapping[str, Any], group: str | None, go_on: bool) -> Any:
    """A W&B run; kept offline, with a warning, where it cannot be online, and None where not even that works.

    go_on: in place of the one that is there, of which an online one is overwritten under its id.
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
                # without it, a second run in one process would be the first one again if that was not finished
                reinit="finish_previous",
                settings=wandb.Settings(console="off", silent=True, init_timeout=SECONDS_TO_START),
            )
        except Exception as error:  # wandb's own, and what its service and the file system raise
            if mode == "offline":
                give_up(error)
                return None
            unreachable.add(mode)
            log.warning("W&B cannot be reached (%s); kept offline, for `wandb sync`", reason(error))
            end_service()  # to which the id is in use now
            continue
        for folder in run_dir.glob(f"wandb/*run-*-{run_id}"):
            if not folder.samefile(Path(run.dir).parent):
                shutil.rmtree(folder, ignore_errors=True)
        return run
    return None


def rows_apart(tracking: Tracking, batches: int, measured: int) -> int:
    """How many iterations one row is sent of, each a measured one.

    Where nothing is said every one, in epochs of at least `ROWS_AN_EPOCH` batches: a net that is done with an epoch
    sooner is done with a step in less than W&B is with a row. batches: of an epoch; measured: `alignment.every`.
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
    """A tracker for one job, its run ended when the block is left: as failed if an exception leaves it.

    tracking: with `rows_apart` settled; config: the resolved configuration, nested; tables: the columns of each, see
    `Tracker`; group: the sweep the job belongs to; written: of a run that goes on, the tables' lengths, see
    `rows_written`.
    """
    (run_dir / MIRRORED).unlink(missing_ok=True)
    run = None if tracking.mode == "disabled" else start(tracking, run_dir, config, group, written is not None)
    tracker = Tracker(run, tables.values(), tracking.every or 1)
    if written is not None and None not in written.values():
        tracker.log(rows_written(run_dir, written))
    # not `with run`: that prints the traceback of every exception, an interruption too
    try:
        yield tracker
    except BaseException:
        tracker.finish(1)
        raise
    if tracker.finish(0):
        (run_dir / MIRRORED).touch()


def make_whole(tracking: Tracking, run_dir: Path, result: Mapping[str, Any], group: str | None) -> None:
    """Mirror a run that has ended, from its files, unless its W&B run is whole or none is asked for."""
    paths = {name: run_dir / f"{name}.csv" for name in ("iterations", "epochs")}
    if tracking.mode == "disabled" or (run_dir / MIRRORED).exists() or not all(map(Path.is_file, paths.values())):
        return
    lengths = {name: path.stat().st_size for name, path in paths.items()}
    tables = {name: header(path) for name, path in paths.items()}
    log.info("%s: W&B is made whole", run_dir.name)
    settled = tracking.model_copy(update={"every": result["config"]["tracking"].get("every")})
    with track(settled, run_dir, result["config"], tables, group, lengths) as tracker:
        tracker.summarise(result)
