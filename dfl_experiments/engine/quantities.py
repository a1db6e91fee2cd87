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
        x, y = exact(x_piece).flatten(), exact(y_piece).flatten()
        products = torch.stack([x @ y, x @ x, y @ y])
        total = products if total is None else total + products
    return total


def cosine(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor | None:
    """Return the cosine of x and y (see `pair_products`); NaN if x or y is zero, None if there are no pairs."""
    products = pair_products(pairs)
    return None if products is None else products[0] / products[1].sqrt() / products[2].sqrt()


def weight_cosine(layer: Measurement) -> Tensor | None:
    """Return the cosine of B and W, flattened to vectors, over all pairs of h_i.

    In a sequential method there is one pair B and W for each layer of block i+1. In a direct method there is only one
    pair: B_{i+1} and the product W_{i+1}ᵀ … W_Lᵀ.
    """
    return cosine(layer.pairs)


def sign_agreement(layer: Measurement) -> Tensor | None:
    """Return the share of entries of B that have the same sign as the weights that they replace."""
    same = [(b.detach().sign() == w.detach().sign()).flatten() for b, w in layer.pairs]
    return torch.cat(same).float().mean() if same else None


def weight_ratio(layer: Measurement) -> Tensor | None:
    """Return ‖B‖ / ‖W‖ over the pairs of h_i."""
    products = pair_products(layer.pairs)
    return None if products is None else (products[1] / products[2]).sqrt()


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


def output_cosine(layer: Measurement) -> Tensor | None:
    """Return the mean over samples of cos(a_L, y_i), with the local prediction y_i; NaN if y_i is zero for a sample."""
    logits = layer.trace.logits
    # after a forward pass under autocast, B and h_i have different types, so the prediction needs autocast too
    with torch.autocast(logits.device.type, torch.bfloat16, enabled=logits.dtype == torch.bfloat16):
        y = layer.method.prediction(layer.i, layer.trace)
    if y is None:
        return None
    y, logits = exact(y), exact(logits)
    return ((y * logits).sum(1) / y.norm(dim=1) / logits.norm(dim=1)).mean()


FUNCTIONS: dict[str, Callable[[Measurement], Tensor | None]] = {
    "weight_cosine": weight_cosine,
    "sign_agreement": sign_agreement,
    "weight_ratio": weight_ratio,
    "gradient_cosine": gradient_cosine,
    "output_cosine": output_cosine,
}


def measure_extra(names: Sequence[str], layer: Measurement) -> Tensor:
    """Return the quantities of a layer, in the order of `names`; NaN for a quantity that the method does not have."""
    nan = exact(layer.reference).new_full((), torch.nan)
    values = [FUNCTIONS[name](layer) for name in names]
    return torch.stack([nan if value is None else value.to(nan) for value in values])
