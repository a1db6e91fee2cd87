"""uSF, brSF and frSF: signals pass through the signs of the weights (Liao et al., 2016; Xiao et al., 2019)."""

from typing import Literal

import torch
from torch import Tensor

from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.losses import OutputLoss
from dfl_experiments.engine.trace import Trace
from dfl_experiments.methods.sequential import Sequential

SignScale = Literal["weights", "xavier", "fan_out"]


class SignSymmetry(Sequential):
    """δ_i = (δ_{i+1} V_{i+1}) ⊙ f'(a_i), with V = M ⊙ sign(W) of today's W.

    `magnitudes`: M is one number s ("uniform", uSF), is drawn anew for every batch ("batch", brSF) or once ("fixed",
    frSF). `scale`: the root mean square of M, s itself: that of W at the start ("weights"); √(2/(fan_in + fan_out))
    ("xavier", BioTorch); or √(2/(k² C_out)) of a convolution and 1/√d_in of a linear layer ("fan_out", Xiao et al.).
    `shape`: M's distribution; "uniform" from 0 up is Liao et al.'s [from memory], "normal" is |N|.
    """

    def __init__(
        self,
        net: BlockNet,
        num_classes: int,
        loss: OutputLoss,
        magnitudes: Literal["uniform", "batch", "fixed"],
        scale: SignScale,
        shape: Literal["uniform", "normal"] = "uniform",
    ) -> None:
        super().__init__(net, num_classes, loss)
        self.magnitudes, self.shape = magnitudes, shape
        self.scales = [root_mean_square(layer.weight.detach(), scale) for layer in self.layers]
        for k, (layer, s) in enumerate(zip(self.layers, self.scales, strict=True)):
            start = torch.tensor(s) if magnitudes == "uniform" else torch.empty_like(layer.weight, requires_grad=False)
            self.register_buffer(f"magnitude_{k}", start.to(layer.weight))
            self.draw(k)

    def draw(self, k: int) -> None:
        """M of layers[k] anew, in place: a step that has been captured goes on reading it."""
        magnitude = self.get_buffer(f"magnitude_{k}")
        if self.magnitudes != "uniform":
            if self.shape == "uniform":
                magnitude.uniform_(0, 3**0.5 * self.scales[k])
            else:
                magnitude.normal_(0, self.scales[k]).abs_()

    def adapt(self, trace: Trace, error: Tensor, target: Tensor) -> None:
        """brSF's new M."""
        if self.magnitudes == "batch":
            for k in range(len(self.layers)):
                self.draw(k)

    def feedback_weight(self, k: int) -> Tensor:
        """V = M ⊙ sign(W)."""
        return self.get_buffer(f"magnitude_{k}") * self.layers[k].weight.detach().sign()


def root_mean_square(weight: Tensor, scale: SignScale) -> float:
    """That of M for a layer with this weight."""
    fan_out, fan_in = (weight.shape[i] * weight[0, 0].numel() for i in (0, 1))
    if scale == "xavier":
        return float((2 / (fan_in + fan_out)) ** 0.5)
    if scale == "fan_out":
        return float((2 / fan_out) ** 0.5 if weight.dim() > 2 else fan_in**-0.5)
    return float(weight.square().mean().sqrt())
