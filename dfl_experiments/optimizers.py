"""Make the network's optimizer and B's optimizer.

Both optimizers have the same options. For B's optimizer, values in `optimizer.feedback` replace these options.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field, fields, make_dataclass
from functools import cache, partial, reduce
from operator import or_
from typing import Annotated, Any, ClassVar, get_args, get_origin, get_type_hints

import torch
from pydantic import Field
from torch import Tensor

from dfl_experiments.errors import UserError
from dfl_experiments.ranges import Fraction, NonNegative, Positive

# parameters of optimizers for which `factory_of` adds no fields
NO_OPTIONS = ("params", "lr", "capturable", "differentiable")
# methods of torch's optimizers, besides `step`, with wrappers that import PyTorch's compiler
WRAPPED = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")


@cache
def eager(kind: type[torch.optim.Optimizer]) -> type[Any]:
    """Return an optimizer class whose methods do not import PyTorch's compiler. This import would take 1.4 s.

    The methods of `kind` are wrapped by functions that import the compiler. The returned subclass has the methods
    without these functions.
    """
    members: dict[str, Any] = {name: inspect.unwrap(getattr(kind, name)) for name in WRAPPED}
    members["step"] = torch.no_grad()(inspect.unwrap(kind.step))
    # do not warn about steps before the graph is captured
    members["_warned_capturable_if_run_uncaptured"] = True
    return type(kind.__name__, (kind,), members)


@dataclass(frozen=True)
class OptimizerFactory(ABC):
    """Base class of factories for optimizers. During training, a schedule multiplies the learning rate."""

    captured: ClassVar[bool] = True
    """Whether a CUDA graph can contain the optimizer's step."""

    lr: Positive
    """Learning rate, before the schedule."""

    @abstractmethod
    def make(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        """Make an optimizer of parameters that are all on one device.

        On a GPU the learning rate is a tensor. The rate can then change after a CUDA graph has captured the step.
        """

    def starting_lr(self, parameters: Sequence[Tensor]) -> float | Tensor:
        """Return the learning rate before the first epoch: a tensor on a GPU, otherwise a number."""
        device = parameters[0].device
        return torch.tensor(self.lr, device=device) if device.type == "cuda" else self.lr


@dataclass(frozen=True)
class Adam(OptimizerFactory):
    """Make Adam optimizers (Kingma and Ba, 2014), with one fused kernel per step."""

    kind: ClassVar[Any] = torch.optim.Adam

    weight_decay: NonNegative
    """Factor of the L2 term that is added to the gradient."""
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)]
    """Decay rates of the two moments."""
    eps: Positive
    """Constant that is added to the denominator."""

    def make(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        first, second = self.betas
        lr = self.starting_lr(parameters)
        options = {"fused": True, "capturable": isinstance(lr, Tensor)}
        return eager(self.kind)(
            parameters, lr, (first, second), self.eps, self.weight_decay, **options
        )


class AdamW(Adam):
    """Make AdamW optimizers (Loshchilov and Hutter, 2019).

    A step computes W ← (1 - lr · weight_decay) W, and then makes a step of Adam with weight_decay = 0.
    """

    kind = torch.optim.AdamW


@dataclass(frozen=True)
class SGD(OptimizerFactory):
    """Make SGD optimizers: W ← W - lr · (∂ℒ/∂W + weight_decay · W), with momentum if it is not zero."""

    weight_decay: NonNegative
    momentum: Fraction
    nesterov: bool

    def __post_init__(self) -> None:
        if self.nesterov and not self.momentum:
            raise UserError("optimizer.nesterov=True: needs optimizer.momentum above zero")

    def make(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        lr = self.starting_lr(parameters)
        return eager(torch.optim.SGD)(
            parameters,
            lr,
            self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
            fused=True,
        )


@dataclass(frozen=True)
class OfTorch(OptimizerFactory):
    """Base class of the factories for any `torch.optim.Optimizer`. `factory_of` makes one subclass per optimizer."""

    kind: ClassVar[Any]

    def __post_init__(self) -> None:
        """Run one step, so that a wrong option raises an error before training."""
        trial = [torch.zeros(2, 2, requires_grad=True), torch.zeros(2, requires_grad=True)]
        for parameter in trial:
            parameter.grad = torch.ones_like(parameter)
        try:
            self.make(trial).step()
        # an option of a wrong type; the factory checks no types of a user's optimizer
        except TypeError as error:
            raise ValueError(str(error)) from error

    def make(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        options = {option.name: getattr(self, option.name) for option in fields(self)}
        if self.captured and parameters[0].device.type == "cuda":
            options |= {"lr": self.starting_lr(parameters), "capturable": True}
        return eager(self.kind)(parameters, **options)


def of_torch(target: str, key: str) -> type[OptimizerFactory]:
    """Return a factory class for an optimizer in torch.optim.

    target: full name of the optimizer's class.
    key: key of the optimizer in the configuration.
    Raises `UserError` if there is no such class, or if the optimizer's step needs a closure that evaluates the loss.
    """
    kind = getattr(torch.optim, target.removeprefix("torch.optim."), None)
    if not is_usable(kind):
        choices = ", ".join(names_in_torch())
        raise UserError(f"{key}._target_={target}: must be one of {choices}, which need no closure")
    return factory_of(kind)


@cache
def names_in_torch() -> list[str]:
    """Return the full names of the optimizers in torch.optim that can train matrices and vectors."""
    names = []
    for name, kind in vars(torch.optim).items():
        if is_usable(kind):
            with suppress(RuntimeError, ValueError):  # the trial step of `OfTorch` fails
                factory_of(kind)(lr=1e-3)
                names.append(f"torch.optim.{name}")
    return names


def name_in_torch(name: str) -> str | None:
    """Return the full name of an optimizer in torch.optim: "torch.optim.NAdam" for "nadam" or "optim.NAdam"."""
    ending = f".{name.lower()}"
    return next((full for full in names_in_torch() if full.lower().endswith(ending)), None)


def is_usable(kind: Any) -> bool:
    """Return whether an object is a subclass of `torch.optim.Optimizer` with two properties.

    Its constructor has a parameter `lr`. Its step needs no closure, a function that evaluates the loss again.
    """
    base = torch.optim.Optimizer
    if not inspect.isclass(kind) or not issubclass(kind, base) or kind is base:
        return False
    parameters = inspect.signature(inspect.unwrap(kind.step)).parameters
    needs_closure = "closure" in parameters and parameters["closure"].default is not None
    return "lr" in inspect.signature(kind).parameters and not needs_closure


@cache
def factory_of(kind: type[torch.optim.Optimizer]) -> type[OptimizerFactory]:
    """Return a factory class for an optimizer. The fields of the factory are the options of the optimizer."""
    is_of_torch = kind.__module__.startswith("torch.")
    # the types of a user's optimizer can be anything; its constructor checks the values
    hints = get_type_hints(kind.__init__) if is_of_torch else {}
    options = []
    for name, parameter in inspect.signature(kind).parameters.items():
        is_variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if name in NO_OPTIONS or is_variadic:
            continue
        default: Any = field()
        if parameter.default is not parameter.empty:
            # a copy, because a default may be a list
            default = field(default_factory=partial(copy, parameter.default))
        options.append((name, without_tensor(hints.get(name, Any)), default))
    members = {"kind": kind, "captured": kind is torch.optim.RMSprop}
    return make_dataclass(
        kind.__name__, options, bases=(OfTorch,), namespace=members, frozen=True, kw_only=True
    )


def without_tensor(hint: Any) -> Any:
    """Convert a type hint of torch.optim for the configuration: remove Tensor, and replace a tuple by a list."""
    kinds = tuple(without_tensor(kind) for kind in get_args(hint) if kind is not Tensor)
    if get_origin(hint) is tuple:
        item: Any = reduce(or_, kinds)
        return Annotated[list[item], Field(min_length=len(kinds), max_length=len(kinds))]
    return reduce(or_, kinds) if kinds else hint
