"""Show the progress of a run: a bar on a terminal, otherwise a line from time to time and after some epochs."""

import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from tqdm import tqdm

from dfl_experiments.running.point_counter import duration

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_UPDATES = 0.5  # of the bar
# in a long run, the time between two lines is this fraction of the time since the start
GROWTH = 0.05


class Progress:
    """Show epoch, batch, loss, accuracy, learning rate, images/s and the time left of the run.

    Within an epoch, loss and accuracy are means over its training batches so far. They are shown on a CPU only, because
    reading them from a GPU would slow training down.
    """

    def __init__(
        self,
        epochs: int,
        images: int,
        batch_size: int,
        metric_names: Sequence[str],
        peek: bool,
        is_quiet: bool = False,
    ) -> None:
        """Prepare for a run.

        images: number of training images.
        metric_names: names of a step's metrics, in order.
        peek: whether to show loss and accuracy within an epoch.
        is_quiet: whether to print no extra line for the first and the last epoch.
        """
        self.epochs, self.images, self.batch_size = epochs, images, batch_size
        self.batches = math.ceil(images / batch_size)
        self.loss_index = metric_names.index("loss")
        self.correct_index = metric_names.index("correct")
        self.peek, self.is_quiet = peek, is_quiet
        self.is_terminal = sys.stderr.isatty()
        self.lr = math.nan
        self._epoch = self._batch = self._steps = 0
        self._start = self._last_line = self._last_end = time.perf_counter()

    def begin(self, epoch: int, lr: float, batch: int = 0) -> None:
        """Start an epoch.

        epoch: number of the epoch, from 1.
        lr: learning rate.
        batch: number of batches of the epoch that are already done.
        """
        self._epoch, self._batch, self.lr = epoch, batch, lr
        self._first_batch, self._epoch_start = batch, time.perf_counter()
        self._bar = tqdm(
            total=self.batches,
            initial=batch,
            desc=f"epoch {epoch}/{self.epochs} batch",
            leave=False,
            dynamic_ncols=True,
            bar_format="{desc} {n_fmt}/{total_fmt}{postfix} {bar}",
            disable=not self.is_terminal,
        )

    def step(self, rows: Tensor) -> None:
        """Count a batch.

        rows: metrics of the batches done in this epoch; one row per batch, one column per metric.
        """
        self._batch += 1
        self._steps += 1
        self._bar.update()
        if self._batch == self.batches and not self.is_terminal:
            return  # `end` prints the line of the whole epoch
        gap = SECONDS_BETWEEN_UPDATES if self.is_terminal else self._gap()
        now = time.perf_counter()
        if now - self._last_line < gap:
            return
        self._last_line = now
        values = {}
        if self.peek:
            loss = rows[:, self.loss_index].mean().item()
            correct = rows[:, self.correct_index].sum().item()
            images = min(len(rows) * self.batch_size, self.images)
            values["loss"] = f"{loss:.4f}"
            values["accuracy"] = f"{correct / images:.4f}"
        images = (self._batch - self._first_batch) * self.batch_size
        text = self._text(values, images / (now - self._epoch_start))
        if self.is_terminal:
            self._bar.set_postfix_str(text)
        else:
            done = f"epoch {self._epoch}/{self.epochs} batch {self._batch}/{self.batches}"
            log.info("%s  %s", done, text)

    def end(self, row: Mapping[str, Any]) -> None:
        """End the epoch, and print a line if due. row: the epoch's row of epochs.csv."""
        self._bar.close()
        now = time.perf_counter()
        is_edge = not self.is_quiet and (self.is_terminal or self._epoch in (1, self.epochs))
        if not is_edge and now - self._last_end < self._gap():
            return
        self._last_line = self._last_end = now
        values = {"loss": f"{row['train_loss']:.4f}", "accuracy": f"{row['train_accuracy']:.4f}"}
        values["test accuracy"] = f"{row['test_accuracy']:.4f}"
        cosine = row.get("cosine/1", math.nan)
        if not math.isnan(cosine):
            values["cosine/1"] = f"{cosine:.3f}"
        text = self._text(values, self.images / row["seconds"])
        log.info("epoch %d/%d  %s", self._epoch, self.epochs, text)

    def _gap(self) -> float:
        """Return the number of seconds between two lines. It grows in a long run."""
        return max(SECONDS_BETWEEN_LINES, GROWTH * (time.perf_counter() - self._start))

    def _text(self, values: Mapping[str, str], images_per_second: float) -> str:
        """Return one line of text: the values, the speed, the time left and the learning rate."""
        parts = [f"{name} {value}" for name, value in values.items()]
        parts.append(f"{images_per_second:.0f} images/s")
        steps_left = (self.epochs - self._epoch + 1) * self.batches - self._batch
        if steps_left > 0 and self._steps > 0:
            seconds_per_step = (time.perf_counter() - self._start) / self._steps
            parts.append(f"{duration(seconds_per_step * steps_left)} left")
        # last, because a narrow terminal cuts off the end of a line
        parts.append(f"lr {self.lr:.3g}")
        return "  ".join(parts)
