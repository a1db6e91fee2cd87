"""The autograd graph of a module's forward pass: which submodules are valid boundaries, and which layers read them."""

import re
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dfl_experiments.engine.activation_calls import ActivationCalls, is_call
from dfl_experiments.engine.crossings import (
    checkpointed_part,
    children,
    copy_of,
    from_the_leaves,
)
from dfl_experiments.errors import UserError

# autograd operations that map zeros to zeros, so that the zeros of a ReLU remain
KEEPS_ZEROS = re.compile("Pool|Mean|View|Reshape|Squeeze|Permute|Transpose|Clone|Mark")
ACTIVATION = re.compile(
    "Relu|Elu|Gelu|Silu|Mish|Tanh|Sigmoid|Softplus|Hardswish|Clamp|Threshold|Maximum", re.IGNORECASE
)
IS_IGNORED = "it works in place and its result is not used; write h = f(h), not only f(h)"
# operations that can stand between a layer and its activation
BEFORE_ACTIVATION = re.compile(f"{KEEPS_ZEROS.pattern}|Norm|Dropout|^Mul")


class Mark(torch.autograd.Function):
    """The identity, as a separate node of the graph. Its output shares memory and version counter with its input."""

    generate_vmap_rule = True  # the module may use torch.func

    @staticmethod
    def forward(h: Tensor) -> Tensor:
        return h.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.version = inputs[0]._version

    @staticmethod
    def backward(ctx: Any, signal: Tensor) -> Tensor:
        return signal


