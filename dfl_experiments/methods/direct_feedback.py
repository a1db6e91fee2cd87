"""DFA, with a fixed B, and LAS and LTAS, with a B that a local loss trains."""

from typing import Any, Literal

from torch import Tensor

from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.losses import OutputLoss, precise
from dfl_experiments.engine.trace import Trace
from dfl_experiments.methods.direct import Direct
from dfl_experiments.ranges import LocalReduction


class DirectFeedback(Direct):
    """DFA (Eqs. 15-18), LAS (Eqs. 19-24) and LTAS (Eqs. 25-27): δ_i = (B_{i+1} e) ⊙ f'(a_i).

    With `top` "direct", the B of the highest layer is fixed.

    local_target: what trains B. None: nothing (DFA). "logits": ℒ_i = ‖y_i - a_L‖², averaged over the batch (LAS).
        "labels": the network's own loss at y_i (LTAS), the cross-entropy of softmax(y_i) or ½‖y_i - y*‖².
    local_reduction: of LAS's loss over the classes: "sum" (Eq. 20), "half_sum", half of it (the step of Eq. 21 and
        Algorithm 1), or "mean".
    options: see `Direct`.
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
        """Set `.grad` of every B to ∂ℒ_i/∂B = h_i (∂ℒ_i/∂y_i)ᵀ, with which `Learner.step` then updates B."""
        if self.local_target is not None:
            self.learn(trace, lambda y: self._local_error(y, trace.logits.detach(), target))

    def _local_error(self, y: Tensor, logits: Tensor, target: Tensor) -> Tensor:
        """Return ∂ℒ_i/∂y_i, (N, K), computed in float32 or more: a factor times y_i - a_L, or softmax(y_i) - y*."""
        if self.local_target == "labels":
            error = self.loss.value_and_error(precise(y), target)[1]
        else:
            error = (precise(y) - precise(logits)) * (self.scale / len(y))
        return error.to(y.dtype)
