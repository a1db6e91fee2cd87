"""Direct feedback: δ_i = (B_{i+1} e) ⊙ f'(a_i), with B fixed (DFA) or trained by a local loss (LAS, LTAS)."""

from typing import Literal

import torch
from torch import Tensor, nn

from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.losses import OutputLoss, precise
from dfl_experiments.engine.method import Method
from dfl_experiments.engine.trace import Trace
from dfl_experiments.methods.local_module import LocalModule
from dfl_experiments.ranges import FeedbackInit, LocalPooling, LocalReduction, Top


class DirectFeedback(Method):
    """DFA (`local_target` null, Eqs. 15-18), LAS ("logits", Eqs. 19-24) and LTAS ("labels", Eqs. 25-27).

    LAS descends ℒ_i = ‖y_i - a_L‖², summed over classes and meaned over the batch (`local_reduction` "sum", Eq. 20), or
    half of it ("half_sum", the step of Eq. 21 and Algorithm 1), or meaned over both ("mean"). LTAS descends the
    network's own loss at y_i: cross-entropy of softmax(y_i), or ½‖y_i - y*‖². `local_pooling` is the global pooling of
    an image-shaped local module, `init` where every B starts (see `LocalModule.initialise`; "product" means "default"
    in a net that is not linear layers alone). `top` says what h_{L-1} receives: "backprop", W_Lᵀ e, or "direct", B_L e
    with B_L fixed: local modules sit on h_1 … h_{L-2} only.
    """

    def __init__(
        self,
        net: BlockNet,
        num_classes: int,
        loss: OutputLoss,
        local_target: Literal["logits", "labels"] | None,
        init: FeedbackInit,
        local_reduction: LocalReduction = "sum",
        local_pooling: LocalPooling = "average",
        top: Top = "backprop",
    ) -> None:
        super().__init__(net, num_classes, loss)
        self.loss = loss
        self.local_target = local_target
        self.scale = {"sum": 2.0, "half_sum": 1.0, "mean": 2.0 / num_classes}[local_reduction]
        self.exact_from = self.depth if top == "direct" else self.depth - 1
        self.cuts = frozenset(range(1, self.exact_from))
        layers = [net.weight_layers(i) for i in range(self.depth)]
        if init == "product" and not all(len(some) == 1 and isinstance(some[0], nn.Linear) for some in layers):
            init = "default"  # also in the dense layers of a convolutional net, as in the published code
        shapes = net.output_shapes()
        modules: list[LocalModule] = []
        for i in sorted(self.cuts):
            module = LocalModule(layers[i][0], shapes[i - 1], num_classes, local_pooling)
            module.initialise(init, [some[0].weight for some in layers[i:]])
            module.requires_grad_(local_target is not None and i < self.depth - 1)
            modules.append(module)
        self.feedback = nn.ModuleList(modules)
        self.local_modules = modules

    def adapt(self, trace: Trace, error: Tensor, target: Tensor) -> None:
        """∂ℒ_i/∂B of every local module: h_i (y_i - a_L)ᵀ or h_i (softmax(y_i) - y*)ᵀ, times the reduction's factor,
        left in `.grad`: `Learner.step` then updates B with it."""
        if self.local_target is None:
            return
        outputs, gradients, weights = [], [], []
        for module, h in zip(self.local_modules, trace.cut_outputs, strict=True):
            if module.weight.requires_grad:
                y = module(h.detach())
                outputs.append(y)
                gradients.append(self._local_error(y.detach(), trace.logits.detach(), target))
                weights.append(module.weight)
        if weights:
            torch.autograd.backward(outputs, gradients, inputs=weights)

    def _local_error(self, y: Tensor, logits: Tensor, target: Tensor) -> Tensor:
        """∂ℒ_i/∂y_i, (N, K), formed in no less than float32."""
        if self.local_target == "labels":
            error = self.loss.value_and_error(precise(y), target)[1]
        else:
            error = (precise(y) - precise(logits)) * (self.scale / len(y))
        return error.to(y.dtype)

    def signal(self, i: int, trace: Trace, error: Tensor, target: Tensor) -> Tensor:
        """B_{i+1} e, with B as it is now."""
        return self.local_modules[i - 1].feedback(error)
