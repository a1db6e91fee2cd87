"""What all direct methods share: at a cut h_i receives B_{i+1} s, and they differ in where B comes from and in s."""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.losses import OutputLoss
from dfl_experiments.engine.method import Method, WeightPair
from dfl_experiments.engine.trace import Trace
from dfl_experiments.errors import UserError
from dfl_experiments.methods.local_module import LocalModule
from dfl_experiments.ranges import FeedbackInit, FeedbackShape, LocalPooling, Size, Top


class Direct(Method):
    """δ_i = (B_{i+1} s) ⊙ f'(a_i), with s = e and a fixed B unless a subclass says otherwise.

    `init`: where every B starts (see `LocalModule.initialise`; "product" means "default" in a net whose products are no
    matrices). `feedback`: B has the shape of a "conv" on an image-shaped h_i, or is "dense", a matrix (K, C·H·W).
    `local_pooling`: of an image-shaped local module. `top` says what h_{L-1} receives: "backprop", W_Lᵀ e, or "direct",
    B_L s: without it local modules sit on h_1 … h_{L-2} only. `held`: so many of the lowest blocks keep their weights.
    """

    def __init__(
        self,
        net: BlockNet,
        num_classes: int,
        loss: OutputLoss,
        init: FeedbackInit = "default",
        feedback: FeedbackShape = "conv",
        local_pooling: LocalPooling = "average",
        top: Top = "backprop",
        held: Size = 0,
    ) -> None:
        super().__init__(net, num_classes, loss)
        if held >= self.depth:
            raise UserError(f"method.held={held}: the model has {self.depth - 1} hidden blocks")
        self.held = held
        self.exact_from = self.depth if top == "direct" else self.depth - 1
        shapes = net.output_shapes()
        self.cuts = frozenset(self.boundaries(net, shapes))
        self.products = Products(net, shapes)
        self.local_modules: dict[int, LocalModule] = {}
        for i in sorted(self.cuts):
            reader = next(iter(net.weight_layers(i)), None)
            module = LocalModule(reader, shapes[i - 1], num_classes, local_pooling, feedback == "dense")
            module.to(next(net.parameters())).initialise(init, self.products.above(i))
            self.local_modules[i] = module.requires_grad_(False)
        self.feedback = nn.ModuleList(self.local_modules.values())

    def boundaries(self, net: BlockNet, shapes: Sequence[torch.Size]) -> Collection[int]:
        """The i whose h_i, of these shapes, receive B_{i+1} s."""
        return range(1, self.exact_from)

    def source(self, error: Tensor, target: Tensor) -> Tensor:
        """s, (N, K). error: e, (N, K); target: labels, (N,)."""
        return error

    def learn(self, trace: Trace, local_error: Callable[[Tensor], Tensor]) -> None:
        """Leave in `.grad` of every B that learns the gradient h_i εᵀ of its y_i. local_error: y_i -> ε, (N, K)."""
        for i, module in self.local_modules.items():
            if module.weight.requires_grad:
                module.learn(trace.output(i), local_error)

    def signal(self, i: int, trace: Trace, error: Tensor, target: Tensor) -> Tensor:
        """B_{i+1} s, with B as it is now."""
        return self.local_modules[i].feedback(self.source(error, target))

    def weight_pairs(self, i: int) -> list[WeightPair]:
        """B_{i+1}ᵀ and W_L … W_{i+1}, both (K, d_i), where the net's products are matrices."""
        product = self.products.above(i) if i in self.local_modules else None
        return [] if product is None else [(self.local_modules[i].weight, self.local_modules[i].in_place(product))]

    def feedback_norm(self, i: int) -> Tensor | None:
        """Return ‖B_{i+1}‖ where h_i has a B."""
        return self.local_modules[i].norm() if i in self.local_modules else None

    def prediction(self, i: int, trace: Trace) -> Tensor | None:
        """y_i of the local module that sits on h_i."""
        return self.local_modules[i](trace.output(i)) if i in self.local_modules else None


class Products:
    """W_L … W_{i+1}, (K, d_i), in nets where they are the transposed Jacobian products up to activation functions.

    That is where every hidden layer is a vector and every block has one matrix, that of a linear layer. On token states
    of a residual net W_L alone is: the products of the residual path.
    """

    def __init__(self, net: BlockNet, shapes: Sequence[torch.Size]) -> None:
        by_block = [net.weight_layers(i) for i in range(net.depth)]
        self.layers = [layer for layers in by_block for layer in layers]
        matrices = [p for p in net.parameters() if p.dim() > 1]
        has_one_each = all(len(layers) == 1 and isinstance(layers[0], nn.Linear) for layers in by_block)
        is_flat = all(len(shape) == 1 for shape in shapes)
        self.dense = has_one_each and is_flat and len(matrices) == net.depth
        width = self.layers[-1].weight.shape[1] if self.layers else 0
        self.residual = all(len(shape) == 2 and shape[1] == width for shape in shapes)

    @torch.no_grad()
    def above(self, i: int) -> Tensor | None:
        """The product above h_i at the current weights; None where there is none."""
        if not self.dense and not self.residual:
            return None
        product = self.layers[-1].weight
        for layer in reversed(self.layers[i:-1] if self.dense else []):
            product = product @ layer.weight
        return product
