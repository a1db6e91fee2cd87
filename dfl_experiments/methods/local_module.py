"""The local module y_i = pool(conv(h_i; B̄)) and its transpose, the direct feedback of e to h_i.

Both are linear in B̄ through the same small matrices. Let S_v[u, r] = 1 where output position p of the convolution reads
row r with kernel row u (r = p·stride + u·dilation - padding, 0 ≤ p < H'), and S_h the same for columns. Then

    Σ_p conv(h; B̄)[k, p] = Σ_{c,u,v} B̄[k,c,u,v] (S_v h_c S_hᵀ)[u, v]        no convolution, only window sums
    conv_transpose(e ⊗ 1; B̄)[c] = Σ_k e_k G[k, c],  G[k, c] = S_vᵀ B̄[k, c] S_h   G once per step for the whole batch

so the feedback is exactly the transpose of the sum-pooled module. Where h_i is read by a linear layer behind a global
average pooling of the network's own, that pooling is no part of the module: S_v and S_h hold 1/H and 1/W, and the
feedback is the transpose of the pooled map itself, as BP's signal is.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfl_experiments.engine.blocknet import WeightLayer
from dfl_experiments.ranges import FeedbackInit, LocalPooling


def output_positions(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """H', how many positions a convolution has along an axis of length `size`."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def window_positions(size: int, kernel: int, stride: int, padding: int, dilation: int) -> Tensor:
    """S: (kernel, size), 1 where some output position reads position r through kernel element u, 0 elsewhere."""
    outputs = torch.arange(output_positions(size, kernel, stride, padding, dilation))
    positions = outputs[None, :] * stride + torch.arange(kernel)[:, None] * dilation - padding
    return (positions[:, :, None] == torch.arange(size)).sum(1)


class LocalModule(nn.Module):
    """Copies the layer that reads h_i, with K outputs and no bias; on a flattened h_i it is y = B̄ h, B̄: (K, d).

    On an image-shaped h_i (C, H, W), B̄ is (K, C, k, k) with the reader's kernel, stride and padding, followed by global
    pooling. On an image that a linear layer reads behind a global average pooling, B̄ is (K, C, 1, 1), and the same
    average is all the pooling there is.
    """

    weight: nn.Parameter
    rows: Tensor
    columns: Tensor

    def __init__(self, reader: WeightLayer, shape: Sequence[int], num_classes: int, pooling: LocalPooling) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.pooling = pooling
        self.linear = isinstance(reader, nn.Linear)
        like = reader.weight
        if len(self.shape) == 1:
            weight = torch.empty(num_classes, self.shape[0])
        else:
            channels, height, width = self.shape
            geometry = _geometry(reader)
            _, self.stride, self.padding, self.dilation = geometry
            rows, columns = ([axis[i] for axis in geometry] for i in (0, 1))
            self.register_buffer("rows", window_positions(height, *rows).to(like), persistent=False)
            self.register_buffer("columns", window_positions(width, *columns).to(like), persistent=False)
            self.positions = output_positions(height, *rows) * output_positions(width, *columns)
            if self.linear:  # the 1/(H W) of the network's own pooling, in both directions
                self.rows, self.columns, self.positions = self.rows / height, self.columns / width, 1
            weight = torch.empty(num_classes, channels, *geometry[0])
        self.weight = nn.Parameter(weight.to(like))

    @torch.no_grad()
    def initialise(self, init: FeedbackInit, weights: Sequence[Tensor] = ()) -> None:
        """Set B to W_{i+1}ᵀ … W_Lᵀ ("product" of the weights given), or draw it uniformly.

        "kaiming": with gain √2 and fan-in K if the reader is linear, C·k² if not, as the published code draws DFA's;
        "default": as a linear layer or a convolution of B̄'s shape starts.
        """
        if init == "product":
            product = weights[-1]
            for weight in reversed(weights[:-1]):
                product = product @ weight
            self.weight.copy_(product)
        elif init == "kaiming":
            nn.init.kaiming_uniform_(self.weight, mode="fan_out" if self.linear else "fan_in", nonlinearity="relu")
        else:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, h: Tensor) -> Tensor:
        """y = Bᵀ h (Eq. 19), or pool(conv(h; B̄)).  h: (N, *shape) -> (N, K)."""
        if len(self.shape) == 1:
            return F.linear(h, self.weight)
        if self.pooling == "max":
            planes = F.conv2d(h, self.weight, None, self.stride, self.padding, self.dilation)
            return planes.amax((2, 3))
        sums = self.rows @ (h @ self.columns.T)
        return F.linear(sums.flatten(1), self.weight.flatten(1)) / self.positions

    @torch.no_grad()
    def feedback(self, error: Tensor) -> Tensor:
        """B e, the direct error signal (Eq. 24).  error: (N, K) -> (N, *shape)."""
        if len(self.shape) == 1:
            return error @ self.weight
        # no 1/(H'W'): the paper repeats e over the plane, it does not average it
        planes = self.rows.T @ self.weight @ self.columns
        return (error @ planes.flatten(1)).view(len(error), *self.shape)


def _geometry(reader: WeightLayer) -> list[tuple[int, int]]:
    """Kernel, stride, padding and dilation of the reader, each as (rows, columns)."""
    if isinstance(reader, nn.Linear):
        return [(1, 1), (1, 1), (0, 0), (1, 1)]
    assert not isinstance(reader.padding, str), "a reader states its padding in pixels"
    return [
        (reader.kernel_size[0], reader.kernel_size[1]),
        (reader.stride[0], reader.stride[1]),
        (reader.padding[0], reader.padding[1]),
        (reader.dilation[0], reader.dilation[1]),
    ]
