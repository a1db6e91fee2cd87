"""Direct feedback with B fixed (DFA) or trained by a local loss (LAS, LTAS)."""

from typing import Any, Literal

from torch import Tensor

from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.losses import OutputLoss, precise
from dfl_experiments.engine.trace import Trace
from dfl_experiments.methods.direct import Direct
from dfl_experiments.ranges import LocalReduction


class DirectFeedback(Direct):
    """DFA (`local_target` null, Eqs. 15-18), LAS ("logits", Eqs. 19-24) and LTAS ("labels", Eqs. 25-27).

    LAS descends ℒ_i = ‖y_i - a_L‖², summed over classes and meaned over the batch (`local_reduction` "sum", Eq. 20), or
    half of it ("half_sum", the step of Eq. 21 and Algorithm 1), or meaned over both ("mean"). LTAS descends the
    network's own loss at y_i: cross-entropy of softmax(y_i), or ½‖y_i - y*‖². The B of the highest layer is fixed
    where `top` is "direct".
    """

    def __init__(
        self,
        net: BlockNet,
        num_classes: int,
        loss: OutputLoss,
        local_target: Literal["logits", "labels"] | None,
        local_reduction: LocalReduction = "sum",
        **options: Any,
    ) -> None:
        super().__init__(net, num_classes, loss, **options)
        self.loss = loss
        self.local_target = local_target
        self.scale = {"sum": 2.0, "half_sum": 1.0, "mean": 2.0 / num_classes}[local_reduction]
        for i, module in self.local_modules.items():
            module.requires_grad_(local_target is not None and i < self.depth - 1)

    def adapt(self, trace: Trace, error: Tensor, target: Tensor) -> None:
        """∂ℒ_i/∂B of every local module: h_i (y_i - a_L)ᵀ or h_i (softmax(y_i) - y*)ᵀ, times the reduction's factor,
        left in `.grad`: `Learner.step` then updates B with it."""
        if self.local_target is not None:
            self.learn(trace, lambda y: self._local_error(y, trace.logits.detach(), target))

    def _local_error(self, y: Tensor, logits: Tensor, target: Tensor) -> Tensor:
        """∂ℒ_i/∂y_i, (N, K), formed in no less than float32."""
        if self.local_target == "labels":
            error = self.loss.value_and_error(precise(y), target)[1]
        else:
            error = (precise(y) - precise(logits)) * (self.scale / len(y))
        return error.to(y.dtype)
