"""DKP: direct feedback in which B learns by the Kolen-Pollack rule (Webster et al., 2021)."""

from typing import Any

import torch
from torch import Tensor

from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.losses import OutputLoss
from dfl_experiments.engine.trace import Trace
from dfl_experiments.methods.direct import Direct
from dfl_experiments.ranges import NonNegative


class DirectKolenPollack(Direct):
    """Direct Kolen-Pollack: δ_i = (B_{i+1} e) ⊙ f'(a_i), then B_{i+1} ← (1 - ηλ) B_{i+1} - η h_i eᵀ.

    The rule equals LTAS with e in place of the local error. At h_{L-1} it equals the Kolen-Pollack rule.

    decay: λ ≥ 0, independent of the optimizer. The optimizer's own weight_decay acts on B as on W.
    options: see `Direct`.
    """

    sends_first = True
    follows_rate_of_b = True

    def __init__(
        self, net: BlockNet, num_classes: int, loss: OutputLoss, decay: NonNegative, **options: Any
    ) -> None:
        super().__init__(net, num_classes, loss, **options)
        self.decay = decay
        self.feedback.requires_grad_(True)

    def adapt(self, trace: Trace, error: Tensor, target: Tensor) -> None:
        """Set `.grad` of every B to h_i eᵀ, the gradient of ⟨e, y_i⟩."""
        self.learn(trace, lambda y: error.to(y.dtype))

    @torch.no_grad()
    def follow(self, lr: float | Tensor) -> None:
        """Multiply every B by 1 - ηλ. lr: η, the rate of B."""
        if self.decay:
            for module in self.local_modules.values():
                module.weight.mul_(1 - lr * self.decay)
