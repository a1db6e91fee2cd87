"""BDFA: direct feedback through a B whose entries are ±c (Han and Yoo, 2019)."""

from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
from torch import nn

from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.losses import OutputLoss
from dfl_experiments.methods.direct import Direct


class BinaryDirectFeedback(Direct):
    """Binary DFA: δ_i = (B_{i+1} e) ⊙ f'(a_i), with B = c_i sign(B°) and sign(0) = +1.

    B° is the initial B of DFA. c_i is the root mean square of B°, so B has the norm of B°. The paper's c_i is unknown.

    convolutions: signal of the convolutions. "direct": all hidden layers receive B e. "backprop": only the hidden dense
        layers receive B e, as in the paper's abstract. The convolutions learn by backpropagation from the lowest dense
        layer. In a net without hidden dense layers, "backprop" equals "direct".
    options: see `Direct`.
    """

    def __init__(
        self,
        net: BlockNet,
        num_classes: int,
        loss: OutputLoss,
        convolutions: Literal["backprop", "direct"],
        **options: Any,
    ) -> None:
        self.convolutions = convolutions
        super().__init__(net, num_classes, loss, **options)
        for module in self.local_modules.values():
            weight = module.weight.data
            size = weight.square().mean().sqrt()
            weight.copy_(torch.where(weight < 0, -size, size))

    def boundaries(self, net: BlockNet, shapes: Sequence[torch.Size]) -> Collection[int]:
        """Return the hidden layers that receive B e: the dense layers, or all layers."""
        every = super().boundaries(net, shapes)
        dense = [i for i in every if are_dense(net.weight_layers(i - 1))]
        return dense if self.convolutions == "backprop" and dense else every


def are_dense(layers: Sequence[nn.Module]) -> bool:
    """Return whether all layers are linear layers."""
    return all(isinstance(layer, nn.Linear) for layer in layers)
