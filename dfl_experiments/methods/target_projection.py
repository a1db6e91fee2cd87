"""DRTP, where hidden layers learn from the label alone, and sDFA, from the error's sign (Frenkel et al., 2021)."""

from typing import Any, Literal

from torch import Tensor
from torch.nn import functional as F

from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.losses import CrossEntropy, OutputLoss
from dfl_experiments.errors import UserError
from dfl_experiments.methods.direct import Direct


class TargetProjection(Direct):
    """Target projection: δ_i = (B_{i+1} s) ⊙ f'(a_i), with a fixed B and s = -y*/N (DRTP) or sign(e)/N (sDFA).

    -y*/N replaces e = (softmax(a_L) - y*)/N; at the label both are negative. This signal never vanishes, so units that
    do not saturate, such as ReLU, grow without bound. The authors use tanh [from memory], and so do the protocols where
    a net has a choice of activation. The authors' signal is +B y* without 1/N: a symmetric B absorbs the sign, and
    SGD's learning rate absorbs N.

    projected: "target" (DRTP) or "error_sign" (sDFA).
    options: see `Direct`.
    Raises `UserError` for "target" with another loss than cross-entropy: its e may be positive at the label.
    """

    def __init__(
        self,
        net: BlockNet,
        num_classes: int,
        loss: OutputLoss,
        projected: Literal["target", "error_sign"],
        **options: Any,
    ) -> None:
        super().__init__(net, num_classes, loss, **options)
        if projected == "target" and not isinstance(loss, CrossEntropy):
            raise UserError("method.projected=target: needs loss=cross_entropy; or choose method.projected=error_sign")
        self.projected = projected

    def source(self, error: Tensor, target: Tensor) -> Tensor:
        """Return s, (N, K). error: e, (N, K). target: labels, (N,)."""
        if self.projected == "target":
            return F.one_hot(target, error.shape[1]).to(error) / -len(target)
        return error.sign() / len(target)
