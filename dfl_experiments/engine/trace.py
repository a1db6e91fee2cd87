"""The trace of one forward pass, divided into segments by the cuts, and its backward pass."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from dfl_experiments.engine.transpose import Transpose
from dfl_experiments.errors import UserError


@dataclass
class Segment:
    """The blocks between two cuts. One call of autograd computes their gradients."""

    first: int
    """Lowest block, counted from 1."""
    last: int
    """Highest block; L for the head."""
    top: GradientEdge
    """Edge of the autograd graph where the gradient at h_last (or at the logits) enters."""
    parameters: list[nn.Parameter]
    """Trainable parameters of these blocks."""
    leak: Tensor | None
    """Second input of a block with a leak: h_{first-1}, as a leaf that gets a gradient; None without a leak."""


@dataclass
class Trace:
    """One forward pass. In the lists, index i-1 belongs to block i."""

    cuts: frozenset[int]
    """Boundaries i where block i+1 reads a detached h_i."""
    kept: bool
    """True: the graph remains after `backward`, to measure alignment."""
    x: Tensor
    """Input of the network, (N, *h_0)."""
    transpose: Transpose | None = None
    """Feedback weights that replace Wᵀ in the backward pass; None for Wᵀ."""
    logits: Tensor = field(init=False)
    """a_L, (N, K)."""
    outputs: list[Tensor | None] = field(default_factory=list)
    """h_i of every block. If the trace is not kept: None, except at a cut until the signal there is formed."""
    segments: list[Segment] = field(default_factory=list)
    """Segments that learn, from the lowest to the highest."""
    preactivations: list[GradientEdge] = field(default_factory=list)
    """In a kept trace: edge of the autograd graph where the gradient at a_i is read. Otherwise empty."""
    inputs: list[tuple[Tensor, ...]] = field(default_factory=list)
    """In a kept trace: input of block i (the head for i = L), h_{i-1}. After a cut: one leaf, or two with a leak."""

    def output(self, i: int) -> Tensor:
        """Return h_i, detached.

        A kept trace stores every h_i. Any other trace stores h_i only at a cut, until the signal at h_i is formed.
        """
        h = self.outputs[i - 1]
        assert h is not None, "h_i is stored until its signal is formed"
        return h.detach()

    def as_backprop(self) -> AbstractContextManager[object]:
        """Return a context in which signals through this graph pass Wᵀ in place of B, as in backpropagation."""
        return nullcontext() if self.transpose is None else self.transpose.backprop()

    def backward(
        self,
        signal: Callable[[int, "Trace", Tensor, Tensor], Tensor],
        error: Tensor,
        target: Tensor,
    ) -> list[Tensor | None]:
        """Set `.grad` of the parameters of all segments, the highest segment first. No gradient crosses a cut.

        signal(i, trace, error, target): function that returns the gradient at h_i. Before each call, the gradients of
            all segments above h_i are computed. The graph of these segments is then freed, except in a kept trace.
        error: e = ∂ℒ/∂a_L, (N, K).
        target: labels, (N,).
        Raises `UserError` if `signal` changes e.
        Returns the applied signals δ_1 … δ_{L-1}, with None for a layer without a signal. If the trace is not kept,
            the list is empty.
        """
        deltas: list[Tensor | None] = [None] * len(self.preactivations)
        start, leaked, version = error, None, error._version
        for segment in reversed(self.segments):
            if segment.last <= len(self.outputs):
                start = self._placeholder(
                    segment, partial(signal, segment.last, self, error, target), leaked
                )
            inside = slice(segment.first - 1, segment.last)
            leak = [] if segment.leak is None else [segment.leak]
            # Do not use `backward(inputs=…)`. It would leave a hook on every a_i that runs again in later passes.
            wanted: Any = [*segment.parameters, *leak, *self.preactivations[inside]]
            gradients = torch.autograd.grad(
                [segment.top], wanted, [start], retain_graph=self.kept, allow_unused=True
            )
            for parameter, gradient in zip(segment.parameters, gradients, strict=False):
                parameter.grad = gradient
            below = gradients[len(segment.parameters) :]
            leaked = below[0] if leak else None
            deltas[inside] = below[len(leak) :]
        if error._version != version:
            raise UserError(
                "method: changes e in place, but the lower layers and BP need it unchanged"
            )
        return deltas

    def _placeholder(
        self, segment: Segment, signal: Callable[[], Tensor], leaked: Tensor | None
    ) -> Tensor:
        """Return zeros that use no memory. Autograd starts with these zeros, and a hook replaces them by the signal.

        The signal is as large as h_i. Only autograd holds a reference to the signal, so autograd frees the signal after
        its use.

        signal: function that returns the gradient at the segment's top.
        leaked: gradient that a leak adds to the signal.
        """
        h = self.outputs[segment.last - 1]
        assert h is not None, "h_i is stored until its signal is formed"

        def replace(placeholder: Tensor) -> Tensor:
            hook.remove()  # it must not act in later backward passes, which use other signals
            gradient = signal()
            refuse_shape(f"the signal to h_{segment.last}", gradient, placeholder.shape)
            if leaked is not None:
                gradient = gradient + leaked
            if not self.kept:
                self.outputs[segment.last - 1 :] = [None] * (len(self.outputs) - segment.last + 1)
            return gradient.to(placeholder.dtype)

        hook = h.register_hook(replace)
        return h.new_zeros(()).expand_as(h)


def refuse_shape(name: str, value: Any, shape: torch.Size) -> None:
    """Raise `UserError` if a value that a method computed is not a tensor of the right shape.

    name: name of the value, for the message.
    """
    if not isinstance(value, Tensor) or value.shape != shape:
        kind = type(value).__name__
        found = f"has shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"is a {kind}"
        raise UserError(f"method: {name} must be a tensor of shape {tuple(shape)}, but {found}")
