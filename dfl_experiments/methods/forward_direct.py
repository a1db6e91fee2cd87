"""FDFA: direct feedback whose B averages the Jacobian, measured by one forward tangent (Bacho and Chu, 2024)."""

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call

from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.losses import OutputLoss, precise
from dfl_experiments.engine.trace import Trace
from dfl_experiments.methods.direct import Direct


class ForwardDirectFeedback(Direct):
    """B ← B - η (B - (1/N) Σ_n p_nᵀ d_n), by an optimizer of B's own, after δ_i = (B_{i+1} e) ⊙ f'(a_i) is sent.

    p_i ~ N(0, 1), independent, is added to every h_i with a B at once as a tangent, and d, (N, K), is the tangent of
    a_L that comes of them all: E[p_iᵀ d] = J_iᵀ, the transposed Jacobian of a_L by h_i. With a B in the shape of a
    convolution, B = S B̄, its gradient is SᵀS B̄ - Sᵀ(pᵀd)/N: B̄ fits the estimate by least squares. The tangents go up a
    forward pass of their own, which moves no statistics.
    """

    sends_first = True

    def __init__(self, net: BlockNet, num_classes: int, loss: OutputLoss, **options: Any) -> None:
        super().__init__(net, num_classes, loss, **options)
        self.feedback.requires_grad_(True)
        self.modules_above = [*net.blocks, net.head]

    @torch.no_grad()
    def adapt(self, trace: Trace, error: Tensor, target: Tensor) -> None:
        """Leave SᵀS B̄ - (1/N) Σ_n Sᵀp_nᵀ d_n in `.grad` of every B̄; S = 1 for a dense one."""
        noise, d = self.tangents(trace) if self.local_modules else ({}, trace.logits)
        for i, p in noise.items():
            module = self.local_modules[i]
            estimate = (d.T @ module.features(p) / len(d)).view_as(module.weight)
            # as B̄ itself lies in memory: fused optimizers go through both alike
            module.weight.grad = torch.empty_like(module.weight).copy_(module.gram() - estimate)

    def tangents(self, trace: Trace) -> tuple[dict[int, Tensor], Tensor]:
        """The p_i that were drawn, shaped like h_i, and d, (N, K)."""
        noise: dict[int, Tensor] = {}
        h: Tensor | None = None
        # PyTorch warns of its own use of torch.jit; and under autocast normalisation mixes the types of tangents
        off = torch.autocast(trace.logits.device.type, enabled=False)
        with warnings.catch_warnings(action="ignore", category=FutureWarning), off, forward_ad.dual_level():
            for i, module in enumerate(self.modules_above):
                if i in self.local_modules:
                    output = precise(trace.output(i)).contiguous()
                    noise[i] = torch.randn_like(output)
                    below = None if h is None else forward_ad.unpack_dual(h).tangent
                    h = forward_ad.make_dual(output, noise[i] if below is None else noise[i] + below)
                if h is not None:
                    # on copies of what batch normalisation would move; and contiguous, without which PyTorch 2.11 has
                    # no forward derivative of group normalisation
                    copies = {name: p.contiguous() for name, p in module.named_parameters()}
                    copies |= {name: b.clone() for name, b in module.named_buffers()}
                    h = functional_call(module, copies, (h,))
            assert h is not None, "some h_i has a B"
            return noise, forward_ad.unpack_dual(h).tangent
