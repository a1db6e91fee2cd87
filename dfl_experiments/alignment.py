"""How well a method's error signals point where BP's would: a reader of the trace, never a mode of a method."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dfl_experiments.blocknet import Trace

QUANTITIES = ("cosine_sample", "cosine_batch", "norm", "norm_bp", "zeros")


def backprop_deltas(trace: Trace, error: Tensor) -> list[Tensor]:
    """δ_1^BP … δ_{L-1}^BP at the weights and the batch of the trace, each shaped like a_i. error: e, (N, K).

    A chain of block-local vector-Jacobian products on the graph that exists already (Eq. 7 read from the top):
    no second forward pass, no second update of batch statistics, no `.grad` touched. The trace must have been kept.
    """
    roots = [*trace.preactivations, trace.logits]
    deltas = [error]
    for i in range(len(trace.outputs), 0, -1):
        read = torch.autograd.grad(roots[i], trace.inputs[i], deltas[-1], retain_graph=True)
        signal = read[0] if len(read) == 1 else read[0] + read[1]
        deltas += torch.autograd.grad(trace.outputs[i - 1], trace.preactivations[i - 1], signal, retain_graph=True)
    return deltas[:0:-1]


def _scaled(signal: Tensor) -> tuple[Tensor, Tensor]:
    """Each sample's signal, (N, d), over its own largest magnitude, and that magnitude, (N,); zero stays zero.

    A confidently classified sample's signal may be 1e-25, or 1e+24 times smaller than its neighbour's: unscaled, the
    squares of float32 numbers would underflow.
    """
    largest = torch.linalg.vector_norm(signal, torch.inf, dim=1)
    return signal / torch.where(largest == 0, 1.0, largest)[:, None], largest


def compare(delta: Tensor | None, reference: Tensor) -> Tensor:
    """The `QUANTITIES` of one layer, (5,): cosines, Frobenius norms of both signals, and samples left out.

    delta: the signal a method applied, None if it sent none; reference: BP's. Both (N, …).
    cosine_sample = mean over samples n of ⟨δ_n, r_n⟩ / (‖δ_n‖ ‖r_n‖), where samples with a signal of exactly zero on
    either side are left out and counted; NaN if none is left. cosine_batch = ⟨δ, r⟩ / (‖δ‖ ‖r‖) over all N·d numbers.
    """
    reference = reference.detach().flatten(1)
    delta = torch.zeros_like(reference) if delta is None else delta.detach().flatten(1)
    (d, d_size), (r, r_size) = _scaled(delta), _scaled(reference)
    dot, dd, rr = ((u[:, None] @ v[:, :, None]).flatten() for u, v in ((d, r), (d, d), (r, r)))
    present = (d_size != 0) & (r_size != 0)
    cosine = torch.where(present, dot / (dd.sqrt() * rr.sqrt()), 0.0)
    d_top, r_top = d_size.amax(), r_size.amax()
    d_part, r_part = d_size / torch.where(d_top == 0, 1.0, d_top), r_size / torch.where(r_top == 0, 1.0, r_top)
    d_norm, r_norm = (dd * d_part.square()).sum().sqrt(), (rr * r_part.square()).sum().sqrt()
    return torch.stack([
        cosine.sum() / present.sum(),
        (dot * d_part * r_part).sum() / (d_norm * r_norm),
        d_norm * d_top,
        r_norm * r_top,
        (~present).sum().to(dot),
    ])  # fmt: skip


@torch.no_grad()
def measure(trace: Trace, applied: Sequence[Tensor | None], error: Tensor) -> Tensor:
    """`QUANTITIES` of every layer, (L-1, 5). applied: δ_1 … δ_{L-1} as `trace.backward(..., keep=True)` returned them.

    Where nothing was cut, what autograd applied is BP's own signal, and there is nothing to compute a second time.
    """
    references = backprop_deltas(trace, error) if trace.cuts else [d for d in applied if d is not None]
    return torch.stack([compare(d, r) for d, r in zip(applied, references, strict=True)])
