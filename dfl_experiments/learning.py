"""One minibatch: the six stops every method and every model shares."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dfl_experiments.alignment import QUANTITIES, measure
from dfl_experiments.blocknet import BlockNet
from dfl_experiments.losses import OutputLoss, precise
from dfl_experiments.methods import Method
from dfl_experiments.optimizers import Optimizer

Precision = Literal["float32", "tf32", "bfloat16"]


@dataclass(frozen=True)
class Step:
    """What one minibatch gave, still on the device: loss (), correct predictions (), alignment (L-1, 5) if measured."""

    loss: Tensor
    correct: Tensor
    alignment: Tensor | None


class Learner:
    """A network, a method and their two optimizers, of the same kind and hyper-parameters.

    precision: "bfloat16" computes the forward and backward pass under autocast, weights and loss staying as they are.
    """

    def __init__(
        self,
        net: BlockNet,
        method: Method,
        loss: OutputLoss,
        optimizer: Optimizer,
        precision: Precision = "float32",
    ) -> None:
        self.net, self.method, self.loss, self.precision = net, method, loss, precision
        self.device = next(net.parameters()).device
        self.parameters = net.parameters_above(method.frozen)
        self.optimizer = optimizer.make(self.parameters)
        feedback = [p for p in method.parameters() if p.requires_grad]
        self.feedback_optimizer = optimizer.make(feedback) if feedback else None

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The network's optimizer, and the local modules' where there are any."""
        return [self.optimizer, *([self.feedback_optimizer] if self.feedback_optimizer else [])]

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of both optimizers, in place where a captured step reads it on the device."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(lr)
                else:
                    group["lr"] = lr

    def autocast(self) -> AbstractContextManager[object]:
        """The context of a forward pass in this learner's precision."""
        if self.precision == "bfloat16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def value_and_error(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """ℒ and e, never in less than float32."""
        return self.loss.value_and_error(precise(logits), target)

    def step(self, x: Tensor, target: Tensor, align: bool = False) -> Step:
        """Forward with the current weights → update every B → form every δ_i with the updated B → update all W, b.

        x: (N, *h_0), target: labels (N,). With `align`, the applied signals are compared with BP's on the same trace,
        which changes no weight. The order is that of the paper's Algorithms 1 and 2.
        """
        with self.autocast():
            trace = self.net.trace(x, self.method.cuts, self.method.frozen, keep=align)
            self.method.adapt(trace, target)
        if self.feedback_optimizer is not None:
            self.feedback_optimizer.step()
            self.feedback_optimizer.zero_grad()
        loss, error = self.value_and_error(trace.logits, target)
        deltas = trace.backward(
            lambda i: self.method.signal(i, trace, error, target), error, self.parameters, keep=align
        )
        alignment = measure(trace, deltas, error) if align else None
        self.optimizer.step()
        self.optimizer.zero_grad()
        correct = (trace.logits.detach().argmax(1) == target).sum()
        return Step(loss, correct, alignment)

    def row(self, x: Tensor, target: Tensor, align: bool = False) -> Tensor:
        """A step's numbers in one tensor, (2 + 5·(L-1),): loss, correct predictions, and `QUANTITIES` layer by layer.

        The quantities are NaN where they are not measured.
        """
        step = self.step(x, target, align)
        quantities = step.alignment
        if quantities is None:
            quantities = step.loss.new_full(((self.net.depth - 1) * len(QUANTITIES),), torch.nan)
        return torch.cat([torch.stack([step.loss, step.correct.to(step.loss)]), quantities.flatten().to(step.loss)])
