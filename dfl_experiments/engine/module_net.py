"""Use any `nn.Module` as a net of blocks. Its boundaries are submodules and calls of activation functions.

Their outputs are h_1 … h_{L-1}. The module's own forward pass runs unchanged. If a method cuts at a boundary, a hook
there returns a detached h_i. The autograd graph of a forward pass shows which parameters belong to which block.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.func import functional_call

from dfl_experiments.engine.activation_calls import ActivationCalls, eager, is_call
from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.module_survey import Survey, copies_of, refuse_unusable
from dfl_experiments.engine.trace import Segment, Trace
from dfl_experiments.engine.transpose import WeightLayer, is_weight_layer
from dfl_experiments.errors import UserError
from dfl_experiments.ranges import SampleKind

log = logging.getLogger(__name__)
Boundaries = Literal["auto"] | list[str]
Visit = Callable[[int, Tensor], Tensor | None]


class ModuleNet(BlockNet):
    """A net whose blocks are the parts of a module between its boundaries. δ_i is ∂ℒ/∂h_i, measured at the boundary.

    module: any module that maps one tensor to logits. Its parameters may be frozen.
    boundaries: names of submodules and of calls (see `ActivationCalls`), or "auto" (see `Survey.automatic`). The
        function `boundaries` returns valid names.
    example: an input that the module accepts, (N, *h_0), for example integers for an embedding.
    Raises `UserError` if a name is not a valid boundary (see `Survey.problem`).
    """

    def __init__(self, module: nn.Module, boundaries: Boundaries, example: Tensor) -> None:
        nn.Module.__init__(self)
        survey = Survey(module, example)
        names = [boundaries] if isinstance(boundaries, str) else boundaries
        self.module = module
        self.example = example[:1].detach()
        self.input_shape = tuple(example.shape[1:])
        self.boundaries = survey.automatic() if names == ["auto"] else survey.checked(names)
        self.weights = survey.blocks(self.boundaries)
        self._readers = survey.readers(self.boundaries)
        self._relu = [survey.graphs[0].ends_in_relu(name) for name in self.boundaries]
        cut_before = [name for name in self.boundaries if survey.graphs[0].activation_after(name)]
        if cut_before:
            log.warning(
                "model: the activation after %s is outside its block, so δ has no f' there; "
                "choose boundaries after the activation, or use a function such as F.relu or F.silu",
                ", ".join(cut_before),
            )
        beside = survey.beside(self.boundaries)
        if beside:
            log.warning(
                "model: no signal is sent to %s, because a parallel branch has a boundary; to treat the branches "
                "alike, put them into one module that returns one tensor, and choose it as the lowest boundary",
                ", ".join(beside),
            )
        self._visit: Visit | None = None
        # i of each boundary that is a call, and the numbers of calls in evaluation and in training mode
        self._calls: dict[str, int] = {}
        self._counts = [graph.calls for graph in survey.graphs]
        self._has_fast_path = any(
            isinstance(part, nn.TransformerEncoder | nn.TransformerEncoderLayer)
            for part in module.modules()
        )
        for i, name in enumerate(self.boundaries, start=1):
            if is_call(name):
                self._calls[name] = i
            else:
                hook = partial(self._after_module, i)
                module.get_submodule(name).register_forward_hook(hook)

    def _after_module(self, i: int, module: nn.Module, inputs: Any, h: Tensor) -> Tensor | None:
        return None if self._visit is None else self._visit(i, h)

    def _after_call(self, name: str, h: Tensor) -> Tensor | None:
        i = self._calls.get(name)
        return None if i is None or self._visit is None else self._visit(i, h)

    def _passed(self, visit: Visit, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Run a forward pass, and call visit(i, h_i) at every boundary.

        visit: function that returns the input of block i+1. If it returns None, the input is h_i.
        """
        self._visit = visit
        try:
            with without_fast_path() if self._has_fast_path else nullcontext():
                return self._passed_calls(run, x) if self._calls else run(x)
        finally:
            self._visit = None

    def _passed_calls(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        with eager(), ActivationCalls(self._after_call) as calls:
            logits = run(x)
        if calls.counts not in self._counts:
            counts = ", ".join(f"{name} {count} times" for name, count in calls.counts.items())
            raise UserError(
                f"model: this forward pass calls {counts}, not as often as when the net was built. So the boundary "
                f"{next(iter(self._calls))} may be another call; use modules such as nn.ReLU() as boundaries"
            )
        return logits

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
        return [
            layer
            for layer in self.module.modules()
            if is_weight_layer(layer) and id(layer.weight) in weights
        ]

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
        """Return all parameters of block i. δ_i is at the output of the block, so all of them are below it."""
        return self.weights[i - 1]

    def replay(
        self, trace: Trace, replace: Callable[[int, Tensor | None], Tensor | None]
    ) -> Tensor:
        """Return the logits of a second forward pass, which skips no block. Arguments: see `BlockNet.replay`."""
        run = partial(functional_call, self.module, self._copies(self.module))
        with eager():  # torch.compile does not support forward derivatives
            return self._passed(replace, run, trace.x)

    def _run(self, trace: Trace, x: Tensor, frozen: int) -> None:
        keep = trace.kept
        first = 1
        learns = torch.is_grad_enabled()
        if keep:
            trace.inputs.append((x,))

        def end(i: int, h: Tensor) -> None:
            if i > frozen and h.requires_grad:
                top = get_gradient_edge(h)
                parameters = self.trained_parameters(first, i)
                trace.segments.append(Segment(first, i, top, parameters, None))

        def at_boundary(i: int, h: Tensor) -> Tensor:
            nonlocal first
            if len(trace.outputs) != i - 1:
                name = self.boundaries[i - 1]
                raise UserError(
                    f"model: {name} cannot be a boundary: it is called twice, or in another order"
                )
            if keep:
                if learns:
                    # if all parameters below are frozen, h does not require a gradient yet
                    h = h if h.requires_grad else h.detach().requires_grad_()
                    trace.preactivations.append(get_gradient_edge(h))
                # a second tensor: autograd starts at the view, and δ_i is read at the original
                h = h.view_as(h)
            trace.outputs.append(h if keep or i in trace.cuts else None)
            read = h
            if i in trace.cuts:
                end(i, h)
                first = i + 1
                read = h.detach().requires_grad_(keep)
            if keep:
                trace.inputs.append((read,))
            if i == frozen:
                torch.set_grad_enabled(learns)
            return read

        with torch.set_grad_enabled(learns and (keep or not frozen)):
            trace.logits = self._passed(at_boundary, self.module, x)
            if len(trace.outputs) != self.depth - 1:
                raise UserError(
                    f"model: {self.boundaries[len(trace.outputs)]} is not called in this forward pass"
                )
            end(self.depth, trace.logits)


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Switch off the fast path of PyTorch's transformer layers: it makes nested tensors, which have no shape."""
    is_fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(is_fast)


def net_of(module: nn.Module, boundaries: Boundaries, example: Tensor) -> BlockNet:
    """Return the net of a module, with the layers that were replaced since it was built, such as a new head.

    boundaries: of a module or of a `ModuleNet`, which keeps its own if they are "auto". A `BlockNet` has only its own.
    Raises `UserError` for other boundaries of a `BlockNet`.
    """
    if isinstance(module, ModuleNet):
        names = module.boundaries if boundaries == "auto" else boundaries
        return ModuleNet(module.module, names, example)
    if isinstance(module, BlockNet):
        if boundaries != "auto":
            raise UserError(
                "boundaries: a BlockNet has fixed boundaries, between its blocks; leave them out"
            )
        module.find_weights()
        return module
    return ModuleNet(module, boundaries, example)


def as_net(
    module: nn.Module,
    names: Boundaries,
    input_shape: Sequence[int],
    samples: SampleKind | None = None,
) -> BlockNet:
    """Return a `ModuleNet` of a module with these boundaries; return a `BlockNet` itself.

    The example for a `ModuleNet` consists of zeros. They are integers if the samples are tokens, otherwise floats.

    samples: kind of the samples. None: they are tokens if the module has an embedding and one sample is a vector.
    Raises `UserError` for an object that is not a module, and for a module whose trainable parameters are not float32.
    """
    if isinstance(module, ModuleNet):
        return module
    if isinstance(module, BlockNet):
        module.find_weights()  # layers may have been replaced after the net was built
        return module
    refuse_unusable(module)
    for name, parameter in module.named_parameters():
        learns = parameter.requires_grad and parameter.is_floating_point()
        if learns and parameter.dtype != torch.float32:
            raise UserError(
                f"model: {name} is {parameter.dtype}, but samples are float32; return a net of float32, such as "
                "net.float() (precision=bfloat16 computes in bfloat16)"
            )
    is_of_tokens = samples == "tokens"
    if samples is None and len(input_shape) == 1:
        is_of_tokens = any(isinstance(layer, nn.Embedding) for layer in module.modules())
    example = torch.zeros(1, *input_shape, dtype=torch.int64 if is_of_tokens else torch.float32)
    return ModuleNet(module, names, example)
