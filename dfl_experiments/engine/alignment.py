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
    quantities = (*QUANTITIES, *extra_quantities)
    names = []
    for i in range(1, depth):
        names += [f"{quantity}/{i}" for quantity in quantities]
    return names


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
    top = len(trace.preactivations)
    lowest_known = top - len(known) + 1
    delta = error
    for i in range(top, 0, -1):
        if i >= lowest_known:
            delta = known[i - lowest_known]
        else:
            delta = _signal_below(trace, delta, i, is_top=i == top, keep=not last)
        if last:
            del trace.inputs[i:], trace.preactivations[i:]
        yield i, delta
        if last:
            del trace.outputs[i - 1 :]


def _signal_below(trace: Trace, delta: Tensor, i: int, is_top: bool, keep: bool) -> Tensor:
    """Return δ_i^BP. delta: δ_{i+1}^BP, or e at the top. keep: whether the graph is needed again."""
    root = trace.logits if is_top else trace.preactivations[i]
    h = trace.outputs[i - 1]
    assert h is not None, "the trace was kept"
    with trace.as_backprop():
        read = torch.autograd.grad(root, trace.inputs[i], delta, retain_graph=keep)
        signal = read[0] if len(read) == 1 else read[0] + read[1]
        a = trace.preactivations[i - 1]
        (below,) = torch.autograd.grad(h, a, signal, retain_graph=keep)
    return below


def backprop_deltas(trace: Trace, error: Tensor) -> list[Tensor]:
    """Return δ_1^BP … δ_{L-1}^BP (see `backprop_signals`)."""
    deltas = [delta for _, delta in backprop_signals(trace, error)]
    return deltas[::-1]


def signal_products(delta: Tensor | None, reference: Tensor) -> Tensor:
    """Return the matrix [[⟨δ_n, δ_n⟩, ⟨δ_n, r_n⟩], [⟨δ_n, r_n⟩, ⟨r_n, r_n⟩]] for every sample n.

    The result has shape (N, 2, 2). The products are computed in float64 (on MPS in float32). The signal of a
    confidently classified sample may be as small as 1e-25. The square of this number would be zero in float32.

    delta: δ, (N, …), the applied signal; None for zero.
    reference: r, the signal of BP, in the same shape.
    """
    if delta is None:
        delta = torch.zeros_like(reference)
    signals = [reference] if delta is reference else [delta, reference]
    signals = [signal.detach() for signal in signals]
    if reference.dim() == 4 and reference.is_contiguous(memory_format=torch.channels_last):
        # memory order, so that `flatten` copies nothing
        signals = [signal.movedim(1, 3) for signal in signals]
    signals = [signal.flatten(1) for signal in signals]
    is_long = signals[0].shape[1] > LONG
    is_on_cpu = reference.device.type == "cpu"
    products = by_dots(signals) if is_long and not is_on_cpu else by_products(signals)
    return products.expand(len(reference), 2, 2)


def by_dots(signals: Sequence[Tensor]) -> Tensor:
    """Return the inner products of the signals in every sample, computed as dot products.

    The result has shape (N, S, S), where S is the number of signals. For long signals on a GPU, this function takes a
    third of the time of `by_products`.

    signals: one or two tensors of shape (N, d).
    """
    first = exact(signals[0])
    last = exact(signals[-1])
    dot = torch.linalg.vecdot(first, last)
    if len(signals) == 1:
        return dot[:, None, None]
    first_square = torch.linalg.vecdot(first, first)
    last_square = torch.linalg.vecdot(last, last)
    products = torch.stack([first_square, dot, dot, last_square], 1)
    return products.unflatten(1, (2, 2))


def by_products(signals: Sequence[Tensor]) -> Tensor:
    """Return the same values as `by_dots`, computed as one matrix product per sample.

    On a CPU the samples are processed in groups, so that the float64 copies of a group fit into the cache.
    """
    device = signals[0].device
    count, length = signals[0].shape
    rows = max(1, CACHED_NUMBERS // length) if device.type == "cpu" else count
    shape = (min(rows, count), len(signals), length)
    copies = torch.empty(shape, dtype=exact_type(signals[0]), device=device)
    products = []
    groups = [signal.split(rows) for signal in signals]
    for parts in zip(*groups, strict=True):
        group = copies[: len(parts[0])]
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
    dd = products[..., 0, 0]
    dot = products[..., 0, 1]
    rr = products[..., 1, 1]
    is_present = (dd != 0) & (rr != 0) & ~is_rounding
    cosine = dot / (dd.sqrt() * rr.sqrt())
    cosine = torch.where(is_present, cosine, 0.0)
    d_norm = dd.sum(1).sqrt()
    r_norm = rr.sum(1).sqrt()
    count = is_present.sum(1)
    batch_cosine = dot.sum(1) / (d_norm * r_norm)
    zeros = is_present.shape[1] - count.to(dot)
    sample_cosine = cosine.sum(1) / count
    return torch.stack([sample_cosine, batch_cosine, d_norm, r_norm, zeros], dim=1)


def relative_rounding(error: Tensor, product: torch.dtype) -> float:
    """Return ε, the limit for rounding errors in B e.

    If ‖B e‖ ≤ ε ‖B‖ ‖e‖, then B e may consist of rounding errors only. The rounding errors come from e, and from the
    sum of K terms in every entry of B e.

    error: e, (N, K).
    product: data type in which B e is computed.
    """
    of_error = torch.finfo(error.dtype)
    of_product = torch.finfo(product)
    relative = error.shape[1] * of_error.eps
    if of_product.bits < of_error.bits:
        relative += of_product.eps
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
    product = error.dtype if method.cuts else trace.logits.dtype
    relative = relative_rounding(error, product)
    none = torch.zeros(len(error), dtype=torch.bool, device=error.device)
    is_rounding = [none]  # first entry: e; then one for each hidden layer, from the highest down
    for i in range(len(products), 0, -1):
        norm = method.feedback_norm(i)
        if norm is not None:
            largest = relative * norm.to(products.dtype)
            squares = error.to(products.dtype).square().sum(1)
            limits = squares * largest.square()
            is_rounding.append(products[i - 1, :, 0, 0] <= limits)
        elif i in method.cuts:
            is_rounding.append(none)
        else:
            is_rounding.append(is_rounding[-1])
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
    is_rounding = only_rounding(method, trace, error, products)
    measured = compare(products, is_rounding)
    if extra_quantities:
        extra = torch.stack(all_extra[::-1])
        measured = torch.cat([measured, extra], dim=1)
    dtype = torch.promote_types(error.dtype, torch.float32)
    return measured.flatten().to(dtype)
