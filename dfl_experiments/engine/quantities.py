"""Extra quantities: compare B with W, gradients with those of BP, and local predictions with the logits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.method import Method, WeightPair
from dfl_experiments.engine.trace import Trace


@dataclass(frozen=True)
class Measurement:
    """The data of a measurement: layer i of a kept trace, after the backward pass."""

    net: BlockNet
    """The network, with its gradients in `.grad`."""
    method: Method
    trace: Trace
    i: int
    reference: Tensor
    """δ_i^BP, in the shape of a_i."""
    above: Tensor | None
    """δ_{i+1}, the applied signal of the layer above; e for i = L-1; None if that layer has no signal."""

    @cached_property
    def pairs(self) -> list[WeightPair]:
        """Return every B that the signal to h_i passes, each with the weights that it replaces."""
        return self.method.weight_pairs(self.i)


def exact_type(values: Tensor) -> torch.dtype:
    """Return float64, or float32 on MPS, which has no float64."""
    return torch.float32 if values.device.type == "mps" else torch.float64


def exact(values: Tensor) -> Tensor:
    """Return the values in `exact_type`, detached."""
    return values.detach().to(exact_type(values))


def pair_products(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor | None:
    """Return one tensor with the three values ⟨x, y⟩, ‖x‖² and ‖y‖²; None if there are no pairs.

    pairs: corresponding parts of x and y. All parts together are the two vectors.
    """
    total = None
    for x_piece, y_piece in pairs:
        x = exact(x_piece).flatten()
        y = exact(y_piece).flatten()
        products = torch.stack([x @ y, x @ x, y @ y])
        total = products if total is None else total + products
    return total


def cosine(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor | None:
    """Return the cosine of x and y (see `pair_products`); NaN if x or y is zero, None if there are no pairs."""
    products = pair_products(pairs)
    if products is None:
        return None
    dot, x_square, y_square = products
    return dot / x_square.sqrt() / y_square.sqrt()


def weight_cosine(layer: Measurement) -> Tensor | None:
    """Return the cosine of B and W, flattened to vectors, over all pairs of h_i.

    In a sequential method there is one pair B and W for each layer of block i+1. In a direct method there is only one
    pair: B_{i+1} and the product W_{i+1}ᵀ … W_Lᵀ.
    """
    return cosine(layer.pairs)


def weight_cosine_pair(layer: Measurement) -> Tensor | None:
    """Return the cosine of B_{i+2} B_{i+1}ᵀ with W_{i+1} (at the top, of B_Lᵀ with W_L), for a direct method.

    Source: Refinetti et al. 2021.
    """
    return cosine(layer.method.neighbour_pairs(layer.i))


def sign_agreement(layer: Measurement) -> Tensor | None:
    """Return the share of entries of B that have the same sign as the weights that they replace."""
    same = []
    for b, w in layer.pairs:
        is_same = b.detach().sign() == w.detach().sign()
        same.append(is_same.flatten())
    return torch.cat(same).float().mean() if same else None


def weight_ratio(layer: Measurement) -> Tensor | None:
    """Return ‖B‖ / ‖W‖ over the pairs of h_i."""
    products = pair_products(layer.pairs)
    if products is None:
        return None
    _, b_square, w_square = products
    return (b_square / w_square).sqrt()


def gradient_cosine(layer: Measurement) -> Tensor | None:
    """Return the cosine of the method's gradient and BP's gradient, over all parameters of block i below δ_i."""
    parameters = [p for p in layer.net.parameters_below_delta(layer.i) if p.grad is not None]
    if not parameters:
        return None
    with layer.trace.as_backprop():
        backprop = torch.autograd.grad(
            layer.trace.preactivations[layer.i - 1],
            parameters,
            layer.reference,
            retain_graph=True,
            allow_unused=True,
        )
    pairs = []
    for parameter, gradient in zip(parameters, backprop, strict=True):
        if parameter.grad is not None and gradient is not None:
            pairs.append((parameter.grad, gradient))
    return cosine(pairs)


def local_cosine(layer: Measurement) -> Tensor | None:
    """Return the mean over samples of cos(B δ_{i+1}, Wᵀ δ_{i+1}), before f', for a sequential method.

    Both signals start from the applied δ_{i+1}. A sample is omitted if one of its signals is zero.
    """
    trace, i = layer.trace, layer.i
    if trace.transpose is None or layer.above is None:
        return None
    is_top = i == layer.net.depth - 1
    root = trace.logits if is_top else trace.preactivations[i]
    h = trace.inputs[i]
    (by_method,) = torch.autograd.grad(root, h, layer.above, retain_graph=True)
    with trace.as_backprop():
        (by_backprop,) = torch.autograd.grad(root, h, layer.above, retain_graph=True)
    return sample_cosines(by_method, by_backprop).nanmean()


def sample_cosines(x: Tensor, y: Tensor) -> Tensor:
    """Return cos(x_n, y_n) for every sample n, (N,); NaN where x_n or y_n is zero."""
    x = exact(x).flatten(1)
    y = exact(y).flatten(1)
    dot = (x * y).sum(1)
    return dot / x.norm(dim=1) / y.norm(dim=1)


def output_cosine(layer: Measurement) -> Tensor | None:
    """Return the mean over samples of cos(a_L, y_i), with the local prediction y_i; NaN if y_i is zero for a sample."""
    logits = layer.trace.logits
    # after a forward pass under autocast, B and h_i have different types, so the prediction needs autocast too
    is_autocast = logits.dtype == torch.bfloat16
    with torch.autocast(logits.device.type, torch.bfloat16, enabled=is_autocast):
        y = layer.method.prediction(layer.i, layer.trace)
    return None if y is None else sample_cosines(y, logits).mean()


FUNCTIONS: dict[str, Callable[[Measurement], Tensor | None]] = {
    "weight_cosine": weight_cosine,
    "weight_cosine_pair": weight_cosine_pair,
    "sign_agreement": sign_agreement,
    "weight_ratio": weight_ratio,
    "gradient_cosine": gradient_cosine,
    "local_cosine": local_cosine,
    "output_cosine": output_cosine,
}


def measure_extra(names: Sequence[str], layer: Measurement) -> Tensor:
    """Return the quantities of a layer, in the order of `names`; NaN for a quantity that the method does not have."""
    nan = exact(layer.reference).new_full((), torch.nan)
    values = [FUNCTIONS[name](layer) for name in names]
    same_type = [nan if value is None else value.to(nan) for value in values]
    return torch.stack(same_type)
