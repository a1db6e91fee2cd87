"""How well a method's error signals point where BP's would: a reader of the trace, never a mode of a method."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.method import Method
from dfl_experiments.engine.quantities import Measurement, exact_type, measure_more
from dfl_experiments.engine.trace import Trace
from dfl_experiments.measured import QUANTITIES

CACHED_NUMBERS = 2**16  # of each signal, as float64 half a megabyte
TF32_EPS = 2.0**-10
LONG = 4096  # numbers of a sample, from which on a GPU takes dots


def quantity_names(depth: int, more: Sequence[str] = ()) -> list[str]:
    """Every hidden layer's `QUANTITIES`, and more, of a net of L layers, by layers: `cosine_sample/1` and so on."""
    return [f"{name}/{i}" for i in range(1, depth) for name in (*QUANTITIES, *more)]


def backprop_signals(
    trace: Trace, error: Tensor, known: Sequence[Tensor] = (), last: bool = False
) -> Iterator[tuple[int, Tensor]]:
    """(i, δ_i^BP), i = L-1 … 1, at the weights and the batch of the trace, each δ_i shaped like a_i.

    error: e, (N, K). known: those of the highest layers that are there already, from the lowest up. last: nobody reads
    the trace afterwards, so what is done with is let go of on the way.

    A chain of block-local vector-Jacobian products on the graph that exists already (Eq. 7 read from the top):
    no second forward pass, no second update of batch statistics, no `.grad` touched. The trace must have been kept.
    """
    count, delta = len(trace.preactivations), error
    lowest_known = count - len(known) + 1
    for i in range(count, 0, -1):
        if i >= lowest_known:
            delta = known[i - lowest_known]
        else:
            root = trace.logits if i == count else trace.preactivations[i]
            h = trace.outputs[i - 1]
            assert h is not None, "the trace was kept"
            with trace.as_backprop():
                read = torch.autograd.grad(root, trace.inputs[i], delta, retain_graph=not last)
                signal = read[0] if len(read) == 1 else read[0] + read[1]
                (delta,) = torch.autograd.grad(h, trace.preactivations[i - 1], signal, retain_graph=not last)
            del root, h, read, signal
        if last:
            del trace.inputs[i:], trace.preactivations[i:]
        yield i, delta
        if last:
            del trace.outputs[i - 1 :]


def backprop_deltas(trace: Trace, error: Tensor) -> list[Tensor]:
    """δ_1^BP … δ_{L-1}^BP of `backprop_signals`."""
    return [delta for _, delta in backprop_signals(trace, error)][::-1]


def gram(delta: Tensor | None, reference: Tensor) -> Tensor:
    """⟨δ_n, δ_n⟩, ⟨δ_n, r_n⟩ and ⟨r_n, r_n⟩ of every sample n, (N, 2, 2), from signals (N, …).

    In float64: a confidently classified sample's signal may be 1e-25, whose square float32 cannot hold (MPS has no
    float64 and does with what it has).
    """
    compared = torch.zeros_like(reference) if delta is None else delta
    signals = [reference] if delta is reference else [compared, reference]  # a signal that is BP's own is compared once
    signals = [signal.detach() for signal in signals]
    if reference.dim() == 4 and reference.is_contiguous(memory_format=torch.channels_last):
        signals = [signal.movedim(1, 3) for signal in signals]  # as they lie in memory
    signals = [signal.flatten(1) for signal in signals]
    is_long = reference.device.type != "cpu" and signals[0].shape[1] > LONG
    return (by_dots(signals) if is_long else by_products(signals)).expand(len(reference), 2, 2)


def by_dots(signals: Sequence[Tensor]) -> Tensor:
    """(N, S, S) of one or two signals (N, d), dot by dot: of long ones, a third of a GPU's time for a product."""
    first, last = (signals[k].to(exact_type(signals[k])) for k in (0, -1))
    dot = torch.linalg.vecdot(first, last)
    if len(signals) == 1:
        return dot[:, None, None]
    dots = torch.linalg.vecdot(first, first), dot, dot, torch.linalg.vecdot(last, last)
    return torch.stack(dots, 1).unflatten(1, (2, 2))


