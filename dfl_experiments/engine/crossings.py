"""Find the weights that multiply hidden values. A sequential rule must replace all of them, or refuse the net."""

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.transpose import Transpose, WeightLayer, transposed
from dfl_experiments.errors import UserError

# Operations that combine a parameter with one hidden unit at a time: a bias, a norm's scale, a position embedding.
UNIT_BY_UNIT = {
    "Add", "Sub", "Rsub", "Maximum", "Minimum", "Clamp", "ClampMin", "ClampMax", "Where", "Cat", "Stack", "Copy",
    "CopySlices", "PreluKernel", "NativeLayerNorm", "NativeGroupNorm", "NativeBatchNorm", "CudnnBatchNorm",
    "MiopenBatchNorm", "FusedRmsNorm",
}  # fmt: skip
# These operations do so if the parameter has one axis, as a layer scale. One with more axes counts as a matrix.
SCALING = {"Mul", "Div", "Addcmul", "Addcdiv", "Lerp", "Pow"}


def layers_to_replace(net: BlockNet) -> list[int]:
    """Return the indices of the weight layers that an error signal passes, counted over all blocks.

    A copy of the net runs in evaluation and in training mode.
    Raises `UserError` where another parameter meets hidden values in a matrix product, a convolution or an unknown
    operation: there the signal would be that of backpropagation.
    """
    twin = copy.deepcopy(net).requires_grad_(True)  # frozen weights must be found too
    learns = {p: q.requires_grad for p, q in zip(twin.parameters(), net.parameters(), strict=True)}
    layers = [layer for i in range(twin.depth) for layer in twin.weight_layers(i)]
    probe = Transpose(layers, lambda k, signal, x: x)
    passed: set[int] = set()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        for training in (False, True):
            # two samples, because batch normalisation refuses a single one where planes have one pixel
            x = net.blank(2)
            x.requires_grad_(x.is_floating_point())
            with probe.installed():
                logits = twin.train(training)(x)
            passed |= set(_passed(twin, x, logits, learns, layers))
    return sorted(passed)


def _passed(
    net: BlockNet, x: Tensor, logits: Tensor, learns: Mapping[nn.Parameter, bool], layers: list[WeightLayer]
) -> Iterator[int]:
    """Yield the indices of the layers that pass a signal on to their input. Raises `UserError` for another weight.

    learns: for each parameter, whether the net trains it. layers: all weight layers.
    """
    hidden: set[Any] = set()  # nodes that depend on the net's input
    trained: set[Any] = set()  # nodes that depend on a trained parameter, so that an error signal passes them
    made_of: dict[Any, list[nn.Parameter]] = {}  # the parameters of every node that is not hidden
    for node in from_the_leaves(logits.grad_fn):
        children = [child for child, _ in node.next_functions if child is not None]
        below = set(children)
        kind = re.sub(r"Backward\d*$", "", node.name().rpartition("::")[2])
        parameters = [p for child in children if child not in hidden for p in made_of[child]]
        if kind == "AccumulateGrad":
            parameters = [node.variable] if node.variable in learns else []
        elif kind == "Crossing":
            if node.next_functions[1][0] in trained:
                check_transpose(layers[node.k], node.saved_tensors[0])
                yield node.k
        elif parameters and below & hidden & trained and _mixes(kind, parameters):
            raise not_replaceable(net, max(parameters, key=torch.numel), kind)
        if below & trained or any(learns[p] for p in parameters):
            trained.add(node)
        # hidden values of tokens begin where the input itself is looked up
        is_look_up = kind == "Embedding" and _start(node._saved_indices) == _start(x)
        if below & hidden or not (below or parameters) or is_look_up:
            hidden.add(node)
        made_of[node] = parameters
    if logits.grad_fn not in hidden:
        raise UserError("model: its output has no gradient by its input, so its weights cannot be found")


def _start(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _mixes(kind: str, parameters: list[nn.Parameter]) -> bool:
    """Return whether an operation with these parameters may combine several hidden units into one."""
    if kind in SCALING:
        return any(p.squeeze().dim() > 1 for p in parameters)
    return kind not in UNIT_BY_UNIT


def check_transpose(layer: WeightLayer, x: Tensor) -> None:
    """Raise `UserError` for a layer whose vector-Jacobian product differs from `transposed` with its own weight.

    Such a layer has a hook or a method that replaces the one of its class. x: an input of the layer.
    """
    start = torch.ones_like(x).requires_grad_()
    output = layer(start)
    signal = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device).cos().view_as(output)
    (own,) = torch.autograd.grad(output, start, signal)
    expected = transposed(layer, layer.weight, signal, start)
    if (own - expected).norm() > 1e-2 * expected.norm():
        raise UserError(
            f"model: {layer} does not compute what its class does (a hook or a method of its own changes it), and FA "
            "and its descendants cannot transpose it; choose a direct method, shallow or bp"
        )


def from_the_leaves(root: Any) -> Iterator[Any]:
    """Yield every node below the root, each after the nodes that it depends on."""
    seen: set[Any] = set()
    stack = [(root, False)]
    while stack:
        node, is_ready = stack.pop()
        if is_ready:
            yield node
        elif node is not None and node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((child, False) for child, _ in node.next_functions)


def not_replaceable(net: nn.Module, weight: nn.Parameter, kind: str) -> UserError:
    """Return the error for a weight that no B can replace. kind: of the operation that uses the weight."""
    net = getattr(net, "module", net)  # a user's module has its own names
    name = next(name for name, p in net.named_parameters() if p is weight)
    owner = type(net.get_submodule(name.rpartition(".")[0])).__name__
    return UserError(
        f"model: {name} of {owner} meets hidden values in an operation ({kind}) that FA and its descendants cannot "
        "transpose with a B: they replace the weights of Linear, Conv1d to Conv3d and ConvTranspose1d to "
        "ConvTranspose3d modules; build the layer from these, or choose a direct method, shallow or bp"
    )
