"""One run, in a directory that is locked: prepared, trained, and concluded by the `result.json` that says how."""

import copy
import errno
import logging
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from dfl_experiments.configuration.composition import AUTO, names_of, science
from dfl_experiments.configuration.schema import Configuration, Settings
from dfl_experiments.data.packs import digest
from dfl_experiments.errors import Fault, UserError, of_the_system, reason
from dfl_experiments.running import checkpoint
from dfl_experiments.running.build import Parts, build
from dfl_experiments.running.device import ALL_THREADS, usual_torch
from dfl_experiments.running.epochs import State, train
from dfl_experiments.running.locks import locked
from dfl_experiments.running.provenance import code_of, device_name, git_commit, versions
from dfl_experiments.running.result import DONE, read_result, status_left, write_config, write_result
from dfl_experiments.running.run_directory import CONFIG, LAST, PREVIOUS, RESULT, record_overrides
from dfl_experiments.running.signals import Stop
from dfl_experiments.running.summary import four_digits, write_outcome
from dfl_experiments.running.tracking import make_whole, rows_apart, track

log = logging.getLogger(__name__)


def failure(error: BaseException) -> dict[str, str]:
    """Status and one-line reason of a run that an exception ended."""
    if isinstance(error, KeyboardInterrupt):
        return {"status": "interrupted", "reason": " ".join(["Interrupted", str(error)]).strip()}
    if isinstance(error, UserError):
        return {"status": "failed", "reason": reason(error)}
    return {"status": "failed", "reason": f"{type(error).__name__}: {reason(error)}"}


