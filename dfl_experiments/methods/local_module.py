"""The local module y_i = pool(conv(h_i; B̄)) and its transpose, the direct feedback of e to h_i.

Both are computed from B̄ with the same two small matrices. S_v[u, r] = 1 if an output position p of the convolution
reads row r with kernel row u (r = p·stride + u·dilation - padding, 0 ≤ p < H'), else 0. S_h is the same for columns.

    Σ_p conv(h; B̄)[k, p] = Σ_{c,u,v} B̄[k,c,u,v] (S_v h_c S_hᵀ)[u, v]        window sums replace the convolution
    conv_transpose(e ⊗ 1; B̄)[c] = Σ_k e_k G[k, c],  G[k, c] = S_vᵀ B̄[k, c] S_h   G is computed once for the whole batch

So the feedback is exactly the transpose of the sum-pooled module. If the network averages each channel of h_i before a
linear layer reads it, the module does the same: S_v and S_h contain the factors 1/H and 1/W. The feedback is then the
transpose of the averaged map, as in BP.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfl_experiments.engine.transpose import WeightLayer
from dfl_experiments.ranges import FeedbackInit, LocalPooling


@dataclass(frozen=True)
class Axis:
    """The geometry of a convolution along one axis."""

    kernel: int
    stride: int
    before: int
    """Zeros of padding before the axis."""
    after: int
    """Zeros of padding after the axis."""
    dilation: int

    def outputs(self, size: int) -> int:
        """Return H', the number of output positions along an axis of length `size`."""
        extent = self.dilation * (self.kernel - 1) + 1
        return (size + self.before + self.after - extent) // self.stride + 1

    def windows(self, size: int) -> Tensor:
        """Return S, (kernel, size): S[u, r] = 1 if kernel element u reads position r for any output position."""
        starts = torch.arange(self.outputs(size)) * self.stride - self.before
        offsets = torch.arange(self.kernel) * self.dilation
        positions = starts[None, :] + offsets[:, None]
        return (positions[:, :, None] == torch.arange(size)).sum(1)


