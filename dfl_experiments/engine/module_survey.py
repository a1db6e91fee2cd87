"""Find the valid boundaries of a module, and the parameters and the weight layer that belong to each of them."""

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from dfl_experiments.engine.activation_calls import eager, is_call
from dfl_experiments.engine.blocknet import forward_failure
from dfl_experiments.engine.crossings import children
from dfl_experiments.engine.module_graph import IS_IGNORED, Graph, Mark
from dfl_experiments.engine.transpose import is_weight_layer
from dfl_experiments.errors import UserError

WRAPPERS = {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}


class Survey:
    """The valid boundaries of a module. They must be valid both in evaluation mode and in training mode."""

    def __init__(self, module: nn.Module, example: Tensor) -> None:
        refuse_unusable(module)
        self.module = module
        # Not one sample, because batch normalisation rejects it if its feature maps have one pixel. Two batch sizes,
        # because an activation of a weight may have one of them as its first axis.
        two = copies_of(example, 2, module)
        three = copies_of(example, 3, module)
        devices = [two.device] if two.is_cuda else []
        try:
            with torch.random.fork_rng(devices=devices), torch.enable_grad(), eager():
                self.graphs = [Graph(module, False, two), Graph(module, True, three)]
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            if isinstance(error, UserError):
                raise
            shape = ", ".join(["N", *map(str, example.shape[1:])])
            raise forward_failure(f"input shape ({shape})", two, error) from error
        self.parameters = self._below(None)

    def _below(self, boundary: str | None) -> frozenset[str]:
        """Return the names of the parameters below a boundary, or below the logits."""
        in_evaluation, in_training = (graph.parameters_below(boundary) for graph in self.graphs)
        return in_evaluation | in_training

    def _is_above(self, upper: str, lower: str) -> bool:
        """Return whether the output of `upper` depends on the output of `lower`."""
        graph = self.graphs[0]
        below = graph.below[graph.nodes[upper]]
        bit = graph.bits[graph.nodes[lower]]
        return below & bit != 0

    def _height(self, name: str) -> int:
        graph = self.graphs[0]
        node = graph.nodes.get(name)
        return graph.below.get(node, 0).bit_count()

    def problem(self, name: str) -> str | None:
        """Return the reason why a name is not a valid boundary; None if it is valid.

        A valid boundary is a submodule that is called once in a forward pass, or a call of an activation function. Its
        output is one tensor with the batch as its first axis. No later operation changes this tensor in place. All
        gradients from the logits to the weights below pass through it. There are weights below and above it.
        """
        for graph in self.graphs:
            problem = graph.problem(name)
            if problem:
                return problem
        in_evaluation, in_training = (graph.parameters_below(name) for graph in self.graphs)
        if is_call(name) and in_evaluation != in_training:
            return "in training mode it is another call than in evaluation mode"
        return "no weight is above it" if self._below(name) == self.parameters else None

    @cached_property
    def valid(self) -> dict[str, frozenset[str]]:
        """Return the valid boundaries in the order of the forward pass, each with the parameters below it."""
        names = [name for name in self.graphs[0].outputs if self.problem(name) is None]
        return {name: self._below(name) for name in sorted(names, key=self._height)}

    @property
    def names(self) -> list[str]:
        """Return the valid boundaries, without the calls whose output is also the output of a valid submodule."""
        nodes = self.graphs[0].nodes
        submodules = [name for name in self.valid if not is_call(name)]
        outputs: set[Any] = set()
        for name in submodules:
            node = nodes[name]
            while isinstance(node, Mark._backward_cls):
                (node,) = children(node)
                outputs.add(node)
        return [name for name in self.valid if name in submodules or nodes[name] not in outputs]

    def automatic(self) -> list[str]:
        """Return a chain of boundaries, each above the one before, with a weight between any two of them.

        If several boundaries lie between the same two weights, the last of these boundaries is chosen. Of parallel
        branches, only the first has boundaries. See `_is_weight` for what counts as a weight here.

        Raises `UserError` if the module has no boundary with a weight below and a weight above it, or if the result of
        an activation in place is not used: then no boundary follows this activation.
        """
        self._refuse_ignored()
        weights = {name for name in self.parameters if self._is_weight(name)}
        last = {below & weights: name for name, below in self.valid.items()}
        chain: list[str] = []
        for below, name in last.items():
            is_between_weights = below and below != weights
            if is_between_weights and (not chain or self._is_above(name, chain[-1])):
                chain.append(name)
        if not chain:
            raise UserError(f"model: there is no boundary; {self._why_none()}")
        return chain

    def beside(self, chain: Sequence[str]) -> list[str]:
        """Return the highest valid boundary of each branch that is parallel to a boundary of the chain."""
        highest: list[str] = []
        for name, below in self.valid.items():  # in the order of the forward pass
            if any(below.isdisjoint(self.valid[other]) for other in chain):
                lower = [other for other in highest if self.valid[other] <= below]
                highest = [other for other in highest if other not in lower]
                highest.append(name)
        return highest

    def _is_weight(self, name: str) -> bool:
        """Return whether a parameter has several axes and belongs to a module without submodules.

        So a position embedding does not count as a weight if its module has submodules.
        """
        owner = self.module.get_submodule(name.rpartition(".")[0])
        is_of_layer = isinstance(owner, ParametrizationList) or not list(owner.children())
        return is_of_layer and self.module.get_parameter(name).dim() > 1

    def _refuse_ignored(self) -> None:
        for name in self.graphs[0].ignored:
            if self.problem(name) != IS_IGNORED:
                continue
            below = self._below(name)
            above = [other for other in self.valid if self._is_above(other, name)]
            below_above = [self.valid[other] for other in above]
            if below and below not in below_above:
                raise UserError(f"model: {name}: {IS_IGNORED}")

    def _why_none(self) -> str:
        """Return why no submodule is a boundary. A possible reason: a layer returns a tuple, as an LSTM does."""
        for name in self.graphs[0].nodes:
            below = self._below(name) if self._height(name) else frozenset()
            if below and below != self.parameters and (problem := self.problem(name)):
                return f"{name}: {problem}"
        for name, outputs in self.graphs[0].outputs.items():
            if outputs and not isinstance(outputs[0], Tensor):
                return f"the output of {name} is not one tensor: put it into a module that returns only its tensor"
        return "no submodule has weight layers both below and above its output"

    def checked(self, names: Sequence[str]) -> list[str]:
        """Return the named boundaries in the order of the forward pass. Raises `UserError` if one is not valid."""
        for name in names:
            problem = self.problem(name)
            if problem:
                raise UserError(f"model.boundaries: {name}: {problem}; {self._choice(name)}")
        chain = sorted(names, key=[*self.valid].index)
        for lower, upper in pairwise(chain):
            if self.valid[lower] == self.valid[upper]:
                raise UserError(
                    f"model.boundaries: {lower}, {upper}: there is no weight between them; choose only one"
                )
            if not self._is_above(upper, lower):
                raise UserError(
                    f"model.boundaries: {lower}, {upper}: are in parallel branches; choose only one"
                )
        return chain

    def _choice(self, name: str) -> str:
        """Return the choices in place of a name that is not a valid boundary: the next one above it, or all."""
        height = self._height(name)
        higher = [other for other in self.names if 0 < height < self._height(other)]
        if higher:
            return f"the next valid boundary is {higher[0]}"
        return f"there are {', '.join(self.names)}" if self.valid else self._why_none()

    def blocks(self, chain: Sequence[str]) -> list[list[nn.Parameter]]:
        """Return the parameters of every block."""
        blocks = []
        lower: frozenset[str] = frozenset()
        uppers = [self.valid[name] for name in chain]
        for upper in (*uppers, self.parameters):
            names = upper - lower
            blocks.append([p for name, p in self.module.named_parameters() if name in names])
            lower = upper
        return blocks

    def readers(self, chain: Sequence[str]) -> list[str | None]:
        """Return for every boundary the name of the layer that `ModuleNet.reader` returns."""
        graph = self.graphs[0]
        layers = []
        for name, module in self.module.named_modules():
            if is_weight_layer(module) and graph.nodes.get(name) in graph.bits:
                layers.append(name)
        names: list[str | None] = []
        for boundary, readers in graph.readers(layers, chain).items():
            is_read = len(readers) == 1 and self._reads_channels(readers[0], boundary)
            names.append(readers[0] if is_read else None)
        return names

    def _reads_channels(self, name: str, boundary: str) -> bool:
        """Return whether a weight layer reads the channels of h, the output of a boundary.

        The shape of h for one sample is (d,), (T, C) or (C, H, W).
        """
        layer: Any = self.module.get_submodule(name)
        outputs = self.graphs[0].outputs
        h = outputs[boundary][0]
        output = outputs[name][0]
        shape = list(h.shape[1:])
        is_plane = len(shape) == 3
        channels = shape[0] if is_plane else shape[-1]
        if not isinstance(layer, nn.Linear):
            return is_plane and layer.in_channels == channels
        # If two axes of h have the same length, it is unknown which of them the layer reads, except for each token.
        reads_tokens = len(shape) == 2 and output.dim() == 3
        is_known = reads_tokens or shape.count(channels) == 1
        return is_known and layer.in_features == channels


