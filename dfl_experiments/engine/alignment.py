"""How well a method's error signals point where BP's would: a reader of the trace, never a mode of a method."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.method import Method
from dfl_experiments.engine.quantities import Measurement, exact_type, measure_more
from dfl_experiments.engine.trace import Trace

CACHED_NUMBERS = 2**16  # of each signal, as float64 half a megabyte
QUANTITIES = ("cosine_sample", "cosine_batch", "norm", "norm_bp", "zeros")


def quantity_names(depth: int, more: Sequence[str] = ()) -> list[str]:
    """Every hidden layer's `QUANTITIES`, and more, of a net of L layers, by layers: `cosine_sample/1` and so on."""
    return [f"{name}/{i}" for i in range(1, depth) for name in (*QUANTITIES, *more)]


def backprop_deltas(trace: Trace, error: Tensor, known: Sequence[Tensor] = ()) -> list[Tensor]:
    """δ_1^BP … δ_{L-1}^BP at the weights and the batch of the trace, each shaped like a_i.

    error: e, (N, K). known: those of the highest layers that are there already, from the lowest up.

    A chain of block-local vector-Jacobian products on the graph that exists already (Eq. 7 read from the top):
    no second forward pass, no second update of batch statistics, no `.grad` touched. The trace must have been kept.
    """
    roots = [*trace.preactivations, trace.logits]
    outputs = [h for h in trace.outputs if h is not None]
    deltas = [error, *reversed(known)]
    with trace.as_backprop():
        for i in range(len(outputs) - len(known), 0, -1):
            read = torch.autograd.grad(roots[i], trace.inputs[i], deltas[-1], retain_graph=True)
            signal = read[0] if len(read) == 1 else read[0] + read[1]
            deltas += torch.autograd.grad(outputs[i - 1], trace.preactivations[i - 1], signal, retain_graph=True)
    return deltas[:0:-1]


def gram(delta: Tensor | None, reference: Tensor) -> Tensor:
    """⟨δ_n, δ_n⟩, ⟨δ_n, r_n⟩ and ⟨r_n, r_n⟩ of every sample n, (N, 2, 2), from signals (N, …).

    In float64: a confidently classified sample's signal may be 1e-25, whose square float32 cannot hold (MPS has no
    float64 and does with what it has). On a CPU a few samples at a time, whose copies then stay in the cache.
    """
    reference = reference.detach()
    delta = torch.zeros_like(reference) if delta is None else delta.detach()
    if reference.dim() == 4 and reference.is_contiguous(memory_format=torch.channels_last):
        reference, delta = reference.movedim(1, 3), delta.movedim(1, 3)  # as they lie in memory
    reference, delta = reference.flatten(1), delta.flatten(1)
    count, numbers = delta.shape
    rows = max(1, CACHED_NUMBERS // numbers) if delta.device.type == "cpu" else count
    pair = torch.empty(min(rows, count), 2, numbers, dtype=exact_type(delta), device=delta.device)
    products = []
    for some_d, some_r in zip(delta.split(rows), reference.split(rows), strict=True):
        some = pair[: len(some_d)]
        some[:, 0], some[:, 1] = some_d, some_r
        products.append(some @ some.mT)
    return torch.cat(products)


def compare(deltas: Sequence[Tensor | None], references: Sequence[Tensor]) -> Tensor:
    """The `QUANTITIES` of every layer, (L-1, 5): cosines, Frobenius norms of both signals, and samples left out.

    deltas: the signals a method applied, None where it sent none; references: BP's. All (N, …).
    cosine_sample = mean over samples n of ⟨δ_n, r_n⟩ / (‖δ_n‖ ‖r_n‖), where samples with a signal of exactly zero on
    either side are left out and counted; NaN if none is left. cosine_batch = ⟨δ, r⟩ / (‖δ‖ ‖r‖) over all N·d numbers.
    """
    grams = torch.stack([gram(delta, reference) for delta, reference in zip(deltas, references, strict=True)])
    dd, dot, rr = grams[..., 0, 0], grams[..., 0, 1], grams[..., 1, 1]
    present = (dd != 0) & (rr != 0)
    cosine = torch.where(present, dot / (dd.sqrt() * rr.sqrt()), 0.0)
    d_norm, r_norm, count = dd.sum(1).sqrt(), rr.sum(1).sqrt(), present.sum(1)
    found = [cosine.sum(1) / count, dot.sum(1) / (d_norm * r_norm), d_norm, r_norm, present.shape[1] - count.to(dot)]
    return torch.stack(found, dim=1).to(torch.promote_types(references[0].dtype, torch.float32))


@torch.no_grad()
def measure(
    net: BlockNet,
    method: Method,
    trace: Trace,
    applied: Sequence[Tensor | None],
    error: Tensor,
    more: Sequence[str] = (),
) -> Tensor:
    """`QUANTITIES` of every layer, and more of those in `quantities.MORE`, in the order of `quantity_names`.

    applied: δ_1 … δ_{L-1} as the kept trace's `backward` returned them. Those that are BP's by the method's own word
    are not computed again.
    """
    references = backprop_deltas(trace, error, [d for d in applied[method.exact_from - 1 :] if d is not None])
    measured = compare(applied, references)
    if more:
        found = [measure_more(more, Measurement(net, method, trace, i, r)) for i, r in enumerate(references, start=1)]
        measured = torch.cat([measured, torch.stack(found).to(measured)], dim=1)
    return measured.flatten()
