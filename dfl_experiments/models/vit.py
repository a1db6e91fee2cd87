"""Vision Transformer (Dosovitskiy et al., 2021), whose attention is built from linear layers."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfl_experiments.engine.blocknet import Block, BlockNet
from dfl_experiments.models.mixer import Patches, TokenMean
from dfl_experiments.ranges import Depth, Width


class Tokens(nn.Module):
    """The embedding of patches (see `Patches`) plus learnt position embeddings: (N, planes, H, W) -> (N, T, C)."""

    def __init__(self, patches: Patches, channels: int) -> None:
        super().__init__()
        self.patches = patches
        positions = torch.empty(patches.tokens, channels).normal_(std=0.02)
        self.positions = nn.Parameter(positions)

    def forward(self, x: Tensor) -> Tensor:
        return self.patches(x) + self.positions


class Attention(nn.Module):
    """Self-attention on (N, T, C): softmax(Q Kᵀ/√d) V in every head, with d = ⌈C/heads⌉, then a linear layer."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        inner = heads * math.ceil(channels / heads)
        self.query = nn.Linear(channels, inner)
        self.value = nn.Linear(channels, inner)
        # a bias of K would not change the softmax
        self.key = nn.Linear(channels, inner, bias=False)
        self.output = nn.Linear(inner, channels)

    def forward(self, h: Tensor) -> Tensor:
        query = self.split(self.query(h))
        key = self.split(self.key(h))
        value = self.split(self.value(h))
        scores = query @ key.mT / query.shape[-1] ** 0.5
        weighted = F.softmax(scores, dim=-1) @ value
        joined = weighted.transpose(1, 2).flatten(2)
        return self.output(joined)

    def split(self, tokens: Tensor) -> Tensor:
        """Return the tokens, split into heads. The result has shape (N, heads, T, d)."""
        return tokens.unflatten(2, (self.heads, -1)).transpose(1, 2)


class Encoder(nn.Module):
    """An encoder layer on (N, T, C): h' = h + Attention(LN(h)); output h' + W_2 GELU(W_1 LN(h') + b_1) + b_2."""

    def __init__(self, channels: int, heads: int, width: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(channels), Attention(channels, heads))
        self.mlp = nn.Sequential(
            nn.LayerNorm(channels),
            nn.Linear(channels, width),
            nn.GELU(),
            nn.Linear(width, channels),
        )

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.attention(h)
        return h + self.mlp(h)


def vit(
    input_shape: tuple[int, int, int],
    num_classes: int,
    patch: Width,
    width: Width,
    depth: Depth,
    heads: Width,
) -> BlockNet:
    """Return a Vision Transformer: patch and position embedding, `depth` encoder layers, head (LN, mean, linear).

    h_i = a_i is the whole residual stream, (N, T, C), after the embedding and after every layer.

    input_shape: (C, H, W). num_classes: K.
    patch: side of a patch in pixels. width: C of the tokens; the hidden layer of each MLP has 4 C units.
    heads: number of attention heads.
    """
    patches = Patches(*input_shape, patch, width)
    blocks = [Block(Tokens(patches, width), nn.Identity())]
    for _ in range(depth):
        encoder = Encoder(width, heads, 4 * width)
        blocks.append(Block(encoder, nn.Identity()))
    head = nn.Sequential(nn.LayerNorm(width), TokenMean(), nn.Linear(width, num_classes))
    return BlockNet(*blocks, head=head, input_shape=input_shape)
