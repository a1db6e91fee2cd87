"""Train one minibatch, in the six stages that all methods and models share."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from dfl_experiments.engine.alignment import measure, quantity_names
from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.losses import OutputLoss, precise
from dfl_experiments.engine.method import Method, refuse_shared
from dfl_experiments.errors import UserError
from dfl_experiments.optimizers import OptimizerFactory
from dfl_experiments.ranges import Precision


class Learner:
    """A network, a method, and one optimizer for each. By default both optimizers have the same hyper-parameters.

    precision: "bfloat16" runs the forward and backward pass under autocast; weights and loss keep their type.
    extra_quantities: names from `measured.EXTRA_QUANTITIES`, measured together with the δ-cosine.
    feedback_optimizer: factory for the optimizer of B. None: `optimizer` is used for B too.
    clip_norm: maximum norm of W's gradient over all trained parameters; None for no limit.
    rates: learning rates of W and B before the schedule changes them.
    metric_names: names of the values that `step` returns, in order.
    """

    def __init__(
        self,
        net: BlockNet,
        method: Method,
        loss: OutputLoss,
        optimizer: OptimizerFactory,
        precision: Precision = "float32",
        extra_quantities: Sequence[str] = (),
        feedback_optimizer: OptimizerFactory | None = None,
        clip_norm: float | None = None,
    ) -> None:
        refuse_shared(method, net)
        self.net = net
        self.method = method
        self.loss = loss
        self.precision = precision
        self.extra_quantities = extra_quantities
        self.clip_norm = clip_norm
        self.device = next(net.parameters()).device
        self.metric_names = ["loss", "correct", *quantity_names(net.depth, extra_quantities)]
        self.parameters = net.parameters_above(max(method.frozen, method.fixed_blocks))
        if not self.parameters:
            raise UserError(
                "model: every parameter that this method trains is frozen (requires_grad=False)"
            )
        self.optimizer = optimizer.make(self.parameters)
        self.feedback = [p for p in method.parameters() if p.requires_grad]
        of_feedback = feedback_optimizer or optimizer
        self.feedback_optimizer = of_feedback.make(self.feedback) if self.feedback else None
        self.rates = (optimizer.lr, of_feedback.lr)

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Return the network's optimizer and, if feedback weights learn, their optimizer."""
        if self.feedback_optimizer is None:
            return [self.optimizer]
        return [self.optimizer, self.feedback_optimizer]

    def _update_feedback(self) -> None:
        if self.feedback_optimizer is not None:
            self.feedback_optimizer.step()
            self.feedback_optimizer.zero_grad()

    def set_lr(self, lr: float, feedback_lr: float | None = None) -> None:
        """Set the learning rates of W and B. A tensor rate is changed in place, because a captured step reads it.

        feedback_lr: rate of B; None for the rate of W.
        """
        values = (lr, lr if feedback_lr is None else feedback_lr)
        for optimizer, value in zip(self.optimizers, values, strict=False):
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(value)
                else:
                    group["lr"] = value

    def _clip(self) -> None:
        """Scale W's gradient down to norm `clip_norm`.

        B's gradient is scaled by the same factor if it was made from W's gradient (`method.follows_backward`).
        """
        if self.clip_norm is None:
            return
        norm = get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        scaled = list(self.parameters)
        if self.method.follows_backward:
            scaled += self.feedback
        clip_grads_with_norm_(scaled, self.clip_norm, norm)

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context of a forward pass in this learner's precision."""
        if self.precision == "bfloat16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def value_and_error(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return ℒ and e, in float32 or higher precision. logits: (N, K). target: (N,)."""
        return self.loss.value_and_error(precise(logits), target)

    def step(self, x: Tensor, target: Tensor, align: bool = False) -> Tensor:
        """Train on one minibatch, in the order of the paper's Algorithms 1 and 2.

        Forward pass → update every B → form every δ_i with the updated B → clip the gradient → update all W, b.
        If `method.sends_first` is True, every δ_i is formed with the old B. Then B is updated just before W.

        x: (N, *h_0).
        target: labels, (N,).
        align: whether to compare the applied signals with those of BP on the same trace. This comparison changes no
            weight.
        Returns the values of `metric_names` in one tensor on the device. If `align` is False, all values except loss
            and correct are NaN.
        """
        with self.autocast():
            trace = self.net.trace(
                x, self.method.cuts, self.method.frozen, align, self.method.transpose
            )
            loss, error = self.value_and_error(trace.logits, target)
            self.method.adapt(trace, error, target)
        if not self.method.sends_first:
            self._update_feedback()
        deltas = trace.backward(self.method.signal, error, target)
        if align:
            measured = measure(
                self.net, self.method, trace, deltas, error, self.extra_quantities, last=True
            ).to(loss)
        else:
            measured = loss.new_full((len(self.metric_names) - 2,), torch.nan)
        self._clip()
        # optimizers: that of W, then that of B
        followed = self.optimizers[-1 if self.method.follows_rate_of_b else 0]
        self.method.follow(followed.param_groups[0]["lr"])
        if self.method.sends_first:
            self._update_feedback()
        self.optimizer.step()
        self.optimizer.zero_grad()
        predicted = trace.logits.detach().argmax(1)
        correct = (predicted == target).sum()
        loss_and_correct = torch.stack([loss, correct.to(loss)])
        return torch.cat([loss_and_correct, measured])
