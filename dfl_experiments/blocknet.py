"""Networks as a chain of blocks, and the trace of one forward pass through them, cut where a method says.

Notation, throughout the package: h_0 = x; a_i = pre_i(h_{i-1}), h_i = post_i(a_i) for i = 1 … L-1; logits
a_L = head(h_{L-1}).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dfl_experiments.config import UserError
from dfl_experiments.messages import clipped

Reader = nn.Linear | nn.Conv2d


class Block(nn.Module):
    """h = post(pre(x)): what lies between two feedback boundaries.

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


class Delivery(torch.autograd.Function):
    """A scalar above h whose backward pass hands h its signal, which is formed only then, and then held by no other.

    Made in the forward pass right behind h: autograd goes from the newest node to the oldest, so that the blocks above
    are done, and their memory is free, before h's signal takes any.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, box: list[Callable[[], Tensor]]) -> Tensor:
        """box: to hold, by the time of the backward pass, what gives the signal, shaped like h."""
        ctx.box = box
        return h.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The signal."""
        return ctx.box.pop()(), None


@dataclass(frozen=True)
class Gate:
    """Where the signal of a cut boundary enters: `root`, a `Delivery` above it that asks the box for the signal."""

    root: Tensor
    box: list[Callable[[], Tensor]]


@dataclass(frozen=True)
class Trace:
    """One forward pass. Index i-1 holds what belongs to block i.

    outputs[i-1]: h_i where the graph is cut behind it, None elsewhere, so that its memory is free once it is read.
    gates[i]: where the signal of cut i enters, for every cut above the frozen blocks. Only if the trace was kept, all
    of the outputs, and: preactivations[i-1]: a_i; inputs[i-1]: the tensors through which block i depends on h_{i-1},
    that is h_{i-1} itself, or behind a cut a detached leaf (and h_{i-1} beside it where the block leaks); inputs[L-1]
    is what the head read.
    """

    logits: Tensor
    cuts: frozenset[int]
    outputs: list[Tensor | None]
    gates: Mapping[int, Gate]
    preactivations: Sequence[Tensor] = ()
    inputs: Sequence[tuple[Tensor, ...]] = ()

    @property
    def cut_outputs(self) -> list[Tensor]:
        """h_i of every cut, from the lowest up."""
        return [h for i, h in enumerate(self.outputs, start=1) if i in self.cuts and h is not None]

    def backward(
        self,
        signal: Callable[[int], Tensor],
        error: Tensor,
        parameters: Sequence[Tensor],
        keep: bool = False,
    ) -> list[Tensor | None]:
        """Start autograd from every error signal: inside each block, across no cut.

        signal: gives the gradient at h_i, and is asked once for every cut above the frozen blocks, from the highest
        down; error: e = ∂ℒ/∂a_L, (N, K). Sets `.grad` of `parameters`, and computes no gradient of a block's input
        where nobody reads it. With `keep`, the graph stays for a reader and the applied δ_1 … δ_{L-1} are returned,
        None where no signal came. Without, nothing is, and an output is let go of once its signal is formed.
        """

        def formed(i: int) -> Tensor:
            gradient = signal(i)
            if not keep:
                self.outputs[i - 1 :] = [None] * (len(self.outputs) - i + 1)
            return gradient

        for i, gate in self.gates.items():
            gate.box.append(partial(formed, i))
        roots = [gate.root for gate in self.gates.values()]
        # not `backward(inputs=…)`: that leaves hooks on every a_i, which later readers of the graph would set off
        found = torch.autograd.grad(
            [*roots, self.logits],
            [*parameters, *self.preactivations],
            [*[None] * len(roots), error],
            retain_graph=keep,
            allow_unused=True,
        )
        for parameter, gradient in zip(parameters, found, strict=False):
            parameter.grad = gradient
        return list(found[len(parameters) :])


