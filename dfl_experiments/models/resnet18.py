"""ResNet18 (He et al., 2016) with feedback boundaries at the stem's and at every stage's output."""

from torch import Tensor, nn
from torch.nn import functional as F

from dfl_experiments.engine.blocknet import Block, BlockNet
from dfl_experiments.models.conv3 import normalisation
from dfl_experiments.ranges import Depth, Passes, Skip, Widths


class Residual(nn.Module):
    """The sum a = BN(conv(ReLU(BN(conv(x))))) + shortcut(x) of a basic block, before its ReLU."""

    def __init__(self, planes: int, out: int, stride: int, updates: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(planes, out, 3, stride, 1, bias=False),
            normalisation(out, updates),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False),
            normalisation(out, updates),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or planes != out:
            self.shortcut = nn.Sequential(nn.Conv2d(planes, out, 1, stride, bias=False), normalisation(out, updates))

    def forward(self, x: Tensor, skipped: Tensor | None = None) -> Tensor:
        """x: what the branch reads; skipped: what the shortcut reads, if not the same tensor. Both (N, C, H, W)."""
        return self.branch(x) + self.shortcut(x if skipped is None else skipped)


class Stage(nn.Module):
    """Basic blocks up to the last one's sum, the stage's pre-activation; every inner sum is followed by its ReLU."""

    def __init__(self, *residuals: Residual) -> None:
        super().__init__()
        self.residuals = nn.ModuleList(residuals)

    def forward(self, x: Tensor, skipped: Tensor | None = None) -> Tensor:
        first, *rest = self.residuals
        a = first(x, skipped)
        for residual in rest:
            a = residual(F.relu(a))
        return a


def resnet18(
    input_shape: tuple[int, int, int],
    num_classes: int,
    channels: Widths,
    residuals: Depth,
    skip: Skip,
    batch_norm_updates: Passes,
    batch_norm_updates_top: Passes | None = None,
) -> BlockNet:
    """Stem 7×7 stride 2 + BN + ReLU, no max-pool; a stage of `residuals` blocks per entry of `channels`; average pool.

    batch_norm_updates: see `normalisation`; batch_norm_updates_top: of the last stage, where it is not the same.
    skip: whether the shortcut across a boundary is "cut" like the branch, or "leak"s BP's signal past the direct one.
    """
    planes = channels[0]
    stem = nn.Sequential(
        nn.Conv2d(input_shape[0], planes, 7, 2, 3, bias=False), normalisation(planes, batch_norm_updates)
    )
    blocks = [Block(stem, nn.ReLU())]
    for index, out in enumerate(channels):
        is_top = index == len(channels) - 1
        updates = batch_norm_updates_top or batch_norm_updates if is_top else batch_norm_updates
        first = Residual(planes, out, 1 if index == 0 else 2, updates)
        rest = (Residual(out, out, 1, updates) for _ in range(residuals - 1))
        blocks.append(Block(Stage(first, *rest), nn.ReLU(), leak=skip == "leak"))
        planes = out
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(planes, num_classes))
    return BlockNet(*blocks, head=head, input_shape=input_shape)
