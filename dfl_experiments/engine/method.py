"""The base class of all learning rules."""

from torch import Tensor, nn

from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.losses import OutputLoss
from dfl_experiments.engine.trace import Trace
from dfl_experiments.engine.transpose import Transpose
from dfl_experiments.errors import UserError

WeightPair = tuple[Tensor, Tensor]  # B and the weights that it replaces, in the same shape


class Method(nn.Module):
    """A learning rule: where the graph is cut, which error signals start autograd at the cuts, and what replaces Wᵀ.

    A subclass sets the attributes below in its constructor. It overrides `signal` if it cuts the graph. It overrides
    `adapt` or `follow` if it learns feedback weights. The method's own parameters are the feedback weights B. By
    default, their optimizer has the kind and hyper-parameters of the network's optimizer. `optimizer.feedback` can set
    others.

    On a GPU a step is captured as a CUDA graph and then replayed without Python. So during a step a method reads no
    value from the device (no `.item()`, no `if` on a tensor). It draws random numbers only from the device's default
    generator. It stores its state in tensors, which it changes in place. `tests/engine/test_step.py` checks these rules
    for every method, including methods of other packages.

    net: network to train.
    num_classes: K.
    loss: loss of the logits.
    Raises `UserError` if the network has no hidden block, or if its output does not have the shape (N, K).
    """

    cuts: frozenset[int] = frozenset()
    """Boundaries i in 1 … L-1 through which autograd sends no gradient. There `signal` gives the gradient at h_i."""
    frozen: int = 0
    """Number of the lowest blocks that receive no signal and keep their initial weights."""
    fixed_blocks: int = 0
    """Number of the lowest blocks that receive signals but keep their weights: a control for the effect of B alone."""
    exact_from: int
    """Lowest layer whose error signal equals BP's by construction (1: all layers; L: no hidden layer)."""
    transpose: Transpose | None = None
    """Feedback weights that replace Wᵀ in the backward pass; None for Wᵀ."""
    needs_labels: bool = False
    """Whether the rule reads the labels, and not only e."""
    sends_first: bool = False
    """Whether the signals are formed with the old B, which is updated afterwards."""
    follows_rate_of_b: bool = False
    """Whether `follow` gets the learning rate of B in place of W's."""
    follows_backward: bool = False
    """Whether `.grad` of B is made from W's gradient in the backward pass, so that clipping scales both alike."""

    def __init__(self, net: BlockNet, num_classes: int, loss: OutputLoss) -> None:
        super().__init__()
        if net.depth < 2:
            raise UserError("model: a network needs at least one hidden block")
        shape = tuple(net.probe().logits.shape)
        if shape != (1, num_classes):
            raise UserError(
                f"model: the output for one sample has shape {shape}; must be (1, {num_classes}), one value per class"
            )
        self.depth = self.exact_from = net.depth

    def adapt(self, trace: Trace, error: Tensor, target: Tensor) -> None:
        """Learn from the forward pass, before any error signal is formed.

        There are two ways to learn. Either set `.grad` of the method's own parameters: their optimizer updates them
        later. Or change the method's buffers in place. Do not change the network.

        error: e, (N, K).
        target: labels, (N,).
        """

    def follow(self, lr: float | Tensor) -> None:
        """Learn from the gradients of the backward pass, which are in `.grad` of the network's parameters.

        If `clip_norm` is set, these gradients are already clipped. After this call, B's optimizer updates B if
        `sends_first` is True. Then the network's optimizer updates W.

        lr: current learning rate of W, or of B if `follows_rate_of_b` is True.
        """

    def signal(self, i: int, trace: Trace, error: Tensor, target: Tensor) -> Tensor:
        """Return the gradient at the block output h_i, in the shape of h_i.

        It is called for every cut above the frozen blocks, from the highest to the lowest, after the gradients of the
        blocks above are computed.

        error: e, (N, K).
        target: labels, (N,).
        """
        raise LookupError(
            f"{type(self).__name__} cuts the graph after block {i} but does not implement `signal`"
        )

    def weight_pairs(self, i: int) -> list[WeightPair]:
        """Return every B that the signal to h_i passes, each with the weights that it replaces."""
        return []

    def neighbour_pairs(self, i: int) -> list[WeightPair]:
        """Return B_{i+2} B_{i+1}ᵀ with W_{i+1}, or B_Lᵀ with W_L; an empty list if h_i has no B.

        If h_{L-1} receives BP's signal, B_L is W_Lᵀ.
        """
        return []

    def feedback_norm(self, i: int) -> Tensor | None:
        """Return the Frobenius norm of B if h_i receives B e; None if h_i receives another signal."""
        return None

    def prediction(self, i: int, trace: Trace) -> Tensor | None:
        """Return the local module's prediction of the logits from h_i, (N, K); None if h_i has no module."""
        return None


def refuse_shared(method: Method, net: BlockNet) -> None:
    """Raise `UserError` if weights of the network are parameters of the method too. B's optimizer would change them."""
    if not set(method.parameters()).isdisjoint(net.parameters()):
        raise UserError(
            f"method: {type(method).__name__} has a module of the network as an attribute, so the network's weights "
            "would count as B; keep it in a list or a tuple"
        )
