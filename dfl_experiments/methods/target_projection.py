"""DRTP projects the label to the hidden layers; error-sign DFA projects the error's sign (Frenkel et al., 2021)."""

from typing import Any, Literal

from torch import Tensor
from torch.nn import functional as F

from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.losses import CrossEntropy, OutputLoss
from dfl_experiments.errors import UserError
from dfl_experiments.methods.direct import Direct


class TargetProjection(Direct):
    """Target projection: δ_i = (B_{i+1} s) ⊙ f'(a_i), B fixed, s = -y*/N (DRTP) or s = sign(e)/N (error-sign DFA).

    DRTP replaces e = (softmax(a_L) - y*)/N by -y*/N. In e and in -y*/N, the entry of the label is negative. But -y*/N
    never vanishes, so units that do not saturate, such as ReLU, grow without bound. The authors use tanh (not checked
    against the paper). The protocols use tanh too, if the net has an option for the activation.

    The authors' signal is +B y* without the factor 1/N. The sign makes no difference if the distribution of B is
    symmetric. In SGD, the learning rate can contain the factor 1/N.

    projected: "target" (DRTP) or "error_sign" (error-sign DFA).
    options: see `Direct`.
    Raises `UserError` if `projected` is "target" and the loss is not cross-entropy. With another loss, the label's
        entry of e may be positive.
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
            raise UserError(
                "method.projected=target: needs loss=cross_entropy; or choose method.projected=error_sign"
            )
        self.projected = projected
        self.needs_labels = projected == "target"

    def source(self, error: Tensor, target: Tensor) -> Tensor:
        """Return s, in the shape of e.

        error: e, (N, K).
        target: labels, (N,).
        """
        if self.projected == "target":
            return F.one_hot(target, error.shape[1]).to(error) / -len(target)
        return error.sign() / len(target)
