"""uSF, brSF and frSF: signals pass through the signs of the weights (Liao et al., 2016; Xiao et al., 2019)."""

from torch import Tensor

from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.losses import OutputLoss
from dfl_experiments.engine.trace import Trace
from dfl_experiments.engine.transpose import TRANSPOSED, WeightLayer
from dfl_experiments.methods.sequential import Sequential
from dfl_experiments.ranges import Magnitudes, Scale


class SignSymmetry(Sequential):
    """δ_i = (δ_{i+1} V_{i+1}) ⊙ f'(a_i), with V = M ⊙ sign(W) of today's W.

    `magnitudes`: M is one number s ("uniform", uSF), is drawn anew for every batch ("batch", brSF) or once ("fixed",
    frSF): uniformly from 0, as Liao et al. [from memory], or |N| where `normal`. `scale`: s, or M's root mean square:
    W's at the start ("weights"); √(2/(fan_in + fan_out)) ("xavier", BioTorch); or √(2/(k² C_out)) of a convolution and
    1/√d_in of a linear layer ("fan_out", Xiao et al.).
    """

    def __init__(
        self, net: BlockNet, num_classes: int, loss: OutputLoss, magnitudes: Magnitudes, scale: Scale, normal: bool
    ) -> None:
        super().__init__(net, num_classes, loss)
        self.magnitudes, self.normal = magnitudes, normal
        self.scales = [root_mean_square(layer, scale) for layer in self.layers]
        for k, layer in enumerate(self.layers):
            rows = layer.weight.detach().flatten(1)  # two dimensions: drawn alike in every memory format
            shape = (1, 1) if magnitudes == "uniform" else rows.shape
            self.register_buffer(f"magnitude_{k}", rows.new_full(shape, self.scales[k]))
        if magnitudes != "uniform":
            self.draw()

    def draw(self) -> None:
        """Every M anew, in place: a step that has been captured goes on reading it."""
        for k, s in enumerate(self.scales):
            magnitude = self.get_buffer(f"magnitude_{k}")
            magnitude.normal_(0, s).abs_() if self.normal else magnitude.uniform_(0, 3**0.5 * s)

    def adapt(self, trace: Trace, error: Tensor, target: Tensor) -> None:
        """brSF's new M."""
        if self.magnitudes == "batch":
            self.draw()

    def feedback_weight(self, k: int) -> Tensor:
        """V = M ⊙ sign(W)."""
        rows = self.layers[k].weight.detach().flatten(1)
        return rows.sign().mul_(self.get_buffer(f"magnitude_{k}")).view_as(self.layers[k].weight)


def root_mean_square(layer: WeightLayer, scale: Scale) -> float:
    """Return that of M for a layer."""
    weight = layer.weight.detach()
    fan_out, fan_in = (weight.shape[i] * weight[0, 0].numel() for i in (0, 1))
    if isinstance(layer, TRANSPOSED):
        fan_out, fan_in = fan_in, fan_out
    return {
        "weights": float(weight.square().mean().sqrt()),
        "xavier": (2 / (fan_in + fan_out)) ** 0.5,
        "fan_out": fan_in**-0.5 if weight.dim() == 2 else (2 / fan_out) ** 0.5,
    }[scale]
