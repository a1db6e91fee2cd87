"""FDFA: direct feedback whose B is a running average of estimated Jacobians (Bacho and Chu, 2024)."""

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.losses import OutputLoss
from dfl_experiments.engine.trace import Trace
from dfl_experiments.errors import UserError, clipped
from dfl_experiments.methods.direct import Direct


class ForwardDirectFeedback(Direct):
    """Forward DFA: δ_i = (B_{i+1} e) ⊙ f'(a_i), then B ← B - η (B - (1/N) Σ_n p_n d_nᵀ).

    A separate forward pass adds an independent random tangent p_i ~ N(0, 1) to every h_i that has a B. This pass
    computes the resulting tangent d of a_L, and changes no batch statistics. The expected value of p_i dᵀ is J_iᵀ,
    where J_i is the Jacobian of a_L with respect to h_i. So p_i dᵀ is an estimate of J_iᵀ.

    If B is a convolution, it has the form B = S B̄ (see `LocalModule.norm_gradient`). Then the gradient
    SᵀS B̄ - (1/N) Σ_n Sᵀ p_n d_nᵀ fits B̄ to the estimate by least squares.

    options: see `Direct`.
    """

    sends_first = True

    def __init__(self, net: BlockNet, num_classes: int, loss: OutputLoss, **options: Any) -> None:
        super().__init__(net, num_classes, loss, **options)
        self.feedback.requires_grad_(True)
        # not `self.net = net`, which would register the net's parameters as the method's
        self.replay = net.replay

    @torch.no_grad()
    def adapt(self, trace: Trace, error: Tensor, target: Tensor) -> None:
        """Set `.grad` of every B̄ to SᵀS B̄ - (1/N) Σ_n Sᵀ p_n d_nᵀ. For a dense B, S = 1."""
        noise, d = self.tangents(trace) if self.local_modules else ({}, trace.logits)
        for i, p in noise.items():
            module = self.local_modules[i]
            estimate = (d.T @ module.features(p) / len(d)).view_as(module.weight)
            gradient = module.norm_gradient() - estimate
            # copy the gradient into the memory format of B̄, which fused optimizers need
            module.weight.grad = torch.empty_like(module.weight).copy_(gradient)

    def tangents(self, trace: Trace) -> tuple[dict[int, Tensor], Tensor]:
        """Draw every p_i and compute d. Return all p_i, by their i, and d.

        Every p_i has the shape of h_i, and d has shape (N, K).
        Raises `UserError` if PyTorch lacks the forward derivative of an operation, such as an LSTM on a CPU.
        """
        noise: dict[int, Tensor] = {}

        def replace(i: int, h: Tensor | None) -> Tensor | None:
            if i not in self.local_modules:
                return h
            # under autocast h_i is bfloat16, but the weights above it and B are float32
            output = trace.output(i).to(self.local_modules[i].weight.dtype).contiguous()
            noise[i] = torch.randn_like(output)
            below = None if h is None else forward_ad.unpack_dual(h).tangent
            return forward_ad.make_dual(output, noise[i] if below is None else noise[i] + below)

        # Ignore PyTorch's warning about its own torch.jit. Switch autocast off, because it would make normalisation
        # layers mix tangents of different data types.
        off = torch.autocast(trace.logits.device.type, enabled=False)
        attention = sdpa_kernel(SDPBackend.MATH)  # the only kernel with a forward derivative
        with (
            warnings.catch_warnings(action="ignore", category=FutureWarning),
            off,
            attention,
            forward_ad.dual_level(),
        ):
            try:
                logits = self.replay(trace, replace)
            except NotImplementedError as error:
                problem = clipped(str(error).partition(" because ")[0], 120)
                raise UserError(
                    f"method: FDFA needs a forward derivative of every operation ({problem}); choose another method"
                ) from error
            return noise, forward_ad.unpack_dual(logits).tangent
