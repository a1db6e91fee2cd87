"""DFA, whose B is fixed, and LAS and LTAS, whose B is trained by a local loss."""

from typing import Any, Literal

from torch import Tensor

from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.losses import OutputLoss, precise
from dfl_experiments.engine.trace import Trace
from dfl_experiments.methods.direct import Direct
from dfl_experiments.ranges import LocalReduction


class DirectFeedback(Direct):
    """DFA (Eqs. 15-18), LAS (Eqs. 19-24) and LTAS (Eqs. 25-27): δ_i = (B_{i+1} e) ⊙ f'(a_i).

    B_L exists only if `top` is "direct". B_L is always fixed.

    local_target: chooses the local loss ℒ_i that trains B.
        None: no local loss, B is fixed (DFA).
        "logits": ℒ_i = ‖y_i - a_L‖², averaged over the batch (LAS).
        "labels": ℒ_i is the network's own loss, cross-entropy or ½‖y_i - y*‖², with y_i as logits (LTAS).
    local_reduction: reduction of LAS's loss over the classes. "sum": the sum (Eq. 20). "half_sum": half of the sum
        (Eq. 21 and Algorithm 1). "mean": the mean.
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
        self.needs_labels = local_target == "labels"
        self.scale = {"sum": 2.0, "half_sum": 1.0, "mean": 2.0 / num_classes}[local_reduction]
        for i, module in self.local_modules.items():
            module.requires_grad_(local_target is not None and i < self.depth - 1)

    def adapt(self, trace: Trace, error: Tensor, target: Tensor) -> None:
        """Set `.grad` of every B to ∂ℒ_i/∂B = h_i (∂ℒ_i/∂y_i)ᵀ. Afterwards `Learner.step` updates B."""
        if self.local_target is not None:
            self.learn(trace, lambda y: self._local_error(y, trace.logits.detach(), target))

    def _local_error(self, y: Tensor, logits: Tensor, target: Tensor) -> Tensor:
        """Return ∂ℒ_i/∂y_i, (N, K), computed in float32 or higher precision."""
        if self.local_target == "labels":
            error = self.loss.value_and_error(precise(y), target)[1]
        else:
            error = (precise(y) - precise(logits)) * (self.scale / len(y))
        return error.to(y.dtype)
