"""The trace of one forward pass, in segments between the cuts, and the way of the error signals down through them."""

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
    """The blocks between two cuts, which one call of autograd goes down through.

    first, last: its blocks, counted from 1, with L for the head. top: where a gradient at h_last (or at the logits)
    enters the graph. leak: a leaf in h_{first-1}'s place that a leaking block reads beside the detached one, or None.
    """

    first: int
    last: int
    top: GradientEdge
    parameters: list[nn.Parameter]
    leak: Tensor | None


@dataclass
class Trace:
    """One forward pass. Index i-1 holds what belongs to block i.

    outputs[i-1]: h_i where the graph is cut behind it, until its signal is formed; None elsewhere, so that its memory
    is free once it is read. segments: those that learn, from the lowest up. transpose: what its signals pass the weight
    layers through, if not W. Only if the trace was kept, all of the outputs, and: preactivations[i-1]: where a_i is in
    the graph, which need not hold its values; inputs[i-1]: the tensors through which block i depends on h_{i-1}, that
    is h_{i-1} itself, or behind a cut a detached leaf (two where the block leaks); inputs[L-1] is what the head read.
    """

    cuts: frozenset[int]
    kept: bool
    transpose: Transpose | None = None
    logits: Tensor = field(init=False)
    outputs: list[Tensor | None] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    preactivations: list[GradientEdge] = field(default_factory=list)
    inputs: list[tuple[Tensor, ...]] = field(default_factory=list)

    def output(self, i: int) -> Tensor:
        """h_i, detached: of a cut whose signal has not been formed, or of a kept trace."""
        h = self.outputs[i - 1]
        assert h is not None, "it is kept until its signal is formed"
        return h.detach()

    def as_backprop(self) -> AbstractContextManager[object]:
        """The context in which every signal through this graph is transposed with W."""
        return nullcontext() if self.transpose is None else self.transpose.backprop()

    def backward(
        self, signal: Callable[[int, "Trace", Tensor, Tensor], Tensor], error: Tensor, target: Tensor
    ) -> list[Tensor | None]:
        """Send every error signal down its segment, the highest first: inside each block, across no cut.

        signal(i, trace, error, target): gives the gradient at h_i, and is asked for it when the segments above are
        done, so that their memory is free. error: e = ∂ℒ/∂a_L, (N, K). Sets `.grad` of the parameters of all
        segments, and computes no gradient of a segment's input where nobody reads it. Of a kept trace the graph stays
        for a reader, and the applied δ_1 … δ_{L-1} are returned, None where no signal came. Of another nothing is, and
        an output is let go of once its signal is formed.
        """
        deltas: list[Tensor | None] = [None] * len(self.preactivations)
        start, leaked = error, None
        for segment in reversed(self.segments):
            if segment.last <= len(self.outputs):
                start = self._awaited(segment, partial(signal, segment.last, self, error, target), leaked)
            inside = slice(segment.first - 1, segment.last)
            leak = [] if segment.leak is None else [segment.leak]
            # not `backward(inputs=…)`: that leaves hooks on every a_i, which later readers of the graph would set off
            wanted: Any = [*segment.parameters, *leak, *self.preactivations[inside]]
            found = torch.autograd.grad([segment.top], wanted, [start], retain_graph=self.kept, allow_unused=True)
            for parameter, gradient in zip(segment.parameters, found, strict=False):
                parameter.grad = gradient
            below = found[len(segment.parameters) :]
            leaked = below[0] if leak else None
            deltas[inside] = below[len(leak) :]
        return deltas

    def _awaited(self, segment: Segment, signal: Callable[[], Tensor], leaked: Tensor | None) -> Tensor:
        """What to start autograd with at a segment's top: nothing yet, in whose place the signal comes when it begins.

        So it is autograd that holds the signal, and lets go of it as soon as it is used: as large as h_i, it would
        otherwise be there for the whole of the way down.
        """
        h = self.outputs[segment.last - 1]
        assert h is not None, "it is kept until its signal is formed"

        def put(nothing: Tensor) -> Tensor:
            hook.remove()  # later readers of the graph come with signals of their own
            gradient = signal() if leaked is None else signal() + leaked
            if not self.kept:
                self.outputs[segment.last - 1 :] = [None] * (len(self.outputs) - segment.last + 1)
            return gradient.to(nothing.dtype)

        hook = h.register_hook(put)
        return h.new_zeros(()).expand_as(h)
