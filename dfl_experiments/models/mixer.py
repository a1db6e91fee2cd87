"""MLP-Mixer (Tolstikhin et al., 2021): patches, mixed along tokens and along channels in turn."""

from typing import Literal

from torch import Tensor, nn

from dfl_experiments.engine.blocknet import Block, BlockNet
from dfl_experiments.ranges import Depth, Width

Cuts = Literal["simple", "full"]


class Patches(nn.Module):
    """Every patch of p × p pixels as a vector: (N, planes, H, W) -> (N, T, C), T = ⌈H/p⌉ ⌈W/p⌉, zeros at the border."""

    def __init__(self, planes: int, height: int, width: int, patch: int, channels: int) -> None:
        super().__init__()
        self.border = nn.ZeroPad2d((0, -width % patch, 0, -height % patch))
        self.embedding = nn.Conv2d(planes, channels, patch, stride=patch)
        self.tokens = -(-height // patch) * -(-width // patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.embedding(self.border(x)).flatten(2).mT.contiguous()


class Mixing(nn.Module):
    """h + W_2 GELU(W_1 LN(h) + b_1) + b_2, along the channels or along the tokens of every sample. (N, T, C)."""

    def __init__(self, channels: int, mixed: int, width: int, along_tokens: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(mixed, width), nn.GELU(), nn.Linear(width, mixed))
        self.along_tokens = along_tokens

    def forward(self, h: Tensor) -> Tensor:
        read = self.norm(h)
        return h + (self.mlp(read.mT).mT if self.along_tokens else self.mlp(read))


class TokenMean(nn.Module):
    """(N, T, C) -> (N, C)."""

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
    """Block 1 embeds patches; each of `layers` mixes along tokens, then along channels; head: LN, mean, linear.

    cuts: feedback boundaries after every layer ("simple") or after every mixing ("full"). h_i, and a_i with it, is the
    whole stream, skip included: (N, T, C).
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
