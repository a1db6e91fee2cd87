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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfl_experiments.engine.transpose import WeightLayer
from dfl_experiments.ranges import FeedbackInit, LocalPooling


@dataclass(frozen=True)
class Axis:
    """A convolution along one axis. before, after: zeros of padding at its two ends."""

    kernel: int
    stride: int
    before: int
    after: int
    dilation: int

    def outputs(self, size: int) -> int:
        """H', how many positions it has along an axis of length `size`."""
        return (size + self.before + self.after - self.dilation * (self.kernel - 1) - 1) // self.stride + 1

    def windows(self, size: int) -> Tensor:
        """S: (kernel, size), 1 where some output position reads position r through kernel element u, 0 elsewhere."""
        outputs = torch.arange(self.outputs(size))
        positions = outputs[None, :] * self.stride + torch.arange(self.kernel)[:, None] * self.dilation - self.before
        return (positions[:, :, None] == torch.arange(size)).sum(1)


class LocalModule(nn.Module):
    """Copies the layer that reads h_i, with K outputs and no bias: y = B̄ h, B̄: (K, d), on h_i of shape (d,).

    On an image (C, H, W), B̄ is (K, C, k, k) with the reader's kernel, stride and padding, followed by global pooling.
    On an image that a linear layer reads behind a global average pooling, B̄ is (K, C, 1, 1), and the same average is
    all the pooling there is. On tokens (T, C), B̄ is (K, C) and y = B̄ · mean_t h, whatever reads them: the 1×1
    convolution that a layer along the channels is, behind the network's own average. A `dense` one is a matrix on
    whatever h_i there is, flattened. So is one on an image without a reader (None), or whose reader is neither linear
    nor a convolution that pads with zeros.
    """

    weight: nn.Parameter
    rows: Tensor
    columns: Tensor

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
            if self.linear:  # the 1/(H W) of the network's own pooling, in both directions
                self.rows, self.columns = self.rows / height, self.columns / width
            else:
                self.positions = rows.outputs(height) * columns.outputs(width)
            weight = torch.empty(num_classes, channels, rows.kernel, columns.kernel)
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

    def gram(self) -> Tensor:
        """Return SᵀS B̄, shaped like B̄: with B = S B̄ the matrix that e meets, S of zeros, ones and shares.

        It is the gradient of ½‖S B̄‖² by B̄: (S_v S_vᵀ) B̄ (S_h S_hᵀ) of a convolution, B̄/T on T tokens.
        """
        if self.flat:
            return self.weight
        if len(self.shape) == 2:
            return self.weight / self.shape[0]
        return (self.rows @ self.rows.T) @ self.weight @ (self.columns @ self.columns.T)

    def norm(self) -> Tensor:
        """Return ‖B‖, the Frobenius norm of the (K, d) matrix that e meets on its way to h_i."""
        return (self.weight * self.gram()).sum().sqrt()

    def forward(self, h: Tensor) -> Tensor:
        """y = Bᵀ h (Eq. 19), or pool(conv(h; B̄)).  h: (N, *shape) -> (N, K)."""
        if self.pooling == "max" and not self.linear:
            return F.conv2d(h, self.weight, None, *self.geometry).amax((2, 3))
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


def _axes(reader: WeightLayer | None) -> tuple[Axis, ...]:
    """Return what the reader is along rows and along columns; nothing where an image's B cannot have its shape."""
    if isinstance(reader, nn.Linear):
        return (Axis(1, 1, 0, 0, 1),) * 2
    if not isinstance(reader, nn.Conv2d) or reader.padding_mode != "zeros":
        return ()
    return tuple(_axis(reader, i) for i in (0, 1))


def _axis(reader: nn.Conv2d, i: int) -> Axis:
    kernel, stride, dilation = reader.kernel_size[i], reader.stride[i], reader.dilation[i]
    if reader.padding == "same":
        both = dilation * (kernel - 1)
        before = both // 2  # as PyTorch has it: of an odd number the larger part comes after
        return Axis(kernel, stride, before, both - before, dilation)
    padding = 0 if isinstance(reader.padding, str) else reader.padding[i]
    return Axis(kernel, stride, padding, padding, dilation)
