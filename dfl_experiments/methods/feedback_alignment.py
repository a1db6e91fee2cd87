"""FA: feedback alignment, through a B that is drawn once and stays (Lillicrap et al., 2016)."""

import torch
from torch import Tensor, nn

from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.losses import OutputLoss
from dfl_experiments.methods.sequential import Sequential
from dfl_experiments.ranges import SequentialInit


class FeedbackAlignment(Sequential):
    """δ_i = (δ_{i+1} B_{i+1}ᵀ) ⊙ f'(a_i) with a fixed B at every weight layer.

    `init`: "default", from the distribution that W starts from, fresh; "kaiming" or "xavier", uniform, as Frenkel et
    al. and BioTorch draw it; "copy": B starts as W, as in Nøkland's published code.
    """

    def __init__(self, net: BlockNet, num_classes: int, loss: OutputLoss, init: SequentialInit) -> None:
        super().__init__(net, num_classes, loss)
        self.feedback = nn.ParameterList(drawn(layer.weight, init) for layer in self.layers)
        self.feedback.requires_grad_(False)

    def feedback_weight(self, k: int) -> Tensor:
        """The B of layers[k]."""
        return self.feedback[k]


def drawn(weight: Tensor, init: SequentialInit) -> Tensor:
    """A B of W's shape, drawn as `init` says."""
    start = torch.empty_like(weight, requires_grad=False)
    if init == "copy":
        return start.copy_(weight.detach())
    if init == "xavier":
        return nn.init.xavier_uniform_(start)
    return nn.init.kaiming_uniform_(start, a=5**0.5 if init == "default" else 0.0)
