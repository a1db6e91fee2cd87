"""Find the calls of activation functions in a forward pass, such as `F.relu(x)`, `x.tanh()` or a shared `nn.ReLU()`."""

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

ACTIVATIONS = (
    *("relu", "relu6", "leaky_relu", "rrelu", "prelu", "threshold", "hardtanh"),
    *("elu", "celu", "selu", "gelu", "silu", "mish", "hardswish", "softplus"),
    *("tanh", "sigmoid", "hardsigmoid", "logsigmoid", "softsign"),
    *("hardshrink", "softshrink", "tanhshrink"),
)


def eager() -> AbstractContextManager[object]:
    """Return a context in which compiled code is not used."""
    is_loaded = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if is_loaded else nullcontext()


def is_call(boundary: str) -> bool:
    """Return whether a boundary is a call of an activation function, and not a submodule."""
    return "@" in boundary


class ActivationCalls(TorchFunctionMode):
    """In this context, call visit(name, h) after every call of an activation function.

    visit: function of the call's name and of its result h. It returns the tensor that replaces h; None keeps h. The
        name is the function's name and the number of this call: `relu@1`, `relu@2`, `tanh@1`, …
    """

    def __init__(self, visit: Callable[[str, Tensor], Tensor | None]) -> None:
        super().__init__()
        self.visit = visit
        self.counts: Counter[str] = Counter()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call the function. See the class."""
        h = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "").rstrip("_")  # relu_ is relu in place
        if name not in ACTIVATIONS:
            return h
        self.counts[name] += 1
        replaced = self.visit(f"{name}@{self.counts[name]}", h)
        return h if replaced is None else replaced
