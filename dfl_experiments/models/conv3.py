"""Conv3 and its variants with normalisation: three convolutions, then three linear layers (Crafton et al., 2019)."""

import math
from typing import Annotated

from pydantic import Field
from torch import nn

from dfl_experiments.engine.blocknet import Block, BlockNet
from dfl_experiments.models.fc import ACTIVATIONS, dense_blocks
from dfl_experiments.ranges import Activation, Downsampling, Passes, Width, Widths


def normalisation(channels: int, updates: int) -> nn.BatchNorm2d:
    """Return a batch normalisation that updates its running statistics n times in every forward pass.

    One update is r ← (1-m) r + m s, with running statistics r, batch statistics s and momentum m = 0.1. The n updates
    use the same s. So they equal one update with momentum 1 - (1-m)ⁿ.

    updates: n.
    """
    return nn.BatchNorm2d(channels, momentum=1 - 0.9**updates)


def conv3(
    input_shape: tuple[int, int, int],
    num_classes: int,
    channels: Widths,
    widths: Annotated[list[Width], Field(max_length=1000)],
    downsampling: Downsampling = "max_pool",
    batch_norm: bool = False,
    batch_norm_updates: Passes = 1,
    layer_norm: bool = False,
    activation: Activation = "relu",
) -> BlockNet:
    """Return a net of convolutional blocks, followed by linear layers.

    A convolutional block is: convolution 5×5 with padding 2, normalisation if it is chosen, activation, max-pooling 3×3
    with stride 2 and padding 1.

    input_shape: (C, H, W). num_classes: K.
    channels: output channels of each convolution.
    widths: widths of the hidden linear layers.
    downsampling: "max_pool", as in the published code; "stride" for stride 2 without pooling, as in the paper's text.
    batch_norm_updates: see `normalisation`.
    layer_norm: normalise over (C, H, W) of each sample.
    """
    planes, height, width = input_shape
    pooled = downsampling == "max_pool"
    stride = 1 if pooled else 2
    blocks: list[Block] = []
    for out in channels:
        layers: list[nn.Module] = [nn.Conv2d(planes, out, 5, stride, padding=2)]
        if batch_norm:
            layers.append(normalisation(out, batch_norm_updates))
        if layer_norm:
            layers.append(nn.GroupNorm(1, out))
        after: list[nn.Module] = [ACTIVATIONS[activation]()]
        if pooled:
            after.append(nn.MaxPool2d(3, stride=2, padding=1))
        if len(blocks) == len(channels) - 1:
            after.append(nn.Flatten())
        blocks.append(Block(nn.Sequential(*layers), nn.Sequential(*after)))
        planes = out
        height = math.ceil(height / 2)
        width = math.ceil(width / 2)
    dense = [planes * height * width, *widths]
    blocks += dense_blocks(dense, activation)
    return BlockNet(*blocks, head=nn.Linear(dense[-1], num_classes), input_shape=input_shape)
