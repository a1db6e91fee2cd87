"""`last.pt`: everything needed to go on, written so that a reader never sees half of it."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dfl_experiments.learning import Learner
from dfl_experiments.results import Accuracies, replace_atomically


def state_of(learner: Learner, epoch: int, iteration: int, accuracies: Accuracies) -> dict[str, Any]:
    """Weights, buffers, every B, both optimizers, all random states and the records, after `epoch` epochs.

    The order of the data needs no state: it is a function of the seed and the epoch alone.
    """
    name, keys, *rest = np.random.get_state()
    return {
        "epoch": epoch,
        "iteration": iteration,
        "net": learner.net.state_dict(),
        "method": learner.method.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in learner.optimizers],
        "accuracies": accuracies.epochs,
        "random": {
            "python": random.getstate(),
            "numpy": (name, np.asarray(keys).tolist(), *rest),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        },
    }


def save(run_dir: Path, state: dict[str, Any]) -> None:
    """Write the state to `last.pt`, atomically."""
    replace_atomically(run_dir / "last.pt", lambda path: torch.save(state, path))


def load(run_dir: Path) -> dict[str, Any]:
    """The state of `last.pt`; nothing in the file is executed."""
    return torch.load(run_dir / "last.pt", map_location="cpu", weights_only=True)
