"""Train the epochs of a run, from its last checkpoint on."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dfl_experiments.measured import STABILITY
from dfl_experiments.running.build import Parts
from dfl_experiments.running.checkpoint import save_checkpoint, snapshot
from dfl_experiments.running.progress import Progress
from dfl_experiments.running.records import by_layer, iteration_rows, per_layer, reported_accuracies
from dfl_experiments.running.run_directory import HEADLINES, Table
from dfl_experiments.running.signals import Interrupted, Stop
from dfl_experiments.running.stability import Activations, instability, norm_ratios
from dfl_experiments.running.tracking import Tracker
from dfl_experiments.schedules import Schedule

# Limits of the published code, see `early_end`. That code counts epochs from 0, so its epoch 5 is epoch 6 here.
UNTRAINABLE_EPOCH, UNTRAINABLE_FACTOR = 6, 1.15
SHARE_OF_WRITING = 0.05  # largest fraction of the time that checkpoints after epochs may take


@dataclass
class State:
    """Progress of a run. Every checkpoint contains the progress and the weights."""

    epoch: int = 0
    """Number of epochs done."""
    rows: Tensor | None = None
    """Metrics of the batches done in the current epoch: one row per batch, one column per metric."""
    seconds: float = 0.0
    """Training time of the epochs done."""
    epoch_seconds: float = 0.0
    """Training time of the current epoch so far."""
    initial: float | None = None
    """Test accuracy before the first epoch."""
    end: dict[str, str] | None = None
    """Status and reason if the run ends early, else None."""
    lengths: dict[str, int | None] = field(
        default_factory=lambda: {"iterations": None, "epochs": None}
    )
    """Length of each CSV file in bytes at the last checkpoint."""
    digests: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each CSV file at the last checkpoint."""
    accuracies: list[tuple[float | None, float]] = field(default_factory=list)
    """Validation and test accuracy of every epoch."""
    first_row: dict[str, Any] = field(default_factory=dict)
    """First row of epochs.csv."""
    result: dict[str, Any] = field(default_factory=dict)
    """Entries of result.json, updated after every epoch."""
    data: str | None = None
    """Digest of the data set."""
    code: dict[str, str] = field(default_factory=dict)
    """Identity of the user's own code, see `code_of`."""
    standardisation: dict[str, Tensor] | None = None
    """See `Parts`."""
    made_by: list[dict[str, Any]] = field(default_factory=list)
    """Versions and commit of each part of a run, and the epochs done at the end of each part except the last.

    A new part starts when the run is resumed with another version or commit.
    """


@dataclass(frozen=True)
class EvaluatedEpoch:
    """What is known of an epoch after its evaluation."""

    row: dict[str, Any]
    """Row of epochs.csv."""
    class_accuracy: dict[str, float | None]
    """Test accuracy of each class, by name; None for a class without test samples."""
    has_collapsed: bool
    """Whether the network has collapsed, see `Activations`."""


