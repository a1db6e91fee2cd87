"""MLP-Mixer (Tolstikhin et al., 2021): layers mix image patches along tokens, then along channels."""

import math
from typing import Literal

from torch import Tensor, nn

from dfl_experiments.engine.blocknet import Block, BlockNet
from dfl_experiments.ranges import Depth, Width

Cuts = Literal["simple", "full"]


class Patches(nn.Module):
    """The embedding of p × p patches, with zero padding: (N, planes, H, W) -> (N, ⌈H/p⌉ ⌈W/p⌉, C)."""

    def __init__(self, planes: int, height: int, width: int, patch: int, channels: int) -> None:
        super().__init__()
        rows = math.ceil(height / patch)
        columns = math.ceil(width / patch)
        self.tokens = rows * columns
        self.border = nn.ZeroPad2d((0, columns * patch - width, 0, rows * patch - height))
        self.embedding = nn.Conv2d(planes, channels, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        embedded = self.embedding(self.border(x))
        return embedded.flatten(2).mT.contiguous()


class Mixing(nn.Module):
    """The residual layer h + W_2 GELU(W_1 LN(h) + b_1) + b_2 on h of shape (N, T, C).

    The weights W_1 and W_2 mix the tokens if `along_tokens` is True. Otherwise they mix the channels.
    """

    def __init__(self, channels: int, mixed: int, width: int, along_tokens: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(mixed, width), nn.GELU(), nn.Linear(width, mixed))
        self.along_tokens = along_tokens

    def forward(self, h: Tensor) -> Tensor:
        normalised = self.norm(h)
        if self.along_tokens:
            return h + self.mlp(normalised.mT).mT
        return h + self.mlp(normalised)


class TokenMean(nn.Module):
    """The mean over tokens: (N, T, C) -> (N, C)."""

    def forward(self, h: Tensor) -> Tensor:
        return h.mean(1)


def mixer(
    input_shape: tuple[int, int, int],
    num_classes: int,
    patch: Width,
    channels: Width,
    layers: Depth,
    token_width: Width,
    channel_width: Width,
    cuts: Cuts,
) -> BlockNet:
    """Return an MLP-Mixer: patch embedding, layers that mix along tokens and channels, head (LN, mean, linear).

    h_i = a_i is the whole residual stream, (N, T, C).

    input_shape: (C, H, W). num_classes: K.
    patch: side of a patch in pixels. channels: C of the tokens.
    layers: number of layers. token_width, channel_width: hidden widths of the two mixings.
    cuts: feedback boundaries after every layer ("simple") or after every mixing ("full").
    """
    patches = Patches(*input_shape, patch, channels)
    blocks = [Block(patches, nn.Identity())]
    for _ in range(layers):
        along_tokens = Mixing(channels, patches.tokens, token_width, along_tokens=True)
        along_channels = Mixing(channels, channels, channel_width, along_tokens=False)
        if cuts == "full":
            blocks += [Block(along_tokens, nn.Identity()), Block(along_channels, nn.Identity())]
        else:
            blocks.append(Block(nn.Sequential(along_tokens, along_channels), nn.Identity()))
    head = nn.Sequential(nn.LayerNorm(channels), TokenMean(), nn.Linear(channels, num_classes))
    return BlockNet(*blocks, head=head, input_shape=input_shape)
