"""What a method is: where the graph is cut, which signals start autograd there, and what a layer transposes with."""

from torch import Tensor, nn

from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.losses import OutputLoss
from dfl_experiments.engine.trace import Trace
from dfl_experiments.engine.transpose import Transpose
from dfl_experiments.errors import UserError

WeightPair = tuple[Tensor, Tensor]  # a B and what BP has in its place, of one shape


class Method(nn.Module):
    """The contract of a learning rule: where the graph is cut, which error signals start autograd there, and what a
    layer transposes with on the way back.

    A subclass sets the attributes below in its constructor, overrides `signal` if it cuts, and `adapt` or `follow` if
    it learns feedback weights. Parameters of the method itself (its B) get an optimizer of the network's kind and
    hyper-parameters.

    On a GPU a whole step is captured as a CUDA graph and replayed: Python runs once, for the capture. So what a method
    does in a step reads no value from the device (no `.item()`, no `if` on a tensor), draws random numbers from the
    device's default generator only, and keeps no Python state that changes from step to step: what changes lies in
    tensors, and is changed in place. `tests/engine/test_step.py` holds every method to it, one's own too.

    cuts: boundaries i (1 … L-1) behind which no gradient flows down; there h_i gets its signal from `signal`.
    frozen: how many of the lowest blocks get no signal at all, and stay as they were initialised.
    held: how many of the lowest blocks keep their weights although signals come: a control, whose alignment says what B
    does alone.
    exact_from: the lowest layer from which on δ_i is BP's own by construction: 1 is BP itself, L says of no hidden
    layer that it is. It is what the measure of alignment goes by.
    transpose: what signals pass the weight layers through where it is not W.
    sends_first: whether the optimizer of B steps after the signals are sent, not before they are formed.
    """

    cuts: frozenset[int] = frozenset()
    frozen: int = 0
    held: int = 0
    exact_from: int
    transpose: Transpose | None = None
    sends_first: bool = False

    def __init__(self, net: BlockNet, num_classes: int, loss: OutputLoss) -> None:
        """Raises `UserError` for a network that no method can train: on images of this shape, or for these classes."""
        super().__init__()
        if net.depth < 2:
            raise UserError("model: a network needs at least one hidden block")
        shape = tuple(net.probe().logits.shape)
        if shape != (1, num_classes):
            raise UserError(f"model: gives {shape} for one image, not (1, {num_classes}), a value per class")
        self.depth = self.exact_from = net.depth

    def adapt(self, trace: Trace, error: Tensor, target: Tensor) -> None:
        """Learn from the forward pass, before any error signal is formed. error: e, (N, K); target: labels (N,).

        Fill `.grad` of the method's own parameters, whose optimizer then steps, or change its buffers in place. The
        trace is a constant here: nothing of the network may change.
        """

    def follow(self, lr: float | Tensor) -> None:
        """Learn from the backward pass, whose gradients are in `.grad` of the network's parameters.

        Called before the network's optimizer steps, and before that of B where the method `sends_first`. lr: theirs.
        """

    def signal(self, i: int, trace: Trace, error: Tensor, target: Tensor) -> Tensor:
        """The gradient at block output h_i, shaped like it. error: e, (N, K); target: labels, (N,).

        Asked for at every cut above the frozen blocks, from the highest down, each when what is above it is done.
        """
        raise LookupError(f"{type(self).__name__} cuts behind block {i} and has no signal for it")

    def weight_pairs(self, i: int) -> list[WeightPair]:
        """What `alignment.quantities` compares: every B that h_i gets its signal through, beside what BP has there."""
        return []

    def feedback_norm(self, i: int) -> Tensor | None:
        """Return ‖B‖, the Frobenius norm of the B through which e itself comes to h_i; None where no e does."""
        return None

    def prediction(self, i: int, trace: Trace) -> Tensor | None:
        """The logits as the local module on h_i predicts them, (N, K); None where there is none."""
        return None
