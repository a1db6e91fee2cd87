"""Run one configuration in a locked directory: prepare it, train, and write `result.json`."""

import copy
import errno
import logging
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from dfl_experiments.configuration.composition import AUTO, LOCATION, names_of
from dfl_experiments.configuration.schema import Configuration, Settings
from dfl_experiments.engine.crossings import computed_tensors
from dfl_experiments.engine.module_net import ModuleNet
from dfl_experiments.errors import Fault, UserError, of_the_system, reason
from dfl_experiments.running.build import Parts, build
from dfl_experiments.running.checkpoint import (
    discard_checkpoints,
    discard_spent,
    load_checkpoint,
    restore,
)
from dfl_experiments.running.device import ALL_THREADS, usual_torch
from dfl_experiments.running.earlier_run import (
    advice_on_changes,
    advice_on_existing_run,
    refuse_changes,
    result_if_done,
)
from dfl_experiments.running.epochs import State, Training
from dfl_experiments.running.event_files import refuse_missing_package
from dfl_experiments.running.locks import lock_run
from dfl_experiments.running.outcome import write_outcome
from dfl_experiments.running.provenance import device_name, git_commit, versions
from dfl_experiments.running.result import (
    DONE,
    read_result,
    status_left,
    without_nan,
    write_config,
    write_result,
)
from dfl_experiments.running.run_directory import (
    CONFIG,
    LAST,
    PREVIOUS,
    RESULT,
    plot_line,
    record_overrides,
    relative,
    rerun_arguments,
)
from dfl_experiments.running.signals import Interrupted, Stop
from dfl_experiments.running.tracking import rows_apart, track

log = logging.getLogger(__name__)


def run_alone(
    configuration: Configuration,
    run_dir: Path,
    overrides: Sequence[str] = (),
    exists_advice: str | None = None,
) -> dict[str, Any]:
    """Run one job outside of a sweep, and return the content of result.json.

    With resume=auto, continue the run in the directory. If there is none, start a new run.

    overrides: overrides of the command line, which are recorded.
    exists_advice: what the user can do if the directory has a run; by default the options of the command line.
    Raises `UserError` in three cases: there is nothing to resume; another process works in the directory; the directory
    already has a run, and the configuration sets neither resume nor force.
    """
    settings = configuration.settings
    is_new = not run_dir.is_dir()
    if not is_new and run_dir.absolute() != Path.cwd():
        is_new = set(os.listdir(run_dir)) <= {"run.log"}
    with lock_run(run_dir):
        status = None if settings.force else status_left(run_dir)
        is_resumed = settings.resume is not None
        if settings.resume == AUTO:
            is_resumed = status is not None
        if is_resumed and (before := result_if_done(configuration, run_dir)):
            return before
        if is_resumed and status is None:
            repeat = rerun_arguments("repeat", relative(run_dir), settings.plugins)
            raise UserError(f"resume={run_dir}: has no checkpoint; {repeat} starts the run again")
        if not is_resumed and status is not None:
            advice = exists_advice or advice_on_existing_run(settings, run_dir, status)
            raise UserError(f"{run_dir}: has a run already ({status}); {advice}")
        if not is_resumed:
            record_overrides(run_dir, overrides)
        try:
            result = run(configuration, run_dir, resume=is_resumed)
        except Interrupted:
            resume = rerun_arguments("resume", relative(run_dir), settings.plugins)
            log.info("interrupted; continue with: dfl-train %s", resume)
            raise
        except UserError as error:
            if is_new and error.exit_code == 2 and not (run_dir / "epochs.csv").exists():
                shutil.rmtree(run_dir, ignore_errors=True)  # the run was refused before training
            raise
    log_summary(result, run_dir)
    return result


@usual_torch()
def run(
    configuration: Configuration,
    run_dir: Path,
    group: str | None = None,
    *,
    resume: bool = False,
    command: str | None = None,
    device: str | None = None,
    threads: int = ALL_THREADS,
) -> dict[str, Any]:
    """Train a configuration in a locked directory, and return the content of result.json.

    After an error, `result.json` has the status "failed" or "interrupted" and the reason.

    group: name of the run's sweep.
    resume: whether to continue from the checkpoint. The checkpoint must have the same configuration.
    command: ID of the sweep's command; None for a single run.
    device: device to use in place of the configured one.
    threads: default number of CPU threads. A number in the configuration or in the checkpoint replaces it.
    """
    settings, result = configuration.settings, initial_result(configuration)
    state: State | None = None
    try:
        # these checks come first: a run that cannot start must not delete earlier results
        refuse_missing_package(settings.tracking)
        saved = load_checkpoint(run_dir, configuration.values) if resume else None
        parts = build(configuration, device, threads if saved is None else saved["threads"])
        with Stop() as stop:  # from here on, a signal takes effect only between two steps
            state = prepare(parts, run_dir, result, saved, stop)
            if command is not None:
                write_outcome(run_dir, command, "running")
            written = state.lengths if resume else None
            config = result["config"]
            with track(
                settings.tracking, run_dir, config, parts.columns, group, written
            ) as tracker:
                try:
                    own_digest, is_quiet = configuration.config_digest, command is not None
                    Training(parts, state, run_dir, own_digest, tracker, stop, is_quiet).run()
                    result |= state.result | (state.end or {"status": "finished"})
                    # write the result before W&B finishes, because a signal may interrupt W&B
                    conclude(run_dir, result, started=True)
                    discard_spent(run_dir, config)
                except BaseException as error:
                    result |= state.result | failure(error)
                    raise
                finally:
                    tracker.summarise(result)
    except BaseException as error:
        explanation = explained(error, settings, run_dir)
        if result["status"] not in DONE:
            # ignore a full disk or a damaged result.json, so that the original error is raised
            with suppress(OSError, UserError):
                conclude(run_dir, result | failure(explanation), started=state is not None)
        if explanation is error:
            raise
        raise explanation from error
    return without_nan(result)


