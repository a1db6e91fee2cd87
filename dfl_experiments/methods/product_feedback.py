"""PFA: signals pass through a product P R, in which R learns from the gradients of W (Li and Benna, 2024)."""

import torch
from torch import Tensor, nn

from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.losses import OutputLoss
from dfl_experiments.engine.transpose import TRANSPOSED
from dfl_experiments.errors import UserError
from dfl_experiments.methods.sequential import Sequential
from dfl_experiments.ranges import Count


class ProductFeedback(Sequential):
    """Product feedback alignment: δ_i = (δ_{i+1} P R) ⊙ f'(a_i), with a fixed P and a learned R.

    P has shape (d_out, m), and R has shape (m, d_in). For a convolution, d_in = C·k². The gradient of R is Pᵀ g, where
    g is the gradient of W. The initial R is Xavier-uniform.

    expansion: m / d_out. If expansion > 1, P is Xavier-uniform with gain √((1 + 1/expansion)/2), so that P Pᵀ ≈ 1. If
        expansion = 1, P is orthogonal. Then SGD with weight decay λ multiplies W - P R by 1 - ηλ in every step.
    Raises `UserError` if layers share a weight, or if a layer is a transposed convolution.
    """

    sends_first = True
    follows_backward = True

    def __init__(self, net: BlockNet, num_classes: int, loss: OutputLoss, expansion: Count) -> None:
        super().__init__(net, num_classes, loss)
        if len({layer.weight for layer in self.layers}) < len(self.layers):
            raise UserError(
                "model: two layers share a weight, but PFA needs an R for each layer; choose fa or kp"
            )
        self.feedback = nn.ParameterList()
        for k, layer in enumerate(self.layers):
            if isinstance(layer, TRANSPOSED):
                raise UserError(
                    f"model: PFA does not support {layer}, a transposed convolution; choose fa or kp"
                )
            rows, columns = layer.weight.flatten(1).shape
            fixed = torch.empty(rows, expansion * rows).to(layer.weight)
            if expansion == 1:
                nn.init.orthogonal_(fixed)
            else:
                nn.init.xavier_uniform_(fixed, ((1 + 1 / expansion) / 2) ** 0.5)
            self.register_buffer(f"fixed_{k}", fixed)
            self.feedback.append(
                nn.init.xavier_uniform_(torch.empty(expansion * rows, columns).to(layer.weight))
            )

    def feedback_weight(self, k: int) -> Tensor:
        """Return P R, in the shape of the weight of layers[k]."""
        return (self.get_buffer(f"fixed_{k}") @ self.feedback[k]).view_as(self.layers[k].weight)

    def carry(self, k: int, signal: Tensor, x: Tensor) -> Tensor:
        """Return the signal at the input x of layers[k]. For a linear layer that learns, also set R.grad = (δ P)ᵀ x."""
        if not isinstance(self.layers[k], nn.Linear):
            return super().carry(k, signal, x)
        # (δ P) R is much cheaper than δ (P R)
        inner = signal @ self.get_buffer(f"fixed_{k}").to(signal.dtype)
        r = self.feedback[k]
        if self.layers[k].weight.requires_grad:
            gradient = (inner.flatten(0, -2).T @ x.to(inner.dtype).flatten(0, -2)).to(r.dtype)
            # a layer may be called twice per pass
            r.grad = gradient if r.grad is None else r.grad + gradient
        return inner @ r.to(inner.dtype)

    @torch.no_grad()
    def follow(self, lr: float | Tensor) -> None:
        """Set `.grad` of R to Pᵀ g for convolutions. lr: η, not used."""
        for k, (layer, feedback) in enumerate(zip(self.layers, self.feedback, strict=True)):
            if not isinstance(layer, nn.Linear) and layer.weight.grad is not None:
                feedback.grad = self.get_buffer(f"fixed_{k}").T @ layer.weight.grad.flatten(1)
