"""Networks as chains of blocks. A method can cut the graph of the forward pass between two blocks.

Notation of the whole package: The input is h_0 = x. Block i computes a_i = pre_i(h_{i-1}) and h_i = post_i(a_i), for
i = 1 … L-1. The logits are a_L = head(h_{L-1}).
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.func import functional_call

from dfl_experiments.engine.gradients import unchanged
from dfl_experiments.engine.trace import Segment, Trace
from dfl_experiments.engine.transpose import Transpose, WeightLayer, is_weight_layer
from dfl_experiments.errors import UserError, clipped

LONGEST_SHAPE = 3  # the number of axes of (C, H, W)
# Python modules whose layers map zeros to zeros
KEEP_ZEROS = ("torch.nn.modules.pooling", "torch.nn.modules.flatten")


class Block(nn.Module):
    """The map h = post(pre(x)) between two feedback boundaries.

    For one sample, h has the shape (d,), (T, C) for tokens, or (C, H, W).

    pre: layers up to the last pre-activation a of the block, where the error signal δ = ∂ℒ/∂a is measured.
    post: layers after a: activation, pooling, flattening.
    leak: whether the gradient of the block's shortcut crosses a cut below the block. If True, the block above a cut is
        called as `pre(x, shortcut)`. Both arguments are h_{i-1}. The gradient at `shortcut` is added to the signal at
        h_{i-1}. The ResNet-18 of the published code has this leak.
    """

    def __init__(self, pre: nn.Module, post: nn.Module, leak: bool = False) -> None:
        super().__init__()
        self.pre = pre
        self.post = post
        self.leak = leak

    def forward(self, x: Tensor) -> Tensor:
        """Return h_i for a batch of inputs. x: h_{i-1}, with the samples along the first axis."""
        return self.post(self.pre(x))


def forward_failure(samples: str, x: Tensor, error: Exception) -> UserError:
    """Return the error to raise if the forward pass of `x` has failed. samples: a description of `x`."""
    hint = ""
    if isinstance(error, RuntimeError) and not x.is_floating_point():
        # probably a layer for floats; an embedding would raise IndexError
        hint = "; integers are tokens; save features as float32"
    reason = clipped(str(error), 200)
    return UserError(f"model: the forward pass fails for {samples} ({reason}){hint}")


class BlockNet(nn.Module):
    """The network h_i = block_i(h_{i-1}), a_L = head(h_{L-1}), which every model function returns.

    input_shape: shape of one sample of x.
    example: one sample for trial forward passes, (1, *h_0). None: a sample of zeros, in the data type of the
        parameters. A net that reads tokens needs an example of integers.
    Raises `UserError` if two blocks share a weight.
    """

    def __init__(self, *blocks: Block, head: nn.Module, input_shape: Sequence[int]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.head = head
        self.input_shape = tuple(input_shape)
        self.example: Tensor | None = None
        self.find_weights()

    def find_weights(self) -> None:
        """Find the parameters of every block and of the head. They are stored, because every step needs them.

        Call this again if layers were replaced. Otherwise the new layers would not learn.
        Raises `UserError` if two blocks share a weight: only the lower block's gradient would remain.
        """
        self.weights = [list(module.parameters()) for module in (*self.blocks, self.head)]
        block_of: dict[nn.Parameter, int] = {}
        for i, weights in enumerate(self.weights, start=1):
            for weight in weights:
                lower = block_of.setdefault(weight, i)
                if lower != i:
                    raise UserError(
                        f"model: blocks {lower} and {i} share a weight of shape {tuple(weight.shape)}; return a "
                        "plain nn.Module, not a BlockNet: its boundaries are chosen so that one block has this weight"
                    )

    @property
    def depth(self) -> int:
        """Return L, the number of blocks including the head."""
        return len(self.blocks) + 1

    def forward(self, x: Tensor, watch: Callable[[int, Tensor], None] | None = None) -> Tensor:
        """Return the logits a_L, (N, K).

        x: (N, *h_0).
        watch(i, h_i): function that is called for every h_i.
        """
        for i, block in enumerate(self.blocks, start=1):
            x = block(x)
            if watch is not None:
                watch(i, x)
        return self.head(x)

    def ends_in_relu(self, i: int) -> bool:
        """Return whether the last layer of block i, apart from pooling and flattening, is a ReLU."""
        layers = [self.blocks[i - 1].post]
        while layers:
            layer = layers.pop()
            if isinstance(layer, nn.Sequential):
                layers += layer
            elif type(layer).__module__ not in KEEP_ZEROS:
                return isinstance(layer, nn.ReLU)
        return False

    def weight_layers(self, i: int) -> list[WeightLayer]:
        """Return the weight layers of block i+1 (of the head for i = L-1), in module order."""
        module = self.head if i == self.depth - 1 else self.blocks[i]
        return [layer for layer in module.modules() if is_weight_layer(layer)]

    def reader(self, i: int) -> WeightLayer | None:
        """Return the first weight layer of block i+1; None if there is none. This layer sets the shape of B on h_i."""
        return next(iter(self.weight_layers(i)), None)

    def blank(self, count: int = 1) -> Tensor:
        """Return samples for a trial forward pass, (count, *h_0)."""
        like = next(self.parameters())
        shape = (count, *self.input_shape)
        if self.example is not None:
            return self.example.expand(shape).to(like.device)
        return torch.zeros(shape, dtype=like.dtype, device=like.device)

    @torch.no_grad()
    def probe(self, cuts: Collection[int] = ()) -> Trace:
        """Return the trace of a forward pass on one sample of `blank`. The net does not change.

        The trace keeps every h_i. It is not for gradients, because the buffers are restored after the forward pass.

        cuts: see `trace`.
        Raises `UserError` if the forward pass fails, for example because a kernel is larger than its input.
        """
        modes = {module: module.training for module in self.modules()}
        x = self.blank()
        try:
            with unchanged(self, x.device):
                return self.eval().trace(x, cuts, keep=True)
        except (RuntimeError, ValueError, IndexError) as error:
            samples = f"input shape {self.input_shape}"
            if not x.is_floating_point():
                samples += f" of integers up to {x.max()}"
            raise forward_failure(samples, x, error) from error
        finally:
            for module, mode in modes.items():
                module.training = mode

    def output_shapes(self) -> list[torch.Size]:
        """Return the shapes of h_1 … h_{L-1} for one sample.

        Raises `UserError` if an h_i has a shape that `Block` does not allow, or if a block changes its input in place.
        """
        trace = self.probe(range(1, self.depth))
        shapes = [h.shape[1:] for h in trace.outputs if h is not None]
        for i, shape in enumerate(shapes, start=1):
            if not 1 <= len(shape) <= LONGEST_SHAPE:
                raise UserError(
                    f"model: h_{i} has shape {tuple(shape)} per sample; must be (d,), (T, C) or (C, H, W)"
                )
        return shapes

    def parameters_above(self, i: int) -> list[nn.Parameter]:
        """Return the parameters of every block above h_i and of the head."""
        return [p for weights in self.weights[i:] for p in weights]

    def trained_parameters(self, first: int, last: int) -> list[nn.Parameter]:
        """Return the parameters of the blocks `first` to `last`, except the frozen ones."""
        parameters = []
        for weights in self.weights[first - 1 : last]:
            parameters += [p for p in weights if p.requires_grad]
        return parameters

    def parameters_below_delta(self, i: int) -> list[nn.Parameter]:
        """Return the parameters of block i up to its pre-activation a_i, where δ_i is measured."""
        return list(self.blocks[i - 1].get_submodule("pre").parameters())

    def replay(
        self, trace: Trace, replace: Callable[[int, Tensor | None], Tensor | None]
    ) -> Tensor:
        """Return the logits of a second forward pass, which changes no buffer.

        trace: trace of the first forward pass.
        replace(i, h_i): function that returns the input of block i+1. The pass starts at the lowest i for which the
            function returns a tensor. All blocks below are skipped, and h_i is None in the calls up to this i.
        """
        h: Tensor | None = None
        for i, module in enumerate((*self.blocks, self.head)):
            h = replace(i, h) if i > 0 else None
            if h is not None:
                h = functional_call(module, self._copies(module), (h,))
        assert h is not None, "`replace` returns a tensor for at least one i"
        return h

    @staticmethod
    def _copies(module: nn.Module) -> dict[str, Tensor]:
        # Buffers are copied, because batch normalisation changes them. Parameters are made contiguous, because in
        # PyTorch 2.11 the forward derivative of group normalisation rejects other memory formats.
        copies: dict[str, Tensor] = {}
        for name, parameter in module.named_parameters():
            copies[name] = parameter.contiguous()
        for name, buffer in module.named_buffers():
            copies[name] = buffer.clone()
        return copies

    def trace(
        self,
        x: Tensor,
        cuts: Collection[int] = (),
        frozen: int = 0,
        keep: bool = False,
        transpose: Transpose | None = None,
    ) -> Trace:
        """Run the forward pass, and return what the backward pass needs.

        x: input, (N, *h_0).
        cuts: boundaries i at which block i+1 reads a detached h_i.
        frozen: number of the lowest blocks that do not learn. The boundary above these blocks is cut. The graph of
            these blocks is recorded if `keep` is True; otherwise it is not recorded.
        keep: whether to keep the graph of every block after `backward`, so that gradients can be computed again.
        transpose: feedback weights that replace Wᵀ in the backward pass; None for Wᵀ.
        """
        trace = Trace(frozenset({*cuts, frozen} - {0}), keep, x, transpose)
        with nullcontext() if transpose is None else transpose.installed():
            self._run(trace, x, frozen)
        return trace

    def _run(self, trace: Trace, x: Tensor, frozen: int) -> None:
        keep = trace.kept
        learns = torch.is_grad_enabled()
        first, leak, h = 1, None, x
        for i, module in enumerate((*self.blocks, self.head), start=1):
            is_head = module is self.head
            is_after_cut = i - 1 in trace.cuts
            gets_signal = is_after_cut and i - 1 > frozen  # h_{i-1} gets a signal of the method
            with torch.set_grad_enabled(learns and (keep or i > frozen)):
                read: tuple[Tensor, ...] = (h,)
                if is_after_cut:
                    first, leak = i, None
                    read = (h.detach().requires_grad_(keep),)
                # frozen blocks get no gradient, not even through a leak
                if gets_signal and getattr(module, "leak", False):
                    leak = h.detach().requires_grad_()
                    read = (*read, leak)
                if keep:
                    trace.inputs.append(read)
                version = read[0]._version
                a = module(*read) if is_head else module.pre(*read)
                if gets_signal and read[0]._version != version:
                    raise UserError(
                        f"model: block {i} changes its input h_{i - 1} in place, but the feedback to h_{i - 1} needs "
                        "the original values; start the block with another operation, such as ReLU(inplace=False)"
                    )
                if is_head:
                    h = trace.logits = a
                else:
                    # an in-place `post` would take a view out of the graph
                    if keep and a._base is not None:
                        a = a.clone()
                    if keep and a.requires_grad:
                        trace.preactivations.append(get_gradient_edge(a))
                    h = module.post(a)
                    # h_i must be a second tensor: autograd starts there, and δ_i is read at a_i
                    if h is a:
                        h = a.view_as(a)
                    trace.outputs.append(h if keep or i in trace.cuts else None)
                is_end = is_head or i in trace.cuts
                if is_end and i > frozen and h.requires_grad:
                    top = get_gradient_edge(h)
                    parameters = self.trained_parameters(first, i)
                    trace.segments.append(Segment(first, i, top, parameters, leak))
