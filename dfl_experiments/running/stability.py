"""Measure early signs of a collapse: the size of the activations, and the fraction of dead units."""

from typing import Any

import torch
from torch import Tensor

from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.quantities import exact
from dfl_experiments.running.records import by_layer

# A run is unstable in two cases. The activation_rms of a layer is more than GROWTH_LIMIT times its value after the
# first epoch, or the column `dead` of layer L-1 is above DEAD_LIMIT.
GROWTH_LIMIT, DEAD_LIMIT = 50.0, 0.95
SMALLEST_RMS = 1e-3  # a smaller activation_rms in the first epoch counts as this value


class Activations:
    """Statistics of h_1 … h_{L-1} over a set of images. The sums stay on the device until the end."""

    net: BlockNet
    """The network that is evaluated."""
    squares: dict[int, Tensor]
    """For every layer, the mean square of its units, summed over the images."""
    is_active: dict[int, Tensor]
    """For every unit of a block that ends in ReLU, whether it is active (not 0) for some image."""
    counts: list[Tensor]
    """For every batch, three counts: all images, images with e ≠ 0, and images with e ≠ 0 and h_{L-1} ≠ 0."""

    def __init__(self, net: BlockNet) -> None:
        self.net = net
        self.squares = {}
        self.is_active = {}
        self.counts = []

    def add(self, i: int, h: Tensor) -> None:
        """Add the activations of layer i. The first axis of `h` is the batch."""
        axes = tuple(range(1, h.dim()))
        kind = torch.promote_types(h.dtype, torch.float32)
        norms = torch.linalg.vector_norm(h, dim=axes, dtype=kind)
        mean_squares = exact(norms).square().sum() / h[0].numel()
        self.squares[i] = self.squares.get(i, 0) + mean_squares
        if self.net.ends_in_relu(i):
            is_active = (h != 0).any(0)
            self.is_active[i] = self.is_active.get(i, False) | is_active
        self._top = h

    def add_error(self, error: Tensor) -> None:
        """Add the output error e of a batch, after `add` has received h_{L-1} of this batch.

        error: e, with shape (N, K).
        """
        is_wrong = (error != 0).any(1)
        has_active_unit = (self._top.flatten(1) != 0).any(1)
        counted = torch.stack([torch.ones_like(is_wrong), is_wrong, is_wrong & has_active_unit])
        self.counts.append(counted.sum(1))

    def measured(self) -> tuple[dict[str, float], bool]:
        """Return the measures by column name, and whether the network has collapsed.

        The measures are `activation_rms/i` for every layer, and `dead/i` for every layer that ends in ReLU. A network
        whose layer L-1 ends in ReLU has collapsed if there are images with e ≠ 0, and h_{L-1} = 0 for all of them.
        """
        images, *errors = torch.stack(self.counts).sum(0)
        measures = {}
        for i, total in self.squares.items():
            measures[f"activation_rms/{i}"] = (total / images).sqrt()
        for i, units in self.is_active.items():
            measures[f"dead/{i}"] = 1 - exact(units).mean()
        # copy all values from the device at once
        *values, wrong, answered = torch.stack([*measures.values(), *errors]).tolist()
        is_defined = self.net.depth - 1 in self.is_active
        has_collapsed = is_defined and answered == 0 < wrong
        return dict(zip(measures, values, strict=True)), has_collapsed


def norm_ratios(columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `norm_ratio/i` = ‖δ_i‖/‖δ_i^BP‖ of every layer and iteration.

    The ratio is NaN if δ_i^BP is zero, or if one of the two norms is not finite.
    """
    ratios = {}
    for name, norm_bp in columns.items():
        quantity, _, layer = name.partition("/")
        if quantity == "norm_bp":
            norm = columns[f"norm/{layer}"]
            ratio = norm.double() / norm_bp.double()
            is_valid = ratio.isfinite() & norm_bp.isfinite()
            ratios[f"norm_ratio/{layer}"] = ratio.where(is_valid, torch.nan)
    return ratios


def instability(row: dict[str, Any], first: dict[str, Any], top: int) -> dict[str, Any] | None:
    """Return the entry `unstable` of result.json; None if no measure is above its limit after this epoch.

    row: row of epochs.csv for this epoch.
    first: row of epochs.csv for the first epoch.
    top: number of the last hidden layer, L-1.
    """
    for layer, rms in by_layer(row, "activation_rms").items():
        start = max(first[f"activation_rms/{layer}"], SMALLEST_RMS)
        growth = rms / start
        if growth > GROWTH_LIMIT:
            sign = {"layer": int(layer), "measure": "activation_rms", "value": growth}
            return sign | {"epoch": row["epoch"]}
    dead = row.get(f"dead/{top}", 0.0)
    if dead > DEAD_LIMIT:
        return {"layer": top, "epoch": row["epoch"], "measure": "dead", "value": dead}
    return None
