"""DRTP: hidden layers learn from the label alone (Frenkel et al., 2021); and its sibling, from the error's sign."""

from typing import Any, Literal

from torch import Tensor
from torch.nn import functional as F

from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.losses import CrossEntropy, OutputLoss
from dfl_experiments.errors import UserError
from dfl_experiments.methods.direct import Direct


class TargetProjection(Direct):
    """δ_i = (B_{i+1} s) ⊙ f'(a_i), with a fixed B and s = -y*/N ("target", DRTP) or sign(e)/N ("error_sign", sDFA).

    -y*/N stands for e = (softmax(a_L) - y*)/N: its entry at the label has e's sign. It never vanishes, and units that
    do not saturate, like ReLU, grow without bound; the authors' are tanh [from memory], which the protocols choose
    where a net leaves its activation open. Theirs is +B y* without 1/N: a symmetric B absorbs the sign, SGD's learning
    rate the N. Raises `UserError` for "target" with another loss than cross-entropy, whose e has any sign there.
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
        """s, (N, K). error: e, (N, K); target: labels, (N,)."""
        if self.projected == "target":
            return F.one_hot(target, error.shape[1]).to(error) / -len(target)
        return error.sign() / len(target)
