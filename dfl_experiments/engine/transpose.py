"""Another transpose on the way back: a weight layer's error signal goes through B where backpropagation takes W."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

WeightLayer = nn.Linear | nn.Conv2d
Carry = Callable[[int, Tensor, Tensor], Tensor]


def transposed(layer: WeightLayer, weight: Tensor, signal: Tensor, shape: Sequence[int]) -> Tensor:
    """The gradient at a layer's input of that shape, had it this weight (of W's shape), given the one at its output.

    g B for rows g of a linear layer; for a convolution the transposed one, with W's stride, padding and groups.
    """
    weight = weight.to(signal.dtype)  # under autocast as W is
    if isinstance(layer, nn.Linear):
        return signal @ weight
    assert not isinstance(layer.padding, str), "a layer states its padding in pixels"
    return conv2d_input(shape, weight, signal, layer.stride, layer.padding, layer.dilation, layer.groups)


class Transpose:
    """What carries error signals from the output of every weight layer but the first to its input.

    layers: these layers, in the order in which the net has them. carry(k, g, x): the signal at the input x of
    layers[k], given the signal g at its output; x's values may be looked at, and B is read when the signal passes, not
    when the graph is built. With `exact`, the same graph transposes with W and is backpropagation's.
    """

    def __init__(self, layers: Sequence[WeightLayer], carry: Carry) -> None:
        self.layers, self.carry, self.exact = list(layers), carry, False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Have the graph of a forward pass that is made meanwhile go through `carry`."""
        with ExitStack() as stack:
            for k, layer in enumerate(self.layers):
                inputs: list[Tensor] = []
                stack.enter_context(layer.register_forward_pre_hook(_take(inputs)))
                stack.enter_context(layer.register_forward_hook(self._give(k, inputs)))
            yield

    @contextmanager
    def backprop(self) -> Iterator[None]:
        """Have signals that pass meanwhile transposed with W."""
        self.exact = True
        try:
            yield
        finally:
            self.exact = False

    def _give(self, k: int, inputs: list[Tensor]) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        return lambda layer, args, output: _Crossing.apply(output, inputs.pop(), self, k)

    def send(self, k: int, signal: Tensor, x: Tensor) -> Tensor:
        """The signal at the input x of layers[k]."""
        layer = self.layers[k]
        return transposed(layer, layer.weight, signal, x.shape) if self.exact else self.carry(k, signal, x)


def _take(inputs: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor]], Tensor]:
    def take(layer: nn.Module, args: tuple[Tensor]) -> Tensor:
        inputs.append(args[0])
        return args[0].detach()  # the layer's own node then computes the gradients of W and b, and none of x

    return take


class _Crossing(torch.autograd.Function):
    """y, unchanged; its gradient goes on into the layer's own node, and by `Transpose.send` to the layer's input."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, transpose: Transpose, k: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.transpose, ctx.k = transpose, k
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, signal: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (x,) = ctx.saved_tensors
        below = ctx.transpose.send(ctx.k, signal, x).to(x.dtype) if ctx.needs_input_grad[1] else None
        return signal, below, None, None
