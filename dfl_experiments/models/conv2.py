"""Two convolutions and two linear layers, the network of the published code of direct Kolen-Pollack."""

from typing import Annotated

from pydantic import Field
from torch import nn

from dfl_experiments.engine.blocknet import Block, BlockNet
from dfl_experiments.models.fc import ACTIVATIONS
from dfl_experiments.ranges import Activation, Width


def conv2(
    input_shape: tuple[int, int, int],
    num_classes: int,
    channels: Annotated[list[Width], Field(min_length=2, max_length=2)],
    width: Width,
    activation: Activation = "relu",
) -> BlockNet:
    """Return the net convolution – convolution – max-pooling 2×2 – linear layer – linear layer.

    The convolutions are 3×3 without padding, followed by batch normalisation and the activation. The pooling comes
    after the second activation, and belongs to the third block. So the error signal of the second block reaches all
    positions of its plane, as in the published code.

    input_shape: (C, H, W). num_classes: K.
    channels: output channels of the two convolutions.
    width: width of the hidden linear layer.

    Source: github.com/webstah/dkp-gist, networks/conv.py.
    """
    planes, height, columns = input_shape
    first, second = channels
    function = ACTIVATIONS[activation]
    # a convolution removes two rows and two columns, and the pooling halves what is left
    positions = ((height - 4) // 2) * ((columns - 4) // 2)
    dense = nn.Linear(second * positions, width)
    return BlockNet(
        Block(nn.Sequential(nn.Conv2d(planes, first, 3), nn.BatchNorm2d(first)), function()),
        Block(nn.Sequential(nn.Conv2d(first, second, 3), nn.BatchNorm2d(second)), function()),
        Block(nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), dense), function()),
        head=nn.Linear(width, num_classes),
        input_shape=input_shape,
    )
