"""Output losses ℒ and their errors e = ∂ℒ/∂a_L, from which every feedback signal is computed."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F


def precise(values: Tensor) -> Tensor:
    """Return the values in float32 or higher precision.

    In bfloat16 the error of a confidently classified sample would be rounded to zero.
    """
    return values.to(torch.promote_types(values.dtype, torch.float32))


class OutputLoss(ABC):
    """A loss ℒ of logits and class labels, averaged over the batch."""

    @abstractmethod
    def value_and_error(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scalar ℒ and the error e = ∂ℒ/∂a_L. Both contain the factor 1/N of the average.

        logits: a_L, (N, K). The error has the same shape.
        target: labels, (N,).
        """


class CrossEntropy(OutputLoss):
    """The cross-entropy ℒ = -(1/N) Σ log softmax(a_L)[y*], with e = (softmax(a_L) - y*) / N.

    The components of e sum to zero, so the target's component is computed as minus the sum of the others. If it
    were computed as p - 1, it would be 0 when the target's probability p rounds to 1 in float32, and the signal would
    have a wrong direction.
    """

    def value_and_error(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        log_y = F.log_softmax(logits.detach(), dim=1)
        error = log_y.exp()
        column = target[:, None]
        error.scatter_(1, column, 0.0)
        others = error.sum(1, keepdim=True)
        error.scatter_(1, column, -others)
        loss = F.nll_loss(log_y, target)
        return loss, error.div_(len(target))


class SquaredError(OutputLoss):
    """The squared error ℒ = (1/2N) Σ ‖a_L - y*‖² with y* one-hot, and e = (a_L - y*) / N."""

    def value_and_error(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        one_hot = F.one_hot(target, logits.shape[1])
        difference = logits.detach() - one_hot
        loss = difference.square().sum() / (2 * len(target))
        return loss, difference / len(target)


LOSSES: dict[str, OutputLoss] = {"cross_entropy": CrossEntropy(), "squared_error": SquaredError()}
