"""The epochs of a run, from wherever its last checkpoint left it, and the records they leave."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfl_experiments import checkpoint
from dfl_experiments.alignment import QUANTITIES
from dfl_experiments.experiment import Experiment
from dfl_experiments.progress import Progress
from dfl_experiments.results import LAYER_COLUMNS, Accuracies, Table, epoch_columns, iteration_columns
from dfl_experiments.stopping import Interrupted, Stop
from dfl_experiments.tracking import Tracker

HEADLINES = {"last": "last", "best_test": "best", "best_validation": "at_best_validation"}
UNTRAINABLE_EPOCH, UNTRAINABLE_FACTOR = 6, 1.15  # the published code's epoch 5, which it counts from 0
SHARE_OF_WRITING = 0.05  # of the time, at most, for the checkpoints at the ends of epochs

# of result.json, brought up to date after every epoch
RECORDS = (
    "epochs", "accuracy", "test_accuracy", "validation_accuracy", "cosine", "zeros", "seconds", "samples_per_second",
)  # fmt: skip

Row = dict[str, float | int | None]


def iteration_rows(values: Tensor, epoch: int) -> list[Row]:
    """The rows of iterations.csv that an epoch's values make. values: (iterations, …) as `Learner.row` has them."""
    rows = []
    layers = (values.shape[1] - 2) // len(QUANTITIES)
    names = [f"{name}/{i}" for i in range(1, layers + 1) for name in QUANTITIES]
    kept = {f"{name}/{i}" for i in range(1, layers + 1) for name in LAYER_COLUMNS}
    for index, (loss, _, *quantities) in enumerate(values.tolist()):
        row: Row = {"iteration": (epoch - 1) * len(values) + index + 1, "epoch": epoch, "loss": loss}
        row.update((name, value) for name, value in zip(names, quantities, strict=True) if name in kept)
        rows.append(row)
    return rows


def per_layer(values: Tensor, quantity: str, reduce: Any) -> dict[str, float]:
    """One quantity of every layer over an epoch's measured iterations, by layer number; empty if there is none.

    Values that are not a number, because a signal was zero for the whole batch, are left out; NaN if all are.
    """
    quantities = values[:, 2:].unflatten(1, (-1, len(QUANTITIES)))
    measured = quantities[~quantities[:, :, QUANTITIES.index("zeros")].isnan().any(1)]
    if not len(measured):
        return {}
    columns = measured[:, :, QUANTITIES.index(quantity)].T
    return {str(i): float(reduce(column[~column.isnan()])) for i, column in enumerate(columns, start=1)}


def stopped(
    values: Tensor, epoch: int, trained: nn.Module, accuracies: Accuracies, initial: float
) -> dict[str, str] | None:
    """Why a run ends after this epoch, before its last: NaN or Inf, or untrainable by the published code's rule."""
    bad = (~values[:, 0].isfinite()).nonzero()
    if len(bad):
        iteration = (epoch - 1) * len(values) + bad[0].item() + 1
        return {"status": "diverged", "reason": f"the loss is NaN or Inf from iteration {iteration} on"}
    if not all(p.isfinite().all() for p in trained.parameters()):
        return {"status": "diverged", "reason": f"a weight is NaN or Inf after iteration {epoch * len(values)}"}
    if epoch >= UNTRAINABLE_EPOCH and accuracies.best_test < UNTRAINABLE_FACTOR * initial:
        best = f"best test accuracy {accuracies.best_test:.4f} < {UNTRAINABLE_FACTOR} × the initial {initial:.4f}"
        return {"status": "stopped", "reason": f"after epoch {epoch}: {best}"}
    return None


