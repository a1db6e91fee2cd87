"""The epochs of a run, from wherever its last checkpoint left it."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict
from torch import Tensor, nn

from dfl_experiments.measured import STABILITY
from dfl_experiments.running import checkpoint
from dfl_experiments.running.build import Parts
from dfl_experiments.running.progress import Progress
from dfl_experiments.running.records import by_layer, iteration_rows, per_layer, reported_accuracies
from dfl_experiments.running.run_directory import HEADLINES, Table
from dfl_experiments.running.signals import Interrupted, Stop
from dfl_experiments.running.stability import Activations, instability, norm_ratios
from dfl_experiments.running.tracking import Tracker

UNTRAINABLE_EPOCH, UNTRAINABLE_FACTOR = 6, 1.15  # the published code's epoch 5, which it counts from 0
SHARE_OF_WRITING = 0.05  # of the time, at most, for the checkpoints at the ends of epochs


@dataclass
class State:
    """Where a run is, beside its weights.

    epoch: epochs done; rows: of the batches done of the next one; initial: test accuracy before the first; end: status
    and reason of a run that ends early; lengths: of the CSV files, in bytes, at the last checkpoint; digests: SHA-256
    of so much of them; accuracies: (validation, test) of every epoch; first_row: of epochs.csv, of the first; result:
    what result.json says so far; data: the data set's digest; code: see `code_of`; made_by: the versions and the
    commit, and before them those that an earlier part was made with, with its number of epochs.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(
        arbitrary_types_allowed=True, strict=True, revalidate_instances="always"
    )
    epoch: int = 0
    rows: Tensor | None = None
    seconds: float = 0.0
    epoch_seconds: float = 0.0
    initial: float | None = None
    end: dict[str, str] | None = None
    lengths: dict[str, int | None] = field(default_factory=lambda: {"iterations": None, "epochs": None})
    digests: dict[str, str] = field(default_factory=dict)
    accuracies: list[tuple[float | None, float]] = field(default_factory=list)
    first_row: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    data: str | None = None
    code: dict[str, str] = field(default_factory=dict)
    made_by: list[dict[str, Any]] = field(default_factory=list)


class Files:
    """The CSV files and the checkpoints of a run under way."""

    def __init__(self, parts: Parts, state: State, run_dir: Path, science: str) -> None:
        self.parts, self.state, self.run_dir, self.science = parts, state, run_dir, science
        self.written, self.cost = time.perf_counter(), 0.0
        self.tables = {
            name: Table(run_dir / f"{name}.csv", columns, state.lengths[name])
            for name, columns in parts.columns.items()
        }

    def save(self) -> None:
        """Write a checkpoint, after the rows that it presupposes."""
        start = time.perf_counter()
        self.state.lengths = {name: table.sync() for name, table in self.tables.items()}
        self.state.digests = {name: table.sha256.hexdigest() for name, table in self.tables.items()}
        checkpoint.save(self.run_dir, checkpoint.taken(self.parts.learner, self.science, self.state))
        self.written = time.perf_counter()
        self.cost = self.written - start


def train(parts: Parts, state: State, run_dir: Path, science: str, tracker: Tracker, stop: Stop) -> None:
    """All epochs that are left; the state is brought up to date as they pass.

    The rows of an epoch are written when it ends, and a checkpoint there and every so many seconds. No value is looked
    at on the device within an epoch. Raises `Interrupted`, after a checkpoint, when a signal has asked for the end.
    """
    settings, learner, batches = parts.settings, parts.learner, parts.batches
    every, numbers = settings.alignment.every, learner.numbers
    progress = Progress(settings.epochs, len(batches), numbers, peek=parts.device.type == "cpu")
    files = Files(parts, state, run_dir, science)
    try:
        if state.initial is None:
            state.initial = evaluate(parts, parts.test, stop.check)[1] if settings.stop_untrainable else 0.0
        while state.epoch < settings.epochs and state.end is None:
            epoch, done, before = state.epoch + 1, state.rows, state.epoch_seconds
            lr = parts.schedule.lr_at(epoch, settings.epochs)
            learner.set_lr(lr)
            learner.net.train()
            rows = torch.empty(len(batches), len(numbers), device=parts.device)
            start_batch = 0 if done is None else len(done)
            if done is not None:
                rows[:start_batch] = done
            progress.begin(epoch, start_batch)
            iteration, start = (epoch - 1) * len(batches) + start_batch, time.perf_counter()
            for index, (x, target) in enumerate(batches.epoch(epoch, start_batch), start_batch):
                rows[index] = parts.step(x, target, every > 0 and iteration % every == 0)
                iteration += 1
                progress.step(len(target), rows[index])
                state.rows, state.epoch_seconds = rows[: index + 1], before + time.perf_counter() - start
                if time.perf_counter() - files.written >= settings.checkpoint.every_seconds:
                    files.save()
                stop.check()
            state.rows = values = rows.cpu()
            state.epoch_seconds = before + time.perf_counter() - start

            columns = dict(zip(numbers, values.T, strict=True))
            row, has_collapsed = epoch_row(parts, state, columns, lr, stop.check)
            for name, those in (("iterations", iteration_rows(values, numbers, epoch)), ("epochs", [row])):
                files.tables[name].extend(those)
                tracker.log(those)
            progress.end(row, parts.train_size)
            close_epoch(parts, state, columns, row, has_collapsed)
            is_last = epoch == settings.epochs or state.end is not None
            is_due = (time.perf_counter() - files.written) * SHARE_OF_WRITING >= files.cost
            if settings.checkpoint.keep if is_last else is_due:
                files.save()
            stop.check()
    except Interrupted:
        files.save()
        raise


