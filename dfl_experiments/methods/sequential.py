"""What feedback alignment and its descendants share: signals pass every weight layer, through a B in W's place."""

from abc import ABC, abstractmethod

from torch import Tensor

from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.crossings import places_to_replace
from dfl_experiments.engine.losses import OutputLoss
from dfl_experiments.engine.method import Method, WeightPair
from dfl_experiments.engine.transpose import Transpose, transposed


class Sequential(Method, ABC):
    """δ_i = (δ_{i+1} B_{i+1}ᵀ) ⊙ f'(a_i) at every weight layer, head and shortcuts included, from δ_L = e on.

    A subclass gives `feedback_weight(k)`, in the shape of the weight of layers[k]: all weight layers but those that
    read the image, which send nothing on. Normalisation, pooling and activations keep their own Jacobians. Raises
    `UserError` for a net with a weight that no B can replace (see `crossings`).
    """

    def __init__(self, net: BlockNet, num_classes: int, loss: OutputLoss) -> None:
        super().__init__(net, num_classes, loss)
        layers = [(i, layer) for i in range(self.depth) for layer in net.weight_layers(i)]
        passed = [layers[place] for place in places_to_replace(net)]
        self.blocks = [i for i, _ in passed]  # of every layer, counted from 0
        self.layers = [layer for _, layer in passed]
        self.transpose = Transpose(self.layers, self.carry)

    @abstractmethod
    def feedback_weight(self, k: int) -> Tensor:
        """The B that layers[k] transposes with, in the shape of its weight."""

    def carry(self, k: int, signal: Tensor, x: Tensor) -> Tensor:
        """The signal at the input x of layers[k], given the one at its output."""
        return transposed(self.layers[k], self.feedback_weight(k), signal, x)

    def weight_pairs(self, i: int) -> list[WeightPair]:
        """B and W of every layer of block i+1, through which h_i gets its signal."""
        return [
            (self.feedback_weight(k), layer.weight)
            for k, (block, layer) in enumerate(zip(self.blocks, self.layers, strict=True))
            if block == i
        ]

    def feedback_norm(self, i: int) -> Tensor | None:
        """Return ‖B_L‖, of the last layer, for h_{L-1}: below it signals come from signals."""
        is_there = i == self.depth - 1 and i in self.blocks
        return self.feedback_weight(len(self.layers) - 1).norm() if is_there else None
