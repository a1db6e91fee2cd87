"""Find the weights that multiply hidden values. A sequential rule must replace all of them or reject the net."""

import copy
import inspect
import re
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.transpose import Transpose, WeightLayer, transposed
from dfl_experiments.errors import UserError

# Operations that combine each hidden unit with its own parameter: a bias, a scale, a position embedding.
UNIT_BY_UNIT = {
    "Add", "Sub", "Rsub", "Maximum", "Minimum", "Clamp", "ClampMin", "ClampMax", "Where", "Cat", "Stack", "Copy",
    "CopySlices", "PreluKernel", "NativeLayerNorm", "NativeGroupNorm", "NativeBatchNorm", "CudnnBatchNorm",
    "MiopenBatchNorm", "FusedRmsNorm",
}  # fmt: skip
# Operations that scale each hidden unit by its own parameter, if the parameter has one axis. A parameter with several
# axes counts as a matrix.
SCALING = {"Mul", "Div", "Addcmul", "Addcdiv", "Lerp", "Pow"}


def layers_to_replace(net: BlockNet) -> list[int]:
    """Return the indices of the weight layers through which error signals pass.

    The indices count the weight layers of all blocks together, from 0. The layers are found by running a copy of the
    net in evaluation mode and in training mode.

    B can only replace the weights of weight layers. Raises `UserError` if another parameter is combined with hidden
    values in a matrix product, a convolution or an unknown operation: the error signal would then be multiplied by the
    parameter itself, as in backpropagation.
    """
    twin = copy_of(net).requires_grad_(True)  # so that frozen weights are found too
    learns = {}
    for copied, parameter in zip(twin.parameters(), net.parameters(), strict=True):
        learns[copied] = parameter.requires_grad
    layers = []
    for i in range(twin.depth):
        layers += twin.weight_layers(i)
    for layer in layers:
        layer.register_forward_pre_hook(refuse_checkpointed)
    probe = Transpose(layers, lambda k, signal, x: x)
    passed: set[int] = set()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        for training in (False, True):
            # two samples, because batch normalisation rejects a single sample if its feature maps have one pixel
            x = net.blank(2)
            x.requires_grad_(x.is_floating_point())
            with probe.installed():
                logits = twin.train(training)(x)
            passed |= set(_passed(twin, x, logits, learns, layers))
    return sorted(passed)


def _passed(
    net: BlockNet,
    x: Tensor,
    logits: Tensor,
    learns: Mapping[nn.Parameter, bool],
    layers: list[WeightLayer],
) -> Iterator[int]:
    """Yield the indices of the layers that send an error signal to their input.

    learns: for each parameter, whether the net trains it.
    layers: all weight layers.
    Raises `UserError` if the signal passes a weight outside of these layers.
    """
    hidden: set[Any] = set()  # nodes that depend on the net's input
    # nodes that depend on a trained parameter, so that error signals reach them
    trained: set[Any] = set()
    # for each node that is not hidden: the parameters it is computed from
    made_of: dict[Any, list[nn.Parameter]] = {}
    for node in from_the_leaves(logits.grad_fn):
        kind = kind_of(node)
        read = children(node)
        below = set(read)
        parameters: list[nn.Parameter] = []
        for child in read:
            if child not in hidden:
                parameters += made_of[child]
        if kind == "AccumulateGrad":
            parameters = [node.variable] if node.variable in learns else []
        elif kind == "Crossing":
            if node.next_functions[1][0] in trained:
                check_transpose(layers[node.k], node.saved_tensors[0])
                yield node.k
        elif parameters and below & hidden & trained and _mixes(kind, parameters):
            largest = max(parameters, key=torch.numel)
            raise not_replaceable(net, largest, kind)
        if below & trained or any(learns[p] for p in parameters):
            trained.add(node)
        # if the input is tokens, the first hidden values are the embeddings of these tokens
        is_look_up = kind == "Embedding" and _start(node._saved_indices) == _start(x)
        if below & hidden or not (below or parameters) or is_look_up:
            hidden.add(node)
        made_of[node] = parameters
    if logits.grad_fn not in hidden:
        raise UserError(
            "model: the output has no gradient with respect to the input, so FA cannot find the weights"
        )