class LocalModule(nn.Module):
    """The local module on h_i: a copy of the layer that reads h_i, with K outputs and without bias.

    h_i is a vector (d,): y = B̄ h, with B̄ (K, d).
    h_i is an image (C, H, W) that a convolution reads: B̄ is a convolution (K, C, k, k) with the reader's kernel size,
        stride and padding, followed by global pooling.
    h_i is an image that a linear layer reads after a global average: B̄ is (K, C, 1, 1), applied after the same average.
    h_i is tokens (T, C): y = B̄ · mean_t h, with B̄ (K, C), for any reader.
    All other cases, and all cases with `dense`: B̄ is a matrix (K, d) on the flattened h_i. Other cases are images
        without a reader, and images whose reader is a convolution with a padding mode other than "zeros".

    reader: layer that reads h_i, or None.
    shape: shape of h_i for one sample.
    num_classes: K.
    pooling: "average" or "max", after a convolution.
    dense: True to use a matrix for every h_i.
    """

    weight: nn.Parameter
    """B̄."""
    rows: Tensor
    """S_v, (k, H)."""
    columns: Tensor
    """S_h, (k, W)."""

    def __init__(
        self,
        reader: WeightLayer | None,
        shape: Sequence[int],
        num_classes: int,
        pooling: LocalPooling = "average",
        dense: bool = False,
    ) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.pooling = pooling
        axes = () if dense or len(self.shape) < 3 else _axes(reader)
        self.linear = not axes or isinstance(reader, nn.Linear)
        self.flat = not axes and (dense or len(self.shape) != 2)
        self.positions = 1
        like = torch.empty(0) if reader is None else reader.weight
        if self.flat:
            weight = torch.empty(num_classes, math.prod(self.shape))
        elif len(self.shape) == 2:
            weight = torch.empty(num_classes, self.shape[1])
        else:
            channels, height, width = self.shape
            rows, columns = axes
            if isinstance(reader, nn.Conv2d):
                self.geometry: Any = (reader.stride, reader.padding, reader.dilation)
            self.register_buffer("rows", rows.windows(height).to(like), persistent=False)
            self.register_buffer("columns", columns.windows(width).to(like), persistent=False)
            if self.linear:  # the factor 1/(H W) of the network's average, for y and for the feedback
                self.rows, self.columns = self.rows / height, self.columns / width
            else:
                self.positions = rows.outputs(height) * columns.outputs(width)
            weight = torch.empty(num_classes, channels, rows.kernel, columns.kernel)
        self.weight = nn.Parameter(weight.to(like))

    @torch.no_grad()
    def initialise(self, init: FeedbackInit, product: Tensor | None = None) -> None:
        """Set B̄ to its initial value.

        init: "product": W_L … W_{i+1}, or "default" if the product is missing or zero. "zeros": 0. "kaiming": uniform
            with gain √2, and fan-in K for a linear reader or C·k² for a convolution, as in the published code of DFA.
            "default": as PyTorch initialises a layer whose weight has the shape of B̄.
        product: (K, d), or None in a net without products.
        """
        # not for a product of zeros, which a head of zeros gives: a fixed B of zeros would send no signal
        if init == "product" and product is not None and product.any():
            self.weight.copy_(self.as_weight(product))
        elif init == "kaiming":
            nn.init.kaiming_uniform_(self.weight, mode="fan_out" if self.linear else "fan_in", nonlinearity="relu")
        elif init == "zeros":
            nn.init.zeros_(self.weight)
        else:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def as_weight(self, product: Tensor) -> Tensor:
        """Return a product (K, d) in the shape of B̄. For T flattened tokens, join T copies of product/T."""
        tokens = self.weight.numel() // product.numel()
        return product.view_as(self.weight) if tokens == 1 else (product / tokens).repeat(1, tokens)

    def features(self, h: Tensor) -> Tensor:
        """Return the matrix that B̄ multiplies in the sum-pooled module: h, its mean over tokens, or its window sums.

        h: (N, *shape). Returns (N, d).
        """
        if self.flat:
            return h.flatten(1)
        if len(self.shape) == 2:
            return h.mean(1)
        if not is_channels_last(h):
            return (self.rows @ (h @ self.columns.T)).flatten(1)
        lines = self.rows @ h.permute(0, 2, 3, 1).flatten(2)  # (N, k, W C)
        sums = self.columns @ lines.unflatten(2, (-1, h.shape[1]))  # (N, k, k, C)
        return sums.permute(0, 3, 1, 2).flatten(1)

    def norm_gradient(self) -> Tensor:
        """Return SᵀS B̄, the gradient of ½‖B‖² with respect to B̄, where B = S B̄ multiplies e. It has the shape of B̄.

        For a convolution SᵀS B̄ is (S_v S_vᵀ) B̄ (S_h S_hᵀ); for T tokens it is B̄/T.
        """
        if self.flat:
            return self.weight
        if len(self.shape) == 2:
            return self.weight / self.shape[0]
        return (self.rows @ self.rows.T) @ self.weight @ (self.columns @ self.columns.T)

    def norm(self) -> Tensor:
        """Return ‖B‖, the Frobenius norm of the (K, d) matrix B that multiplies e."""
        return (self.weight * self.norm_gradient()).sum().sqrt()

    def forward(self, h: Tensor) -> Tensor:
        """Return y = Bᵀ h (Eq. 19), or pool(conv(h; B̄)), (N, K). h: (N, *shape)."""
        if self.pooling == "max" and not self.linear:
            return F.conv2d(h, self.weight, None, *self.geometry).amax((2, 3))
        return self._product(self.features(h))

    def _product(self, features: Tensor) -> Tensor:
        y = F.linear(features, self.weight.flatten(1))
        return y if self.positions == 1 else y / self.positions

    def learn(self, h: Tensor, local_error: Callable[[Tensor], Tensor]) -> None:
        """Set `.grad` of the weight B̄ to Σ_n ε_n ∂y_n/∂B̄, where y is the module's prediction from h.

        h: (N, *shape). local_error: function that computes the local error ε, (N, K), from y.
        """
        if self.pooling == "max" and not self.linear:
            y = self(h)
            y.backward(local_error(y.detach()), inputs=[self.weight])
            return
        with torch.no_grad():
            features = self.features(h)
            error = local_error(self._product(features)) / self.positions
            gradient = (error.T @ features).view(self.weight.shape)
            # copy the gradient into the memory format of B̄, which fused optimizers need
            self.weight.grad = torch.empty_like(self.weight).copy_(gradient)

    @torch.no_grad()
    def feedback(self, error: Tensor) -> Tensor:
        """Return B e, the direct error signal (Eq. 24), (N, *shape). error: e, (N, K)."""
        if self.flat:
            return (error @ self.weight).view(len(error), *self.shape)
        if len(self.shape) == 2:
            return (error @ self.weight / self.shape[0])[:, None].expand(len(error), *self.shape)
        # without the factor 1/(H'W'): in the paper, e and not e/(H'W') is repeated at every position of the plane
        planes = self.rows.T @ self.weight @ self.columns
        if not is_channels_last(self.weight):
            return (error @ planes.flatten(1)).view(len(error), *self.shape)
        signal = error @ planes.permute(0, 2, 3, 1).flatten(1)  # in the memory format of h_i, to avoid a copy
        return signal.unflatten(1, (*self.shape[1:], self.shape[0])).permute(0, 3, 1, 2)


def is_channels_last(images: Tensor) -> bool:
    """Return whether the memory of (N, C, H, W) has the order (N, H, W, C)."""
    return images.stride(1) == 1 and images.stride(3) == images.shape[1] > 1


def _axes(reader: WeightLayer | None) -> tuple[Axis, ...]:
    """Return kernel size, stride, padding and dilation of the layer that reads h_i, along rows and along columns.

    Return () if the layer is no convolution with zero padding, so that B cannot have its shape.
    """
    if isinstance(reader, nn.Linear):
        return (Axis(1, 1, 0, 0, 1),) * 2
    if not isinstance(reader, nn.Conv2d) or reader.padding_mode != "zeros":
        return ()
    return tuple(_axis(reader, i) for i in (0, 1))


def _axis(reader: nn.Conv2d, i: int) -> Axis:
    kernel, stride, dilation = reader.kernel_size[i], reader.stride[i], reader.dilation[i]
    if reader.padding == "same":
        both = dilation * (kernel - 1)
        before = both // 2  # PyTorch puts the larger part of an odd padding after the axis
        return Axis(kernel, stride, before, both - before, dilation)
    padding = 0 if isinstance(reader.padding, str) else reader.padding[i]
    return Axis(kernel, stride, padding, padding, dilation)
