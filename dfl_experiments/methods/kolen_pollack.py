"""KP: B learns with W's gradients, and decay brings B and W together (Kolen and Pollack, 1994; Akrout et al., 2019)."""

from typing import Any

import torch
from torch import Tensor

from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.losses import OutputLoss
from dfl_experiments.methods.feedback_alignment import FeedbackAlignment
from dfl_experiments.ranges import NonNegative


class KolenPollack(FeedbackAlignment):
    """Kolen-Pollack: W ← (1 - ηλ) W - η g and B ← (1 - ηλ) B - η g, with W's gradient g (Akrout et al., Eqs. 16-17).

    B receives W's gradient, and its optimizer has the same hyper-parameters. So a B that equals W stays equal
    to W, and without decay B - W is constant.

    decay: λ ≥ 0, independent of the optimizer. It acts on W and B of all layers except the first and the frozen ones,
        and multiplies B - W by exactly 1 - ηλ in every step.
    options: see `FeedbackAlignment`.
    """

    sends_first = True

    def __init__(
        self, net: BlockNet, num_classes: int, loss: OutputLoss, decay: NonNegative, **options: Any
    ) -> None:
        super().__init__(net, num_classes, loss, **options)
        self.decay = decay
        self.feedback.requires_grad_(True)

    @torch.no_grad()
    def follow(self, lr: float | Tensor) -> None:
        """Set `.grad` of every B to the gradient of its W, and multiply both weights by 1 - ηλ. lr: η."""
        for layer, feedback in zip(self.layers, self.feedback, strict=True):
            feedback.grad = layer.weight.grad
        if self.decay:
            # a set, so that a weight shared by two layers decays only once
            decaying: set[Tensor] = set()
            for layer, feedback in zip(self.layers, self.feedback, strict=True):
                if layer.weight.requires_grad:
                    decaying.update((layer.weight, feedback))
            for weight in decaying:
                weight.mul_(1 - lr * self.decay)
