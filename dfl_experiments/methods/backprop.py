"""Backpropagation, and its restriction to the two highest layers."""

from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.losses import OutputLoss
from dfl_experiments.engine.method import Method


class Backprop(Method):
    """Backpropagation (BP): δ_i = (W_{i+1}ᵀ δ_{i+1}) ⊙ f'(a_i) for every i (Eqs. 6-7)."""

    def __init__(self, net: BlockNet, num_classes: int, loss: OutputLoss) -> None:
        super().__init__(net, num_classes, loss)
        self.exact_from = 1


class Shallow(Method):
    """Shallow: δ_{L-1} = (W_Lᵀ e) ⊙ f'(a_{L-1}); all blocks below keep their initial weights."""

    def __init__(self, net: BlockNet, num_classes: int, loss: OutputLoss) -> None:
        super().__init__(net, num_classes, loss)
        self.frozen = self.depth - 2
        self.exact_from = self.depth - 1
