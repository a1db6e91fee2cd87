"""BDFA: direct feedback through a B of one magnitude and two signs (Han and Yoo, 2019)."""

from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
from torch import nn

from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.losses import OutputLoss
from dfl_experiments.methods.direct import Direct


class BinaryDirectFeedback(Direct):
    """δ_i = (B_{i+1} e) ⊙ f'(a_i), with B = c_i sign(B°) and sign(0) = +1.

    B°: the B that DFA would have started with, whose root mean square is c_i, so that the norm of B is kept; the
    paper's c_i could not be read. `convolutions`: "backprop", as its abstract has it: only dense layers receive B e,
    and convolutions learn by backpropagation from the lowest of them; or "direct", like the others. Of a net without
    hidden dense layers, all blocks receive B e.
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
        """The hidden layers that are dense, or all of them."""
        every = super().boundaries(net, shapes)
        layers = {i: net.weight_layers(i - 1) for i in every}
        dense = [i for i in every if all(isinstance(layer, nn.Linear) for layer in layers[i])]
        return dense if self.convolutions == "backprop" and dense else every
