"""Fully connected networks."""

import math
from itertools import pairwise

from torch import nn

from dfl_experiments.engine.blocknet import Block, BlockNet
from dfl_experiments.ranges import Activation, Widths

ACTIVATIONS: dict[Activation, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "identity": nn.Identity,
}


def dense_blocks(
    widths: list[int], activation: Activation = "relu", layer_norm: bool = False
) -> list[Block]:
    """Return blocks a_i = W_i h_{i-1} + b_i, h_i = f(a_i); with layer_norm, a_i = LN(W_i h_{i-1} + b_i).

    widths: [d_0, d_1, …].
    """
    blocks = []
    for d, width in pairwise(widths):
        layer: nn.Module = nn.Linear(d, width)
        pre = nn.Sequential(layer, nn.LayerNorm(width)) if layer_norm else layer
        blocks.append(Block(pre, ACTIVATIONS[activation]()))
    return blocks


def fc(
    input_shape: tuple[int, ...],
    num_classes: int,
    widths: Widths,
    activation: Activation,
    layer_norm: bool = False,
) -> BlockNet:
    """Return a fully connected network with layers of d_0, *widths and K units.

    The paper uses 784-1024-1024-10 and 3072-4096-4096-4096-K units with ReLU.

    input_shape: shape of one sample, which is flattened to d_0.
    num_classes: K.
    activation: f; "identity" makes the network linear.
    """
    first, *rest = dense_blocks([math.prod(input_shape), *widths], activation, layer_norm)
    first.pre = nn.Sequential(nn.Flatten(), first.pre)
    return BlockNet(first, *rest, head=nn.Linear(widths[-1], num_classes), input_shape=input_shape)
