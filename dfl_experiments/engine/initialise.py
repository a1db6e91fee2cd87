"""Initialise W: PyTorch's default, Xavier, Kaiming or orthogonal."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dfl_experiments.engine.transpose import is_weight_layer
from dfl_experiments.ranges import WeightInit


def kaiming(weight: Tensor) -> None:
    """Draw W from N(0, 2/fan_in), so that activations keep their size through ReLU layers (He et al., 2015)."""
    nn.init.kaiming_normal_(weight, nonlinearity="relu")


DRAWS: dict[WeightInit, Callable[[Tensor], object]] = {
    "xavier": nn.init.xavier_uniform_,
    "kaiming": kaiming,
    "orthogonal": nn.init.orthogonal_,
}


@torch.no_grad()
def initialise(net: nn.Module, init: WeightInit) -> None:
    """Draw new values for every W of a net, and set the biases to zero; "default" changes nothing.

    Only weight layers change. Normalisation layers and embeddings keep their values.
    """
    if init == "default":
        return
    for module in net.modules():
        if is_weight_layer(module):
            DRAWS[init](module.weight)
            if module.bias is not None:
                module.bias.zero_()
