"""Backpropagation, and its restriction to the two layers at the top."""

from dfl_experiments.blocknet import BlockNet
from dfl_experiments.losses import OutputLoss
from dfl_experiments.methods.base import Method


class Backprop(Method):
    """δ_i = (W_{i+1}ᵀ δ_{i+1}) ⊙ f'(a_i) for every i (Eqs. 6-7)."""


class Shallow(Method):
    """δ_{L-1} = (W_Lᵀ e) ⊙ f'(a_{L-1}); every block below stays as it was initialised."""

    def __init__(self, net: BlockNet, num_classes: int, loss: OutputLoss) -> None:
        super().__init__(net, num_classes, loss)
        self.frozen = self.depth - 2
        self.cuts = frozenset({self.frozen} - {0})
