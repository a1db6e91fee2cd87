"""All epochs of a run, its records, and how it ends."""

import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from dfl_experiments import checkpoint
from dfl_experiments.alignment import QUANTITIES
from dfl_experiments.config import plain
from dfl_experiments.experiment import Experiment
from dfl_experiments.progress import Progress
from dfl_experiments.results import (
    EPOCH_COLUMNS,
    LAYER_COLUMNS,
    Accuracies,
    Table,
    device_name,
    git_commit,
    iteration_columns,
    versions,
    write_config,
    write_result,
)
from dfl_experiments.settings import Settings
from dfl_experiments.tracking import Tracker, track

log = logging.getLogger(__name__)

HEADLINES = {"last": "last", "best_test": "best", "best_validation": "at_best_validation"}
UNTRAINABLE_EPOCH, UNTRAINABLE_FACTOR = 5, 1.15


def iteration_rows(values: Tensor, epoch: int) -> list[dict[str, float | int | None]]:
    """The rows of iterations.csv that an epoch's values make."""
    rows = []
    layers = (values.shape[1] - 1) // len(QUANTITIES)
    names = [f"{name}/{i}" for i in range(1, layers + 1) for name in QUANTITIES]
    kept = {f"{name}/{i}" for i in range(1, layers + 1) for name in LAYER_COLUMNS}
    for index, (loss, *quantities) in enumerate(values.tolist()):
        row: dict[str, float | int | None] = {
            "iteration": (epoch - 1) * len(values) + index + 1,
            "epoch": epoch,
            "loss": loss,
        }
        row.update((name, value) for name, value in zip(names, quantities, strict=True) if name in kept)
        rows.append(row)
    return rows


def per_layer(values: Tensor, quantity: str, reduce: Any) -> dict[str, float]:
    """One quantity of every layer over an epoch's measured iterations, by layer number; empty if there is none.

    Values that are not a number, because a signal was zero for the whole batch, are left out; NaN if all are.
    """
    quantities = values[:, 1:].unflatten(1, (-1, len(QUANTITIES)))
    measured = quantities[~quantities[:, :, QUANTITIES.index("zeros")].isnan().any(1)]
    if not len(measured):
        return {}
    columns = measured[:, :, QUANTITIES.index(quantity)].T
    return {str(i): float(reduce(column[~column.isnan()])) for i, column in enumerate(columns, start=1)}


def failure(error: BaseException) -> dict[str, str]:
    """Status and one-line reason of a run that an exception ended."""
    status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
    return {"status": status, "reason": " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")}


def run(cfg: DictConfig, settings: Settings, run_dir: Path, group: str | None) -> float | None:
    """Train as configured, writing the run directory, and return the accuracy that the protocol reports.

    A run that raises leaves a `result.json` with status "failed" (or "interrupted"), the reason, and what was known.
    """
    config = plain(cfg)
    names = {key: config[key]["name"] for key in ("dataset", "augmentation", "model", "method", "protocol")}
    result: dict[str, Any] = {
        "status": "failed", "reason": None, **names, "seed": settings.seed, "epochs": 0, "versions": versions(),
        "git_commit": git_commit(), "config": config,
    }  # fmt: skip
    run_dir.mkdir(parents=True, exist_ok=True)
    for name in ("result.json", "last.pt"):  # of an earlier run in this directory, whose end they would claim
        (run_dir / name).unlink(missing_ok=True)
    write_config(run_dir, cfg)
    try:
        experiment = Experiment(cfg, settings)
        net, cuts = experiment.learner.net, experiment.learner.method.cuts
        result |= {
            "parameters": sum(p.numel() for p in net.parameters()),
            "device": device_name(experiment.device),
            "cosine_by_construction": [str(i) for i in range(max(cuts, default=0) + 1, net.depth)],
        }
        with track(settings.tracking, run_dir, config, iteration_columns(net.depth - 1), group) as tracker:
            try:
                train(experiment, run_dir, tracker, result)
            except BaseException as error:
                result |= failure(error)
                raise
            finally:
                tracker.summarise(result)
    except BaseException as error:
        result |= failure(error)
        raise
    finally:
        write_result(run_dir, result)
    summarise(result, run_dir)
    return result["accuracy"]


