"""TensorBoard's event files in a run directory, written from the same rows as the CSV files."""

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dfl_experiments.configuration.schema import Tracking
from dfl_experiments.errors import UserError

SECONDS_TO_FLUSH = 5  # time between flushes; a killed process loses the events since its last flush


class EventFiles:
    """A writer of event files. It has the methods of a W&B run that a `Tracker` calls."""

    def __init__(self, run_dir: Path) -> None:
        """Start a new event file, and empty the event files that the run directory already has.

        The rows of a resumed run are written again from its CSV files. The old event files cannot be continued:
        after a crash, they may have rows that are newer than the last checkpoint, or an incomplete last event.
        """
        from torch.utils.tensorboard import SummaryWriter

        for path in run_dir.glob("events.out.tfevents.*"):
            os.truncate(path, 0)  # a running TensorBoard stops when a file is deleted
        # purge_step=0 makes a running TensorBoard drop the events that it has already read
        self._writer: Any = SummaryWriter(str(run_dir), purge_step=0, flush_secs=SECONDS_TO_FLUSH)
        self._steps: dict[str, str] = {}
        # set by a `Tracker`, but not written: TensorBoard shows only series
        self.summary: dict[str, Any] = {}

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        """Store the name of the column that counts a metric's steps: `iteration` or `epoch`."""
        if step_metric is not None:
            self._steps[name] = step_metric

    def log(self, row: Mapping[str, float]) -> None:
        """Write the metrics of one row as one event. Calls of `add_scalar` would take five times as long."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary()
        for name, value in row.items():
            if name in self._steps:
                summary.value.add(tag=name, simple_value=value)
                step = int(row[self._steps[name]])
        if summary.value:  # the row of a diverged run may have no number
            self._writer.file_writer.add_summary(summary, step)

    def finish(self, exit_code: int) -> None:
        """Write the remaining events, and close the file."""
        self._writer.close()


def refuse_missing_package(tracking: Tracking) -> None:
    """Raise `UserError` if tracking=tensorboard and the package is not installed."""
    if tracking.mode == "tensorboard" and find_spec("tensorboard") is None:
        raise UserError('tracking=tensorboard needs: pip install "dfl-experiments[tensorboard]"')
