"""Replace Wᵀ by feedback weights in the backward pass of weight layers."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.grad import conv2d_input

from dfl_experiments.errors import UserError

WeightLayer = (
    nn.Linear
    | nn.Conv1d
    | nn.Conv2d
    | nn.Conv3d
    | nn.ConvTranspose1d
    | nn.ConvTranspose2d
    | nn.ConvTranspose3d
)
# weight: (C_in, C_out / groups, …)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
Carry = Callable[[int, Tensor, Tensor], Tensor]


def is_weight_layer(module: nn.Module) -> TypeGuard[WeightLayer]:
    """Return whether the module is a `WeightLayer`: linear in its input, with its own parameter `weight`.

    Return False for a subclass with another forward pass, and for a layer that computes its weight from other
    parameters.
    """
    if not isinstance(module, WeightLayer):
        return False
    kind = next(kind for kind in WeightLayer.__args__ if isinstance(module, kind))
    own_parameters = dict(module.named_parameters(recurse=False))
    return type(module).forward is kind.forward and "weight" in own_parameters


def pads_with_zeros(layer: WeightLayer) -> bool:
    """Return whether a layer is a convolution with zero padding whose size is a number (not "same" or "valid")."""
    if isinstance(layer, nn.Linear):
        return False
    return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def transposed(layer: WeightLayer, weight: Tensor, signal: Tensor, x: Tensor) -> Tensor:
    """Return the signal at the layer's input: the layer's vector-Jacobian product with B in place of W.

    weight: B, in the shape of W.
    signal: error signal at the layer's output.
    x: input of the layer. Only its shape matters, because the layer is linear.
    """
    weight = weight.detach().to(signal.dtype)  # autocast converts W in the same way
    if isinstance(layer, nn.Linear):
        return signal @ weight
    # faster than below: no forward pass
    if isinstance(layer, nn.Conv2d) and pads_with_zeros(layer):
        padding: Any = layer.padding
        return conv2d_input(
            x.shape, weight, signal, layer.stride, padding, layer.dilation, layer.groups
        )
    parameters = {name: p.detach().to(signal.dtype) for name, p in layer.named_parameters()}
    parameters["weight"] = weight
    with torch.enable_grad():
        start = torch.zeros_like(x, dtype=signal.dtype, requires_grad=True)
        output = functional_call(layer, parameters, (start,))
    return torch.autograd.grad(output, start, signal)[0]


class Transpose:
    """The feedback weights that replace Wᵀ in the layers that read hidden values.

    layers: layers whose Wᵀ is replaced, in the order of the net.
    carry(k, g, x): function that computes the signal at the input x of layers[k] from the signal g at the layer's
        output. It is called in the backward pass, so it uses the current B.
    exact: whether the backward pass uses Wᵀ in place of B. If True, the same graph computes the signals of
        backpropagation.
    """

    def __init__(self, layers: Sequence[WeightLayer], carry: Carry) -> None:
        self.layers = list(layers)
        self.carry = carry
        self.exact = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """In this context, let every forward pass record a graph whose backward pass calls `carry`."""
        with ExitStack() as stack:
            for k, layer in enumerate(self.layers):
                inputs: list[Tensor] = []
                before = layer.register_forward_pre_hook(_detach_input(inputs), with_kwargs=True)
                stack.enter_context(before)
                # `prepend` makes this hook run before the hook of a boundary, so h_i is the output of `Crossing`
                after = layer.register_forward_hook(self._give(k, inputs), prepend=True)
                stack.enter_context(after)
            yield

    @contextmanager
    def backprop(self) -> Iterator[None]:
        """In this context, let signals pass Wᵀ in place of B."""
        self.exact = True
        try:
            yield
        finally:
            self.exact = False

    def _give(self, k: int, inputs: list[Tensor]) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def give(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
            return Crossing.apply(output, inputs.pop(), self, k)

        return uncompiled(give)

    def send(self, k: int, signal: Tensor, x: Tensor) -> Tensor:
        """Compute the signal at the input x of layers[k] from the signal at the layer's output."""
        if not self.exact:
            return self.carry(k, signal, x)
        layer = self.layers[k]
        return transposed(layer, layer.weight, signal, x)


def uncompiled(hook: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a hook that is not compiled where PyTorch fails to compile `Crossing`: 2.6 fails, 2.14 does not."""
    if "torch._dynamo" in sys.modules and torch.__version__ < "2.14":
        return torch.compiler.disable(hook)
    return hook


def _detach_input(inputs: list[Tensor]) -> Callable[..., tuple[tuple[Tensor], dict[str, Any]]]:
    """Return a hook that appends a layer's input to `inputs`, and passes the detached input to the layer."""

    def detach(
        layer: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any]
    ) -> tuple[tuple[Tensor], dict[str, Any]]:
        if len(args) != 1 or kwargs:
            raise UserError(
                f"model: {layer} is called with several arguments or by keyword, and FA and the rules based on it "
                "cannot transpose such a call; call it with one positional argument, or choose another method"
            )
        inputs.append(args[0])
        # so autograd computes the layer's gradients of W and b, but not of x
        return (args[0].detach(),), {}

    return detach


class Crossing(torch.autograd.Function):
    """The identity on a layer's output, with its own backward pass.

    The signal at the output goes to the layer's W and b as usual. `Transpose.send` computes the signal at the input x.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, transpose: Transpose, k: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.transpose, ctx.k = transpose, k
        # Do not return a view: autograd does not let `ReLU(inplace=True)` change a view that a Function returns. An
        # in-place change is harmless here, because the backward pass of a weight layer does not use the layer's output.
        return output.data

    @staticmethod
    def backward(ctx: Any, signal: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (x,) = ctx.saved_tensors
        below = None
        if ctx.needs_input_grad[1]:
            below = ctx.transpose.send(ctx.k, signal, x).to(x.dtype)
        return signal, below, None, None
