"""`last.pt`: everything needed to go on as if nothing had happened, written so that a reader never sees half of it.

At its end, where `torch.load` does not look, stands SHA-256 of all before it: PyTorch checks no sums of its own.
"""

import hashlib
import logging
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dfl_experiments.engine.learner import Learner
from dfl_experiments.errors import UserError, reason
from dfl_experiments.running.run_directory import LAST, PREVIOUS, fsync_folder, synced
from dfl_experiments.seal import opened, sha256_of

if TYPE_CHECKING:
    from dfl_experiments.running.epochs import State

log = logging.getLogger(__name__)

CHECKPOINT_FORMAT = 3
DIGEST_LENGTH = 64  # hexadecimal digits of SHA-256
KEYS = {"format", "science", "epoch", "batch", "net", "method", "optimizers", "random", "training", "threads"}


def taken(learner: Learner, science: str, state: "State") -> dict[str, Any]:
    """Weights, buffers, every B, both optimizers, all random states, and where the training is.

    science: the digest of what the run computes. The order of the data needs no state: it is a function of the seed,
    the epoch and the batch.
    """
    name, keys, *rest = np.random.get_state()
    rows = None if state.rows is None else state.rows.cpu().clone()
    return {
        "format": CHECKPOINT_FORMAT,
        "science": science,
        "epoch": state.epoch,
        "batch": 0 if rows is None else len(rows),
        "net": learner.net.state_dict(),
        "method": learner.method.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in learner.optimizers],
        "training": {key: value for key, value in vars(state).items() if key != "epoch"} | {"rows": rows},
        "threads": torch.get_num_threads(),
        "random": {
            "python": random.getstate(),
            "numpy": (name, np.asarray(keys).tolist(), *rest),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        },
    }


def restore(learner: Learner, state: dict[str, Any]) -> None:
    """Put the learner and all random numbers where the state was taken. Learning rates are left to the schedule."""
    learner.net.load_state_dict(state["net"])
    learner.method.load_state_dict(state["method"])
    for optimizer, saved in zip(learner.optimizers, state["optimizers"], strict=True):
        # what belongs to the device, not to the run: a learning rate that a captured step reads, and its flag
        own = [{key: group[key] for key in ("lr", "capturable") if key in group} for group in optimizer.param_groups]
        optimizer.load_state_dict(saved)
        for group, values in zip(optimizer.param_groups, own, strict=True):
            for key, value in values.items():
                group[key] = value
    states = state["random"]
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_initialized() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def save(run_dir: Path, state: dict[str, Any]) -> None:
    """Write the state to `last.pt`, keeping the one before as `previous.pt`. Raises OSError where that fails."""
    new = run_dir / f".{LAST}.new"
    try:
        with new.open("w+b") as file:
            torch.save(state, file)
            file.seek(0)
            file.write(hashlib.file_digest(file, "sha256").hexdigest().encode())
            synced(file)
        if (run_dir / LAST).exists():
            (run_dir / LAST).replace(run_dir / PREVIOUS)
        new.replace(run_dir / LAST)
        fsync_folder(run_dir)
    except RuntimeError as error:  # torch.save's word for a write that failed
        raise OSError(f"{run_dir / LAST}: cannot be written ({reason(error)})") from error
    finally:
        new.unlink(missing_ok=True)


def discard(run_dir: Path, *names: str) -> None:
    """Remove checkpoints; all of them unless named."""
    for name in names or (LAST, PREVIOUS):
        (run_dir / name).unlink(missing_ok=True)


def discard_spent(run_dir: Path, config: Mapping[str, Any]) -> None:
    """Remove the checkpoints that a run with this configuration has no use for once it has ended."""
    keeps = (config.get("checkpoint") or {}).get("keep", True)
    discard(run_dir, *([PREVIOUS] if keeps else [LAST, PREVIOUS]))


def read(path: Path, science: str | None = None) -> dict[str, Any]:
    """The state of one file; nothing in it is executed.

    science: of the run that is to go on from it, whose tables must be as it left them. Raises `UserError` if the file
    or a table is damaged or of another run.
    """
    with opened(path) as file:
        length = max(os.fstat(file.fileno()).st_size - DIGEST_LENGTH, 0)
        file.seek(length)
        if sha256_of(path, length).hexdigest().encode() != file.read():
            raise UserError(f"{path}: is damaged, or of an earlier version")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or foreign file makes the unpickler say
        raise UserError(f"{path}: cannot be read ({reason(error)})") from error
    if not isinstance(state, dict) or not set(state) >= KEYS or not isinstance(state["threads"], int):
        raise UserError(f"{path}: is no checkpoint of a run")
    if state["format"] != CHECKPOINT_FORMAT:
        raise UserError(f"{path}: has format {state['format']}, this version reads {CHECKPOINT_FORMAT}")
    if science is not None and state["science"] != science:
        raise UserError(f"{path}: belongs to a run with another configuration ({state['science']}, not {science})")
    for name, digest in state["training"]["digests"].items() if science is not None else ():
        table, length = path.with_name(f"{name}.csv"), state["training"]["lengths"][name]
        if not table.exists() or sha256_of(table, length).hexdigest() != digest:
            raise UserError(f"{table}: missing, or not as it was at the checkpoint {path.name}")
    return state


def load(run_dir: Path, science: str | None = None) -> dict[str, Any]:
    """The state of `last.pt`, or with a warning of `previous.pt` where that is missing or damaged.

    Raises `UserError`, naming both files and what to do, where neither serves.
    """
    problems = []
    for name in (LAST, PREVIOUS):
        try:
            found = read(run_dir / name, science)
        except FileNotFoundError:
            problems.append(f"{run_dir / name}: missing")
        except UserError as error:
            problems.append(str(error))
        else:
            if problems:
                log.warning("%s; going on from %s", problems[0], name)
            return found
    raise UserError(f"{'; '.join(problems)}; remove {LAST} and {PREVIOUS} to start the run anew")
