"""The contract of a learning rule."""

from torch import Tensor, nn

from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.losses import OutputLoss
from dfl_experiments.engine.trace import Trace
from dfl_experiments.engine.transpose import Transpose
from dfl_experiments.errors import UserError

WeightPair = tuple[Tensor, Tensor]  # a B and the weights that it replaces, of one shape


class Method(nn.Module):
    """A learning rule: where the graph is cut, which error signals start autograd there, and what replaces Wᵀ.

    A subclass sets the attributes below in its constructor. It overrides `signal` if it cuts, and `adapt` or `follow`
    if it learns feedback weights. The method's own parameters (B) get an optimizer of the network's kind and
    hyper-parameters, unless `optimizer.feedback` says otherwise.

    On a GPU a whole step is captured as a CUDA graph and replayed, so Python runs for the capture only. In a step, a
    method must not read a value from the device (no `.item()`, no `if` on a tensor); it draws random numbers from the
    device's default generator only; and it keeps what changes from step to step in tensors, which it changes in place.
    `tests/engine/test_step.py` checks this for every method, also for methods of other packages.

    net: to train. num_classes: K. loss: of the logits.
    Raises `UserError` for a network without a hidden block, or with another output than (N, K).
    """

    cuts: frozenset[int] = frozenset()
    """Boundaries i in 1 … L-1 where no gradient flows down; there h_i gets its gradient from `signal`."""
    frozen: int = 0
    """Number of the lowest blocks that get no signal, and keep their initial weights."""
    fixed_blocks: int = 0
    """Number of the lowest blocks that get signals, but keep their weights: a control that shows what B does alone."""
    exact_from: int
    """Lowest layer whose error signal equals BP's by construction (1: all layers; L: no hidden layer)."""
    transpose: Transpose | None = None
    """Feedback weights that replace Wᵀ in the backward pass; None for Wᵀ."""
    sends_first: bool = False
    """Update B after the signals are formed, not before."""
    follows_backward: bool = False
    """`.grad` of B comes from W's gradient in the backward pass, before `follow`: clip it by the same factor."""

    def __init__(self, net: BlockNet, num_classes: int, loss: OutputLoss) -> None:
        super().__init__()
        if net.depth < 2:
            raise UserError("model: a network needs at least one hidden block")
        shape = tuple(net.probe().logits.shape)
        if shape != (1, num_classes):
            raise UserError(
                f"model: its output for one image is {shape}, must be (1, {num_classes}), a value per class"
            )
        self.depth = self.exact_from = net.depth

    def adapt(self, trace: Trace, error: Tensor, target: Tensor) -> None:
        """Learn from the forward pass, before any error signal is formed.

        Set `.grad` of the method's own parameters, for their optimizer, or change its buffers in place. The network
        must not change.

        error: e, (N, K). target: labels, (N,).
        """

    def follow(self, lr: float | Tensor) -> None:
        """Learn from the backward pass: its gradients are in `.grad` of the network's parameters, clipped if asked.

        The network's optimizer steps afterwards, and so does that of B if the method `sends_first`.

        lr: the current learning rate.
        """

    def signal(self, i: int, trace: Trace, error: Tensor, target: Tensor) -> Tensor:
        """Return the gradient at the block output h_i, in its shape.

        It is called for every cut above the frozen blocks, from the highest down. The blocks above are done by then.

        error: e, (N, K). target: labels, (N,).
        """
        raise LookupError(f"{type(self).__name__} cuts behind block {i} and has no signal for it")

    def weight_pairs(self, i: int) -> list[WeightPair]:
        """Return every B through which h_i gets its signal, each with the weights that it replaces."""
        return []

    def feedback_norm(self, i: int) -> Tensor | None:
        """Return ‖B‖ (Frobenius) where h_i receives B e; None where it receives another signal."""
        return None

    def prediction(self, i: int, trace: Trace) -> Tensor | None:
        """Return the local module's prediction of the logits from h_i, (N, K); None without a module."""
        return None
