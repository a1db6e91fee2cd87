"""DKP: direct feedback whose B learns like the weights above (Webster et al., 2021)."""

from typing import Any

import torch
from torch import Tensor

from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.losses import OutputLoss
from dfl_experiments.engine.trace import Trace
from dfl_experiments.methods.direct import Direct
from dfl_experiments.ranges import NonNegative


class DirectKolenPollack(Direct):
    """δ_i = (B_{i+1} e) ⊙ f'(a_i), then B_{i+1} ← (1 - ηλ) B_{i+1} - η h_iᵀ e, by an optimizer of B's own.

    That is LTAS with the network's error in place of the local one; at h_{L-1} it is the Kolen-Pollack rule. `decay`:
    λ, decoupled from the optimizer's kind; the optimizer's own weight_decay acts on B as on W.
    """

    sends_first = True

    def __init__(self, net: BlockNet, num_classes: int, loss: OutputLoss, decay: NonNegative, **options: Any) -> None:
        super().__init__(net, num_classes, loss, **options)
        self.decay = decay
        self.feedback.requires_grad_(True)

    def adapt(self, trace: Trace, error: Tensor, target: Tensor) -> None:
        """∂/∂B of ⟨e, y_i⟩, the gradient h_i eᵀ of a linear local module, left in `.grad`."""
        self.learn(trace, lambda y: error.to(y.dtype))

    @torch.no_grad()
    def follow(self, lr: float | Tensor) -> None:
        """The decay, after the signals are sent. lr: η."""
        if self.decay:
            for module in self.local_modules.values():
                module.weight.mul_(1 - lr * self.decay)
