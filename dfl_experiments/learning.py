"""One minibatch: the six stops every method and every model shares."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dfl_experiments.alignment import measure
from dfl_experiments.blocknet import BlockNet
from dfl_experiments.losses import OutputLoss
from dfl_experiments.methods import Method
from dfl_experiments.optimizers import Optimizer


@dataclass(frozen=True)
class Step:
    """What one minibatch gave, still on the device: loss (), correct predictions (), alignment (L-1, 5) if measured."""

    loss: Tensor
    correct: Tensor
    alignment: Tensor | None


class Learner:
    """A network, a method and their two optimizers, of the same kind and hyper-parameters."""

    def __init__(self, net: BlockNet, method: Method, loss: OutputLoss, optimizer: Optimizer) -> None:
        self.net, self.method, self.loss = net, method, loss
        self.parameters = net.parameters_above(method.frozen)
        self.optimizer = optimizer.make(self.parameters)
        feedback = [p for p in method.parameters() if p.requires_grad]
        self.feedback_optimizer = optimizer.make(feedback) if feedback else None

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The network's optimizer, and the local modules' where there are any."""
        return [self.optimizer, *([self.feedback_optimizer] if self.feedback_optimizer else [])]

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of both optimizers."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr

    def step(self, x: Tensor, target: Tensor, align: bool = False) -> Step:
        """Forward with the current weights → update every B → form every δ_i with the updated B → update all W, b.

        x: (N, *h_0), target: labels (N,). With `align`, the applied signals are compared with BP's on the same trace,
        which changes no weight. The order is that of the paper's Algorithms 1 and 2.
        """
        trace = self.net.trace(x, self.method.cuts, self.method.frozen, keep=align)
        self.method.adapt(trace, target)
        if self.feedback_optimizer is not None:
            self.feedback_optimizer.step()
            self.feedback_optimizer.zero_grad()
        loss, error = self.loss.value_and_error(trace.logits, target)
        signals = self.method.signals(trace, error, target)
        deltas = trace.backward(signals, error, self.parameters, keep=align)
        alignment = measure(trace, deltas, error) if align else None
        self.optimizer.step()
        self.optimizer.zero_grad()
        correct = (trace.logits.detach().argmax(1) == target).sum()
        return Step(loss, correct, alignment)