def initial_result(configuration: Configuration) -> dict[str, Any]:
    """Return the entries of result.json that are known before the run starts."""
    # resume, repeat and force belong to the command, not to the run
    values = configuration.values | {"resume": None, "repeat": None, "force": False}
    # absolute paths are valid in any working directory
    values["data_dir"] = str(Path(values["data_dir"]).expanduser().absolute())
    source = values["dataset"]["source"]
    location = source.get(LOCATION)
    if isinstance(location, str) and os.path.exists(location):
        source = source | {LOCATION: os.path.abspath(location)}
        values["dataset"] = values["dataset"] | {"source": source}
    return {
        "status": "failed",
        "reason": None,
        **names_of(values),
        "seed": configuration.settings.seed,
        "epochs": 0,
        "versions": versions(),
        "git_commit": git_commit(),
        "earlier": [],
        "config": values,
    }


def prepare(
    parts: Parts, run_dir: Path, result: dict[str, Any], saved: dict[str, Any] | None, stop: Stop
) -> State:
    """Prepare the run directory, and return the state with which training begins.

    A resumed run begins with the state of its checkpoint. For a new run, earlier results are deleted.

    result: content of result.json. The function adds entries to it.
    saved: snapshot in the checkpoint; None for a new run.
    Raises `UserError` if the checkpoint belongs to other data or code, and `Interrupted` if a signal has arrived.
    """
    net = parts.learner.net
    made_by = {key: result[key] for key in ("versions", "git_commit")}
    if saved is not None:
        advice = advice_on_changes(parts.settings, run_dir)
        refuse_changes(run_dir, saved["training"], parts.origin, advice)
    result |= facts_of(parts)
    if parts.settings.repeat is not None:
        repeated = read_result(Path(parts.settings.repeat)) or {}
        if repeated.get("data") not in (None, result["data"]):
            log.warning("the data differ from those of %s", parts.settings.repeat)
    if isinstance(net, ModuleNet):
        names = [f"{i} {name}" for i, name in enumerate(net.boundaries, start=1)]
        log.info("layers: %s", ", ".join(names))
    if saved is None:
        if any((run_dir / name).exists() for name in (RESULT, LAST, PREVIOUS)):
            rehearse(parts)
        stop.raise_if_asked()
        discard_checkpoints(run_dir)
        state = State(data=result["data"], code=result["code"], made_by=[made_by])
    else:
        state = State(saved["epoch"], **saved["training"])
        restore(parts.learner, saved)
        log.info("continuing after epoch %d, batch %d", saved["epoch"], saved["batch"])
        add_origin(state, made_by)
        result["earlier"] = state.made_by[:-1]
    state.standardisation = parts.standardisation
    # an earlier result is no longer true once training begins
    (run_dir / RESULT).unlink(missing_ok=True)
    every = rows_apart(parts.settings.tracking, len(parts.batches), parts.settings.alignment.every)
    tracking = result["config"]["tracking"] | {"every": every}
    # Record the number of threads, because it changes how sums are rounded. `repeat` uses the same number.
    result["config"] = result["config"] | {"threads": torch.get_num_threads(), "tracking": tracking}
    write_config(run_dir, result["config"])
    return state


def facts_of(parts: Parts) -> dict[str, Any]:
    """Return the entries of result.json that follow from the parts of a run."""
    net, labels = parts.learner.net, parts.test.labels
    is_last = parts.memory_format == torch.channels_last
    # the configuration lacks it if an optimizer of torch.optim or a plugin has its own default
    weight_decay = parts.learner.optimizer.param_groups[0].get("weight_decay")
    facts = parts.origin | {
        "input_shape": list(net.input_shape),
        "num_classes": len(parts.classes),
        "test_images": len(labels),
        "largest_class": float(labels.bincount().max() / len(labels)),
        "parameters": sum(p.numel() for p in net.parameters()),
        "cosine_by_construction": [
            str(i) for i in range(parts.learner.method.exact_from, net.depth)
        ],
        "device": device_name(parts.device),
        "memory_format": "channels_last" if is_last else "contiguous",
        "weight_decay": None if weight_decay is None else float(weight_decay),
    }
    if isinstance(net, ModuleNet):
        facts |= {"delta_at": "boundary", "boundaries": net.boundaries}
    return facts


