"""Learning-rate schedules. A schedule returns the factor by which the optimizers' learning rates are multiplied."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from dfl_experiments.errors import UserError
from dfl_experiments.ranges import Fraction, NonNegative, Probability

ROUNDING = 1e-9  # epochs
Decay = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """The factor of the learning rate over a run: η_t = η · factor(t) · min(1, (t + Δ) / warmup).

    t: number of completed epochs. Δ: number of epochs between two changes of the rate.
    """

    warmup: NonNegative = 0.0
    """Number of epochs in which the rate rises linearly to its full value; 0: no warm-up."""
    per: Literal["epoch", "iteration"] = "epoch"
    """The rate changes at the start of each epoch (Δ = 1), or at each iteration (Δ = 1 / batches)."""

    def __post_init__(self) -> None:
        if self.per == "epoch" and 0 < self.warmup <= 1:
            raise UserError(
                f"schedule.warmup={self.warmup:g}: one epoch or less has no effect with per=epoch; "
                "set schedule.per=iteration"
            )

    def factors(self, epoch: int, epochs: int, batches: int) -> list[float]:
        """Return the factor for each batch.

        epoch: number of the epoch, from 1.
        epochs: number of epochs of the run.
        batches: number of batches per epoch.
        """
        changes = 1 if self.per == "epoch" else batches
        factors = []
        for index in range(changes):
            done = epoch - 1 + index / changes
            rise = min(1.0, (done + 1 / changes) / self.warmup) if self.warmup else 1.0
            factors.append(self._checked_factor(done, epochs) * rise)
        return factors * (batches // changes)

    def _checked_factor(self, done: float, epochs: int) -> float:
        """Return `factor`. Raises `UserError` if it is negative or not a finite number."""
        factor = self.factor(done, epochs)
        try:
            value = float(factor)
        except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor with several values
            value = math.nan
        if not 0 <= value < math.inf:
            raise UserError(
                f"the schedule {type(self).__name__} returns the factor {factor} for done={done:g}; must be a finite "
                "number of 0 or more"
            )
        return value

    @abstractmethod
    def factor(self, done: float, epochs: int) -> float:
        """Return the factor without the warm-up.

        done: t, the number of completed epochs, which may be a fraction.
        epochs: number of epochs of the run.
        """


@dataclass(frozen=True, kw_only=True)
class Step(Schedule):
    """Multiply the rate by `decay` at each milestone. Without milestones the rate is constant."""

    milestones: list[Fraction]
    """Points at which the rate falls, as fractions of all epochs."""
    decay: Decay
    """Factor at each milestone."""

    def factor(self, done: float, epochs: int) -> float:
        """Return decay^(number of milestones reached)."""
        # 0.28 · 25 is slightly above 7 in floating point
        reached = [done >= milestone * epochs - ROUNDING for milestone in self.milestones]
        return self.decay ** sum(reached)


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """Decrease the rate as half a cosine, from the end of the warm-up to the end of the run."""

    final: Probability = 0.0
    """Factor at the end of the run."""

    def factor(self, done: float, epochs: int) -> float:
        """Return final + (1 - final) · (1 + cos πp) / 2. p: completed part of the epochs after the warm-up."""
        p = max(0.0, done - self.warmup) / (epochs - self.warmup)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * p)) / 2


@dataclass(frozen=True, kw_only=True)
class Exponential(Schedule):
    """Multiply the rate by `decay` in every epoch after the warm-up."""

    decay: Decay
    """Factor per epoch."""

    def factor(self, done: float, epochs: int) -> float:
        """Return decay^(epochs since the warm-up)."""
        return self.decay ** max(0.0, done - self.warmup)
