"""The trace of one forward pass, in segments between the cuts, and its backward pass."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from dfl_experiments.engine.transpose import Transpose


@dataclass
class Segment:
    """The blocks between two cuts. One call of autograd computes their gradients."""

    first: int
    """Lowest block, counted from 1."""
    last: int
    """Highest block; L for the head."""
    top: GradientEdge
    """Edge of the graph for the gradient at h_last, or at the logits."""
    parameters: list[nn.Parameter]
    """Parameters of these blocks that learn."""
    leak: Tensor | None
    """Second input of a leaking block: h_{first-1} as a leaf that gets a gradient; None without a leak."""


@dataclass
class Trace:
    """One forward pass. In the lists, index i-1 belongs to block i."""

    cuts: frozenset[int]
    """Boundaries i where block i+1 reads a detached h_i."""
    kept: bool
    """The graph remains after `backward`, for a later reader."""
    x: Tensor
    """Input of the network, (N, *h_0)."""
    transpose: Transpose | None = None
    """Feedback weights that replace Wᵀ in the backward pass; None for Wᵀ."""
    logits: Tensor = field(init=False)
    """a_L, (N, K)."""
    outputs: list[Tensor | None] = field(default_factory=list)
    """h_i at a cut until its signal is formed, and all h_i of a kept trace; else None, which frees the memory."""
    segments: list[Segment] = field(default_factory=list)
    """The segments that learn, the lowest first."""
    preactivations: list[GradientEdge] = field(default_factory=list)
    """For a kept trace: the edge of the graph for the gradient at a_i."""
    inputs: list[tuple[Tensor, ...]] = field(default_factory=list)
    """For a kept trace: what block i (the head for i = L) read: h_{i-1}, or after a cut one leaf, two with a leak."""

    def output(self, i: int) -> Tensor:
        """Return h_i, detached: at a cut before its signal is formed, or of a kept trace."""
        h = self.outputs[i - 1]
        assert h is not None, "it is kept until its signal is formed"
        return h.detach()

    def as_backprop(self) -> AbstractContextManager[object]:
        """Return the context in which signals through this graph pass Wᵀ, as in backpropagation."""
        return nullcontext() if self.transpose is None else self.transpose.backprop()

    def backward(
        self, signal: Callable[[int, "Trace", Tensor, Tensor], Tensor], error: Tensor, target: Tensor
    ) -> list[Tensor | None]:
        """Set `.grad` of the parameters of all segments, the highest segment first. No gradient crosses a cut.

        signal(i, trace, error, target): returns the gradient at h_i. It is called when the segments above are done, so
            that their memory is free.
        error: e = ∂ℒ/∂a_L, (N, K).
        target: labels, (N,).
        Returns the applied δ_1 … δ_{L-1} of a kept trace, None for a layer without a signal; else an empty list.
        """
        deltas: list[Tensor | None] = [None] * len(self.preactivations)
        start, leaked = error, None
        for segment in reversed(self.segments):
            if segment.last <= len(self.outputs):
                start = self._placeholder(segment, partial(signal, segment.last, self, error, target), leaked)
            inside = slice(segment.first - 1, segment.last)
            leak = [] if segment.leak is None else [segment.leak]
            # not `backward(inputs=…)`, which leaves a hook on every a_i for later readers of the graph
            wanted: Any = [*segment.parameters, *leak, *self.preactivations[inside]]
            gradients = torch.autograd.grad([segment.top], wanted, [start], retain_graph=self.kept, allow_unused=True)
            for parameter, gradient in zip(segment.parameters, gradients, strict=False):
                parameter.grad = gradient
            below = gradients[len(segment.parameters) :]
            leaked = below[0] if leak else None
            deltas[inside] = below[len(leak) :]
        return deltas

    def _placeholder(self, segment: Segment, signal: Callable[[], Tensor], leaked: Tensor | None) -> Tensor:
        """Return zeros without memory, which a hook replaces by the signal when autograd starts with them.

        So autograd alone holds the signal, and frees it after its use. The signal is as large as h_i.

        signal: returns the gradient at the segment's top. leaked: gradient that a leak adds to it.
        """
        h = self.outputs[segment.last - 1]
        assert h is not None, "it is kept until its signal is formed"

        def replace(placeholder: Tensor) -> Tensor:
            hook.remove()  # later readers of the graph have signals of their own
            gradient = signal() if leaked is None else signal() + leaked
            if not self.kept:
                self.outputs[segment.last - 1 :] = [None] * (len(self.outputs) - segment.last + 1)
            return gradient.to(placeholder.dtype)

        hook = h.register_hook(replace)
        return h.new_zeros(()).expand_as(h)
