"""The base class of all direct methods. At each cut, h_i receives B_{i+1} s, where s is computed from e or y*."""

import logging
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.losses import OutputLoss
from dfl_experiments.engine.method import Method, WeightPair
from dfl_experiments.engine.trace import Trace, refuse_shape
from dfl_experiments.errors import UserError
from dfl_experiments.methods.local_module import LocalModule
from dfl_experiments.ranges import FeedbackInit, FeedbackShape, LocalPooling, Size, Top

log = logging.getLogger(__name__)


class Direct(Method):
    """A direct method: δ_i = (B_{i+1} s) ⊙ f'(a_i).

    In this class s = e, and B is fixed. A subclass can use another s, and can train B.

    init: initial value of every B (see `LocalModule.initialise`); "product" means "default" in a net without
        `Products`.
    feedback: form of B if h_i is an image. "conv": a convolution. "dense": a matrix of shape (K, C·H·W).
    local_pooling: pooling of the local module if its B is a convolution; otherwise it has no effect.
    top: signal of h_{L-1}. "backprop": W_Lᵀ e, so only h_1 … h_{L-2} have a B. "direct": B_L s.
    fixed_blocks: number of the lowest blocks that keep their weights.
    Raises `UserError` if `fixed_blocks` is larger than the number of hidden blocks.
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
        fixed_blocks: Size = 0,
    ) -> None:
        super().__init__(net, num_classes, loss)
        if fixed_blocks >= self.depth:
            raise UserError(
                f"method.fixed_blocks={fixed_blocks}: must be at most {self.depth - 1}, the number of hidden blocks"
            )
        self.fixed_blocks = fixed_blocks
        self.exact_from = self.depth if top == "direct" else self.depth - 1
        shapes = net.output_shapes()
        self.cuts = frozenset(self.boundaries(net, shapes))
        self.products = Products(net, shapes, num_classes)
        self.local_modules: dict[int, LocalModule] = {}
        for i in sorted(self.cuts):
            reader = net.reader(i)
            dense = feedback == "dense" or reader is None
            module = LocalModule(reader, shapes[i - 1], num_classes, local_pooling, dense)
            module.to(next(net.parameters())).initialise(init, self.products.above(i))
            self.local_modules[i] = module.requires_grad_(False)
        self.feedback = nn.ModuleList(self.local_modules.values())
        if not self.cuts:
            log.warning(
                "method: no hidden layer has a B, so every signal equals BP's; a net needs several hidden blocks "
                "(a layer that is used twice is one block, and so is nn.LSTM with num_layers=2)"
            )
        if init == "product" and self.cuts:
            self.log_initial_feedback()

    def log_initial_feedback(self) -> None:
        """Log how B starts if that is not the product of the weights above it."""
        if self.products.residual:
            log.info("method.init=product: B of every layer starts as W_Lᵀ, at every token")
        elif self.products.above(1) is None:
            log.info("method.init=product: this net has no product of weights, so B starts random")

    def boundaries(self, net: BlockNet, shapes: Sequence[torch.Size]) -> Collection[int]:
        """Return every i for which h_i receives the signal B_{i+1} s.

        shapes: shapes of h_1 … h_{L-1} for one sample.
        """
        return range(1, self.exact_from)

    def source(self, error: Tensor, target: Tensor) -> Tensor:
        """Return s, in the shape of e.

        error: e, (N, K).
        target: labels, (N,).
        """
        return error

    def learn(self, trace: Trace, local_error: Callable[[Tensor], Tensor]) -> None:
        """Set `.grad` of every B that learns to h_i εᵀ.

        local_error: function that computes the local error ε from the prediction y_i. Both have shape (N, K).
        """
        for i, module in self.local_modules.items():
            if module.weight.requires_grad:
                module.learn(trace.output(i), local_error)

    def signal(self, i: int, trace: Trace, error: Tensor, target: Tensor) -> Tensor:
        """Return B_{i+1} s with the current B, in the shape of h_i."""
        source = self.source(error, target)
        refuse_shape("s, which `source` returns,", source, error.shape)
        return self.local_modules[i].feedback(source)

    def weight_pairs(self, i: int) -> list[WeightPair]:
        """Return the pair of B_{i+1}ᵀ and W_L … W_{i+1}, both of shape (K, d_i).

        Return an empty list if h_i has no B, or if the net has no `Products`.
        """
        product = self.products.above(i) if i in self.local_modules else None
        return (
            []
            if product is None
            else [(self.local_modules[i].weight, self.local_modules[i].as_weight(product))]
        )

    def neighbour_pairs(self, i: int) -> list[WeightPair]:
        """Return B_{i+2} B_{i+1}ᵀ with W_{i+1}, both of shape (d_{i+1}, d_i); at the top, B_Lᵀ with W_L.

        Return an empty list if h_i has no B, or if the net is not fully connected.
        """
        if i not in self.local_modules or not self.products.dense:
            return []
        feedback, weight = self.local_modules[i].weight, self.products.layers[i].weight
        if i == self.depth - 1:
            return [(feedback, weight)]
        is_cut = i + 1 in self.local_modules
        above = self.local_modules[i + 1].weight if is_cut else self.products.layers[-1].weight
        return [(above.T @ feedback, weight)]

    def feedback_norm(self, i: int) -> Tensor | None:
        """Return ‖B_{i+1}‖ if h_i has a B; otherwise None."""
        return self.local_modules[i].norm() if i in self.local_modules else None

    def prediction(self, i: int, trace: Trace) -> Tensor | None:
        """Return y_i of the local module on h_i, (N, K); None if h_i has no module."""
        return self.local_modules[i](trace.output(i)) if i in self.local_modules else None


class Products:
    """The products W_L … W_{i+1}, each of shape (K, d_i).

    In a net without activations, the product is the Jacobian of a_L with respect to h_i.

    Only two kinds of nets have products, and only if the last linear layer has K outputs:
    dense: every h_i is a vector, and every block has exactly one matrix, which is the weight of a linear layer. This
        layer reads all of h_i.
    residual: every h_i consists of tokens, all tokens have the same width, and linear layers read them. The head has
        one linear layer. Every product is W_L, as if the signal passed only through shortcuts, also in a net without
        shortcuts, such as a stack of recurrent layers.
    """

    def __init__(self, net: BlockNet, shapes: Sequence[torch.Size], num_classes: int) -> None:
        by_block = [net.weight_layers(i) for i in range(net.depth)]
        self.layers = [layer for layers in by_block for layer in layers]
        matrices = [p for p in net.parameters() if p.dim() > 1]
        has_one_each = all(
            len(layers) == 1 and isinstance(layers[0], nn.Linear) for layers in by_block
        )
        is_flat = all(len(shape) == 1 for shape in shapes)
        reads_all = [layer.weight.shape[1:] for layer in self.layers[1:]] == list(shapes)
        # not so with an activation such as GLU, which halves the units
        above_first = pairwise(layer.weight.shape for layer in self.layers[1:])
        fit = all(lower[0] == upper[1] for lower, upper in above_first)
        # not so if the net flattens the logits of every token
        gives_logits = bool(self.layers) and self.layers[-1].weight.shape[0] == num_classes
        has_no_other = len(matrices) == net.depth
        is_dense = has_one_each and is_flat and reads_all and fit and has_no_other
        self.dense = is_dense and gives_logits
        width = self.layers[-1].weight.shape[1] if self.layers else 0
        are_tokens = all(len(shape) == 2 and shape[1] == width for shape in shapes)
        above_input = [layer for layers in by_block[1:] for layer in layers]
        are_linear = all(isinstance(layer, nn.Linear) for layer in above_input)
        has_one_head = len(by_block[-1]) == 1
        self.residual = are_tokens and are_linear and has_one_head and gives_logits

    @torch.no_grad()
    def above(self, i: int) -> Tensor | None:
        """Return W_L … W_{i+1} for the current weights; None in a net without products."""
        if not self.dense and not self.residual:
            return None
        product = self.layers[-1].weight
        for layer in reversed(self.layers[i:-1] if self.dense else []):
            product = product @ layer.weight
        return product
