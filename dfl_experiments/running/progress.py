"""What a person sees while a run trains: a bar on a terminal, a line now and then elsewhere."""

import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from tqdm import tqdm

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_LOOKS = 0.5


class Progress:
    """epoch, loss, accuracy, layer-1 cosine and samples per second.

    Values are read from the device only where that does not make it wait (`peek`: on a CPU), otherwise the last epoch's
    are shown.
    """

    def __init__(self, epochs: int, batches: int, numbers: Sequence[str], peek: bool) -> None:
        """numbers: the names of a step's."""
        self.epochs, self.batches, self.peek = epochs, batches, peek
        self.places = {name: place for place, name in enumerate(numbers)}
        self.terminal = sys.stderr.isatty()
        self.shown: dict[str, str] = {}
        self._last_line = self._last_look = time.perf_counter()
        self._epoch = self._batch = self._samples = 0
        self._bar: tqdm | None = None

    def begin(self, epoch: int, done: int = 0) -> None:
        """Start epoch 1 … epochs, of which so many batches are done."""
        self._epoch, self._batch, self._samples, self._start = epoch, done, 0, time.perf_counter()
        if self.terminal:
            self._bar = tqdm(
                total=self.batches,
                initial=done,
                desc=f"epoch {epoch}/{self.epochs}",
                leave=False,
                dynamic_ncols=True,
                bar_format="{desc}{postfix} {bar} {n_fmt}/{total_fmt} {remaining}",
            )
            self._bar.set_postfix(self.shown)

    def step(self, samples: int, row: Tensor) -> None:
        """One batch is done; row is that of `Learner.step`."""
        self._samples += samples
        self._batch += 1
        now = time.perf_counter()
        if self._bar is not None:
            self._bar.update()
        if now - self._last_look < SECONDS_BETWEEN_LOOKS:
            return
        self._last_look = now
        if self.peek:
            self._show(row[self.places["loss"]].item(), row[self.places["cosine_sample/1"]].item())
        self.shown.pop("test acc", None)  # of the epoch before
        self.shown["images/s"] = f"{self._samples / (now - self._start):.0f}"
        if self._bar is not None:
            self._bar.set_postfix(self.shown)
        elif now - self._last_line > SECONDS_BETWEEN_LINES:
            self._line(f" batch {self._batch}/{self.batches}")

    def _show(self, loss: float, cosine: float) -> None:
        self.shown["loss"] = f"{loss:.4f}"
        if not math.isnan(cosine):
            self.shown["cosine/1"] = f"{cosine:.3f}"

    def end(self, row: Mapping[str, Any], samples: int) -> None:
        """The epoch is done; row is that of epochs.csv, of so many images."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self.shown = {}
        self._show(row["train_loss"], row.get("cosine/1", math.nan))
        self.shown["test acc"] = f"{row['test_accuracy']:.4f}"
        self.shown["images/s"] = f"{samples / row['seconds']:.0f}"
        is_due = time.perf_counter() - self._last_line > SECONDS_BETWEEN_LINES
        if self.terminal or is_due or self._epoch in (1, self.epochs):
            self._line()

    def _line(self, batch: str = "") -> None:
        self._last_line = time.perf_counter()
        values = "  ".join(f"{name} {value}" for name, value in self.shown.items())
        log.info("epoch %d/%d%s  %s", self._epoch, self.epochs, batch, values)