class Graph:
    """The autograd graph of one forward pass of a copy of a module.

    In the copy no weight is frozen, and a `Mark` follows every submodule and every call of an activation function. A
    set of nodes is stored as an integer with one bit for each node.
    """

    def __init__(self, module: nn.Module, training: bool, x: Tensor) -> None:
        twin = copy_of(module).requires_grad_(True).train(training)
        self.outputs: dict[str, list[Any]] = {name: [] for name, _ in twin.named_modules() if name}
        self.nodes: dict[str, Any] = {}
        self.checkpointed: set[str] = set()  # marked inside a checkpointed part, but not at its end
        self.ends: dict[Any, str] = {}  # for each checkpointed part: the last name marked in it
        for name in self.outputs:
            twin.get_submodule(name).register_forward_hook(partial(self._after_module, name))
        self.batch = x.shape[:1]
        with ActivationCalls(self._mark) as calls:
            logits = twin(x)
        self.calls = calls.counts  # number of calls of each activation function
        if not isinstance(logits, Tensor) or logits.grad_fn is None:
            raise UserError(
                "model: the output must be one tensor that depends on the model's parameters; put a model that "
                "returns a tuple or a dictionary into a module that returns only its logits"
            )
        self.root = logits.grad_fn
        self._index_nodes()
        self.ignored = self._ignored_calls()
        self._index_parameters(twin)

    def _index_nodes(self) -> None:
        """Give every node its bit, and find the nodes below it."""
        self.bits: dict[Any, int] = {}
        self.read: dict[Any, int] = {}  # for each node: the nodes that it depends on directly
        self.below: dict[Any, int] = {}  # for each node: itself and all nodes that it depends on
        for k, node in enumerate(from_the_leaves(self.root)):
            bit = 1 << k
            self.bits[node] = bit
            self.read[node] = 0
            self.below[node] = bit
            for child in children(node):
                self.read[node] |= self.bits[child]
                self.below[node] |= self.below[child]

    def _index_parameters(self, twin: nn.Module) -> None:
        """Find the node of every parameter, and the nodes that use the parameter."""
        names: dict[Any, str] = {p: name for name, p in twin.named_parameters()}
        self.parameters: dict[str, int] = {}  # for each parameter: its node
        name_of: dict[Any, str] = {}
        for node, bit in self.bits.items():
            name = names.get(getattr(node, "variable", None))
            if name is not None:
                self.parameters[name] = bit
                name_of[node] = name
        # for each parameter: the nodes that depend on it directly
        self.users = dict.fromkeys(self.parameters, 0)
        for node, bit in self.bits.items():
            for child in children(node):
                if child in name_of:
                    self.users[name_of[child]] |= bit

    def _ignored_calls(self) -> set[str]:
        """Return the calls in place whose result is not used.

        The node of such a call becomes the operation itself, because the mark after the operation is not in the graph.
        """
        ignored = set()
        for name in filter(is_call, list(self.nodes)):
            node = self.nodes[name]
            (operation,) = children(node)
            if node not in self.below and operation in self.below:
                ignored.add(name)
                self.nodes[name] = operation
        return ignored

    def _after_module(self, name: str, module: nn.Module, inputs: Any, h: Any) -> Any:
        return self._mark(name, h)

    def _mark(self, name: str, h: Any) -> Any:
        if isinstance(h, Tensor) and h.requires_grad:
            h = Mark.apply(h)
            self.nodes[name] = h.grad_fn
            if (part := checkpointed_part()) is not None:
                if part in self.ends:
                    self.checkpointed.add(self.ends[part])
                self.ends[part] = name
        self.outputs.setdefault(name, []).append(h)
        return h

    def parameters_below(self, boundary: str | None) -> frozenset[str]:
        """Return the names of the parameters below a boundary, or below the logits for None."""
        top = self.root if boundary is None else self.nodes[boundary]
        below = self.below[top]
        return frozenset(name for name, bit in self.parameters.items() if bit & below)

    def problem(self, name: str) -> str | None:
        """Return the reason why a name cannot be a boundary in this forward pass; None if it can."""
        if name not in self.outputs:
            return "there is no such submodule or call of an activation function"
        outputs = self.outputs[name]
        if len(outputs) != 1:
            return f"it is called {len(outputs)} times in a forward pass, must be called once"
        h = outputs[0]
        node = self.nodes.get(name)
        if not isinstance(h, Tensor):
            return "its output is not one tensor"
        if "parametrizations" in name.split("."):
            return "it computes a weight"
        if name in self.checkpointed:
            return "it is inside a part with activation checkpointing"
        if h.shape[:1] != self.batch:
            return "the first axis of its output is not the batch"
        if node is None or node not in self.below:
            return "no weight is below it, or the logits do not depend on it"
        if name not in self.ignored and h._version != node.version:
            return "its output is changed in place afterwards"
        below = self.below[node]
        for parameter, bit in self.parameters.items():
            if bit & below and self.users[parameter] & ~below:
                return f"the blocks below and above it share the weight {parameter}"
        read_above = 0
        for other, bit in self.bits.items():
            if not bit & below:
                read_above |= self.read[other]
        if read_above & below & ~self.bits[node]:
            return "the forward pass has a path that bypasses it"
        return IS_IGNORED if name in self.ignored else None

    def ends_in_relu(self, name: str) -> bool:
        """Return whether the last operation before a boundary is a ReLU. Operations in `KEEPS_ZEROS` are skipped."""
        return self.ends_in(re.compile("^Relu"), name)

    def ends_in(self, kind: re.Pattern[str], name: str) -> bool:
        """Return whether the last operation before a boundary is of a kind. Operations in `KEEPS_ZEROS` are skipped."""
        node = self.nodes[name]
        while KEEPS_ZEROS.search(node.name()):
            node = node.next_functions[0][0]
        return kind.search(node.name()) is not None

    def activation_after(self, name: str) -> bool:
        """Return whether an activation outside of the block follows a boundary that does not end in an activation.

        Operations in `BEFORE_ACTIVATION` are skipped.
        """
        if self.ends_in(ACTIVATION, name):
            return False
        waiting = [self.nodes[name]]
        seen = set()
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            bit = self.bits[node]
            for reader, read in self.read.items():
                if not read & bit:
                    continue
                if ACTIVATION.search(reader.name()):
                    return True
                if BEFORE_ACTIVATION.search(reader.name()):
                    waiting.append(reader)
        return False

    def readers(self, layers: Collection[str], boundaries: Sequence[str]) -> dict[str, list[str]]:
        """Return for every boundary the layers that read its output, without another layer or boundary in between."""
        stops = {self.nodes[name] for name in (*layers, *boundaries)}
        # for each node: the first stop on each path from it towards the input
        first: dict[Any, int] = {}
        for node in self.bits:
            first[node] = 0
            for child in children(node):
                if child in stops:
                    first[node] |= self.bits[child]
                else:
                    first[node] |= first[child]
        readers: dict[str, list[str]] = {name: [] for name in boundaries}
        for layer in layers:
            inputs = first[self.nodes[layer]]
            for name in boundaries:
                boundary = self.nodes[name]
                if inputs & self.bits[boundary]:
                    readers[name].append(layer)
        return readers
