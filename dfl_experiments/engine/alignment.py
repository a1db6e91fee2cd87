"""Compare the error signals that a method applied with those of backpropagation, on the same trace."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.method import Method
from dfl_experiments.engine.quantities import Measurement, exact, exact_type, measure_extra
from dfl_experiments.engine.trace import Trace
from dfl_experiments.measured import QUANTITIES

CACHED_NUMBERS = 2**16  # entries of each signal: half a megabyte as float64
TF32_EPS = 2.0**-10
LONG = 4096  # length of a sample's signal above which dot products are faster on a GPU


def quantity_names(depth: int, extra_quantities: Sequence[str] = ()) -> list[str]:
    """Return the names of `QUANTITIES`, then `extra_quantities`, for every hidden layer: `cosine_sample/1`, …

    depth: L.
    """
    return [f"{name}/{i}" for i in range(1, depth) for name in (*QUANTITIES, *extra_quantities)]


def backprop_signals(
    trace: Trace, error: Tensor, known: Sequence[Tensor] = (), last: bool = False
) -> Iterator[tuple[int, Tensor]]:
    """Yield (i, δ_i^BP) for i = L-1 … 1, at the weights and the batch of the trace; δ_i has the shape of a_i.

    One vector-Jacobian product per block on the existing graph (Eq. 7 from the top): no second forward pass, no second
    update of batch statistics, no change of `.grad`.

    trace: a kept one.
    error: e, (N, K).
    known: the signals of the highest layers, from the lowest of them up, if they have been computed already.
    last: no later caller reads the trace, so its parts are released on the way.
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
    """Return δ_1^BP … δ_{L-1}^BP (see `backprop_signals`)."""
    return [delta for _, delta in backprop_signals(trace, error)][::-1]


def signal_products(delta: Tensor | None, reference: Tensor) -> Tensor:
    """Return [[⟨δ_n, δ_n⟩, ⟨δ_n, r_n⟩], [⟨δ_n, r_n⟩, ⟨r_n, r_n⟩]] of every sample n, (N, 2, 2).

    In float64, except on MPS: the signal of a confidently classified sample may be 1e-25, and float32 cannot hold its
    square.

    delta: δ, (N, …), the applied signal; None for zero. reference: r, the signal of BP, of the same shape.
    """
    compared = torch.zeros_like(reference) if delta is None else delta
    signals = [reference] if delta is reference else [compared, reference]
    signals = [signal.detach() for signal in signals]
    if reference.dim() == 4 and reference.is_contiguous(memory_format=torch.channels_last):
        signals = [signal.movedim(1, 3) for signal in signals]  # in the order of their memory
    signals = [signal.flatten(1) for signal in signals]
    is_long = reference.device.type != "cpu" and signals[0].shape[1] > LONG
    return (by_dots(signals) if is_long else by_products(signals)).expand(len(reference), 2, 2)


def by_dots(signals: Sequence[Tensor]) -> Tensor:
    """Return all inner products of S = 1 or 2 signals (N, d), (N, S, S), each as a dot product.

    For long signals a GPU needs a third of the time of `by_products`.
    """
    first, last = exact(signals[0]), exact(signals[-1])
    dot = torch.linalg.vecdot(first, last)
    if len(signals) == 1:
        return dot[:, None, None]
    dots = torch.linalg.vecdot(first, first), dot, dot, torch.linalg.vecdot(last, last)
    return torch.stack(dots, 1).unflatten(1, (2, 2))