def by_products(signals: Sequence[Tensor]) -> Tensor:
    """The same as a product of matrices for each sample: on a CPU a few at a time, whose copies stay in the cache."""
    count, numbers = signals[0].shape
    rows = max(1, CACHED_NUMBERS // numbers) if signals[0].device.type == "cpu" else count
    shape = (min(rows, count), len(signals), numbers)
    pair = torch.empty(shape, dtype=exact_type(signals[0]), device=signals[0].device)
    products = []
    for parts in zip(*(signal.split(rows) for signal in signals), strict=True):
        some = pair[: len(parts[0])]
        for k, part in enumerate(parts):
            some[:, k] = part
        products.append(some @ some.mT)
    return torch.cat(products)


def compare(grams: Tensor, is_rounding: Tensor) -> Tensor:
    """The `QUANTITIES` of every layer, (L-1, 5): cosines, Frobenius norms of both signals, and samples left out.

    grams: of the signals a method applied and of BP's, see `gram`; (L-1, N, 2, 2). is_rounding: see `only_rounding`.
    cosine_sample = mean over samples n of ⟨δ_n, r_n⟩ / (‖δ_n‖ ‖r_n‖), where samples with a signal of zero on either
    side, exactly or but for rounding, are left out and counted; NaN if none is left. cosine_batch = ⟨δ, r⟩ / (‖δ‖ ‖r‖)
    over all N·d numbers.
    """
    dd, dot, rr = grams[..., 0, 0], grams[..., 0, 1], grams[..., 1, 1]
    present = (dd != 0) & (rr != 0) & ~is_rounding
    cosine = torch.where(present, dot / (dd.sqrt() * rr.sqrt()), 0.0)
    d_norm, r_norm, count = dd.sum(1).sqrt(), rr.sum(1).sqrt(), present.sum(1)
    found = [cosine.sum(1) / count, dot.sum(1) / (d_norm * r_norm), d_norm, r_norm, present.shape[1] - count.to(dot)]
    return torch.stack(found, dim=1)


def relative_rounding(error: Tensor, product: torch.dtype) -> float:
    """Return the size of B e relative to ‖B‖ ‖e‖ under which all of it may be rounding: of e, and of a sum of K terms.

    error: e, (N, K); product: the type in which e meets B.
    """
    relative = error.shape[1] * torch.finfo(error.dtype).eps
    if torch.finfo(product).bits < torch.finfo(error.dtype).bits:
        relative += torch.finfo(product).eps
    if error.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
        relative += TF32_EPS
    return relative


def only_rounding(method: Method, trace: Trace, error: Tensor, grams: Tensor) -> Tensor:
    """Return which samples' applied signals are nothing but rounding, (L-1, N).

    e sums to zero in every sample, so B e is exactly zero where B's entries are alike (two signs, two classes), and
    rounding is left of it. A signal counts as rounding if ‖δ_n‖ ≤ ε ‖B‖ ‖e_n‖, with ε of `relative_rounding`, and so do
    those that come down from it.
    """
    relative = relative_rounding(error, error.dtype if method.cuts else trace.logits.dtype)
    none = torch.zeros(len(error), dtype=torch.bool, device=error.device)
    found = [none]
    for i in range(len(grams), 0, -1):
        norm = method.feedback_norm(i)
        if norm is not None:
            limits = error.to(grams.dtype).square().sum(1) * (relative * norm.to(grams.dtype)).square()
            found.append(grams[i - 1, :, 0, 0] <= limits)
        else:
            found.append(none if i in method.cuts else found[-1])
    return torch.stack(found[:0:-1])


@torch.no_grad()
def measure(
    net: BlockNet,
    method: Method,
    trace: Trace,
    applied: list[Tensor | None],
    error: Tensor,
    more: Sequence[str] = (),
    last: bool = False,
) -> Tensor:
    """`QUANTITIES` of every layer, and more of those in `quantities.MORE`, in the order of `quantity_names`.

    applied: δ_1 … δ_{L-1} as the kept trace's `backward` returned them. Those that are BP's by the method's own word
    are not computed again. last: nobody reads the trace or what was applied afterwards.
    """
    known = [d for d in applied[method.exact_from - 1 :] if d is not None]
    grams, others = [], []
    for i, reference in backprop_signals(trace, error, known, last):
        grams.append(gram(applied[i - 1], reference))
        others.append(measure_more(more, Measurement(net, method, trace, i, reference)) if more else None)
        if last:
            applied[i - 1] = None
            del known[i - method.exact_from :]
    stacked = torch.stack(grams[::-1])
    measured = compare(stacked, only_rounding(method, trace, error, stacked))
    if more:
        measured = torch.cat([measured, torch.stack([other for other in others[::-1] if other is not None])], dim=1)
    return measured.flatten().to(torch.promote_types(error.dtype, torch.float32))