def train(experiment: Experiment, run_dir: Path, tracker: Tracker, result: dict[str, Any]) -> None:
    """All epochs; each one's rows are written, and the result brought up to date, as it ends."""
    settings, learner = experiment.settings, experiment.learner
    accuracies, seconds = Accuracies(), 0.0
    initial = experiment.evaluate(experiment.test)[1] if settings.stop_untrainable else 0.0
    progress = Progress(settings.epochs, len(experiment.batches), peek=experiment.device.type == "cpu")
    sizes = torch.full((len(experiment.batches),), float(settings.batch_size))
    sizes[-1] = experiment.train_size - settings.batch_size * (len(sizes) - 1)
    saved = time.perf_counter()
    with (
        Table(run_dir / "iterations.csv", iteration_columns(learner.net.depth - 1)) as iterations,
        Table(run_dir / "epochs.csv", EPOCH_COLUMNS) as table,
    ):
        for epoch in range(1, settings.epochs + 1):
            values, correct, duration = experiment.train_epoch(epoch, progress)
            validation = experiment.evaluate(experiment.validation)[1] if len(experiment.validation) else None
            test_loss, test = experiment.evaluate(experiment.test)
            accuracies.add(validation, test)
            seconds += duration
            rows = iteration_rows(values, epoch)
            train_loss = (values[:, 0] @ sizes).item() / experiment.train_size
            row: dict[str, float | int | None] = {
                "epoch": epoch,
                "lr": experiment.schedule.lr_at(epoch, settings.epochs),
                "train_loss": train_loss,
                "train_accuracy": correct.item() / experiment.train_size,
                "validation_accuracy": validation,
                "test_loss": test_loss,
                "test_accuracy": test,
                "seconds": duration,
            }
            cosine = per_layer(values, "cosine_sample", torch.mean)
            summary = accuracies.summary()
            update = {
                "epochs": epoch,
                "accuracy": summary[HEADLINES[settings.protocol.accuracy]],
                "test_accuracy": summary,
                "validation_accuracy": validation,
                "cosine": cosine or result.get("cosine", {}),
                "zeros": per_layer(values, "zeros", torch.sum) or result.get("zeros", {}),
                "seconds": seconds,
                "samples_per_second": epoch * experiment.train_size / seconds,
            }
            iterations.extend(rows)
            table.extend([row])
            result |= update  # next to the rows, so that an interruption finds both or neither
            tracker.log(rows)
            tracker.log([row])
            progress.end(train_loss, test, cosine.get("1"), duration)
            end = stopped(values, epoch, learner.net, accuracies, initial)
            if epoch == settings.epochs or end or time.perf_counter() - saved >= settings.checkpoint.every_seconds:
                checkpoint.save(run_dir, checkpoint.state_of(learner, epoch, epoch * len(values), accuracies))
                saved = time.perf_counter()
            if end:
                break
    result |= end or {"status": "finished"}


def stopped(
    values: Tensor, epoch: int, net: nn.Module, accuracies: Accuracies, initial: float
) -> dict[str, str] | None:
    """Why a run ends after this epoch, before its last: NaN or Inf, or untrainable by the published code's rule."""
    bad = (~values[:, 0].isfinite()).nonzero()
    if len(bad):
        iteration = (epoch - 1) * len(values) + bad[0].item() + 1
        return {"status": "diverged", "reason": f"the loss is NaN or Inf from iteration {iteration} on"}
    if not all(p.isfinite().all() for p in net.parameters()):
        return {"status": "diverged", "reason": f"a weight is NaN or Inf after iteration {epoch * len(values)}"}
    if epoch >= UNTRAINABLE_EPOCH and accuracies.best_test < UNTRAINABLE_FACTOR * initial:
        best = f"best test accuracy {accuracies.best_test:.4f} < {UNTRAINABLE_FACTOR} × the initial {initial:.4f}"
        return {"status": "stopped", "reason": f"after epoch {epoch}: {best}"}
    return None


def summarise(result: dict[str, Any], run_dir: Path) -> None:
    """The end of a run in a few lines."""
    accuracy = result["test_accuracy"]
    log.info("")
    log.info("%s: %s, %s on %s", result["status"], result["method"], result["model"], result["dataset"])
    if result["reason"]:
        log.info("  %s", result["reason"])
    log.info("  test accuracy   %.4f after the last epoch", accuracy["last"])
    if accuracy["at_best_validation"] is not None:
        log.info("                  %.4f after the epoch of best validation accuracy", accuracy["at_best_validation"])
    log.info("                  %.4f at best, after epoch %d", accuracy["best"], accuracy["best_epoch"])
    if result["cosine"]:
        log.info("  alignment with BP, mean cosine of the last epoch")
    for layer, cosine in result["cosine"].items():
        exact = layer in result["cosine_by_construction"]
        value = "no signal" if math.isnan(cosine) else f"{cosine:.3f}"
        log.info("    layer %s   %s%s", layer, value, " (BP's own signal, by construction)" if exact else "")
    log.info("  %.0f samples/s, %.1f s of training", result["samples_per_second"], result["seconds"])
    log.info("  run directory   %s", run_dir)