def refuse_unusable(module: nn.Module) -> None:
    """Raise `UserError` for an object that is not a module, or for a wrapper that does not work with the rules."""
    if not isinstance(module, nn.Module):
        raise UserError(f"model: must be a torch.nn.Module, but is of type {type(module).__name__}")
    if hasattr(module, "_orig_mod"):
        raise UserError(
            "model: the module is compiled; pass the original module, then call module.compile()"
        )
    for part in module.modules():
        kinds = {kind.__name__ for kind in type(part).__mro__} & WRAPPERS
        if kinds:
            problem = f"{kinds.pop()} would not average the rule's gradients over the processes"
            raise UserError(
                f"model: {problem}; pass the original module, and average .grad yourself before the step"
            )


def copies_of(example: Tensor, count: int, module: nn.Module) -> Tensor:
    """Return `count` copies of the first sample, on the module's device. Floats get the data type of the parameters."""
    parameter = next(module.parameters(), None)
    if parameter is None:
        raise UserError("model: the module has no parameters")
    dtype = parameter.dtype if example.is_floating_point() else example.dtype
    sample = example[:1].detach().to(parameter.device, dtype)
    other_axes = [1] * (example.dim() - 1)
    return sample.repeat(count, *other_axes)


@torch.inference_mode(False)
def boundaries(module: nn.Module, example: Tensor) -> list[str]:
    """Return the names of a module's valid boundaries, in the order of the forward pass. example: input (N, *h_0)."""
    return Survey(module, example).names
