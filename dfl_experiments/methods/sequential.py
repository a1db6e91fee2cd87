"""The base class of feedback alignment and the rules based on it: signals pass a B in place of every weight."""

from abc import ABC, abstractmethod

from torch import Tensor

from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.crossings import layers_to_replace
from dfl_experiments.engine.losses import OutputLoss
from dfl_experiments.engine.method import Method, WeightPair
from dfl_experiments.engine.transpose import Transpose, transposed


class Sequential(Method, ABC):
    """A sequential method: δ_L = e and δ_i = (δ_{i+1} B_{i+1}ᵀ) ⊙ f'(a_i). The head and shortcuts have a B too.

    A subclass implements `feedback_weight`. `layers` are the weight layers through which signals pass. These are all
    weight layers except those that read the net's input. Normalisation, pooling and activations keep their own
    Jacobians.

    Raises `UserError` if the net has a weight that no B can replace (see `crossings`).
    """

    def __init__(self, net: BlockNet, num_classes: int, loss: OutputLoss) -> None:
        super().__init__(net, num_classes, loss)
        layers = [(i, layer) for i in range(self.depth) for layer in net.weight_layers(i)]
        passed = [layers[index] for index in layers_to_replace(net)]
        self.blocks = [i for i, _ in passed]  # block of each layer, counted from 0
        self.layers = [layer for _, layer in passed]
        self.transpose = Transpose(self.layers, self.carry)

    @abstractmethod
    def feedback_weight(self, k: int) -> Tensor:
        """Return the B of layers[k], in the shape of its weight."""

    def carry(self, k: int, signal: Tensor, x: Tensor) -> Tensor:
        """Compute the signal at the input x of layers[k] from the signal at the layer's output."""
        return transposed(self.layers[k], self.feedback_weight(k), signal, x)

    def weight_pairs(self, i: int) -> list[WeightPair]:
        """Return B and W of every layer of block i+1."""
        return [
            (self.feedback_weight(k), layer.weight)
            for k, (block, layer) in enumerate(zip(self.blocks, self.layers, strict=True))
            if block == i
        ]

    def feedback_norm(self, i: int) -> Tensor | None:
        """Return ‖B_L‖ for h_{L-1}, which receives B_L e; None for lower layers, which receive other signals."""
        receives_error = i == self.depth - 1 and i in self.blocks
        return self.feedback_weight(len(self.layers) - 1).norm() if receives_error else None
