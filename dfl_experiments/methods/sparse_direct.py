"""SDFA: direct feedback through a sparse B (Crafton et al., 2019)."""

from typing import Any, Literal

import torch

from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.losses import OutputLoss
from dfl_experiments.errors import UserError
from dfl_experiments.methods.direct import Direct
from dfl_experiments.ranges import Count


class SparseDirectFeedback(Direct):
    """Sparse DFA: δ_i = (B_{i+1} e) ⊙ f'(a_i), with a sparse B.

    B has K entries for each hidden unit. Only s of these entries, at random positions, are non-zero. With s = K and
    `scale` "dense" the rule equals DFA.

    nonzeros: s. In the paper s = 1, so each unit receives the error of one class.
    scale: distribution of the non-zero entries. "dense": as in a dense B. "published": uniform between
        -(K s)^¼ / √d_i and (K s)^¼ / √d_i, as in the published code.
    options: see `Direct`.
    Raises `UserError` if s > K.
    """

    def __init__(
        self,
        net: BlockNet,
        num_classes: int,
        loss: OutputLoss,
        nonzeros: Count,
        scale: Literal["dense", "published"],
        **options: Any,
    ) -> None:
        super().__init__(net, num_classes, loss, **options)
        if nonzeros > num_classes:
            raise UserError(
                f"method.nonzeros={nonzeros}: must be at most the number of classes, {num_classes}"
            )
        for module in self.local_modules.values():
            weight = module.weight.data  # (K, …): K entries for each unit of h_i
            if scale == "published":
                bound = (num_classes * nonzeros) ** 0.25 * weight[0].numel() ** -0.5
                weight.uniform_(-bound, bound)
            rank = torch.rand_like(weight).argsort(0).argsort(0)
            weight.mul_(rank < nonzeros)
