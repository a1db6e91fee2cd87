"""Fully connected network."""

import math
from itertools import pairwise
from typing import Literal

from torch import nn

from dfl_experiments.engine.blocknet import Block, BlockNet
from dfl_experiments.ranges import Widths

Activation = Literal["relu", "tanh", "identity"]
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "identity": nn.Identity}


def dense_blocks(widths: list[int], activation: type[nn.Module] = nn.ReLU) -> list[Block]:
    """Blocks [a_i = W_i h_{i-1} + b_i, h_i = f(a_i)] for widths [d_0, d_1, …]."""
    return [Block(nn.Linear(d, width), activation()) for d, width in pairwise(widths)]


def fc(input_shape: tuple[int, ...], num_classes: int, widths: Widths, activation: Activation) -> BlockNet:
    """d_0-widths-K (paper: 784-1024-1024-10 and 3072-4096-4096-4096-K, ReLU). "identity" makes it linear."""
    first, *rest = dense_blocks([math.prod(input_shape), *widths], ACTIVATIONS[activation])
    first.pre = nn.Sequential(nn.Flatten(), first.pre)
    return BlockNet(first, *rest, head=nn.Linear(widths[-1], num_classes), input_shape=input_shape)
