"""Another transpose on the way back: a weight layer's error signal goes through B where backpropagation takes W."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.grad import conv2d_input

from dfl_experiments.errors import UserError

WeightLayer = (
    nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)  # whose weight is (C_in, C_out / groups, …)
Carry = Callable[[int, Tensor, Tensor], Tensor]


def is_weight_layer(module: nn.Module) -> TypeGuard[WeightLayer]:
    """Return whether the module is a `WeightLayer`: linear in its input, with a `weight` parameter of its own.

    A subclass with a forward pass of its own is none, nor is a layer whose weight is computed from other parameters.
    """
    if not isinstance(module, WeightLayer):
        return False
    kind = next(kind for kind in WeightLayer.__args__ if isinstance(module, kind))
    return type(module).forward is kind.forward and "weight" in dict(module.named_parameters(recurse=False))


def pads_with_zeros(layer: WeightLayer) -> bool:
    """Return whether a convolution pads with zeros, and with a given number of them."""
    return not isinstance(layer, nn.Linear) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def transposed(layer: WeightLayer, weight: Tensor, signal: Tensor, x: Tensor) -> Tensor:
    """Return the gradient at a layer's input, had the layer this weight: its vector-Jacobian product with B for W.

    weight: B, in W's shape. signal: the gradient at the layer's output. x: its input; only its shape counts, as the
    layer is linear.
    """
    weight = weight.detach().to(signal.dtype)  # under autocast as W is
    if isinstance(layer, nn.Linear):
        return signal @ weight
    if isinstance(layer, nn.Conv2d) and pads_with_zeros(layer):  # without a forward pass
        padding: Any = layer.padding
        return conv2d_input(x.shape, weight, signal, layer.stride, padding, layer.dilation, layer.groups)
    parameters = {name: p.detach().to(signal.dtype) for name, p in layer.named_parameters()}
    parameters["weight"] = weight
    with torch.enable_grad():
        start = torch.zeros_like(x, dtype=signal.dtype, requires_grad=True)
        output = functional_call(layer, parameters, (start,))
    return torch.autograd.grad(output, start, signal)[0]


class Transpose:
    """What carries error signals from the output of every weight layer that receives hidden values to its input.

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
                stack.enter_context(layer.register_forward_pre_hook(_take(inputs), with_kwargs=True))
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
        return lambda layer, args, output: Crossing.apply(output, inputs.pop(), self, k)

    def send(self, k: int, signal: Tensor, x: Tensor) -> Tensor:
        """The signal at the input x of layers[k]."""
        layer = self.layers[k]
        return transposed(layer, layer.weight, signal, x) if self.exact else self.carry(k, signal, x)


def _take(inputs: list[Tensor]) -> Callable[..., tuple[tuple[Tensor], dict[str, Any]]]:
    def take(layer: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any]) -> tuple[tuple[Tensor], dict[str, Any]]:
        if len(args) != 1 or kwargs:
            raise UserError(
                f"model: {layer} is called with more than its input, and FA and its descendants cannot transpose it; "
                "call it with one positional argument, or choose another method"
            )
        inputs.append(args[0])
        return (args[0].detach(),), {}  # the layer's own node then computes the gradients of W and b, and none of x

    return take


class Crossing(torch.autograd.Function):
    """y, unchanged; its gradient goes on into the layer's own node, and by `Transpose.send` to the layer's input."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, transpose: Transpose, k: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.transpose, ctx.k = transpose, k
        # A view could not be changed by `ReLU(inplace=True)`. No weight layer reads its output's values again.
        return output.data

    @staticmethod
    def backward(ctx: Any, signal: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (x,) = ctx.saved_tensors
        below = ctx.transpose.send(ctx.k, signal, x).to(x.dtype) if ctx.needs_input_grad[1] else None
        return signal, below, None, None