class Training:
    """The training of a run: its epochs, its CSV files and its checkpoints."""

    def __init__(
        self,
        parts: Parts,
        state: State,
        run_dir: Path,
        config_digest: str,
        tracker: Tracker,
        stop: Stop,
        is_quiet: bool = False,
    ) -> None:
        """Open the tables, and remove the rows that were written after the last checkpoint.

        is_quiet: see `Progress`.
        """
        self.parts, self.state, self.run_dir = parts, state, run_dir
        self.config_digest, self.tracker, self.stop = config_digest, tracker, stop
        self.settings, self.learner = parts.settings, parts.learner
        epochs, batch_size = self.settings.epochs, self.settings.batch_size
        names, peek = self.learner.metric_names, parts.device.type == "cpu"
        self.progress = Progress(epochs, parts.train_size, batch_size, names, peek, is_quiet)
        self.written, self.seconds_to_write = time.perf_counter(), 0.0
        self.tables = {
            name: Table(run_dir / f"{name}.csv", columns, state.lengths[name])
            for name, columns in parts.columns.items()
        }

    def run(self) -> None:
        """Train the remaining epochs, and update the state.

        Rows are written at the end of each epoch. Checkpoints are written at the end of an epoch and every
        `checkpoint.every_seconds`. Within an epoch no value is read from a GPU, so that the CPU does not wait for it.

        Raises `Interrupted` after a signal. Before that, a checkpoint is written.
        """
        parts, state, epochs = self.parts, self.state, self.settings.epochs
        try:
            if state.initial is None:
                is_needed, check = self.settings.stop_untrainable, self.stop.raise_if_asked
                state.initial = evaluate(parts, parts.test, check).accuracy if is_needed else 0.0
            while state.epoch < epochs and state.end is None:
                lr, feedback_lr = self.learner.rates
                rates = self.scheduled(lr, parts.schedule)
                feedback_rates = self.scheduled(feedback_lr, parts.feedback_schedule)
                self.train_batches(rates, feedback_rates)
                self.end_epoch(rates[0])
        except Interrupted:
            self.save()
            raise

    def scheduled(self, lr: float, schedule: Schedule) -> list[float]:
        """Return the learning rate of each batch of the next epoch. lr: the rate before the schedule changes it."""
        next_epoch, batches = self.state.epoch + 1, len(self.parts.batches)
        factors = schedule.factors(next_epoch, self.settings.epochs, batches)
        return [lr * factor for factor in factors]

    def train_batches(self, rates: list[float], feedback_rates: list[float]) -> None:
        """Train the remaining batches of an epoch, and store the metrics of all its batches in `state.rows`.

        rates, feedback_rates: learning rates of W and of B for each batch.
        """
        state, learner, batches = self.state, self.learner, self.parts.batches
        every, seconds_before = self.settings.alignment.every, state.epoch_seconds
        epoch = state.epoch + 1
        learner.net.train()
        rows = torch.empty(len(batches), len(learner.metric_names), device=self.parts.device)
        start_batch = 0 if state.rows is None else len(state.rows)
        if state.rows is not None:
            rows[:start_batch] = state.rows
        self.progress.begin(epoch, rates[0], start_batch)
        iteration, start = state.epoch * len(batches) + start_batch, time.perf_counter()
        current: tuple[float, float] | None = None
        for index, (x, target) in enumerate(batches.epoch(epoch, start_batch), start_batch):
            new = (rates[index], feedback_rates[index])
            if new != current:
                learner.set_lr(*new)
                current = new
            rows[index] = self.parts.step(x, target, every > 0 and iteration % every == 0)
            iteration += 1
            state.rows = rows[: index + 1]
            state.epoch_seconds = seconds_before + time.perf_counter() - start
            self.progress.step(state.rows)
            if self.age >= self.settings.checkpoint.every_seconds:
                self.save()
            self.stop.raise_if_asked()
        state.rows = rows.cpu()
        state.epoch_seconds = seconds_before + time.perf_counter() - start

    def end_epoch(self, lr: float) -> None:
        """Evaluate after an epoch, write its rows, update the state, and save a checkpoint if due."""
        state, names, values = self.state, self.learner.metric_names, self.state.rows
        assert values is not None
        columns = dict(zip(names, values.T, strict=True))
        evaluated = self.evaluated(columns, lr)
        row = evaluated.row
        rows = {"iterations": iteration_rows(values, names, row["epoch"]), "epochs": [row]}
        for name in rows:
            self.tables[name].extend(rows[name])
            self.tracker.log(rows[name])
        self.progress.end(row)
        self.close_epoch(columns, evaluated)
        is_last = state.epoch == self.settings.epochs or state.end is not None
        is_due = self.age * SHARE_OF_WRITING >= self.seconds_to_write
        if self.settings.checkpoint.keep if is_last else is_due:
            self.save()
        self.stop.raise_if_asked()

    def evaluated(self, columns: dict[str, Tensor], lr: float) -> EvaluatedEpoch:
        """Evaluate the network after an epoch.

        columns: the epoch's metrics by name. Each has shape (iterations,).
        """
        parts, state, check = self.parts, self.state, self.stop.raise_if_asked
        activations = Activations(parts.learner.net)
        validation = None
        if len(parts.validation) > 0:
            validation = evaluate(parts, parts.validation, check, activations)
        test = evaluate(parts, parts.test, check, None if validation else activations)
        stability, has_collapsed = activations.measured()
        batch_size = parts.settings.batch_size
        sizes = torch.full_like(columns["loss"], batch_size)
        sizes[-1] = parts.train_size - batch_size * (len(sizes) - 1)
        row = {
            "epoch": state.epoch + 1,
            "lr": lr,
            "train_loss": (columns["loss"] @ sizes).item() / parts.train_size,
            "train_accuracy": columns["correct"].sum().item() / parts.train_size,
            "validation_loss": validation.loss if validation else None,
            "validation_accuracy": validation.accuracy if validation else None,
            "test_loss": test.loss,
            "test_accuracy": test.accuracy,
            "seconds": state.epoch_seconds,
            **stability,
        }
        names = {"cosine_sample": "cosine", "norm_ratio": "norm_ratio"}
        names |= {quantity: f"{quantity}_mean" for quantity in parts.learner.extra_quantities}
        columns = columns | norm_ratios(columns)
        for quantity, name in names.items():
            means = per_layer(columns, quantity, torch.mean)
            row |= {f"{name}/{i}": value for i, value in means.items()}
        class_accuracy = dict(zip(parts.classes, test.class_accuracy, strict=True))
        return EvaluatedEpoch(row, class_accuracy, has_collapsed)

    def close_epoch(self, columns: dict[str, Tensor], evaluated: EvaluatedEpoch) -> None:
        """Add an epoch to the state, and decide whether the run ends early."""
        parts, state, learner = self.parts, self.state, self.learner
        row = evaluated.row
        epoch, top = row["epoch"], learner.net.depth - 1
        state.accuracies.append((row["validation_accuracy"], row["test_accuracy"]))
        state.seconds += state.epoch_seconds
        state.first_row = state.first_row or row
        accuracies, before = reported_accuracies(state.accuracies), state.result
        state.result = {
            "epochs": epoch,
            "accuracy": accuracies[HEADLINES[self.settings.protocol.accuracy]],
            "test_accuracy": accuracies,
            "class_accuracy": evaluated.class_accuracy,
            "validation_accuracy": row["validation_accuracy"],
            "validation_loss": row["validation_loss"],
            "zeros": per_layer(columns, "zeros", torch.sum) or before.get("zeros", {}),
            **{key: by_layer(row, key) or before.get(key, {}) for key in ("cosine", *STABILITY)},
            "unstable": before.get("unstable") or instability(row, state.first_row, top),
            "seconds": state.seconds,
            "samples_per_second": epoch * parts.train_size / state.seconds,
        }
        trained, initial = nn.ModuleList([learner.net, learner.method]), state.initial or 0.0
        state.end = early_end(columns["loss"], epoch, trained, accuracies["best"], initial)
        if state.end is None and evaluated.has_collapsed and self.settings.stop_collapsed:
            cause = f"all units of layer {top} are 0 for every image that still has an error"
            reason = f"after epoch {epoch}: {cause}; try a lower optimizer.lr"
            state.end = {"status": "collapsed", "reason": reason}
        state.epoch, state.rows, state.epoch_seconds = epoch, None, 0.0

    def save(self) -> None:
        """Flush the tables to the disk, then write a checkpoint."""
        start = time.perf_counter()
        self.state.lengths = {name: table.sync() for name, table in self.tables.items()}
        self.state.digests = {name: table.sha256.hexdigest() for name, table in self.tables.items()}
        save_checkpoint(self.run_dir, snapshot(self.learner, self.config_digest, self.state))
        self.written = time.perf_counter()
        self.seconds_to_write = self.written - start

    @property
    def age(self) -> float:
        """Seconds since the last checkpoint."""
        return time.perf_counter() - self.written