def explained(error: BaseException, settings: Settings, run_dir: Path, started: bool = True) -> BaseException:
    """What the machine or PyTorch would not do, as a `Fault` that says what to change; other errors as they are."""
    text = reason(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        if not started:
            return Fault(f"out of memory before the first batch: the data or the network are too large ({text})")
        return Fault(f"batch_size={settings.batch_size}: out of memory on device={settings.device} ({text})")
    if isinstance(error, RuntimeError) and "does not have a deterministic implementation" in text:
        operator = text.split(" does not have")[0]
        return Fault(f"deterministic=true: {operator} has no deterministic form on device={settings.device}")
    if isinstance(error, OSError):
        told = of_the_system(error)
        if error.errno == errno.ENOSPC:
            told += f"; make room, and the run goes on from its last checkpoint (resume={run_dir}, or the sweep again)"
        return Fault(told)
    return error


def opening(configuration: Configuration) -> dict[str, Any]:
    """What result.json says of a run before it has done anything."""
    # resume, repeat and force are of the command, not of the run
    values = configuration.values | {"resume": None, "repeat": None, "force": False}
    values["data_dir"] = str(Path(values["data_dir"]).expanduser().absolute())  # to be found from elsewhere
    return {
        "status": "failed", "reason": None, **names_of(values), "seed": configuration.settings.seed, "epochs": 0,
        "versions": versions(), "git_commit": git_commit(), "earlier": [], "config": values,
    }  # fmt: skip


def rehearse(parts: Parts) -> None:
    """The first step, on a copy: a run that cannot take it costs nothing that was there before."""
    x, target = next(iter(parts.batches.epoch(1)))
    with torch.random.fork_rng(devices=[parts.device] if parts.device.type == "cuda" else []):
        copy.deepcopy(parts.learner).step(x, target, parts.settings.alignment.every > 0)


def prepare(parts: Parts, run_dir: Path, result: dict[str, Any], saved: dict[str, Any] | None, stop: Stop) -> State:
    """Where to begin: at the checkpoint, if the run goes on; otherwise what the directory holds is given up now.

    Raises `UserError` where the checkpoint is of other data or code, `Interrupted` where a signal has come before.
    """
    net, method = parts.learner.net, parts.learner.method
    made_by = {key: result[key] for key in ("versions", "git_commit")}
    if saved is not None:
        refuse_changes(run_dir, saved["training"], parts.origin)
    result |= parts.origin | {
        "input_shape": list(net.input_shape),
        "num_classes": parts.num_classes,
        "parameters": sum(p.numel() for p in net.parameters()),
        "cosine_by_construction": [str(i) for i in range(method.exact_from, net.depth)],
        "device": device_name(parts.device),
        "memory_format": "channels_last" if parts.memory_format == torch.channels_last else "contiguous",
    }
    state = State(data=result["data"], code=result["code"], made_by=[made_by])
    if saved is not None:
        try:
            state = TypeAdapter(State).validate_python(State(saved["epoch"], **saved["training"]))
            checkpoint.restore(parts.learner, saved)
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            told = f"holds a wrong value ({reason(error)}); force=true starts anew"
            raise UserError(f"{run_dir / LAST}: {told}") from error
        log.info("going on after epoch %d, batch %d", saved["epoch"], saved["batch"])
        go_on_under(state, made_by)
        result["earlier"] = state.made_by[:-1]
    else:
        if any((run_dir / name).exists() for name in (RESULT, LAST, PREVIOUS)):
            rehearse(parts)
        stop.check()
        checkpoint.discard(run_dir)
    (run_dir / RESULT).unlink(missing_ok=True)  # of the part or the run before
    every = rows_apart(parts.settings.tracking, len(parts.batches), parts.settings.alignment.every)
    tracking = result["config"]["tracking"] | {"every": every}
    # sums by another number of threads are rounded otherwise: a repetition needs the one that was used
    result["config"] = result["config"] | {"threads": torch.get_num_threads(), "tracking": tracking}
    write_config(run_dir, result["config"])
    return state


def go_on_under(state: State, made_by: dict[str, Any]) -> None:
    """Note that the rest of a run is made by this, with a warning where what is done was made by something else."""
    before = state.made_by[-1]
    old, new = ({**one["versions"], "commit": one["git_commit"]} for one in (before, made_by))
    if differing := [f"{name} {old.get(name)}, now {new[name]}" for name in new if old.get(name) != new[name]]:
        log.warning("the part before was made with %s: bits may differ, both are recorded", "; ".join(differing))
        state.made_by[-1:] = [before | {"epochs": state.epoch}, made_by]


@usual_torch()
def run(
    configuration: Configuration,
    run_dir: Path,
    group: str | None = None,
    *,
    go_on: bool = False,
    command: str | None = None,
    device: str | None = None,
    threads: int = ALL_THREADS,
) -> dict[str, Any]:
    """Train as configured in a directory that is locked, and return the content of its result.json.

    group: the sweep that the run belongs to. go_on: from the checkpoint there, which must be of the same configuration;
    otherwise anew, over what is there. command: of a sweep, for its summary to know that it was this one that ran the
    point. device, threads: of the CPU, where neither the configuration nor the checkpoint says which. A run that raises
    leaves a `result.json` with status "failed" (or "interrupted"), the reason, and what was known.
    """
    settings, result = configuration.settings, opening(configuration)
    state: State | None = None
    try:
        # nothing is given up for a run that cannot start
        saved = checkpoint.load(run_dir, configuration.science) if go_on else None
        parts = build(configuration, device, threads if saved is None else saved["threads"])
        with Stop() as stop:  # from here on a signal waits for a place where it breaks nothing
            state = prepare(parts, run_dir, result, saved, stop)
            if command is not None:
                write_outcome(run_dir, command, "running")
            written = state.lengths if go_on else None
            tracking = settings.tracking.model_copy(update={"every": result["config"]["tracking"]["every"]})
            with track(tracking, run_dir, result["config"], parts.columns, group, written) as tracker:
                try:
                    train(parts, state, run_dir, configuration.science, tracker, stop)
                    result |= state.result | (state.end or {"status": "finished"})
                    conclude(run_dir, result, started=True)  # before W&B has its time, which a signal may cut short
                    checkpoint.discard_spent(run_dir, result["config"])
                except BaseException as error:
                    result |= state.result | failure(error)
                    raise
                finally:
                    tracker.summarise(result)
    except BaseException as error:
        told = explained(error, settings, run_dir, started=state is not None)
        if result["status"] not in DONE:
            with suppress(OSError, UserError):  # of a full disk, or a damaged result: the error itself is to be told
                conclude(run_dir, result | failure(told), started=state is not None)
        if told is error:
            raise
        raise told from error
    return result


def run_alone(configuration: Configuration, run_dir: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Run one job outside of a sweep, and return what result.json says. overrides: what the command line said.

    Raises `UserError` for a directory that holds a run already, or that has nothing to resume, or that is in use. With
    resume=auto a run there goes on, if it is of the same configuration, and otherwise one begins.
    """
    settings = configuration.settings
    is_new = not run_dir.is_dir() or (run_dir.absolute() != Path.cwd() and set(os.listdir(run_dir)) <= {"run.log"})
    with locked(run_dir):
        status = None if settings.force and settings.resume is None else status_left(run_dir)
        go_on = status is not None if settings.resume == AUTO else settings.resume is not None
        if not go_on and status is not None:
            told = f"holds a run already ({status}); resume={run_dir} goes on, force=true starts anew"
            raise UserError(f"{run_dir}: {told}")
        if go_on and (before := found_done(configuration, run_dir)):
            return before
        if go_on and status is None:
            raise UserError(f"resume={run_dir}: left no checkpoint; repeat={run_dir} starts it anew")
        if not go_on:
            record_overrides(run_dir, overrides)
        try:
            result = run(configuration, run_dir, go_on=go_on)
        except UserError as error:
            if is_new and error.exit_code == 2 and not (run_dir / "epochs.csv").exists():
                shutil.rmtree(run_dir, ignore_errors=True)  # it was refused, and nothing has been trained
            raise
    summarise(result, run_dir)
    return result


def found_done(configuration: Configuration, run_dir: Path, group: str | None = None) -> dict[str, Any] | None:
    """Return the result of the run that a directory holds, mirrored, where it has ended; None where it has not.

    group: see `run`. Raises `UserError` where that run has another configuration, other data or other code.
    """
    before = read_result(run_dir)
    if before is None:
        return None
    settings, status = configuration.settings, status_left(run_dir)
    if science(before["config"]) != configuration.science:
        raise UserError(f"{run_dir}: holds a run with another configuration; force=true replaces it")
    if status is None:  # it begins anew, with its code mended perhaps
        return None
    source = configuration.components["dataset.source"].build()
    data = digest(settings.dataset.name, source, Path(settings.data_dir))
    refuse_changes(run_dir, before, {"data": data, "code": code_of(configuration.components)})
    if status not in DONE:
        return None
    log.info("%s: %s already, accuracy %s", run_dir, status, four_digits(before["accuracy"]))
    checkpoint.discard_spent(run_dir, before["config"])
    make_whole(settings.tracking, run_dir, before, group)
    return before


def refuse_changes(run_dir: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise `UserError` where data or one's own code are others than a result, or a checkpoint's state, recorded."""
    recorded, present = ({"data": one.get("data"), **one.get("code", {})} for one in (before, now))
    for name, value in present.items():
        if None not in (value, recorded.get(name)) and value != recorded[name]:
            changed = f"holds a run on other data or code: {name} {recorded[name]}, now {value}"
            advice = "force=true replaces it, a new sweep= or hydra.run.dir= keeps both"
            raise UserError(f"{run_dir.absolute().name}: {changed}; {advice}")


def conclude(run_dir: Path, result: dict[str, Any], started: bool) -> None:
    """Leave the result; of a run that could not start, only where that takes nothing from the one before."""
    before = None if started else read_result(run_dir)
    result["finished_at"] = datetime.now(UTC).isoformat(timespec="milliseconds")
    if not (run_dir / CONFIG).exists():
        write_config(run_dir, result["config"])
    if before is None:
        write_result(run_dir, result)
    elif before["status"] not in DONE:  # the part before keeps its numbers, and this is why it did not go on
        write_result(run_dir, before | {key: result[key] for key in ("status", "reason")})


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
