"""Compare the error signals of a method with those of backpropagation, on the same trace."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.method import Method
from dfl_experiments.engine.quantities import Measurement, exact, exact_type, measure_extra
from dfl_experiments.engine.trace import Trace
from dfl_experiments.measured import QUANTITIES

CACHED_NUMBERS = 2**16  # entries of a signal that are converted at once: half a megabyte in float64
TF32_EPS = 2.0**-10
LONG = 4096  # number of entries per sample above which `by_dots` is faster on a GPU


def quantity_names(depth: int, extra_quantities: Sequence[str] = ()) -> list[str]:
    """Return the column names of all quantities of all hidden layers: `cosine_sample/1`, …

    depth: L, the number of blocks.
    extra_quantities: quantities measured in addition to `QUANTITIES`.
    """
    return [f"{name}/{i}" for i in range(1, depth) for name in (*QUANTITIES, *extra_quantities)]


def backprop_signals(
    trace: Trace, error: Tensor, known: Sequence[Tensor] = (), last: bool = False
) -> Iterator[tuple[int, Tensor]]:
    """Yield (i, δ_i^BP) for i = L-1 … 1. Every δ_i^BP has the shape of a_i.

    δ_i^BP is the signal of backpropagation, for the same weights and the same batch as in the trace. Each block needs
    one vector-Jacobian product on the existing graph (Eq. 7). So there is no second forward pass, the batch statistics
    are not updated again, and `.grad` does not change.

    trace: must be kept (`trace.kept`).
    error: e, (N, K).
    known: δ_k^BP … δ_{L-1}^BP, the signals of the highest layers, if they are already computed.
    last: True if the trace is not needed afterwards. Then every part of the trace is released after its use.
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
                (delta,) = torch.autograd.grad(
                    h, trace.preactivations[i - 1], signal, retain_graph=not last
                )
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
    """Return the matrix [[⟨δ_n, δ_n⟩, ⟨δ_n, r_n⟩], [⟨δ_n, r_n⟩, ⟨r_n, r_n⟩]] for every sample n.

    The result has shape (N, 2, 2). The products are computed in float64 (on MPS in float32). The signal of a
    confidently classified sample may be as small as 1e-25. The square of this number would be zero in float32.

    delta: δ, (N, …), the applied signal; None for zero.
    reference: r, the signal of BP, in the same shape.
    """
    compared = torch.zeros_like(reference) if delta is None else delta
    signals = [reference] if delta is reference else [compared, reference]
    signals = [signal.detach() for signal in signals]
    if reference.dim() == 4 and reference.is_contiguous(memory_format=torch.channels_last):
        # memory order, so that `flatten` copies nothing
        signals = [signal.movedim(1, 3) for signal in signals]
    signals = [signal.flatten(1) for signal in signals]
    is_long = reference.device.type != "cpu" and signals[0].shape[1] > LONG
    return (by_dots(signals) if is_long else by_products(signals)).expand(len(reference), 2, 2)


def by_dots(signals: Sequence[Tensor]) -> Tensor:
    """Return the inner products of the signals in every sample, computed as dot products.

    The result has shape (N, S, S), where S is the number of signals. For long signals on a GPU, this function takes a
    third of the time of `by_products`.

    signals: one or two tensors of shape (N, d).
    """
    first, last = exact(signals[0]), exact(signals[-1])
    dot = torch.linalg.vecdot(first, last)
    if len(signals) == 1:
        return dot[:, None, None]
    dots = torch.linalg.vecdot(first, first), dot, dot, torch.linalg.vecdot(last, last)
    return torch.stack(dots, 1).unflatten(1, (2, 2))


def by_products(signals: Sequence[Tensor]) -> Tensor:
    """Return the same values as `by_dots`, computed as one matrix product per sample.

    On a CPU the samples are processed in groups, so that the float64 copies of a group fit into the cache.
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
    """Return the five `QUANTITIES` of every layer. The result has shape (L-1, 5).

    cosine_sample: mean of ⟨δ_n, r_n⟩ / (‖δ_n‖ ‖r_n‖) over the samples n. A sample is omitted if δ_n or r_n is zero, or
        if δ_n consists of rounding errors only. NaN if all samples are omitted.
    cosine_batch: ⟨δ, r⟩ / (‖δ‖ ‖r‖) over all N·d entries.
    norm, norm_bp: the Frobenius norms ‖δ‖ and ‖r‖.
    zeros: number of samples that cosine_sample omits.

    products: see `signal_products`, (L-1, N, 2, 2).
    is_rounding: see `only_rounding`, (L-1, N).
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
    """Return ε, the limit for rounding errors in B e.

    If ‖B e‖ ≤ ε ‖B‖ ‖e‖, then B e may consist of rounding errors only. The rounding errors come from e, and from the
    sum of K terms in every entry of B e.

    error: e, (N, K).
    product: data type in which B e is computed.
    """
    relative = error.shape[1] * torch.finfo(error.dtype).eps
    if torch.finfo(product).bits < torch.finfo(error.dtype).bits:
        relative += torch.finfo(product).eps
    if error.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
        relative += TF32_EPS
    return relative


def only_rounding(method: Method, trace: Trace, error: Tensor, products: Tensor) -> Tensor:
    """Return for each layer and each sample whether the applied signal consists of rounding errors only.

    The result has shape (L-1, N). The entries of e sum to zero in every sample. So the exact value of B e is zero for a
    unit whose K entries of B are equal. There are three cases:
    - A layer receives B e: its signal counts as rounding if ‖δ_n‖ ≤ ε ‖B‖ ‖e_n‖, with ε from `relative_rounding`.
    - A layer receives another signal at a cut: its signal never counts as rounding.
    - All other layers receive their signal from the layer above: the result is the same as for the layer above.

    error: e, (N, K).
    products: see `signal_products`, (L-1, N, 2, 2).
    """
    relative = relative_rounding(error, error.dtype if method.cuts else trace.logits.dtype)
    none = torch.zeros(len(error), dtype=torch.bool, device=error.device)
    is_rounding = [none]  # first entry: e; then one for each hidden layer, from the highest down
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
    """Return `QUANTITIES` and `extra_quantities` of every hidden layer, in the order of `quantity_names`.

    trace: must be kept (`trace.kept`), and its `backward` must have run.
    applied: the signals δ_1 … δ_{L-1}, as `backward` returned them. In layer `method.exact_from` and all layers above,
        δ_i equals δ_i^BP.
    error: e, (N, K).
    extra_quantities: names from `measured.EXTRA_QUANTITIES`.
    last: True if the trace and `applied` are not needed afterwards. Then every part of them is released after its use.
    """
    # `local_cosine` reads the layer above
    last = last and "local_cosine" not in extra_quantities
    known = [d for d in applied[method.exact_from - 1 :] if d is not None]
    all_products, all_extra = [], []
    above: Tensor | None = error
    for i, reference in backprop_signals(trace, error, known, last):
        all_products.append(signal_products(applied[i - 1], reference))
        if extra_quantities:
            layer = Measurement(net, method, trace, i, reference, above)
            all_extra.append(measure_extra(extra_quantities, layer))
            above = applied[i - 1]
        if last:
            applied[i - 1] = None
            del known[i - method.exact_from :]
    products = torch.stack(all_products[::-1])
    measured = compare(products, only_rounding(method, trace, error, products))
    if extra_quantities:
        measured = torch.cat([measured, torch.stack(all_extra[::-1])], dim=1)
    return measured.flatten().to(torch.promote_types(error.dtype, torch.float32))