def rehearse(parts: Parts) -> None:
    """Run one training step on a copy of the learner. An error then occurs before earlier results are deleted."""
    x, target = next(iter(parts.batches.epoch(1)))
    with torch.random.fork_rng(devices=[parts.device] if parts.device.type == "cuda" else []):
        learner = copy.deepcopy(parts.learner, computed_tensors(parts.learner.net))
        learner.step(x, target, parts.settings.alignment.every > 0)


def add_origin(state: State, made_by: dict[str, Any]) -> None:
    """Record the versions and the commit with which a run is resumed. Log a warning if they have changed."""
    before = state.made_by[-1]
    old = {**before["versions"], "commit": before["git_commit"]}
    new = {**made_by["versions"], "commit": made_by["git_commit"]}
    differing = []
    for name, value in new.items():
        if old.get(name) != value:
            differing.append(f"{name} {old.get(name)}, now {value}")
    if differing:
        text = "the earlier epochs used %s; results may differ in the last bits; result.json names all versions"
        log.warning(text, "; ".join(differing))
        state.made_by[-1:] = [before | {"epochs": state.epoch}, made_by]


def explained(error: BaseException, settings: Settings, run_dir: Path) -> BaseException:
    """Return a `Fault` with advice for an error of the machine. Return any other error unchanged."""
    text = reason(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        return Fault(
            f"batch_size={settings.batch_size}: out of memory on device={settings.device} ({text})"
        )
    if isinstance(error, RuntimeError) and "deterministic implementation" in text:
        return Fault(f"deterministic=true: {text}")
    if isinstance(error, OSError):
        problem = of_the_system(error)
        if error.errno == errno.ENOSPC:
            arguments = rerun_arguments("resume", relative(run_dir), settings.plugins)
            problem += f"; free space, then continue with {arguments}, or start the sweep again"
        return Fault(problem)
    return error


def failure(error: BaseException) -> dict[str, str]:
    """Return the status of a run that ended with an exception, and the reason in one line."""
    if isinstance(error, KeyboardInterrupt):
        return {"status": "interrupted", "reason": str(error) or "KeyboardInterrupt"}
    if isinstance(error, UserError):
        return {"status": "failed", "reason": reason(error)}
    return {"status": "failed", "reason": f"{type(error).__name__}: {reason(error)}"}


def conclude(run_dir: Path, result: dict[str, Any], started: bool) -> None:
    """Write result.json.

    If the run did not start, an earlier result is kept. If the status of the earlier result is in `DONE`, nothing is
    changed. Otherwise, only its status and reason are replaced.

    started: whether the run started.
    """
    before = None if started else read_result(run_dir)
    result["finished_at"] = datetime.now(UTC).isoformat(timespec="milliseconds")
    if not (run_dir / CONFIG).exists():
        write_config(run_dir, result["config"])
    if before is None:
        write_result(run_dir, result)
    elif before["status"] not in DONE:
        write_result(run_dir, before | {key: result[key] for key in ("status", "reason")})


def log_summary(result: dict[str, Any], run_dir: Path) -> None:
    """Log the results of a run in a few lines, and the command that plots it."""
    accuracy = result["test_accuracy"]
    log.info("")
    place = f"{result['method']}, {result['model']} on {result['dataset']}"
    log.info("%s: %s", result["status"], place)
    if result["config"]["smoke"]:
        log.info("  a smoke run with %d images: a test, not a result", result["config"]["smoke"])
    if result["reason"]:
        log.info("  %s", result["reason"])
    log.info("  test accuracy   %.4f after the last epoch", accuracy["last"])
    if (best := accuracy["at_best_validation"]) is not None:
        log.info("                  %.4f after the epoch of best validation accuracy", best)
    # a checkpoint of an earlier version may lack it
    shares = result.get("class_accuracy", {}).values()
    by_class = [share for share in shares if share is not None]
    if not all(by_class):
        text = "                  0 in %d of %d classes; see class_accuracy in result.json"
        log.info(text, by_class.count(0), len(by_class))
    if result["cosine"]:
        log.info("  alignment with BP, mean cosine of the last measured epoch")
    for layer, cosine in result["cosine"].items():
        value = "no signal" if cosine is None else f"{cosine:.3f}"
        if layer in result["cosine_by_construction"]:
            value += " (BP's own signal, by construction)"
        log.info("    layer %s   %s", layer, value)
    log.info("  %.0f images/s, %.1f s of training", result["samples_per_second"], result["seconds"])
    log.info("  run directory   %s", run_dir)
    log.info("  %s", plot_line(run_dir))