def _start(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _mixes(kind: str, parameters: list[nn.Parameter]) -> bool:
    """Return whether an operation with these parameters may combine several hidden units into one."""
    if kind in SCALING:
        return any(p.squeeze().dim() > 1 for p in parameters)
    return kind not in UNIT_BY_UNIT


def check_transpose(layer: WeightLayer, x: Tensor) -> None:
    """Raise `UserError` if the layer's vector-Jacobian product differs from the result of `transposed` with B = W.

    The two differ if a hook changes the layer's output, or if a method is overwritten on the instance.

    x: an input of the layer.
    """
    start = torch.ones_like(x).requires_grad_()
    output = layer(start)
    angles = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device)
    signal = angles.cos().view_as(output)
    (own,) = torch.autograd.grad(output, start, signal)
    expected = transposed(layer, layer.weight, signal, start)
    difference = (own - expected).norm()
    if difference > 1e-2 * expected.norm():
        raise UserError(
            f"model: a hook or an overwritten method changes the output of {layer}, so FA and the rules based on it "
            "cannot transpose this layer; choose a direct method, shallow or bp"
        )


def checkpointed_part() -> FrameType | None:
    """Return the innermost call of `torch.utils.checkpoint` that this code runs in, as its frame; None outside."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename != torch.utils.checkpoint.__file__:
        frame = frame.f_back
    return frame


def refuse_checkpointed(layer: nn.Module, inputs: Any) -> None:
    """Raise `UserError` if a layer is called in a checkpointed part, where `Transpose` does not act."""
    if checkpointed_part() is not None:
        raise UserError(
            f"model: {layer} is inside a part with activation checkpointing, which FA and the rules based on it do "
            "not support; switch checkpointing off, or choose a direct method, shallow or bp"
        )


def copy_of(module: nn.Module) -> Any:
    """Return a copy of a module, also of one that keeps computed tensors (see `computed_tensors`)."""
    return copy.deepcopy(module, computed_tensors(module))


def computed_tensors(module: nn.Module) -> dict[int, Any]:
    """Return copies of the tensors that a module computed and keeps as attributes, by id, for `copy.deepcopy`.

    `deepcopy` refuses such tensors itself. A pruned layer keeps one.
    """
    copies: dict[int, Any] = {}
    for part in module.modules():
        waiting = [*vars(part).values(), *part.buffers(recurse=False)]
        for value in waiting:
            if isinstance(value, list | tuple):
                waiting += value
            elif isinstance(value, Tensor) and not value.is_leaf:
                copies[id(value)] = value.detach().clone()
    return copies


def children(node: Any) -> list[Any]:
    """Return the nodes of the graph that a node depends on directly."""
    return [child for child, _ in node.next_functions if child is not None]


def kind_of(node: Any) -> str:
    """Return the operation of a node, such as "Mul" for `MulBackward0`."""
    name = node.name().rpartition("::")[2]
    return re.sub(r"Backward\d*$", "", name)


def from_the_leaves(root: Any) -> Iterator[Any]:
    """Yield the root and all nodes that it depends on, in topological order: leaves first, the root last."""
    seen: set[Any] = set()
    stack = [(root, False)]
    while stack:
        node, is_ready = stack.pop()
        if is_ready:
            yield node
        elif node is not None and node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(child, False) for child in children(node)]


def not_replaceable(net: nn.Module, weight: nn.Parameter, kind: str) -> UserError:
    """Return the error for a weight that no B can replace. kind: operation that uses the weight."""
    # for a `ModuleNet`, use the parameter names of the user's module
    net = getattr(net, "module", net)
    name = next(name for name, p in net.named_parameters() if p is weight)
    owner = type(net.get_submodule(name.rpartition(".")[0])).__name__
    return UserError(
        f"model: {name} of {owner} is combined with hidden values in the operation {kind}. FA and the rules based on "
        "FA cannot replace this parameter by a B. They replace only the weights of Linear, Conv1d to Conv3d and "
        "ConvTranspose1d to ConvTranspose3d modules; use these modules, or choose a direct method, shallow or bp"
    )
