"""What may be measured beside the δ-cosine: how near B, its gradients and its predictions are to backpropagation's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.method import Method, WeightPair
from dfl_experiments.engine.trace import Trace
from dfl_experiments.measured import EXTRA_QUANTITIES


@dataclass(frozen=True)
class Measurement:
    """Layer i of a kept trace after its backward pass, whose gradients are in `.grad`; reference: δ_i^BP."""

    net: BlockNet
    method: Method
    trace: Trace
    i: int
    reference: Tensor

    @cached_property
    def pairs(self) -> list[WeightPair]:
        """Every B that h_i gets its signal through, beside what BP has there."""
        return self.method.weight_pairs(self.i)


def exact_type(values: Tensor) -> torch.dtype:
    """float64, where the device has it: MPS does with float32."""
    return torch.float32 if values.device.type == "mps" else torch.float64


def exact(values: Tensor) -> Tensor:
    """The values in `exact_type`."""
    return values.detach().to(exact_type(values))


def gram(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor | None:
    """⟨x, y⟩, ‖x‖², ‖y‖² of two vectors that are given in pieces, (3,); None where there is none."""
    found = None
    for x, y in ((exact(x).flatten(), exact(y).flatten()) for x, y in pairs):
        products = torch.stack([x @ y, x @ x, y @ y])
        found = products if found is None else found + products
    return found


def cosine(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor | None:
    """cos of two vectors that are given in pieces; NaN where one is zero, None where there are no pieces."""
    products = gram(pairs)
    return None if products is None else products[0] / products[1].sqrt() / products[2].sqrt()


def weight_cosine(of: Measurement) -> Tensor | None:
    """cos(vec B, vec W) of what h_i gets its signal through: in a sequential method of the layers of block i+1, in a
    direct one of B_{i+1} and W_{i+1}ᵀ … W_Lᵀ, where the net's products are matrices."""
    return cosine(of.pairs)


def sign_agreement(of: Measurement) -> Tensor | None:
    """The share of those entries whose signs are the same."""
    same = [(b.detach().sign() == w.detach().sign()).flatten() for b, w in of.pairs]
    return torch.cat(same).float().mean() if same else None


def weight_ratio(of: Measurement) -> Tensor | None:
    """‖B‖ / ‖W‖ of them."""
    products = gram(of.pairs)
    return None if products is None else (products[1] / products[2]).sqrt()


def gradient_cosine(of: Measurement) -> Tensor | None:
    """cos of (∂W_i, ∂b_i), all parameters of block i up to a_i, with those of backpropagation."""
    parameters = [p for p in of.net.blocks[of.i - 1].get_submodule("pre").parameters() if p.grad is not None]
    if not parameters:
        return None
    with of.trace.as_backprop():
        backprop = torch.autograd.grad(
            of.trace.preactivations[of.i - 1], parameters, of.reference, retain_graph=True, allow_unused=True
        )
    pairs = zip((p.grad for p in parameters), backprop, strict=True)
    return cosine([(own, bp) for own, bp in pairs if own is not None and bp is not None])


def output_cosine(of: Measurement) -> Tensor | None:
    """mean over samples n of cos(a_L, y_i): how well the module on h_i predicts the logits; NaN for a zero y_i."""
    logits = of.trace.logits
    # of a trace under autocast the module is computed so too, as when it learns: its B has another type than h_i
    with torch.autocast(logits.device.type, torch.bfloat16, enabled=logits.dtype == torch.bfloat16):
        y = of.method.prediction(of.i, of.trace)
    if y is None:
        return None
    y, logits = exact(y), exact(logits)
    return ((y * logits).sum(1) / y.norm(dim=1) / logits.norm(dim=1)).mean()


MORE: dict[str, Callable[[Measurement], Tensor | None]] = {name: globals()[name] for name in EXTRA_QUANTITIES}


def measure_more(names: Sequence[str], of: Measurement) -> Tensor:
    """These quantities of a layer, (len(names),); NaN where a method has no such thing."""
    nothing = exact(of.reference).new_full((), torch.nan)
    found = (MORE[name](of) for name in names)
    return torch.stack([nothing if value is None else value.to(nothing) for value in found])