class BlockNet(nn.Module):
    """a_L = head(h_{L-1}), h_i = block_i(h_{i-1}): a model is a function that returns one of these."""

    def __init__(self, *blocks: Block, head: nn.Module, input_shape: Sequence[int]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.head = head
        self.input_shape = tuple(input_shape)

    @property
    def depth(self) -> int:
        """L, the number of layers or blocks, head included."""
        return len(self.blocks) + 1

    def forward(self, x: Tensor) -> Tensor:
        """The logits a_L. x: (N, *h_0) -> (N, K)."""
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def readers(self, i: int) -> list[Reader]:
        """The weight layers of block i+1 (of the head for i = L-1), the first of which reads h_i."""
        module = self.head if i == self.depth - 1 else self.blocks[i]
        return [layer for layer in module.modules() if isinstance(layer, Reader)]

    def normalised_planes(self) -> list[int]:
        """How many pixels each batch normalisation sees per image and channel."""
        planes: list[int] = []
        layers = [layer for layer in self.modules() if isinstance(layer, nn.BatchNorm2d)]
        hooks = [layer.register_forward_pre_hook(lambda _, x: planes.append(x[0][0, 0].numel())) for layer in layers]
        self.output_shapes()
        for hook in hooks:
            hook.remove()
        return planes

    @torch.no_grad()
    def probe(self) -> Trace:
        """A kept trace of one blank image, from a forward pass that leaves the net as it was.

        Raises `UserError` where no image gets through: a kernel or a pooling is larger than what is left of it, or two
        layers do not fit together.
        """
        training, parameter = self.training, next(self.parameters())
        x = torch.zeros(1, *self.input_shape, dtype=parameter.dtype, device=parameter.device)
        try:
            return self.eval().trace(x, keep=True)
        except (RuntimeError, ValueError) as error:
            shape = "x".join(str(length) for length in self.input_shape)
            raise UserError(f"model: images of {shape} do not get through it ({clipped(str(error), 200)})") from error
        finally:
            self.train(training)

    def output_shapes(self) -> list[torch.Size]:
        """The shape of one sample's h_1 … h_{L-1}."""
        return [h.shape[1:] for h in self.probe().outputs if h is not None]

    def parameters_above(self, i: int) -> list[nn.Parameter]:
        """The weights of every block above h_i and of the head."""
        return [p for module in (*self.blocks[i:], self.head) for p in module.parameters()]

    def trace(self, x: Tensor, cuts: Collection[int] = (), frozen: int = 0, keep: bool = False) -> Trace:
        """One forward pass that keeps what the error signals need.

        cuts: boundaries i behind which block i+1 reads a detached h_i. frozen: how many of the lowest blocks learn
        nothing, and so need no graph. With `keep`, every block's graph reaches its input, for a reader of the trace.
        """
        inputs: list[tuple[Tensor, ...]] = []
        preactivations: list[Tensor] = []
        outputs: list[Tensor | None] = []
        gates: dict[int, Gate] = {}
        h = x
        for i, module in enumerate((*self.blocks, self.head)):
            with torch.set_grad_enabled(torch.is_grad_enabled() and (keep or i >= frozen)):
                read: tuple[Tensor, ...] = (h,)
                if i in cuts:
                    detached = h.detach().requires_grad_(keep)
                    # a block that learns nothing receives nothing, through a leak neither
                    leaks = i > frozen and getattr(module, "leak", False)
                    read = (detached, h) if leaks else (detached,)
                if keep:
                    inputs.append(read)
                if module is self.head:
                    break
                a = module.pre(*read)
                h = module.post(a)
                outputs.append(h if keep or i + 1 in cuts else None)
                if i + 1 in cuts and i + 1 > frozen:
                    box: list[Callable[[], Tensor]] = []
                    gates[i + 1] = Gate(Delivery.apply(h, box), box)
                if keep:
                    preactivations.append(a)
        return Trace(self.head(*read), frozenset(cuts), outputs, gates, preactivations, inputs)
