"""The local module y_i = pool(conv(h_i; B̄)) and its transpose, the direct feedback of e to h_i.

Both are computed from B̄ with two small matrices, S_v and S_h. S_v[u, r] is 1 if kernel row u touches input row r at
some output position p, that is, if r = p·stride + u·dilation - padding for some p with 0 ≤ p < H'. Otherwise it is 0.
S_h is defined in the same way for columns.

Average pooling needs the sum of the convolution over all output positions. This sum is computed without a convolution:

    Σ_p conv(h; B̄)[k, p] = Σ_{c,u,v} B̄[k,c,u,v] (S_v h_c S_hᵀ)[u, v]

The feedback repeats e at every output position and applies the transposed convolution. The matrices G[k, c] are
computed once for the whole batch:

    conv_transpose(e ⊗ 1; B̄)[c] = Σ_k e_k G[k, c]
    G[k, c] = S_vᵀ B̄[k, c] S_h

So the feedback is exactly the transpose of the linear map h ↦ Σ_p conv(h; B̄)[:, p].

If the network averages each channel of h_i before a linear layer reads it, the module takes the same average. Then S_v
contains the factor 1/H, and S_h contains the factor 1/W. The feedback contains both factors too, as in BP.
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
        """Return the matrix S with shape (kernel, size).

        S[u, r] is 1 if kernel element u touches input position r at some output position. Otherwise it is 0.
        """
        starts = torch.arange(self.outputs(size)) * self.stride - self.before
        offsets = torch.arange(self.kernel) * self.dilation
        positions = starts[None, :] + offsets[:, None]
        return (positions[:, :, None] == torch.arange(size)).sum(1)


class LocalModule(nn.Module):
    """The local module on h_i: a copy of the layer that reads h_i, with K outputs and without bias.

    There are five cases:
    - h_i is a vector of shape (d,). Then y = B̄ h, and B̄ has shape (K, d).
    - h_i is an image of shape (C, H, W) that a convolution reads. Then B̄ is the kernel of a convolution with the
      reader's kernel size, stride and padding. Global pooling follows. B̄ has shape (K, C, k, k).
    - h_i is an image that a linear layer reads after a global average. Then y = B̄ h, with the same average of h. B̄ has
      shape (K, C, 1, 1).
    - h_i consists of tokens and has shape (T, C). Then y = B̄ · mean_t h, and B̄ has shape (K, C). The reader does not
      matter.
    - All other cases, and every h_i if `dense` is True: y = B̄ h with the flattened h, and B̄ has shape (K, d). For
      example, an image may have no reader, its reader may pad with other values than zeros, or its reader may be a
      linear layer that reads the flattened image.

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
        is_matrix = dense or len(self.shape) < 3 or reads_positions(reader, self.shape[0])
        axes = () if is_matrix else _axes(reader)
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
            # the factor 1/(H W) of the network's average, for y and for the feedback
            if self.linear:
                self.rows, self.columns = self.rows / height, self.columns / width
            else:
                self.positions = rows.outputs(height) * columns.outputs(width)
            weight = torch.empty(num_classes, channels, rows.kernel, columns.kernel)
        self.weight = nn.Parameter(weight.to(like))

    @torch.no_grad()
    def initialise(self, init: FeedbackInit, product: Tensor | None = None) -> None:
        """Set B̄ to its initial value.

        init: distribution or value of B̄.
            "default": as PyTorch initialises a layer whose weight has the shape of B̄.
            "zeros": 0.
            "product": W_L … W_{i+1}, or "default" if the product is missing or zero.
            "kaiming": Kaiming-uniform with gain √2, as in the published code of DFA. The fan-in is C·k² if B̄ is the
                kernel of a convolution, and K in all other cases.
            "kaiming_in": Kaiming-uniform with gain √2. The fan-in is the number of entries of B̄ for one class.
        product: (K, d), or None in a net without products.
        """
        # A head of zeros gives a product of zeros. Do not copy it: a fixed B of zeros would send no signal.
        if init == "product" and product is not None and product.any():
            self.weight.copy_(self.as_weight(product))
        elif init == "kaiming":
            nn.init.kaiming_uniform_(
                self.weight, mode="fan_out" if self.linear else "fan_in", nonlinearity="relu"
            )
        elif init == "kaiming_in":
            nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")
        elif init == "zeros":
            nn.init.zeros_(self.weight)
        else:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def as_weight(self, product: Tensor) -> Tensor:
        """Return the product, (K, d), in the shape of B̄.

        If B̄ reads T flattened tokens, the result consists of T copies of product/T, side by side.
        """
        tokens = self.weight.numel() // product.numel()
        return product.view_as(self.weight) if tokens == 1 else (product / tokens).repeat(1, tokens)

    def features(self, h: Tensor) -> Tensor:
        """Return the features of h that B̄ multiplies.

        The features are h itself, the mean of h over tokens, or the window sums S_v h_c S_hᵀ.

        h: (N, *shape).
        Returns a matrix with one row for each sample. A row has as many entries as B̄ has for each class.
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
        """Return SᵀS B̄, where S is the linear map from B̄ to the matrix B = S B̄ that multiplies e.

        SᵀS B̄ is the gradient of ½‖B‖² with respect to B̄, and has the shape of B̄. For a convolution it equals
        (S_v S_vᵀ) B̄ (S_h S_hᵀ). For the mean of T tokens it equals B̄/T.
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
        """Return the prediction y = Bᵀ h (Eq. 19), or y = pool(conv(h; B̄)). The result has shape (N, K).

        h: (N, *shape).
        """
        if self.pooling == "max" and not self.linear:
            return F.conv2d(h, self.weight, None, *self.geometry).amax((2, 3))
        return self._product(self.features(h))

    def _product(self, features: Tensor) -> Tensor:
        y = F.linear(features, self.weight.flatten(1))
        return y if self.positions == 1 else y / self.positions

    def learn(self, h: Tensor, local_error: Callable[[Tensor], Tensor]) -> None:
        """Set `.grad` of the weight B̄ to Σ_n ε_n ∂y_n/∂B̄, where y is the module's prediction from h.

        h: (N, *shape).
        local_error: function that computes the local error ε from y. Both ε and y have shape (N, K).
        """
        if self.pooling == "max" and not self.linear:
            y = self(h)
            y.backward(local_error(y.detach()), inputs=[self.weight])
            return
        with torch.no_grad():
            features = self.features(h)
            error = local_error(self._product(features)).to(features.dtype) / self.positions
            gradient = (error.T @ features).view(self.weight.shape)
            # copy the gradient into the memory format of B̄, which fused optimizers need
            self.weight.grad = torch.empty_like(self.weight).copy_(gradient)

    @torch.no_grad()
    def feedback(self, error: Tensor) -> Tensor:
        """Return B e, the direct error signal (Eq. 24). The signal has the shape of h_i.

        error: e, (N, K).
        """
        error = error.to(self.weight.dtype)
        if self.flat:
            return (error @ self.weight).view(len(error), *self.shape)
        if len(self.shape) == 2:
            return (error @ self.weight / self.shape[0])[:, None].expand(len(error), *self.shape)
        # The factor 1/(H'W') of average pooling is omitted: the paper repeats e itself at every output position.
        planes = self.rows.T @ self.weight @ self.columns
        if not is_channels_last(self.weight):
            return (error @ planes.flatten(1)).view(len(error), *self.shape)
        # in the memory format of h_i, to avoid a copy
        signal = error @ planes.permute(0, 2, 3, 1).flatten(1)
        return signal.unflatten(1, (*self.shape[1:], self.shape[0])).permute(0, 3, 1, 2)


def reads_positions(reader: WeightLayer | None, channels: int) -> bool:
    """Return whether a linear layer reads the positions of an image, and not only the mean of each channel."""
    return isinstance(reader, nn.Linear) and reader.in_features != channels


def is_channels_last(images: Tensor) -> bool:
    """Return whether the memory of (N, C, H, W) has the order (N, H, W, C)."""
    return images.stride(1) == 1 and images.stride(3) == images.shape[1] > 1


def _axes(reader: WeightLayer | None) -> tuple[Axis, ...]:
    """Return the geometry of the layer that reads h_i, first along rows, then along columns.

    A linear layer has the geometry of a 1×1 convolution. Return () if the reader is neither a linear layer nor a
    `Conv2d` with zero padding. Then B cannot take the shape of the reader.
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
