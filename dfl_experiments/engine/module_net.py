"""Use any `nn.Module` as a net of blocks. Its boundaries are submodules, whose outputs are h_1 … h_{L-1}.

The module's own forward pass runs unchanged. If a method cuts at a boundary, a hook there returns a detached h_i. The
autograd graph of a forward pass shows which parameters belong to which block.
"""

import copy
import re
from collections.abc import Callable, Collection, Sequence
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.func import functional_call

from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.crossings import from_the_leaves
from dfl_experiments.engine.trace import Segment, Trace
from dfl_experiments.engine.transpose import WeightLayer, is_weight_layer
from dfl_experiments.errors import UserError, clipped

Boundaries = Literal["auto"] | list[str]
Visit = Callable[[int, Tensor], Tensor | None]
# autograd operations that map zeros to zeros, so that the zeros of a ReLU remain
KEEPS_ZEROS = re.compile("Pool|Mean|View|Reshape|Squeeze|Permute|Transpose|Clone|Mark")


class ModuleNet(BlockNet):
    """A net whose blocks are the parts of a module between its boundaries. δ_i is ∂ℒ/∂h_i, measured at the boundary.

    module: any module that maps one tensor to logits. Its parameters may be frozen.
    boundaries: names of submodules, or "auto" (see `Survey.automatic`). The function `boundaries` returns valid names.
    example: an input that the module accepts, (N, *h_0), for example integers for an embedding.
    Raises `UserError` if a submodule is not a valid boundary (see `Survey.problem`).
    """

    def __init__(self, module: nn.Module, boundaries: Boundaries, example: Tensor) -> None:
        nn.Module.__init__(self)
        survey = Survey(module, example)
        self.module = module
        self.example = example[:1].detach()
        self.input_shape = tuple(example.shape[1:])
        self.boundaries = survey.automatic() if boundaries == "auto" else survey.checked(boundaries)
        self.weights = survey.blocks(self.boundaries)
        self._readers = survey.readers(self.boundaries)
        self._relu = [survey.graphs[0].ends_in_relu(name) for name in self.boundaries]
        self._visit: Visit | None = None
        for i, name in enumerate(self.boundaries, start=1):
            module.get_submodule(name).register_forward_hook(partial(self._at_boundary, i))

    def _at_boundary(self, i: int, module: nn.Module, inputs: Any, h: Tensor) -> Tensor | None:
        return None if self._visit is None else self._visit(i, h)

    def _passed(self, visit: Visit, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Run a forward pass, and call visit(i, h_i) at every boundary.

        visit: function that returns the input of block i+1. If it returns None, the input is h_i.
        """
        self._visit = visit
        try:
            return run(x)
        finally:
            self._visit = None

    @property
    def depth(self) -> int:
        """Return L, the number of blocks."""
        return len(self.boundaries) + 1

    def forward(self, x: Tensor, watch: Callable[[int, Tensor], None] | None = None) -> Tensor:
        """Return the logits a_L, (N, K). Arguments: see `BlockNet.forward`."""
        if watch is None:
            return self.module(x)
        return self._passed(watch, self.module, x)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's own `state_dict`, whose keys have no prefix."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load a `state_dict` of the module."""
        return self.module.load_state_dict(*args, **kwargs)

    def ends_in_relu(self, i: int) -> bool:
        """Return whether the last operation of block i, apart from pooling and flattening, is a ReLU."""
        return self._relu[i - 1]

    def weight_layers(self, i: int) -> list[WeightLayer]:
        """Return the weight layers of block i+1, in module order."""
        weights = {id(p) for p in self.weights[i]}
        return [layer for layer in self.module.modules() if is_weight_layer(layer) and id(layer.weight) in weights]

    def reader(self, i: int) -> WeightLayer | None:
        """Return the only weight layer that reads h_i.

        Return None if no layer or several layers read h_i, or if the only layer does not read all channels.
        """
        name = self._readers[i - 1]
        layer: Any = None if name is None else self.module.get_submodule(name)
        return layer

    def blank(self, count: int = 1) -> Tensor:
        """Return copies of the example, (count, *h_0)."""
        assert self.example is not None, "the constructor sets the example"
        return copies_of(self.example, count, self.module)

    def parameters_above(self, i: int) -> list[nn.Parameter]:
        """Return the parameters above h_i, except the frozen ones."""
        return [p for p in super().parameters_above(i) if p.requires_grad]

    def parameters_below_delta(self, i: int) -> list[nn.Parameter]:
        """Return the parameters of block i, all of which are below δ_i."""
        return self.weights[i - 1]

    def replay(self, trace: Trace, replace: Callable[[int, Tensor | None], Tensor | None]) -> Tensor:
        """Return the logits of a second forward pass, which skips no block. Arguments: see `BlockNet.replay`."""
        return self._passed(replace, partial(functional_call, self.module, self._copies(self.module)), trace.x)

    def _run(self, trace: Trace, x: Tensor, frozen: int) -> None:
        keep, first, learns = trace.kept, 1, torch.is_grad_enabled()
        if keep:
            trace.inputs.append((x,))

        def end(i: int, h: Tensor) -> None:
            if i > frozen and h.requires_grad:
                parameters = [p for block in self.weights[first - 1 : i] for p in block if p.requires_grad]
                trace.segments.append(Segment(first, i, get_gradient_edge(h), parameters, None))

        def at_boundary(i: int, h: Tensor) -> Tensor:
            nonlocal first
            if len(trace.outputs) != i - 1:
                name = self.boundaries[i - 1]
                raise UserError(f"model: {name} is called twice or in a different order, so it cannot be a boundary")
            if keep:
                if learns:
                    # if all parameters below are frozen, h does not require a gradient yet
                    h = h if h.requires_grad else h.detach().requires_grad_()
                    trace.preactivations.append(get_gradient_edge(h))
                h = h.view_as(h)  # a second tensor: autograd starts at the view, and δ_i is read at the original
            trace.outputs.append(h if keep or i in trace.cuts else None)
            read = h
            if i in trace.cuts:
                end(i, h)
                first, read = i + 1, h.detach().requires_grad_(keep)
            if keep:
                trace.inputs.append((read,))
            if i == frozen:
                torch.set_grad_enabled(learns)
            return read

        with torch.set_grad_enabled(learns and (keep or not frozen)):
            trace.logits = self._passed(at_boundary, self.module, x)
            if len(trace.outputs) != self.depth - 1:
                raise UserError(f"model: {self.boundaries[len(trace.outputs)]} is not called in this forward pass")
            end(self.depth, trace.logits)


class Mark(torch.autograd.Function):
    """The identity, as a separate node of the graph. Its output shares memory and version counter with its input."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.version = h._version
        return h.detach()

    @staticmethod
    def backward(ctx: Any, signal: Tensor) -> Tensor:
        return signal


class Graph:
    """The autograd graph of one forward pass of a copy of a module.

    In the copy no weight is frozen, and a `Mark` follows every submodule. A set of nodes is stored as an integer with
    one bit for each node.
    """

    def __init__(self, module: nn.Module, training: bool, x: Tensor) -> None:
        twin = copy.deepcopy(module).requires_grad_(True).train(training)
        self.outputs: dict[str, list[Any]] = {name: [] for name, _ in twin.named_modules() if name}
        self.nodes: dict[str, Any] = {}
        for name in self.outputs:
            twin.get_submodule(name).register_forward_hook(partial(self._mark, name))
        logits = twin(x)
        if not isinstance(logits, Tensor) or logits.grad_fn is None:
            raise UserError("model: the output must be one tensor that depends on the model's parameters")
        self.root = logits.grad_fn
        self.bits: dict[Any, int] = {}
        self.read: dict[Any, int] = {}  # for each node: the nodes that it depends on directly
        self.below: dict[Any, int] = {}  # for each node: itself and all nodes that it depends on
        for k, node in enumerate(from_the_leaves(self.root)):
            self.bits[node], self.read[node], self.below[node] = 1 << k, 0, 1 << k
            for child in children(node):
                self.read[node] |= self.bits[child]
                self.below[node] |= self.below[child]
        names: dict[Any, str] = {p: name for name, p in twin.named_parameters()}
        leaves = {names.get(getattr(node, "variable", None)): bit for node, bit in self.bits.items()}
        self.parameters = {name: bit for name, bit in leaves.items() if name is not None}

    def _mark(self, name: str, module: nn.Module, inputs: Any, h: Any) -> Tensor | None:
        if isinstance(h, Tensor) and h.requires_grad:
            h = Mark.apply(h)
            self.nodes[name] = h.grad_fn
        self.outputs[name].append(h)
        return h

    def problem(self, name: str) -> str | None:
        """Return the reason why a submodule cannot be a boundary in this forward pass; None if it can."""
        if name not in self.outputs:
            return "there is no such submodule"
        if len(self.outputs[name]) != 1:
            return f"it is called {len(self.outputs[name])} times in a forward pass, must be called once"
        (h,), node = self.outputs[name], self.nodes.get(name)
        if not isinstance(h, Tensor):
            return "its output is not one tensor"
        if node is None or node not in self.below:
            return "no weight is below it, or the logits do not depend on it"
        if h._version != node.version:
            return "its output is changed in place afterwards"
        read_above = 0
        for other, bit in self.bits.items():
            if not bit & self.below[node]:
                read_above |= self.read[other]
        around = read_above & self.below[node] & ~self.bits[node]
        shared = [name for name, bit in self.parameters.items() if bit & around]
        if len(shared) < around.bit_count():
            return "the forward pass has a path that bypasses it"
        return f"the blocks below and above it share the weight {shared[0]}" if shared else None

    def ends_in_relu(self, name: str) -> bool:
        """Return whether the last operation before a boundary is a ReLU. Operations in `KEEPS_ZEROS` are skipped."""
        node = self.nodes[name]
        while KEEPS_ZEROS.search(node.name()):
            node = node.next_functions[0][0]
        return node.name().startswith("Relu")

    def readers(self, layers: Collection[str], boundaries: Sequence[str]) -> dict[str, list[str]]:
        """Return for every boundary the layers that read its output, without another layer or boundary in between."""
        stops = {self.nodes[name] for name in (*layers, *boundaries)}
        first: dict[Any, int] = {}  # for each node: the first stop on each path from it towards the input
        for node in self.bits:
            first[node] = 0
            for child in children(node):
                first[node] |= self.bits[child] if child in stops else first[child]
        return {name: [k for k in layers if first[self.nodes[k]] & self.bits[self.nodes[name]]] for name in boundaries}


def children(node: Any) -> list[Any]:
    """Return the nodes that a node of the graph depends on directly."""
    return [child for child, _ in node.next_functions if child is not None]


class Survey:
    """The valid boundaries of a module. They must be valid both in evaluation mode and in training mode."""

    def __init__(self, module: nn.Module, example: Tensor) -> None:
        self.module = module
        if hasattr(module, "_orig_mod"):
            raise UserError("model: the module is compiled; pass the original module, then call module.compile()")
        # two samples, because batch normalisation rejects a single sample if its feature maps have one pixel
        x = copies_of(example, 2, module)
        try:
            with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []), torch.enable_grad():
                self.graphs = [Graph(module, training, x) for training in (False, True)]
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if isinstance(error, UserError):
                raise
            shape, reason = tuple(example.shape[1:]), clipped(str(error), 200)
            raise UserError(f"model: the forward pass fails for input shape {shape} ({reason})") from error
        self.parameters = self._below(None)

    def _below(self, boundary: str | None) -> frozenset[str]:
        """Return the names of the parameters below a boundary, or below the logits."""
        names: set[str] = set()
        for graph in self.graphs:
            below = graph.below[graph.nodes[boundary] if boundary else graph.root]
            names.update(name for name, bit in graph.parameters.items() if bit & below)
        return frozenset(names)

    def _height(self, name: str) -> int:
        graph = self.graphs[0]
        return graph.below.get(graph.nodes.get(name), 0).bit_count()

    def problem(self, name: str) -> str | None:
        """Return the reason why a submodule is not a valid boundary; None if it is valid.

        A valid boundary is called once in a forward pass. Its output is one tensor, which no later operation changes in
        place. All gradients from the logits to the weights below pass through it. There are weights below and above it.
        """
        problems = [problem for graph in self.graphs if (problem := graph.problem(name))]
        if not problems and self._below(name) == self.parameters:
            return "no weight is above it"
        return problems[0] if problems else None

    @cached_property
    def valid(self) -> dict[str, frozenset[str]]:
        """Return the valid boundaries in the order of the forward pass, each with the parameters below it."""
        names = [name for name in self.graphs[0].outputs if self.problem(name) is None]
        return {name: self._below(name) for name in sorted(names, key=self._height)}

    def automatic(self) -> list[str]:
        """Return as many boundaries as possible, with a weight between any two of them.

        If several boundaries lie between the same two weights, the last of these boundaries is chosen. In this
        function, a weight is a parameter that has several axes and belongs to a module without submodules. So a
        position embedding does not count as a weight if its module has submodules.

        Raises `UserError` if the module has no boundary with a weight below and a weight above it.
        """
        weights = set()
        for name in self.parameters:
            owner = self.module.get_submodule(name.rpartition(".")[0])
            if self.module.get_parameter(name).dim() > 1 and not [*owner.children()]:
                weights.add(name)
        chain = {below & weights: name for name, below in self.valid.items()}
        names = [name for below, name in chain.items() if below and below != weights]
        if not names:
            raise UserError(f"model: there is no boundary; {self._why_none()}")
        return names

    def _why_none(self) -> str:
        """Return why no submodule is a boundary. A possible reason: a layer returns a tuple, as an LSTM does."""
        for name, outputs in self.graphs[0].outputs.items():
            if outputs and not isinstance(outputs[0], Tensor):
                return f"the output of {name} is not one tensor: put it into a module that returns only its tensor"
        return "no submodule has weight layers both below and above its output"

    def checked(self, names: Sequence[str]) -> list[str]:
        """Return the named boundaries in the order of the forward pass. Raises `UserError` if one is not valid."""
        for name in names:
            if problem := self.problem(name):
                higher = [other for other in self.valid if 0 < self._height(name) < self._height(other)]
                choice = f"there are {', '.join(self.valid)}" if self.valid else self._why_none()
                choice = f"the next valid boundary is {higher[0]}" if higher else choice
                raise UserError(f"model.boundaries: {name}: {problem}; {choice}")
        chain = sorted(names, key=[*self.valid].index)
        for lower, upper in pairwise(chain):
            if self.valid[lower] == self.valid[upper]:
                raise UserError(f"model.boundaries: {lower}, {upper}: there is no weight between them; choose only one")
        return chain

    def blocks(self, chain: Sequence[str]) -> list[list[nn.Parameter]]:
        """Return the parameters of every block."""
        limits = [frozenset(), *(self.valid[name] for name in chain), self.parameters]
        named = self.module.named_parameters
        return [[p for name, p in named() if name in upper - lower] for lower, upper in pairwise(limits)]

    def readers(self, chain: Sequence[str]) -> list[str | None]:
        """Return for every boundary the name of the layer that `ModuleNet.reader` returns."""
        graph, modules = self.graphs[0], dict(self.module.named_modules())
        layers = [name for name in graph.nodes if is_weight_layer(modules[name]) and graph.nodes[name] in graph.bits]
        names: list[str | None] = []
        for boundary, readers in graph.readers(layers, chain).items():
            shape = graph.outputs[boundary][0].shape[1:]
            is_read = len(readers) == 1 and reads_channels(modules[readers[0]], shape)
            names.append(readers[0] if is_read else None)
        return names


def reads_channels(layer: Any, shape: Sequence[int]) -> bool:
    """Return whether a layer reads the channels of h, whose shape is (d,), (T, C) or (C, H, W) for one sample."""
    channels = shape[0] if len(shape) == 3 else shape[-1]
    if isinstance(layer, nn.Linear):
        return layer.in_features == channels
    return len(shape) == 3 and layer.in_channels == channels


def copies_of(example: Tensor, count: int, module: nn.Module) -> Tensor:
    """Return `count` copies of the first sample, on the module's device. Floats get the data type of the parameters."""
    parameter = next(module.parameters())
    dtype = parameter.dtype if example.is_floating_point() else example.dtype
    return example[:1].detach().to(parameter.device, dtype).repeat(count, *[1] * (example.dim() - 1))


def as_net(module: nn.Module, names: Boundaries, input_shape: Sequence[int]) -> BlockNet:
    """Return a `ModuleNet` of a module with these boundaries; return a `BlockNet` unchanged.

    The example for a `ModuleNet` consists of zeros. The zeros are integers (tokens) if the module contains an embedding
    and one sample is a vector. Otherwise they are floats.
    """
    if isinstance(module, BlockNet):
        return module
    has_embedding = any(isinstance(layer, nn.Embedding) for layer in module.modules())
    is_of_tokens = has_embedding and len(input_shape) == 1
    example = torch.zeros(1, *input_shape, dtype=torch.int64 if is_of_tokens else torch.float32)
    return ModuleNet(module, names, example)


def boundaries(module: nn.Module, example: Tensor) -> list[str]:
    """Return the names of a module's valid boundaries, in the order of the forward pass. example: input (N, *h_0)."""
    return [*Survey(module, example).valid]
