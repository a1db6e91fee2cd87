"""SDFA: direct feedback through a sparse B (Crafton et al., 2019)."""

from typing import Any, Literal

import torch

from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.losses import OutputLoss
from dfl_experiments.errors import UserError
from dfl_experiments.methods.direct import Direct
from dfl_experiments.ranges import Count


class SparseDirectFeedback(Direct):
    """δ_i = (B_{i+1} e) ⊙ f'(a_i), with s of the K entries of B for each hidden unit, the others zero.

    `nonzeros`: s, 1 in the paper, where a unit hears of one class's error. Positions are drawn for every unit, without
    replacement. `scale`: the entries left are those of the dense B ("dense"), or drawn anew from U(±(K s)^¼ / √d_i),
    as the published code draws them ("published"). At s = K and "dense" it is DFA.
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
            raise UserError(f"method.nonzeros={nonzeros}: there are {num_classes} classes, with an error each")
        for module in self.local_modules.values():
            weight = module.weight.data  # (K, …), all units of h_i behind it
            if scale == "published":
                bound = (num_classes * nonzeros) ** 0.25 * weight[0].numel() ** -0.5
                weight.uniform_(-bound, bound)
            rank = torch.rand_like(weight).argsort(0).argsort(0)
            weight.mul_(rank < nonzeros)
