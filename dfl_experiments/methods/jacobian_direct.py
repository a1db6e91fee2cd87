"""ADFA: direct feedback in which B follows the product of the weights above (Baldi et al., 2018, in Yang's version)."""

from typing import Any

import torch
from torch import Tensor

from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.losses import OutputLoss
from dfl_experiments.engine.trace import Trace
from dfl_experiments.errors import UserError
from dfl_experiments.methods.direct import Direct, Products
from dfl_experiments.ranges import Probability


class ProductDirectFeedback(Direct):
    """Adaptive DFA: B_{i+1} ← B_{i+1} + ρ (W_{i+1}ᵀ … W_Lᵀ - B_{i+1}), then δ_i = (B_{i+1} e) ⊙ f'(a_i).

    The rule copies the forward weights, so it is useful as a control, but not as a rule for hardware.

    rate: ρ in [0, 1]. ρ = 0 gives DFA. In a linear net, ρ = 1 gives backpropagation.
    options: see `Direct`.
    Raises `UserError` if the net is not fully connected.
    """

    def __init__(
        self, net: BlockNet, num_classes: int, loss: OutputLoss, rate: Probability, **options: Any
    ) -> None:
        if not Products(net, net.output_shapes(), num_classes).dense:
            raise UserError(
                "method: B of ADFA follows the product of the weights, so the net must be fully connected"
            )
        super().__init__(net, num_classes, loss, **options)
        self.rate = rate

    def adapt(self, trace: Trace, error: Tensor, target: Tensor) -> None:
        """Move every B towards the product of the current weights."""
        with torch.autocast(error.device.type, enabled=False):
            for i, module in self.local_modules.items():
                product = self.products.above(i)
                assert product is not None, "the net is dense"
                module.weight.data.lerp_(product, self.rate)
