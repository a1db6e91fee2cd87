"""KP: B learns by the gradients of W, so that the two come to agree (Kolen and Pollack, 1994; Akrout et al., 2019)."""

from typing import Any

import torch
from torch import Tensor

from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.losses import OutputLoss
from dfl_experiments.methods.feedback_alignment import FeedbackAlignment
from dfl_experiments.ranges import NonNegative


class KolenPollack(FeedbackAlignment):
    """With the B that sent the signals: W ← (1 - ηλ) W - η g, B ← (1 - ηλ) B - η g (Akrout et al., Eqs. 16-17).

    B has an optimizer of its own, of W's kind and hyper-parameters, which is given W's gradient: where they start alike
    they stay so, and without weight decay their difference stays. `decay`: λ, decoupled from the optimizer's kind, on W
    and B of all layers but the first: it shrinks the difference by exactly 1 - ηλ a step.
    """

    sends_first = True

    def __init__(self, net: BlockNet, num_classes: int, loss: OutputLoss, decay: NonNegative, **options: Any) -> None:
        super().__init__(net, num_classes, loss, **options)
        self.decay = decay
        self.feedback.requires_grad_(True)

    @torch.no_grad()
    def follow(self, lr: float | Tensor) -> None:
        """Give every B its W's gradient, and let both decay. lr: η."""
        for layer, feedback in zip(self.layers, self.feedback, strict=True):
            feedback.grad = layer.weight.grad
        if self.decay:
            for weight in {*self.feedback, *(layer.weight for layer in self.layers)}:  # one that two layers share, once
                weight.mul_(1 - lr * self.decay)
