"""Keep or accumulate the gradients that parameters had before a backward pass."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Gradients = list[Tensor | None]


@contextmanager
def unchanged(module: nn.Module, device: torch.device) -> Iterator[None]:
    """At the end of this context, restore the gradients, the buffers and the random state."""
    parameters = list(module.parameters())
    gradients = take_gradients(parameters)
    # a forward pass may replace a buffer
    buffers = [dict(part._buffers) for part in module.modules()]
    copies = [buffer.clone() for buffer in module.buffers()]
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        for part, original in zip(module.modules(), buffers, strict=True):
            part._buffers.update(original)
        with torch.no_grad():
            for buffer, saved in zip(module.buffers(), copies, strict=True):
                buffer.copy_(saved)


@contextmanager
def accumulating(parameters: Sequence[nn.Parameter], weight: float = 1.0) -> Iterator[None]:
    """In this context `.grad` starts as None. At its end, `.grad` is its earlier value plus weight · its new value."""
    before = take_gradients(parameters)
    try:
        yield
        if weight != 1.0:
            for parameter in parameters:
                if parameter.grad is not None:
                    # a new tensor, because two parameters may share one gradient
                    parameter.grad = parameter.grad * weight
    finally:
        add_gradients(parameters, before)


def take_gradients(parameters: Iterable[nn.Parameter]) -> Gradients:
    """Return `.grad` of the parameters, and set it to None."""
    gradients: Gradients = []
    for parameter in parameters:
        gradients.append(parameter.grad)
        parameter.grad = None
    return gradients


def add_gradients(parameters: Iterable[nn.Parameter], gradients: Gradients) -> None:
    """Add the gradients that `take_gradients` returned to `.grad`."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
