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
from collections.abc import Callable, Sequence

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
    """Copies the layer that reads h_i, with K outputs and no bias: y = B̄ h, B̄: (K, d), on h_i of shape (d,).

    On an image (C, H, W), B̄ is (K, C, k, k) with the reader's kernel, stride and padding, followed by global pooling.
    On an image that a linear layer reads behind a global average pooling, B̄ is (K, C, 1, 1), and the same average is
    all the pooling there is. On tokens (T, C), B̄ is (K, C) and y = B̄ · mean_t h, whatever reads them: the 1×1
    convolution that a layer along the channels is, behind the network's own average. A `dense` one is a matrix on
    whatever h_i there is, flattened.
    """

    weight: nn.Parameter
    rows: Tensor
    columns: Tensor

    def __init__(
        self,
        reader: WeightLayer,
        shape: Sequence[int],
        num_classes: int,
        pooling: LocalPooling = "average",
        dense: bool = False,
    ) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.pooling = pooling
        self.linear = dense or isinstance(reader, nn.Linear) or len(self.shape) < 3
        self.flat = dense or len(self.shape) == 1
        self.positions = 1
        like = reader.weight
        if self.flat:
            weight = torch.empty(num_classes, math.prod(self.shape))
        elif len(self.shape) == 2:
            weight = torch.empty(num_classes, self.shape[1])
        else:
            channels, height, width = self.shape
            geometry = _geometry(reader)
            _, self.stride, self.padding, self.dilation = geometry
            rows, columns = ([axis[i] for axis in geometry] for i in (0, 1))
            self.register_buffer("rows", window_positions(height, *rows).to(like), persistent=False)
            self.register_buffer("columns", window_positions(width, *columns).to(like), persistent=False)
            if self.linear:  # the 1/(H W) of the network's own pooling, in both directions
                self.rows, self.columns = self.rows / height, self.columns / width
            else:
                self.positions = output_positions(height, *rows) * output_positions(width, *columns)
            weight = torch.empty(num_classes, channels, *geometry[0])
        self.weight = nn.Parameter(weight.to(like))

    @torch.no_grad()
    def initialise(self, init: FeedbackInit, product: Tensor | None = None) -> None:
        """Set B̄ to W_L … W_{i+1} ("product", which is given, (K, d)) or to "zeros", or draw it uniformly.

        "kaiming": with gain √2 and fan-in K if the reader is linear, C·k² if not, as the published code draws DFA's;
        "default": as a linear layer or a convolution of B̄'s shape starts, and in place of a product that is not there.
        """
        if init == "product" and product is not None:
            self.weight.copy_(self.in_place(product))
        elif init == "kaiming":
            nn.init.kaiming_uniform_(self.weight, mode="fan_out" if self.linear else "fan_in", nonlinearity="relu")
        elif init == "zeros":
            nn.init.zeros_(self.weight)
        else:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def in_place(self, product: Tensor) -> Tensor:
        """A product (K, d) as B̄ holds it; one of channels, (K, C), on flattened tokens: a share of it on each."""
        tokens = self.weight.numel() // product.numel()
        return product.view_as(self.weight) if tokens == 1 else (product / tokens).repeat(1, tokens)

    def features(self, h: Tensor) -> Tensor:
        """What the sum-pooled module is a matrix on: h itself, its mean over tokens, or its window sums, flattened."""
        if self.flat:
            return h.flatten(1)
        if len(self.shape) == 2:
            return h.mean(1)
        if not is_channels_last(h):
            return (self.rows @ (h @ self.columns.T)).flatten(1)
        lines = self.rows @ h.permute(0, 2, 3, 1).flatten(2)  # (N, k, W C)
        sums = self.columns @ lines.unflatten(2, (-1, h.shape[1]))  # (N, k, k, C)
        return sums.permute(0, 3, 1, 2).flatten(1)

    @property
    def spread(self) -> Tensor | float:
        """How often a unit of h_i meets every element of B̄[k], squared shares summed, shaped to divide B̄."""
        if self.flat:
            return 1.0
        if len(self.shape) == 2:
            return 1 / self.shape[0]
        spread = self.rows.square().sum(1)[:, None] * self.columns.square().sum(1)
        return torch.where(spread == 0, 1.0, spread)  # of a small image some elements read nothing but padding

    def forward(self, h: Tensor) -> Tensor:
        """y = Bᵀ h (Eq. 19), or pool(conv(h; B̄)).  h: (N, *shape) -> (N, K)."""
        if self.pooling == "max" and not self.linear:
            planes = F.conv2d(h, self.weight, None, self.stride, self.padding, self.dilation)
            return planes.amax((2, 3))
        return self._product(self.features(h))

    def _product(self, features: Tensor) -> Tensor:
        y = F.linear(features, self.weight.flatten(1))
        return y if self.positions == 1 else y / self.positions

    def learn(self, h: Tensor, local_error: Callable[[Tensor], Tensor]) -> None:
        """Leave Σ_n ε_n ∂y_n/∂B̄ in `.grad`: but for the largest position of all, what it is linear in. ε: (N, K)."""
        if self.pooling == "max" and not self.linear:
            y = self(h)
            y.backward(local_error(y.detach()), inputs=[self.weight])
            return
        with torch.no_grad():
            features = self.features(h)
            error = local_error(self._product(features)) / self.positions
            # as B̄ itself lies in memory: optimizers go through both alike
            self.weight.grad = torch.empty_like(self.weight).copy_((error.T @ features).view(self.weight.shape))

    @torch.no_grad()
    def feedback(self, error: Tensor) -> Tensor:
        """B e, the direct error signal (Eq. 24).  error: (N, K) -> (N, *shape)."""
        if self.flat:
            return (error @ self.weight).view(len(error), *self.shape)
        if len(self.shape) == 2:
            return (error @ self.weight / self.shape[0])[:, None].expand(len(error), *self.shape)
        # no 1/(H'W'): the paper repeats e over the plane, it does not average it
        planes = self.rows.T @ self.weight @ self.columns
        if not is_channels_last(self.weight):
            return (error @ planes.flatten(1)).view(len(error), *self.shape)
        signal = error @ planes.permute(0, 2, 3, 1).flatten(1)  # as h_i lies in such a net: nothing is copied
        return signal.unflatten(1, (*self.shape[1:], self.shape[0])).permute(0, 3, 1, 2)


def is_channels_last(images: Tensor) -> bool:
    """Whether (N, C, H, W) lies in memory as (N, H, W, C)."""
    return images.stride(1) == 1 and images.stride(3) == images.shape[1] > 1


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
