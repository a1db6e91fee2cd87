"""Optimizers. The network and the feedback weights each get one, of the same kind unless the options say otherwise."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from functools import cache, reduce
from operator import or_
from typing import Annotated, Any, ClassVar, get_args, get_origin, get_type_hints

import torch
from pydantic import Field
from torch import Tensor

from dfl_experiments.errors import UserError
from dfl_experiments.ranges import Fraction, NonNegative, Positive

NO_OPTIONS = ("params", "lr", "capturable", "differentiable")  # parameters that are no options of their own
WRAPPED = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")


@cache
def eager(kind: type[torch.optim.Optimizer]) -> type[Any]:
    """Return the optimizer class without the wrappers that import PyTorch's compiler, which takes 1.4 s."""
    members: dict[str, Any] = {name: inspect.unwrap(getattr(kind, name)) for name in WRAPPED}
    members["step"] = torch.no_grad()(inspect.unwrap(kind.step))
    members["_warned_capturable_if_run_uncaptured"] = True  # no warning about the steps before the capture
    return type(kind.__name__, (kind,), members)


@dataclass(frozen=True)
class OptimizerFactory(ABC):
    """Make optimizers. A schedule multiplies their learning rate later."""

    captured: ClassVar[bool] = True
    """Whether a CUDA graph can hold the optimizer's step."""

    lr: Positive
    """Learning rate, before the schedule."""

    @abstractmethod
    def make(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        """Make the optimizer of parameters on one device.

        On a GPU the learning rate is a tensor on it, so that a step captured in a CUDA graph uses a changed rate.
        """

    def starting_lr(self, parameters: Sequence[Tensor]) -> float | Tensor:
        """Return the learning rate before the first epoch sets it: a tensor on a GPU, else a number."""
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
    """Added to the denominator."""

    def make(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        first, second = self.betas
        lr = self.starting_lr(parameters)
        options = {"fused": True, "capturable": isinstance(lr, Tensor)}
        return eager(self.kind)(parameters, lr, (first, second), self.eps, self.weight_decay, **options)


class AdamW(Adam):
    """Make AdamW optimizers (Loshchilov and Hutter, 2019): W ← (1 - lr · weight_decay) W, then Adam without L2 term."""

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
            parameters, lr, self.momentum, weight_decay=self.weight_decay, nesterov=self.nesterov, fused=True
        )


@dataclass(frozen=True)
class OfTorch(OptimizerFactory):
    """Make optimizers of a class in torch.optim, whose parameters are the fields of a subclass (see `of_torch`)."""

    kind: ClassVar[Any]

    def __post_init__(self) -> None:
        """Try a step, so that what the class refuses is refused before training."""
        trial = [torch.zeros(2, 2, requires_grad=True), torch.zeros(2, requires_grad=True)]
        for parameter in trial:
            parameter.grad = torch.ones_like(parameter)
        self.make(trial).step()

    def make(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        options = {option.name: getattr(self, option.name) for option in fields(self)}
        if self.captured and parameters[0].device.type == "cuda":
            options |= {"lr": self.starting_lr(parameters), "capturable": True}
        return eager(self.kind)(parameters, **options)


@cache
def of_torch(target: str, key: str) -> type[OptimizerFactory]:
    """Return the factory class of an optimizer in torch.optim, with its parameters as fields.

    target: full name of the optimizer's class. key: of the configuration's node.
    Raises `UserError` if there is no such class, and if its step needs a closure, which evaluates the loss.
    """
    kinds: dict[str, Any] = {}
    for name, kind in vars(torch.optim).items():
        if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer:
            closure = inspect.signature(inspect.unwrap(kind.step)).parameters["closure"]
            kinds |= {f"torch.optim.{name}": kind} if closure.default is None else {}
    if target not in kinds:
        raise UserError(f"{key}._target_={target}: must be one of those that need no closure: {', '.join(kinds)}")
    kind = kinds[target]
    hints, parameters = get_type_hints(kind.__init__), inspect.signature(kind).parameters
    names = [name for name in parameters if name not in NO_OPTIONS]
    options = [(name, without_tensor(hints[name]), field(default=parameters[name].default)) for name in names]
    members = {"kind": kind, "captured": kind is torch.optim.RMSprop}
    return make_dataclass(kind.__name__, options, bases=(OfTorch,), namespace=members, frozen=True, kw_only=True)


def without_tensor(hint: Any) -> Any:
    """Return a type hint as an option of the configuration has it: without tensors, and with a list for a tuple."""
    kinds = tuple(without_tensor(kind) for kind in get_args(hint) if kind is not Tensor)
    if get_origin(hint) is tuple:
        item: Any = reduce(or_, kinds)
        return Annotated[list[item], Field(min_length=len(kinds), max_length=len(kinds))]
    return reduce(or_, kinds) if kinds else hint
