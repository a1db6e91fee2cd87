"""Direct feedback through the first rows of one shared matrix (Launay et al., 2019)."""

from typing import Any, Literal

import torch

from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.losses import OutputLoss
from dfl_experiments.methods.direct import Direct


class SharedDirectFeedback(Direct):
    """DFA with a shared matrix: δ_i = (B_{i+1} e) ⊙ f'(a_i). B_{i+1} is c_i times the first d_i rows of S.

    S has shape (d_max, K), where d_max is the largest d_i. For a convolutional B, d_i is C·k².

    scale: distribution of S, and c_i.
        "layerwise", as first published: S ~ N(0, 1/(d_max K)) and c_i = √(d_max/d_i). Then the first rows of
            B_{i+1} √d_i are equal in all layers.
        "global", as in the authors' code of 2020: S ~ U[-1, 1)/√d_max and c_i = 1.
    options: see `Direct`.
    """

    def __init__(
        self,
        net: BlockNet,
        num_classes: int,
        loss: OutputLoss,
        scale: Literal["layerwise", "global"],
        **options: Any,
    ) -> None:
        super().__init__(net, num_classes, loss, **options)
        weights = [module.weight.data for module in self.local_modules.values()]
        rows = max((weight[0].numel() for weight in weights), default=0)
        shared = torch.empty(rows, num_classes).to(next(net.parameters()))
        if scale == "layerwise":
            shared.normal_(0, (max(rows, 1) * num_classes) ** -0.5)
        else:
            shared.uniform_(-1, 1).mul_(max(rows, 1) ** -0.5)
        for weight in weights:
            own = weight[0].numel()
            factor = (rows / own) ** 0.5 if scale == "layerwise" else 1.0
            weight.copy_((shared[:own] * factor).T.reshape(weight.shape))
