"""One run: its directory, from the first claim on it to the `result.json` that says how it ended."""

import logging
import math
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from dfl_experiments import checkpoint
from dfl_experiments.config import Fault, UserError, plain
from dfl_experiments.experiment import Experiment
from dfl_experiments.messages import reason
from dfl_experiments.results import (
    DONE,
    PREVIOUS,
    RESULT,
    device_name,
    epoch_columns,
    git_commit,
    iteration_columns,
    read_result,
    versions,
    write_config,
    write_result,
)
from dfl_experiments.settings import Settings, science
from dfl_experiments.sharing import ALL_THREADS
from dfl_experiments.tracking import track
from dfl_experiments.training import Training

log = logging.getLogger(__name__)


def failure(error: BaseException) -> dict[str, str]:
    """Status and one-line reason of a run that an exception ended."""
    if isinstance(error, KeyboardInterrupt):
        return {"status": "interrupted", "reason": " ".join(["Interrupted", str(error)]).strip()}
    if isinstance(error, UserError):
        return {"status": "failed", "reason": reason(error)}
    return {"status": "failed", "reason": f"{type(error).__name__}: {reason(error)}"}


def explained(error: Exception, settings: Settings) -> Exception:
    """What the machine or PyTorch would not do, as a `Fault` that says what to change; other errors as they are."""
    text = reason(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        return Fault(f"batch_size={settings.batch_size}: out of memory on device={settings.device} ({text})")
    if isinstance(error, RuntimeError) and "does not have a deterministic implementation" in text:
        operator = text.split(" does not have")[0]
        return Fault(f"deterministic=true: {operator} has no deterministic form on device={settings.device}")
    if isinstance(error, OSError):
        return Fault(f"{error.filename}: {error.strerror}" if error.strerror and error.filename else text)
    return error


def run(
    cfg: DictConfig,
    settings: Settings,
    run_dir: Path,
    group: str | None,
    *,
    go_on: bool = False,
    threads: int = ALL_THREADS,
) -> dict[str, Any]:
    """Train as configured in a directory that is claimed, and return the content of its result.json.

    go_on: from the checkpoint there, which must be of the same configuration; otherwise anew, over what is there.
    threads: of the CPU, where neither the configuration nor the checkpoint says how many. A run
    that raises leaves a `result.json` with status "failed" (or "interrupted"), the reason, and what was known.
    """
    # resume, repeat and force are of the command, not of the run
    config = plain(cfg) | {"resume": None, "repeat": None, "force": False}
    config["data_dir"] = str(Path(settings.data_dir).expanduser().absolute())  # to be found from elsewhere
    names = {key: config[key]["name"] for key in ("dataset", "augmentation", "model", "method", "protocol")}
    result: dict[str, Any] = {
        "status": "failed", "reason": None, **names, "seed": settings.seed, "epochs": 0, "versions": versions(),
        "git_commit": git_commit(), "config": config,
    }  # fmt: skip
    started = False
    try:
        state = checkpoint.load(run_dir, science(cfg)) if go_on else None
        experiment = Experiment(cfg, settings, state["threads"] if state is not None else threads)
        net, cuts = experiment.learner.net, experiment.learner.method.cuts
        result |= {
            "parameters": sum(p.numel() for p in net.parameters()),
            "cosine_by_construction": [str(i) for i in range(max(cuts, default=0) + 1, net.depth)],
        }
        columns = {"iteration": iteration_columns(net.depth - 1), "epoch": epoch_columns(net.depth - 1)}
        if state is None:  # only now: nothing that a directory holds is given up for a run that cannot start
            (run_dir / RESULT).unlink(missing_ok=True)
            checkpoint.discard(run_dir)
        started = True
        # sums by another number of threads are rounded otherwise: a repetition needs the one that was used
        result["config"] = config = config | {"threads": torch.get_num_threads()}
        write_config(run_dir, config)
        with track(settings.tracking, run_dir, config, columns, group, go_on=state is not None) as tracker:
            training = Training(experiment, run_dir, tracker, result, science(cfg))
            if state is not None:
                training.restore(state)
                (run_dir / RESULT).unlink(missing_ok=True)  # of the part before, which is now going on
                log.info("going on after epoch %d, batch %d", state["epoch"], state["batch"])
            result["device"] = device_name(experiment.device)
            try:
                training.run()
            except BaseException as error:
                result |= failure(error)
                raise
            finally:
                tracker.summarise(result)
        checkpoint.discard(run_dir, PREVIOUS)
    except BaseException as error:
        told = explained(error, settings) if isinstance(error, Exception) else error
        result |= failure(told)
        if told is error:
            raise
        raise told from error
    finally:
        before = read_result(run_dir)
        if started or before is None:
            write_result(run_dir, result)
        elif before["status"] not in DONE:  # the part before keeps its numbers, and this is why it did not go on
            write_result(run_dir, before | {key: result[key] for key in ("status", "reason")})
        if not (run_dir / "config.yaml").exists():
            write_config(run_dir, config)
    if not settings.checkpoint.keep:  # only now that the result is there
        checkpoint.discard(run_dir)
    return result


def summarise(result: dict[str, Any], run_dir: Path) -> None:
    """The end of a run in a few lines."""
    accuracy = result["test_accuracy"]
    log.info("")
    log.info("%s: %s, %s on %s", result["status"], result["method"], result["model"], result["dataset"])
    if result["config"]["smoke"]:
        log.info("  a smoke run: %d images, no result", result["config"]["smoke"])
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
        value = "no signal" if cosine is None or math.isnan(cosine) else f"{cosine:.3f}"
        log.info("    layer %s   %s%s", layer, value, " (BP's own signal, by construction)" if exact else "")
    log.info("  %.0f samples/s, %.1f s of training", result["samples_per_second"], result["seconds"])
    log.info("  run directory   %s", run_dir)
