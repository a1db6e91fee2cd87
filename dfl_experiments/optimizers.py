"""Optimizers with the paper's step schedule. The network and the local modules get one each, of the same kind."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from dfl_experiments.errors import UserError
from dfl_experiments.ranges import Fraction, NonNegative, Positive

WRAPPED = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")


@cache
def eager(kind: type[torch.optim.Optimizer]) -> type[Any]:
    """The same optimizer, without the wrappers that import PyTorch's compiler when first called: 1.4 s of a start."""
    wrapped = {name: inspect.unwrap(getattr(kind, name)) for name in WRAPPED}
    return type(kind.__name__, (kind,), wrapped | {"step": torch.no_grad()(inspect.unwrap(kind.step))})


@dataclass(frozen=True)
class OptimizerFactory(ABC):
    """lr_t = lr · decay^(number of milestones, as fractions of all epochs, that epoch t has reached)."""

    lr: Positive
    weight_decay: NonNegative
    milestones: list[Fraction]
    decay: Annotated[float, Field(gt=0, le=1)]

    def lr_at(self, epoch: int, epochs: int) -> float:
        """The learning rate of epoch 1 … epochs."""
        return self.lr * self.decay ** sum(epoch - 1 >= milestone * epochs for milestone in self.milestones)

    @abstractmethod
    def make(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        """An optimizer of these parameters, all on one device; one fused kernel a step.

        On a GPU its learning rate is a tensor there, so that a captured step follows its changes.
        """

    def starting_lr(self, parameters: Sequence[Tensor]) -> float | Tensor:
        """The learning rate before the first epoch sets it, where the optimizer of these parameters reads it."""
        device = parameters[0].device
        return torch.tensor(self.lr, device=device) if device.type == "cuda" else self.lr


@dataclass(frozen=True)
class Adam(OptimizerFactory):
    """Adam (Kingma and Ba, 2014); weight_decay is the L2 term added to the gradient."""

    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)]
    eps: Positive

    def make(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        first, second = self.betas
        lr = self.starting_lr(parameters)
        on_gpu = isinstance(lr, Tensor)
        adam = eager(torch.optim.Adam)(
            parameters, lr, (first, second), self.eps, self.weight_decay, fused=True, capturable=on_gpu
        )
        # PyTorch warns once of a capturable optimizer that steps uncaptured, as it does here before a capture
        adam._warned_capturable_if_run_uncaptured = True
        return adam


@dataclass(frozen=True)
class SGD(OptimizerFactory):
    """W ← W - lr · (∂ℒ/∂W + weight_decay · W), with momentum if it is not zero."""

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