class Training:
    """Trains, writes each epoch's rows as it ends, and leaves a checkpoint there and every so many seconds."""

    def __init__(self, experiment: Experiment, run_dir: Path, tracker: Tracker, result: dict[str, Any], science: str):
        """result: the content of result.json, brought up to date after every epoch."""
        self.experiment, self.run_dir, self.tracker, self.result = experiment, run_dir, tracker, result
        self.settings, self.learner, self.science = experiment.settings, experiment.learner, science
        batches = len(experiment.batches)
        self.progress = Progress(self.settings.epochs, batches, peek=experiment.device.type == "cpu")
        self.sizes = torch.full((batches,), float(self.settings.batch_size))
        self.sizes[-1] = experiment.train_size - self.settings.batch_size * (batches - 1)
        self.accuracies = Accuracies()
        self.epoch = 0  # done
        self.rows: Tensor | None = None  # of the batches done of the next one
        self.seconds = self.epoch_seconds = 0.0
        self.initial: float | None = None
        self.end: dict[str, str] | None = None
        self.lengths: dict[str, int | None] = {"iterations": None, "epochs": None}
        self._written, self._writing = time.perf_counter(), 0.0

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a checkpoint."""
        checkpoint.restore(self.learner, state)
        training = state["training"]
        self.epoch, self.rows = state["epoch"], training["rows"]
        self.seconds, self.epoch_seconds = training["seconds"], training["epoch_seconds"]
        self.initial, self.end, self.lengths = training["initial"], training["end"], training["lengths"]
        self.accuracies.epochs = [(validation, test) for validation, test in training["accuracies"]]
        self.result |= training["result"]

    def save(self) -> None:
        """Write a checkpoint, after the rows that it presupposes."""
        start = time.perf_counter()
        self.lengths = {"iterations": self.iterations.sync(), "epochs": self.table.sync()}
        done = {
            "rows": None if self.rows is None else self.rows.cpu().clone(),
            "seconds": self.seconds,
            "epoch_seconds": self.epoch_seconds,
            "initial": self.initial,
            "end": self.end,
            "lengths": self.lengths,
            "accuracies": self.accuracies.epochs,
            "result": {key: self.result[key] for key in RECORDS if key in self.result},
        }
        batch = 0 if self.rows is None else len(self.rows)
        state = checkpoint.state_of(self.learner, self.science, self.epoch, batch, done)
        checkpoint.save(self.run_dir, state)
        self._written = time.perf_counter()
        self._writing = self._written - start

    def run(self) -> None:
        """All epochs that are left. Raises `Interrupted`, after a checkpoint, when a signal has asked for it."""
        layers = self.learner.net.depth - 1
        files = (
            (self.run_dir / "iterations.csv", iteration_columns(layers), self.lengths["iterations"]),
            (self.run_dir / "epochs.csv", epoch_columns(layers), self.lengths["epochs"]),
        )
        with (
            Table(*files[0]) as self.iterations,
            Table(*files[1]) as self.table,
            Stop() as stop,
        ):
            try:
                if self.initial is None:
                    self.initial = (
                        self._evaluate(self.experiment.test, stop)[1] if self.settings.stop_untrainable else 0.0
                    )
                while self.epoch < self.settings.epochs and self.end is None:
                    self._one_epoch(stop)
            except Interrupted:
                self.save()
                raise
        self.result |= self.end or {"status": "finished"}

    def _evaluate(self, batches: Any, stop: Stop) -> tuple[float, float]:
        return self.experiment.evaluate(batches, stop.check)

    def _one_epoch(self, stop: Stop) -> None:
        experiment, settings, epoch = self.experiment, self.settings, self.epoch + 1
        before = self.epoch_seconds

        def after_step(rows: Tensor, seconds: float) -> None:
            self.rows, self.epoch_seconds = rows, before + seconds
            if time.perf_counter() - self._written >= settings.checkpoint.every_seconds:
                self.save()
            stop.check()

        values, duration = experiment.train_epoch(epoch, self.progress, self.rows, after_step)
        self.rows, self.epoch_seconds = values, before + duration
        validation = self._evaluate(experiment.validation, stop)[1] if len(experiment.validation) else None
        test_loss, test = self._evaluate(experiment.test, stop)
        self.accuracies.add(validation, test)
        self.seconds += self.epoch_seconds
        train_loss = (values[:, 0] @ self.sizes).item() / experiment.train_size
        cosine = per_layer(values, "cosine_sample", torch.mean)
        row: Row = {
            "epoch": epoch,
            "lr": experiment.schedule.lr_at(epoch, settings.epochs),
            "train_loss": train_loss,
            "train_accuracy": values[:, 1].sum().item() / experiment.train_size,
            "validation_accuracy": validation,
            "test_loss": test_loss,
            "test_accuracy": test,
            "seconds": self.epoch_seconds,
            **{f"cosine/{i}": value for i, value in cosine.items()},
        }
        summary = self.accuracies.summary()
        rows = iteration_rows(values, epoch)
        self.iterations.extend(rows)
        self.table.extend([row])
        self.result |= {
            "epochs": epoch,
            "accuracy": summary[HEADLINES[settings.protocol.accuracy]],
            "test_accuracy": summary,
            "validation_accuracy": validation,
            "cosine": cosine or self.result.get("cosine", {}),
            "zeros": per_layer(values, "zeros", torch.sum) or self.result.get("zeros", {}),
            "seconds": self.seconds,
            "samples_per_second": epoch * experiment.train_size / self.seconds,
        }
        self.tracker.log(rows)
        self.tracker.log([row])
        self.progress.end(train_loss, test, cosine.get("1"), self.epoch_seconds)
        trained = nn.ModuleList([self.learner.net, self.learner.method])
        self.end = stopped(values, epoch, trained, self.accuracies, self.initial or 0.0)
        self.epoch, self.rows, self.epoch_seconds = epoch, None, 0.0
        if epoch == settings.epochs or self.end is not None:
            due = settings.checkpoint.keep
        else:
            due = (time.perf_counter() - self._written) * SHARE_OF_WRITING >= self._writing
        if due:
            self.save()
        stop.check()
