"""Networks as a chain of blocks, and their forward pass, cut where a method says.

Notation, throughout the package: h_0 = x; a_i = pre_i(h_{i-1}), h_i = post_i(a_i) for i = 1 … L-1; logits
a_L = head(h_{L-1}).
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from dfl_experiments.engine.trace import Segment, Trace
from dfl_experiments.engine.transpose import Transpose, WeightLayer, is_weight_layer
from dfl_experiments.errors import UserError, clipped

LONGEST_SHAPE = 3
KEEP_ZEROS = ("torch.nn.modules.pooling", "torch.nn.modules.flatten")  # modules whose layers give 0 where they read 0


class Block(nn.Module):
    """h = post(pre(x)): what lies between two feedback boundaries.

    One sample's h is a vector (d,), tokens (T, C) or an image (C, H, W).
    `pre` ends at the block's last pre-activation a, where its error signal δ = ∂ℒ/∂a lives; `post` is the rest
    (activation, pooling, flattening). With `leak`, `pre` is called as `pre(x, shortcut)` and at a cut the second
    argument still carries the gradient of the block above into the block below (spec: ResNet18's skip, as published).
    """

    def __init__(self, pre: nn.Module, post: nn.Module, leak: bool = False) -> None:
        super().__init__()
        self.pre = pre
        self.post = post
        self.leak = leak

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, *h_{i-1}) -> (N, *h_i)."""
        return self.post(self.pre(x))


class BlockNet(nn.Module):
    """a_L = head(h_{L-1}), h_i = block_i(h_{i-1}): a model is a function that returns one of these."""

    def __init__(self, *blocks: Block, head: nn.Module, input_shape: Sequence[int]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.head = head
        self.input_shape = tuple(input_shape)
        # of every block and of the head: asked for at every step
        self.weights = [list(module.parameters()) for module in (*blocks, head)]

    @property
    def depth(self) -> int:
        """L, the number of layers or blocks, head included."""
        return len(self.blocks) + 1

    def forward(self, x: Tensor, watch: Callable[[int, Tensor], None] | None = None) -> Tensor:
        """The logits a_L. x: (N, *h_0) -> (N, K). watch: called with i and h_i, as each is computed."""
        for i, block in enumerate(self.blocks, start=1):
            x = block(x)
            if watch is not None:
                watch(i, x)
        return self.head(x)

    def ends_in_relu(self, i: int) -> bool:
        """Whether the last layer of block i is a ReLU, but for pooling and flattening."""
        layers = [self.blocks[i - 1].post]
        while layers:
            layer = layers.pop()
            if isinstance(layer, nn.Sequential):
                layers += layer
            elif type(layer).__module__ not in KEEP_ZEROS:
                return isinstance(layer, nn.ReLU)
        return False

    def weight_layers(self, i: int) -> list[WeightLayer]:
        """Those of block i+1 (of the head for i = L-1), in the order in which it has them."""
        module = self.head if i == self.depth - 1 else self.blocks[i]
        return [layer for layer in module.modules() if is_weight_layer(layer)]

    @torch.no_grad()
    def probe(self, cuts: Collection[int] = ()) -> Trace:
        """A kept trace of one blank image, from a forward pass that leaves the net as it was.

        Raises `UserError` where no image gets through: a kernel or a pooling is larger than what is left of it, or two
        layers do not fit together. cuts: see `trace`.
        """
        training, parameter = self.training, next(self.parameters())
        x = torch.zeros(1, *self.input_shape, dtype=parameter.dtype, device=parameter.device)
        try:
            return self.eval().trace(x, cuts, keep=True)
        except (RuntimeError, ValueError) as error:
            shape = "x".join(str(length) for length in self.input_shape)
            raise UserError(f"model: images of {shape} do not get through it ({clipped(str(error), 200)})") from error
        finally:
            self.train(training)

    def output_shapes(self) -> list[torch.Size]:
        """Return the shape of one sample's h_1 … h_{L-1}.

        Raises `UserError` for a shape that `Block` does not allow, and for a block that changes its input in place.
        """
        shapes = [h.shape[1:] for h in self.probe(range(1, self.depth)).outputs if h is not None]
        for i, shape in enumerate(shapes, start=1):
            if not 1 <= len(shape) <= LONGEST_SHAPE:
                raise UserError(f"model: block {i} gives {tuple(shape)} per sample; must be (d,), (T, C) or (C, H, W)")
        return shapes

    def parameters_above(self, i: int) -> list[nn.Parameter]:
        """The weights of every block above h_i and of the head."""
        return [p for weights in self.weights[i:] for p in weights]

    def trace(
        self,
        x: Tensor,
        cuts: Collection[int] = (),
        frozen: int = 0,
        keep: bool = False,
        transpose: Transpose | None = None,
    ) -> Trace:
        """One forward pass that keeps what the error signals need.

        cuts: boundaries i behind which block i+1 reads a detached h_i. frozen: how many of the lowest blocks learn
        nothing, and so need no graph; there is a cut above them. With `keep`, every block's graph reaches its input.
        transpose: what signals pass the weight layers through, in W's place.
        """
        trace = Trace(frozenset({*cuts, frozen} - {0}), keep, transpose)
        with nullcontext() if transpose is None else transpose.installed():
            self._run(trace, x, frozen)
        return trace

    def _run(self, trace: Trace, x: Tensor, frozen: int) -> None:
        keep = trace.kept
        first, leak, h = 1, None, x
        for i, module in enumerate((*self.blocks, self.head), start=1):
            with torch.set_grad_enabled(torch.is_grad_enabled() and (keep or i > frozen)):
                read: tuple[Tensor, ...] = (h,)
                if i - 1 in trace.cuts:
                    first, leak = i, None
                    read = (h.detach().requires_grad_(keep),)
                    # a block that learns nothing receives nothing, through a leak neither
                    if getattr(module, "leak", False) and i - 1 > frozen:
                        leak = h.detach().requires_grad_()
                        read = (*read, leak)
                if keep:
                    trace.inputs.append(read)
                version = read[0]._version
                a = module(*read) if module is self.head else module.pre(*read)
                if i - 1 in trace.cuts and i - 1 > frozen and read[0]._version != version:
                    raise UserError(
                        f"model: block {i} changes h_{i - 1}, its input, in place, which feedback to h_{i - 1} needs; "
                        "begin the block with another operation, such as ReLU(inplace=False)"
                    )
                if module is self.head:
                    h = trace.logits = a
                else:
                    if keep and a._base is not None:  # changed in place by `post`, a view would be no part of the graph
                        a = a.clone()
                    if keep and a.requires_grad:
                        trace.preactivations.append(get_gradient_edge(a))
                    h = module.post(a)
                    if h is a:  # two places all the same: h_i is where the signal enters, a_i where δ_i is
                        h = a.view_as(a)
                    trace.outputs.append(h if keep or i in trace.cuts else None)
                if (i in trace.cuts or module is self.head) and i > frozen and h.requires_grad:
                    parameters = [p for weights in self.weights[first - 1 : i] for p in weights if p.requires_grad]
                    trace.segments.append(Segment(first, i, get_gradient_edge(h), parameters, leak))
