"""FA: feedback alignment, through a random fixed B (Lillicrap et al., 2016)."""

import torch
from torch import Tensor, nn

from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.losses import OutputLoss
from dfl_experiments.methods.sequential import Sequential
from dfl_experiments.ranges import SequentialInit


class FeedbackAlignment(Sequential):
    """Feedback alignment: δ_i = (δ_{i+1} B_{i+1}ᵀ) ⊙ f'(a_i), with a fixed B at every weight layer.

    init: initial B. "default": drawn from the initial distribution of W. "kaiming" or "xavier": uniform, as in Frenkel
        et al. and in BioTorch. "copy": the initial W, as in Nøkland's published code.
    """

    def __init__(
        self, net: BlockNet, num_classes: int, loss: OutputLoss, init: SequentialInit
    ) -> None:
        super().__init__(net, num_classes, loss)
        self.feedback = nn.ParameterList(drawn(layer.weight, init) for layer in self.layers)
        self.feedback.requires_grad_(False)

    def feedback_weight(self, k: int) -> Tensor:
        """Return the B of layers[k]."""
        return self.feedback[k]


def drawn(weight: Tensor, init: SequentialInit) -> Tensor:
    """Return a B in the shape of W. weight: W. init: see `FeedbackAlignment`."""
    start = torch.empty_like(weight, requires_grad=False)
    if init == "copy":
        return start.copy_(weight.detach())
    if init == "xavier":
        return nn.init.xavier_uniform_(start)
    return nn.init.kaiming_uniform_(start, a=5**0.5 if init == "default" else 0.0)