class Evaluation(NamedTuple):
    """Loss and accuracy over a set of images."""

    loss: float
    """Mean loss."""
    accuracy: float
    """Share of the images that are classified correctly."""
    class_accuracy: list[float | None]
    """This share for each class; None for a class without images."""


@torch.no_grad()
def evaluate(
    parts: Parts,
    batches: Iterable[tuple[Tensor, Tensor]],
    check: Callable[[], None] = lambda: None,
    activations: Activations | None = None,
) -> Evaluation:
    """Return loss and accuracy over a set of images.

    check: function that is called before every batch.
    activations: object that collects statistics of h_i.
    """
    learner = parts.learner
    net = learner.net.eval()
    losses = []
    labels = []
    is_correct = []
    for x, target in batches:
        check()
        with learner.autocast():
            logits = net(x) if activations is None else net(x, activations.add)
        value, error = learner.value_and_error(logits, target)
        if activations is not None:
            activations.add_error(error)
        losses.append(value * len(target))
        labels.append(target)
        is_correct.append(logits.argmax(1) == target)
    # Sum on the CPU, because some devices have no float64.
    loss = torch.stack(losses).cpu().double().sum().item()
    of_images = torch.cat(labels).cpu()
    num_classes = len(parts.classes)
    counts = of_images.bincount(minlength=num_classes).tolist()
    hits = of_images[torch.cat(is_correct).cpu()].bincount(minlength=num_classes).tolist()
    class_accuracy = [
        hit / count if count else None for hit, count in zip(hits, counts, strict=True)
    ]
    return Evaluation(loss / len(of_images), sum(hits) / len(of_images), class_accuracy)


def early_end(
    losses: Tensor, epoch: int, trained: nn.Module, best: float, initial: float
) -> dict[str, str] | None:
    """Return status and reason if the run must end after this epoch, otherwise None.

    A run ends if a loss or a weight is NaN or Inf. A run also ends if its test accuracy has hardly improved. This
    second rule is from the published code.

    losses: losses of the epoch's iterations.
    best: best test accuracy of all epochs.
    initial: test accuracy before training; 0 switches the second rule off.
    """
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        iteration = (epoch - 1) * len(losses) + bad[0].item() + 1
        cause = f"the loss is NaN or Inf from iteration {iteration} on"
        return {"status": "diverged", "reason": cause}
    if not all(p.isfinite().all() for p in trained.parameters()):
        cause = f"a weight is NaN or Inf after iteration {epoch * len(losses)}"
        return {"status": "diverged", "reason": cause}
    if epoch >= UNTRAINABLE_EPOCH and best < UNTRAINABLE_FACTOR * initial:
        cause = f"best test accuracy {best:.4f} < {UNTRAINABLE_FACTOR} × the initial {initial:.4f}"
        return {"status": "stopped", "reason": f"after epoch {epoch}: {cause}"}
    return None
