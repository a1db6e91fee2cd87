"""Output losses as pairs of a value and the error e = ∂ℒ/∂a_L that every feedback signal is made from."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F


def precise(values: Tensor) -> Tensor:
    """The values in no less than float32: of a confident sample's error bfloat16 would leave nothing."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


class OutputLoss(ABC):
    """A loss of the logits a_L (N, K) and class labels (N,), meaned over the batch."""

    @abstractmethod
    def value_and_error(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """ℒ, a scalar, and e = ∂ℒ/∂a_L, (N, K), which carries the mean's factor 1/N."""


class CrossEntropy(OutputLoss):
    """ℒ = -(1/N) Σ log softmax(a_L)[y*],  e = (softmax(a_L) - y*) / N.

    e's components sum to zero, and its target's is formed as minus the sum of the others: once a probability rounds to
    1 in float32, p - 1 would be exactly 0, and the sample's signal would point elsewhere.
    """

    def value_and_error(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        log_y = F.log_softmax(logits.detach(), dim=1)
        error = log_y.exp()
        error.scatter_(1, target[:, None], 0.0)
        error.scatter_(1, target[:, None], -error.sum(1, keepdim=True))
        return F.nll_loss(log_y, target), error.div_(len(target))


class SquaredError(OutputLoss):
    """ℒ = (1/2N) Σ ‖a_L - y*‖² with y* one-hot,  e = (a_L - y*) / N."""

    def value_and_error(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        difference = logits.detach() - F.one_hot(target, logits.shape[1])
        return difference.square().sum() / (2 * len(target)), difference / len(target)


LOSSES: dict[str, OutputLoss] = {"cross_entropy": CrossEntropy(), "squared_error": SquaredError()}
