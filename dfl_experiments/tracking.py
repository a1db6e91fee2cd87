"""W&B, as a mirror of the local files. It is imported only when tracking is on."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dfl_experiments.config import UserError
from dfl_experiments.results import EPOCH_COLUMNS, cell
from dfl_experiments.settings import Tracking

Row = Mapping[str, float | int | None]


class Tracker:
    """Where a run's numbers go beside the local files. This one sends them nowhere."""

    def log(self, rows: Iterable[Row]) -> None:
        """Rows of iterations.csv or epochs.csv."""

    def summarise(self, result: Mapping[str, Any]) -> None:
        """The content of result.json."""


class WandbTracker(Tracker):
    """Sends every row as it stands in the CSV file, and the result as the run's summary."""

    def __init__(self, run: Any, iteration_columns: Iterable[str]) -> None:
        self._run = run
        for step, columns in (("iteration", iteration_columns), ("epoch", EPOCH_COLUMNS)):
            run.define_metric(step, summary="none")
            for column in columns:
                if column not in ("iteration", "epoch"):
                    run.define_metric(column, step_metric=step, summary="none")

    def log(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self._run.log({key: _as_written(value) for key, value in row.items() if cell(value)})

    def summarise(self, result: Mapping[str, Any]) -> None:
        self._run.summary.update({key: value for key, value in result.items() if key != "config"})


def _as_written(value: float | int | None) -> float | int:
    assert value is not None
    return value if isinstance(value, int) else float(cell(value))


@contextmanager
def track(
    tracking: Tracking, run_dir: Path, config: Mapping[str, Any], iteration_columns: Iterable[str], group: str | None
) -> Iterator[Tracker]:
    """A tracker for one job, its run ended when the block is left: as failed if an exception leaves it.

    config: the resolved configuration, nested; group: the sweep the job belongs to.
    """
    if tracking.mode == "disabled":
        yield Tracker()
        return
    import wandb

    names = {key: config[key]["name"] for key in ("method", "model", "dataset", "augmentation", "protocol")}
    try:
        run = wandb.init(
            mode=tracking.mode,
            dir=run_dir,
            project=tracking.project,
            entity=tracking.entity,
            name=run_dir.name,
            group=group,
            job_type=names["method"],
            tags=[*dict.fromkeys([*names.values(), *tracking.tags])],
            config=dict(config),
            # without it, a second run in one process would be the first one again if that was not finished
            reinit="finish_previous",
            settings=wandb.Settings(console="off", silent=True),
        )
    except wandb.errors.Error as error:
        raise UserError(f"tracking.mode={tracking.mode}: W&B says: {error}; or train with tracking=offline") from error
    # not `with run`: that prints the traceback of every exception, an interruption too
    try:
        yield WandbTracker(run, iteration_columns)
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()
