"""WM: weight mirror, in which B learns W from noise that is sent through the layers (Akrout et al., 2019)."""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.losses import OutputLoss
from dfl_experiments.engine.trace import Trace
from dfl_experiments.methods.feedback_alignment import FeedbackAlignment
from dfl_experiments.ranges import Probability


class WeightMirror(FeedbackAlignment):
    """Weight mirror: B ← (1 - ρ) B + ρ (y - ȳ)ᵀ(ξ - ξ̄)/(M - 1) in every step, with y = ξ Wᵀ.

    ξ is noise of shape (M, d_in) with entries from N(0, 1). The rule is Eq. 7 of the paper, normalised so that
    E[B] = W. B has the shape of W. Bias, activation and padding are not used. For a convolution, every row of ξ is one
    patch with d_in = C·k² entries.

    samples: M.
    rate: ρ. None: 0.08 (M - 1)/(d_in + 1), but at most 1. With this ρ, the cosine of B and a constant W converges to
        0.98.
    options: see `FeedbackAlignment`.
    """

    def __init__(
        self,
        net: BlockNet,
        num_classes: int,
        loss: OutputLoss,
        samples: Annotated[int, Field(ge=2, le=2**16)],
        rate: Probability | None,
        **options: Any,
    ) -> None:
        super().__init__(net, num_classes, loss, **options)
        self.samples, self.rate = samples, rate

    @torch.no_grad()
    def adapt(self, trace: Trace, error: Tensor, target: Tensor) -> None:
        """Update the B of every layer, in float32 or higher precision."""
        with torch.autocast(error.device.type, enabled=False):
            for layer, feedback in zip(self.layers, self.feedback, strict=True):
                weight = layer.weight.flatten(1)
                noise = torch.randn(
                    self.samples, weight.shape[1], dtype=weight.dtype, device=weight.device
                )
                rate = self.rate
                if rate is None:
                    rate = min(1.0, 0.08 * (self.samples - 1) / (weight.shape[1] + 1))
                feedback.lerp_(mirrored(weight, noise).view_as(feedback), rate)


def mirrored(weight: Tensor, noise: Tensor) -> Tensor:
    """Return (y - ȳ)ᵀ(ξ - ξ̄)/(M - 1) with y = ξ Wᵀ. The result has the shape of W.

    weight: W, (d_out, d_in).
    noise: ξ, (M, d_in).
    """
    centred = noise - noise.mean(0)
    y = noise @ weight.T
    return (y - y.mean(0)).T @ centred / (len(noise) - 1)