def by_products(signals: Sequence[Tensor]) -> Tensor:
    """Return the same as `by_dots`, as one matrix product per sample.

    On a CPU it goes through the samples in groups whose copies fit into the cache.
    """
    count, length = signals[0].shape
    rows = max(1, CACHED_NUMBERS // length) if signals[0].device.type == "cpu" else count
    shape = (min(rows, count), len(signals), length)
    pair = torch.empty(shape, dtype=exact_type(signals[0]), device=signals[0].device)
    products = []
    for parts in zip(*(signal.split(rows) for signal in signals), strict=True):
        group = pair[: len(parts[0])]
        for k, part in enumerate(parts):
            group[:, k] = part
        products.append(group @ group.mT)
    return torch.cat(products)


def compare(products: Tensor, is_rounding: Tensor) -> Tensor:
    """Return the `QUANTITIES` of every layer, (L-1, 5).

    cosine_sample: mean over samples n of ⟨δ_n, r_n⟩ / (‖δ_n‖ ‖r_n‖), without samples where δ_n or r_n is zero or δ_n is
        nothing but rounding; NaN without samples.
    cosine_batch: ⟨δ, r⟩ / (‖δ‖ ‖r‖) over all N·d entries.
    norm, norm_bp: ‖δ‖ and ‖r‖, Frobenius norms.
    zeros: the number of samples that cosine_sample omits.

    products: see `signal_products`, (L-1, N, 2, 2). is_rounding: see `only_rounding`, (L-1, N).
    """
    dd, dot, rr = products[..., 0, 0], products[..., 0, 1], products[..., 1, 1]
    present = (dd != 0) & (rr != 0) & ~is_rounding
    cosine = torch.where(present, dot / (dd.sqrt() * rr.sqrt()), 0.0)
    d_norm, r_norm = dd.sum(1).sqrt(), rr.sum(1).sqrt()
    count = present.sum(1)
    batch_cosine = dot.sum(1) / (d_norm * r_norm)
    zeros = present.shape[1] - count.to(dot)
    return torch.stack([cosine.sum(1) / count, batch_cosine, d_norm, r_norm, zeros], dim=1)


def relative_rounding(error: Tensor, product: torch.dtype) -> float:
    """Return ε: where ‖B e‖ ≤ ε ‖B‖ ‖e‖, B e may be nothing but the rounding of e and of a sum of K terms.

    error: e, (N, K). product: the type in which B e is computed.
    """
    relative = error.shape[1] * torch.finfo(error.dtype).eps
    if torch.finfo(product).bits < torch.finfo(error.dtype).bits:
        relative += torch.finfo(product).eps
    if error.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
        relative += TF32_EPS
    return relative


def only_rounding(method: Method, trace: Trace, error: Tensor, products: Tensor) -> Tensor:
    """Return for each layer and sample whether the applied signal is nothing but rounding, (L-1, N).

    e sums to zero in every sample, so B e is zero, but for rounding, where the entries of a row of B are equal (for
    example two classes and one sign). A signal counts as rounding if ‖δ_n‖ ≤ ε ‖B‖ ‖e_n‖, with ε of
    `relative_rounding`, or if the signal that it was computed from does.

    error: e, (N, K). products: see `signal_products`, (L-1, N, 2, 2).
    """
    relative = relative_rounding(error, error.dtype if method.cuts else trace.logits.dtype)
    none = torch.zeros(len(error), dtype=torch.bool, device=error.device)
    is_rounding = [none]  # the first entry is for e, the next for the highest layer
    for i in range(len(products), 0, -1):
        norm = method.feedback_norm(i)
        if norm is not None:
            largest = relative * norm.to(products.dtype)
            limits = error.to(products.dtype).square().sum(1) * largest.square()
            is_rounding.append(products[i - 1, :, 0, 0] <= limits)
        else:
            is_rounding.append(none if i in method.cuts else is_rounding[-1])
    return torch.stack(is_rounding[:0:-1])


@torch.no_grad()
def measure(
    net: BlockNet,
    method: Method,
    trace: Trace,
    applied: list[Tensor | None],
    error: Tensor,
    extra_quantities: Sequence[str] = (),
    last: bool = False,
) -> Tensor:
    """Return `QUANTITIES` and `extra_quantities` of every layer, in the order of `quantity_names`.

    trace: a kept one, after its `backward`.
    applied: δ_1 … δ_{L-1} as `backward` returned them. From `method.exact_from` on they are those of BP.
    error: e, (N, K).
    extra_quantities: names from `measured.EXTRA_QUANTITIES`.
    last: no later caller reads the trace or `applied`, so their parts are released on the way.
    """
    known = [d for d in applied[method.exact_from - 1 :] if d is not None]
    all_products, all_extra = [], []
    for i, reference in backprop_signals(trace, error, known, last):
        all_products.append(signal_products(applied[i - 1], reference))
        if extra_quantities:
            all_extra.append(measure_extra(extra_quantities, Measurement(net, method, trace, i, reference)))
        if last:
            applied[i - 1] = None
            del known[i - method.exact_from :]
    products = torch.stack(all_products[::-1])
    measured = compare(products, only_rounding(method, trace, error, products))
    if extra_quantities:
        measured = torch.cat([measured, torch.stack(all_extra[::-1])], dim=1)
    return measured.flatten().to(torch.promote_types(error.dtype, torch.float32))
