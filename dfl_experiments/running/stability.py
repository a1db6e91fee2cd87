"""How near a run is to a collapse: how large its activations are, and how many of its units are dead."""

from typing import Any

import torch
from torch import Tensor

from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.quantities import exact
from dfl_experiments.running.records import by_layer

# A run is unstable above these: activation_rms/i over that of the first epoch, and dead/(L-1).
GROWTH_LIMIT, DEAD_LIMIT = 50.0, 0.95
SMALLEST_RMS = 1e-3  # that growth is counted from


class Activations:
    """Sums over a set of images of what its forward pass shows of h_1 … h_{L-1}, kept on the device.

    squares: of every layer, the sum over images of the mean square of its units.
    is_active: of every unit, whether it is not 0 for some image; only for blocks that end in ReLU.
    counts: of every batch, its images, those with e ≠ 0, and those of them with an active unit in h_{L-1}.
    """

    def __init__(self, net: BlockNet) -> None:
        self.net = net
        self.squares: dict[int, Tensor] = {}
        self.is_active: dict[int, Tensor] = {}
        self.counts: list[Tensor] = []

    def add(self, i: int, h: Tensor) -> None:
        """Take in h_i of a batch, (N, *h_i)."""
        axes, kind = tuple(range(1, h.dim())), torch.promote_types(h.dtype, torch.float32)
        norms = torch.linalg.vector_norm(h, dim=axes, dtype=kind)
        self.squares[i] = self.squares.get(i, 0) + exact(norms).square().sum() / h[0].numel()
        if self.net.ends_in_relu(i):
            self.is_active[i] = self.is_active.get(i, False) | (h != 0).any(0)
        self._top = h

    def add_error(self, error: Tensor) -> None:
        """Take in e of the batch whose h_{L-1} came last, (N, K)."""
        is_wrong = (error != 0).any(1)
        answers = (self._top.flatten(1) != 0).any(1)
        self.counts.append(torch.stack([is_wrong | True, is_wrong, is_wrong & answers]).sum(1))

    def measured(self) -> tuple[dict[str, float], bool]:
        """`activation_rms/i` and, where it is defined, `dead/i` of every layer; and whether the net has collapsed.

        That is where some images have an error, and h_{L-1} of none of them has an active unit.
        """
        images, *errors = torch.stack(self.counts).sum(0)
        found = {f"activation_rms/{i}": (total / images).sqrt() for i, total in self.squares.items()}
        found |= {f"dead/{i}": 1 - exact(units).mean() for i, units in self.is_active.items()}
        *values, wrong, answered = torch.stack([*found.values(), *errors]).tolist()
        has_collapsed = answered == 0 < wrong and self.net.depth - 1 in self.is_active
        return dict(zip(found, values, strict=True)), has_collapsed


def norm_ratios(columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """`norm_ratio/i` = ‖δ_i‖/‖δ_i^BP‖ of every layer and iteration; NaN where δ_i^BP is zero, or one is not finite."""
    found = {}
    for name, norm_bp in columns.items():
        quantity, _, layer = name.partition("/")
        if quantity == "norm_bp":
            ratio = columns[f"norm/{layer}"].double() / norm_bp.double()
            found[f"norm_ratio/{layer}"] = ratio.where(ratio.isfinite() & norm_bp.isfinite(), torch.nan)
    return found


def instability(row: dict[str, Any], first: dict[str, Any], top: int) -> dict[str, Any] | None:
    """What makes a run unstable after an epoch, for result.json; None where nothing does.

    row, first: of epochs.csv, for this epoch and for the first. top: L-1.
    """
    for layer, rms in by_layer(row, "activation_rms").items():
        growth = rms / max(first[f"activation_rms/{layer}"], SMALLEST_RMS)
        if growth > GROWTH_LIMIT:
            return {"layer": int(layer), "epoch": row["epoch"], "measure": "activation_rms", "value": growth}
    if (dead := row.get(f"dead/{top}", 0.0)) > DEAD_LIMIT:
        return {"layer": top, "epoch": row["epoch"], "measure": "dead", "value": dead}
    return None
