"""One minibatch: the six stops every method and every model shares."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from dfl_experiments.engine.alignment import measure, quantity_names
from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.losses import OutputLoss, precise
from dfl_experiments.engine.method import Method
from dfl_experiments.optimizers import OptimizerFactory
from dfl_experiments.ranges import Precision


class Learner:
    """A network, a method and their two optimizers, of the same kind and hyper-parameters.

    numbers: the names of what a step returns, in its order: the one place where that is known. more: what is measured
    beside the δ-cosine (see `quantities.MORE`).
    precision: "bfloat16" computes the forward and backward pass under autocast, weights and loss staying as they are.
    """

    def __init__(
        self,
        net: BlockNet,
        method: Method,
        loss: OutputLoss,
        optimizer: OptimizerFactory,
        precision: Precision = "float32",
        more: Sequence[str] = (),
    ) -> None:
        self.net, self.method, self.loss, self.precision, self.more = net, method, loss, precision, more
        self.device = next(net.parameters()).device
        self.numbers = ["loss", "correct", *quantity_names(net.depth, more)]
        self.parameters = net.parameters_above(max(method.frozen, method.held))
        self.optimizer = optimizer.make(self.parameters)
        feedback = [p for p in method.parameters() if p.requires_grad]
        self.feedback_optimizer = optimizer.make(feedback) if feedback else None

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The network's optimizer, and the local modules' where there are any."""
        return [self.optimizer, *([self.feedback_optimizer] if self.feedback_optimizer else [])]

    def _update_feedback(self) -> None:
        if self.feedback_optimizer is not None:
            self.feedback_optimizer.step()
            self.feedback_optimizer.zero_grad()

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

    def step(self, x: Tensor, target: Tensor, align: bool = False) -> Tensor:
        """Forward with the current weights → update every B → form every δ_i with the updated B → update all W, b.

        Where a method `sends_first`, B is updated after the signals are sent.

        x: (N, *h_0), target: labels (N,). With `align`, the applied signals are compared with BP's on the same trace,
        which changes no weight. The order is that of the paper's Algorithms 1 and 2. Returns the step's `numbers`,
        still on the device, in one tensor; those of alignment are NaN where it is not measured.
        """
        with self.autocast():
            trace = self.net.trace(x, self.method.cuts, self.method.frozen, align, self.method.transpose)
            loss, error = self.value_and_error(trace.logits, target)
            self.method.adapt(trace, error, target)
        if not self.method.sends_first:
            self._update_feedback()
        deltas = trace.backward(self.method.signal, error, target)
        if align:
            measured = measure(self.net, self.method, trace, deltas, error, self.more, last=True).to(loss)
        else:
            measured = loss.new_full((len(self.numbers) - 2,), torch.nan)
        self.method.follow(self.optimizer.param_groups[0]["lr"])
        if self.method.sends_first:
            self._update_feedback()
        self.optimizer.step()
        self.optimizer.zero_grad()
        correct = (trace.logits.detach().argmax(1) == target).sum()
        return torch.cat([torch.stack([loss, correct.to(loss)]), measured])
