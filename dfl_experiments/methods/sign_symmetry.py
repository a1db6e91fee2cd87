"""uSF, brSF and frSF: feedback through the signs of the weights (Liao et al., 2016; Xiao et al., 2019)."""

from typing import Any

import torch
from torch import Tensor

from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.losses import OutputLoss
from dfl_experiments.engine.trace import Trace
from dfl_experiments.engine.transpose import TRANSPOSED, WeightLayer
from dfl_experiments.methods.sequential import Sequential
from dfl_experiments.ranges import Magnitudes, Scale


class SignSymmetry(Sequential):
    """Sign symmetry: δ_i = (δ_{i+1} V_{i+1}) ⊙ f'(a_i), with V = M ⊙ sign(W) at the current W.

    magnitudes: "uniform": M is one number s (uSF). "batch": M is drawn for every batch (brSF). "fixed": M is drawn once
        (frSF).
    scale: s, the root mean square of M. "weights": the root mean square of the initial W. "xavier":
        √(2/(fan_in + fan_out)), as in BioTorch. "fan_out": √(2/(k² C_out)) for a convolution, 1/√d_in for a linear
        layer, as in Xiao et al.
    normal: distribution of a drawn M. True: M ~ |N(0, s²)|. False: M is uniform in [0, √3 s], as in Liao et al. (not
        checked against the paper).
    """

    def __init__(
        self,
        net: BlockNet,
        num_classes: int,
        loss: OutputLoss,
        magnitudes: Magnitudes,
        scale: Scale,
        normal: bool,
    ) -> None:
        super().__init__(net, num_classes, loss)
        self.magnitudes, self.normal = magnitudes, normal
        self.scales = [root_mean_square(layer, scale) for layer in self.layers]
        self.register_load_state_dict_pre_hook(add_scales)
        for k, layer in enumerate(self.layers):
            # flat, so that every memory format draws the same M
            rows = layer.weight.detach().flatten(1)
            shape = (1, 1) if magnitudes == "uniform" else rows.shape
            self.register_buffer(f"magnitude_{k}", rows.new_full(shape, self.scales[k]))
        if magnitudes != "uniform":
            self.draw()

    def get_extra_state(self) -> Tensor:
        """Return the scales, which `state_dict` includes. They stay numbers, so that a step reads no device."""
        return torch.tensor(self.scales, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Use the scales of a saved state in later draws."""
        self.scales = state.tolist()

    def draw(self) -> None:
        """Draw new values for every M. The tensors stay the same, because a CUDA graph keeps their addresses."""
        for k, s in enumerate(self.scales):
            magnitude = self.get_buffer(f"magnitude_{k}")
            magnitude.normal_(0, s).abs_() if self.normal else magnitude.uniform_(0, 3**0.5 * s)

    def adapt(self, trace: Trace, error: Tensor, target: Tensor) -> None:
        """Draw new values for every M if `magnitudes` is "batch"."""
        if self.magnitudes == "batch":
            self.draw()

    def feedback_weight(self, k: int) -> Tensor:
        """Return V = M ⊙ sign(W), in the shape of W."""
        rows = self.layers[k].weight.detach().flatten(1)
        return rows.sign().mul_(self.get_buffer(f"magnitude_{k}")).view_as(self.layers[k].weight)


def add_scales(rule: SignSymmetry, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Add the rule's own scales to the state of an early version, which lacks them."""
    state.setdefault(f"{prefix}_extra_state", rule.get_extra_state())


def root_mean_square(layer: WeightLayer, scale: Scale) -> float:
    """Return the root mean square of M for a layer. scale: see `SignSymmetry`."""
    weight = layer.weight.detach()
    kernel_size = weight[0, 0].numel()
    fan_out, fan_in = weight.shape[0] * kernel_size, weight.shape[1] * kernel_size
    if isinstance(layer, TRANSPOSED):
        fan_out, fan_in = fan_in, fan_out
    return {
        "weights": float(weight.square().mean().sqrt()),
        "xavier": (2 / (fan_in + fan_out)) ** 0.5,
        "fan_out": fan_in**-0.5 if weight.dim() == 2 else (2 / fan_out) ** 0.5,
    }[scale]
