"""Write and read the checkpoint `last.pt`: all values that are needed to continue a run bit for bit.

A reader never sees an incomplete file. The last 64 bytes are the SHA-256 of all bytes before them, because `torch.load`
verifies no checksum.
"""

import hashlib
import logging
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dfl_experiments.configuration.composition import config_digest
from dfl_experiments.engine.learner import Learner
from dfl_experiments.errors import UserError, reason
from dfl_experiments.running.run_directory import LAST, PREVIOUS, fsync_folder, synced
from dfl_experiments.seal import opened, sha256_of

if TYPE_CHECKING:
    from dfl_experiments.running.epochs import State

log = logging.getLogger(__name__)

CHECKPOINT_FORMAT = 3
DIGEST_LENGTH = 64  # hexadecimal digits of SHA-256


def snapshot(learner: Learner, own_digest: str, state: "State") -> dict[str, Any]:
    """Return weights, buffers, every B, both optimizers, all random states, and the progress of training.

    The order of the data is not saved, because it depends only on the seed, the epoch and the batch.

    own_digest: digest of the run's configuration.
    """
    name, keys, *rest = np.random.get_state()
    rows = None if state.rows is None else state.rows.cpu().clone()
    training = {key: value for key, value in vars(state).items() if key != "epoch"}
    return {
        "format": CHECKPOINT_FORMAT,
        "science": own_digest,
        "epoch": state.epoch,
        "batch": 0 if rows is None else len(rows),
        "net": learner.net.state_dict(),
        "method": learner.method.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in learner.optimizers],
        "training": training | {"rows": rows},
        "threads": torch.get_num_threads(),
        "random": {
            "python": random.getstate(),
            "numpy": (name, np.asarray(keys).tolist(), *rest),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        },
    }


def restore(learner: Learner, saved: dict[str, Any]) -> None:
    """Set the learner and all random number generators to a saved state. The schedule sets the learning rates later."""
    learner.net.load_state_dict(saved["net"])
    learner.method.load_state_dict(saved["method"])
    for optimizer, state in zip(learner.optimizers, saved["optimizers"], strict=True):
        restore_optimizer(optimizer, state)
    states = saved["random"]
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    count = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    if states["cuda"] and len(states["cuda"]) == count:
        torch.cuda.set_rng_state_all(states["cuda"])


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Set an optimizer to its saved state, but keep the options that depend on the device.

    These options are the flag `capturable` and the learning rate. On a GPU, the learning rate is a tensor.
    """
    before = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, earlier in zip(optimizer.param_groups, before, strict=True):
        for name in ("lr", "capturable"):
            if name in earlier:
                group[name] = earlier[name]


def save_checkpoint(run_dir: Path, saved: dict[str, Any]) -> None:
    """Write a snapshot to `last.pt`, and keep the earlier file as `previous.pt`. Raises OSError if writing fails."""
    new = run_dir / f".{LAST}.new"
    try:
        with new.open("w+b") as file:
            torch.save(saved, file)
            file.seek(0)
            file.write(hashlib.file_digest(file, "sha256").hexdigest().encode())
            synced(file)
        if (run_dir / LAST).exists():
            (run_dir / LAST).replace(run_dir / PREVIOUS)
        new.replace(run_dir / LAST)
        fsync_folder(run_dir)
    except RuntimeError as error:  # torch.save raises RuntimeError if writing fails
        raise OSError(f"{run_dir / LAST}: cannot be written ({reason(error)})") from error
    finally:
        new.unlink(missing_ok=True)


def discard_checkpoints(run_dir: Path, names: Sequence[str] = (LAST, PREVIOUS)) -> None:
    """Remove checkpoints."""
    for name in names:
        (run_dir / name).unlink(missing_ok=True)


def discard_spent(run_dir: Path, config: Mapping[str, Any]) -> None:
    """Remove the checkpoints that are not needed after the run has ended. config: the configuration of the run."""
    keeps = (config.get("checkpoint") or {}).get("keep", True)
    discard_checkpoints(run_dir, [PREVIOUS] if keeps else [LAST, PREVIOUS])


def read_checkpoint(path: Path, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the snapshot in one file. No code in the file is executed.

    config: the configuration to continue. If it is given, the snapshot must have its digest, and the run's CSV files
        must have the content that the snapshot recorded.
    Raises `UserError` if the file or a table is damaged or belongs to another run.
    """
    refuse_damaged(path)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler may raise anything on a damaged or foreign file
        raise UserError(f"{path}: cannot be read ({reason(error)})") from error
    if saved["format"] != CHECKPOINT_FORMAT:
        raise UserError(
            f"{path}: has format {saved['format']}, this version reads {CHECKPOINT_FORMAT}"
        )
    if config is None:
        return saved
    own_digest = config_digest(config)
    if saved["science"] != own_digest:
        digests = f"{saved['science']}, not {own_digest}"
        raise UserError(f"{path}: belongs to a run with another configuration ({digests})")
    training = saved["training"]
    for name, digest in training["digests"].items():
        table, length = path.with_name(f"{name}.csv"), training["lengths"][name]
        if not table.exists() or sha256_of(table, length).hexdigest() != digest:
            raise UserError(f"{table}: missing, or changed since the checkpoint {path.name}")
    return saved


def refuse_damaged(path: Path) -> None:
    """Raise `UserError` if a checkpoint does not end with the SHA-256 of its content."""
    with opened(path) as file:
        length = max(os.fstat(file.fileno()).st_size - DIGEST_LENGTH, 0)
        file.seek(length)
        if sha256_of(path, length).hexdigest().encode() != file.read():
            raise UserError(f"{path}: is damaged, or of an earlier version")


def load_checkpoint(run_dir: Path, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the snapshot in `last.pt`. If this file is unusable, return the snapshot in `previous.pt`.

    In the second case, a warning says why `last.pt` is unusable.

    config: see `read_checkpoint`. Raises `UserError` if neither file can be used.
    """
    problems = []
    for name in (LAST, PREVIOUS):
        try:
            saved = read_checkpoint(run_dir / name, config)
        except FileNotFoundError:
            problems.append(f"{run_dir / name}: missing")
        except UserError as error:
            problems.append(str(error))
        else:
            if problems:
                log.warning("%s; continuing from %s", problems[0], name)
            return saved
    raise UserError(f"{'; '.join(problems)}; remove {LAST} and {PREVIOUS} to start the run again")
