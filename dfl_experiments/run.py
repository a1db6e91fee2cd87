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
    """One quantity of every layer over an epoch's iterations, by layer number; those not measured are left out."""
    columns = values[:, 1:].unflatten(1, (-1, len(QUANTITIES)))[:, :, QUANTITIES.index(quantity)]
    return {str(i): float(reduce(column[~column.isnan()])) for i, column in enumerate(columns.T, start=1)}


def run(cfg: DictConfig, settings: Settings, run_dir: Path, group: str | None) -> float | None:
    """Train as configured, writing the run directory, and return the accuracy that the protocol reports.

    A run that raises leaves a `result.json` with status "failed" (or "interrupted") and the reason.
    """
    config = plain(cfg)
    names = {key: config[key]["name"] for key in ("dataset", "augmentation", "model", "method", "protocol")}
    result: dict[str, Any] = {
        "status": "failed", "reason": None, **names, "seed": settings.seed, "epochs": settings.epochs,
    }  # fmt: skip
    run_dir.mkdir(parents=True, exist_ok=True)
    write_config(run_dir, cfg)
    try:
        experiment = Experiment(cfg, settings)
        columns = iteration_columns(experiment.learner.net.depth - 1)
        with track(settings.tracking, run_dir, config, columns, group) as tracker:
            epochs_of(experiment, run_dir, tracker, result, config["protocol"]["accuracy"])
            result |= {
                "parameters": sum(p.numel() for p in experiment.learner.net.parameters()),
                "device": device_name(experiment.device),
                "versions": versions(),
                "git_commit": git_commit(),
                "config": config,
            }
            tracker.summarise(result)
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        result |= {"status": "interrupted" if interrupted else "failed", "reason": reason, "config": config}
        write_result(run_dir, result)
        raise
    write_result(run_dir, result)
    summarise(result, run_dir)
    return result["accuracy"]


def epochs_of(experiment: Experiment, run_dir: Path, tracker: Tracker, result: dict[str, Any], headline: str) -> None:
    """All epochs, each one's rows written as it ends, and the outcome added to the result."""
    settings, learner = experiment.settings, experiment.learner
    accuracies, seconds, images = Accuracies(), 0.0, 0
    initial = experiment.evaluate(experiment.test)[1] if settings.stop_untrainable else 0.0
    progress = Progress(settings.epochs, len(experiment.batches), peek=experiment.device.type == "cpu")
    saved = time.perf_counter()
    result |= {"status": "finished", "reason": None}
    with (
        Table(run_dir / "iterations.csv", iteration_columns(learner.net.depth - 1)) as iterations,
        Table(run_dir / "epochs.csv", EPOCH_COLUMNS) as table,
    ):
        for epoch in range(1, settings.epochs + 1):
            values, correct, duration = experiment.train_epoch(epoch, progress)
            seconds, images = seconds + duration, images + experiment.train_size
            validation = experiment.evaluate(experiment.validation)[1] if len(experiment.validation) else None
            test_loss, test = experiment.evaluate(experiment.test)
            accuracies.add(validation, test)
            rows = iteration_rows(values, epoch)
            train_loss = values[:, 0].mean().item()
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
            iterations.extend(rows)
            table.extend([row])
            tracker.log(rows)
            tracker.log([row])
            cosine = per_layer(values, "cosine_sample", torch.mean)
            progress.end(train_loss, test, cosine.get("1"), duration)
            reason = stopped(values, epoch, learner.net, accuracies, initial)
            if epoch == settings.epochs or reason or time.perf_counter() - saved >= settings.checkpoint.every_seconds:
                checkpoint.save(run_dir, checkpoint.state_of(learner, epoch, epoch * len(values), accuracies))
                saved = time.perf_counter()
            if reason:
                result |= reason
                break
    summary = accuracies.summary()
    key = {"last": "last", "best_test": "best", "best_validation": "at_best_validation"}[headline]
    result |= {
        "accuracy": summary[key],
        "test_accuracy": summary,
        "validation_accuracy": accuracies.epochs[-1][0],
        "cosine": cosine,
        "cosine_by_construction": [str(i) for i in range(max(learner.method.cuts, default=0) + 1, learner.net.depth)],
        "zeros": per_layer(values, "zeros", torch.sum),
        "seconds": seconds,
        "samples_per_second": images / seconds,
    }


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
        return {"reason": f"stopped after epoch {epoch}: {best}"}
    return None


def summarise(result: dict[str, Any], run_dir: Path) -> None:
    """The end of a run in a few lines."""
    accuracy = result["test_accuracy"]
    log.info("")
    log.info("%s: %s, %s on %s", result["status"], result["method"], result["model"], result["dataset"])
    if result["reason"]:
        log.info("  %s", result["reason"])
    log.info(
        "  test accuracy   %.4f (best %.4f at epoch %d)", accuracy["last"], accuracy["best"], accuracy["best_epoch"]
    )
    if accuracy["at_best_validation"] is not None:
        log.info("  … at the epoch with the best validation accuracy   %.4f", accuracy["at_best_validation"])
    if result["cosine"]:
        log.info("  alignment with BP, mean cosine of the last epoch")
    for layer, cosine in result["cosine"].items():
        exact = layer in result["cosine_by_construction"]
        value = "no signal" if math.isnan(cosine) else f"{cosine:.3f}"
        log.info("    layer %s   %s%s", layer, value, " (BP's own signal, by construction)" if exact else "")
    log.info("  %.0f samples/s, %.1f s of training", result["samples_per_second"], result["seconds"])
    log.info("  run directory   %s", run_dir)