def epoch_row(
    parts: Parts, state: State, columns: dict[str, Tensor], lr: float, check: Callable[[], None]
) -> tuple[dict[str, Any], bool]:
    """The row of epochs.csv for the epoch whose batches are done, and whether the net has collapsed.

    columns: what the epoch's steps returned, by name. check: called before every batch of the evaluation.
    """
    activations = Activations(parts.learner.net)
    held_out = len(parts.validation) > 0
    validation_loss, validation = evaluate(parts, parts.validation, check, activations) if held_out else (None, None)
    test_loss, test = evaluate(parts, parts.test, check, None if held_out else activations)
    stability, has_collapsed = activations.measured()
    sizes = torch.full_like(columns["loss"], parts.settings.batch_size)
    sizes[-1] = parts.train_size - parts.settings.batch_size * (len(sizes) - 1)
    row = {
        "epoch": state.epoch + 1,
        "lr": lr,
        "train_loss": (columns["loss"] @ sizes).item() / parts.train_size,
        "train_accuracy": columns["correct"].sum().item() / parts.train_size,
        "validation_loss": validation_loss,
        "validation_accuracy": validation,
        "test_loss": test_loss,
        "test_accuracy": test,
        "seconds": state.epoch_seconds,
        **stability,
    }
    names = {"cosine_sample": "cosine", "norm_ratio": "norm_ratio"} | {q: f"{q}_mean" for q in parts.learner.more}
    columns = columns | norm_ratios(columns)
    for quantity, name in names.items():
        row |= {f"{name}/{i}": value for i, value in per_layer(columns, quantity, torch.mean).items()}
    return row, has_collapsed


def close_epoch(
    parts: Parts, state: State, columns: dict[str, Tensor], row: dict[str, Any], has_collapsed: bool
) -> None:
    """Bring the state up to date with an epoch whose row is written, and settle whether it is the last."""
    settings, learner = parts.settings, parts.learner
    epoch, top = row["epoch"], learner.net.depth - 1
    state.accuracies.append((row["validation_accuracy"], row["test_accuracy"]))
    state.seconds += state.epoch_seconds
    state.first_row = state.first_row or row
    accuracies, before = reported_accuracies(state.accuracies), state.result
    state.result = {
        "epochs": epoch,
        "accuracy": accuracies[HEADLINES[settings.protocol.accuracy]],
        "test_accuracy": accuracies,
        "validation_accuracy": row["validation_accuracy"],
        "validation_loss": row["validation_loss"],
        "zeros": per_layer(columns, "zeros", torch.sum) or before.get("zeros", {}),
        **{name: by_layer(row, name) or before.get(name, {}) for name in ("cosine", *STABILITY)},
        "unstable": before.get("unstable") or instability(row, state.first_row, top),
        "seconds": state.seconds,
        "samples_per_second": epoch * parts.train_size / state.seconds,
    }
    trained = nn.ModuleList([learner.net, learner.method])
    state.end = early_end(columns["loss"], epoch, trained, accuracies["best"], state.initial or 0.0)
    if state.end is None and has_collapsed and settings.stop_collapsed:
        told = f"no unit of layer {top} is active for any image whose error is not zero"
        state.end = {"status": "collapsed", "reason": f"after epoch {epoch}: {told}"}
    state.epoch, state.rows, state.epoch_seconds = epoch, None, 0.0


@torch.no_grad()
def evaluate(
    parts: Parts,
    batches: Iterable[tuple[Tensor, Tensor]],
    check: Callable[[], None] = lambda: None,
    activations: Activations | None = None,
) -> tuple[float, float]:
    """Mean loss and accuracy over a set of images. check: called before every batch. activations: take in its h_i."""
    learner = parts.learner
    net = learner.net.eval()
    sums = []
    count = 0
    for x, target in batches:
        check()
        with learner.autocast():
            logits = net(x) if activations is None else net(x, activations.add)
        value, error = learner.value_and_error(logits, target)
        if activations is not None:
            activations.add_error(error)
        sums.append(torch.stack([value * len(target), (logits.argmax(1) == target).sum()]))
        count += len(target)
    # summed on the CPU: not every device has float64
    summed, correct = torch.stack(sums).cpu().double().sum(0).tolist()
    return summed / count, correct / count


def early_end(losses: Tensor, epoch: int, trained: nn.Module, best: float, initial: float) -> dict[str, str] | None:
    """Why a run ends after this epoch, before its last: NaN or Inf, or untrainable by the published code's rule.

    losses: of the epoch's iterations; best, initial: test accuracies.
    """
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        iteration = (epoch - 1) * len(losses) + bad[0].item() + 1
        return {"status": "diverged", "reason": f"the loss is NaN or Inf from iteration {iteration} on"}
    if not all(p.isfinite().all() for p in trained.parameters()):
        return {"status": "diverged", "reason": f"a weight is NaN or Inf after iteration {epoch * len(losses)}"}
    if epoch >= UNTRAINABLE_EPOCH and best < UNTRAINABLE_FACTOR * initial:
        told = f"best test accuracy {best:.4f} < {UNTRAINABLE_FACTOR} × the initial {initial:.4f}"
        return {"status": "stopped", "reason": f"after epoch {epoch}: {told}"}
    return None
