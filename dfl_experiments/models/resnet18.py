"""ResNet-18 (He et al., 2016), with feedback boundaries after the stem and after every stage."""

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from dfl_experiments.engine.blocknet import Block, BlockNet
from dfl_experiments.models.conv3 import normalisation
from dfl_experiments.ranges import Depth, Passes, Skip, Widths


class Residual(nn.Module):
    """The sum a = BN(conv(ReLU(BN(conv(x))))) + shortcut(x) of a basic block, before the block's last ReLU.

    planes, out: channels of the input and of the output. updates: see `normalisation`.
    """

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
            self.shortcut = nn.Sequential(
                nn.Conv2d(planes, out, 1, stride, bias=False), normalisation(out, updates)
            )

    def forward(self, x: Tensor, skipped: Tensor | None = None) -> Tensor:
        """Return the sum a.

        x: input of the branch, (N, C, H, W).
        skipped: input of the shortcut, in the shape of x. None: the shortcut reads x.
        """
        if skipped is None:
            skipped = x
        return self.branch(x) + self.shortcut(skipped)


class Stage(nn.Module):
    """A chain of basic blocks with a ReLU between them. There is no ReLU after the last block."""

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
    stem: Literal["7x7", "3x3"] = "7x7",
) -> BlockNet:
    """Return a ResNet-18: stem (convolution, BN, ReLU, no max-pool), stages, global average, linear layer.

    input_shape: (C, H, W). num_classes: K.
    channels: channels of each stage. residuals: number of basic blocks per stage.
    skip: whether the gradient of a shortcut stops at a boundary ("cut") or flows into the stage below ("leak").
    batch_norm_updates: `updates` of `normalisation`.
    batch_norm_updates_top: `updates` in the last stage; None for `batch_norm_updates`.
    stem: convolution of the stem: "7x7" with stride 2, or "3x3" with stride 1.
    """
    planes = channels[0]
    if stem == "7x7":
        convolution = nn.Conv2d(input_shape[0], planes, 7, stride=2, padding=3, bias=False)
    else:
        convolution = nn.Conv2d(input_shape[0], planes, 3, padding=1, bias=False)
    pre = nn.Sequential(convolution, normalisation(planes, batch_norm_updates))
    blocks = [Block(pre, nn.ReLU())]
    updates = batch_norm_updates
    for index, out in enumerate(channels):
        is_top = index == len(channels) - 1
        if is_top and batch_norm_updates_top is not None:
            updates = batch_norm_updates_top
        stride = 1 if index == 0 else 2
        chain = [Residual(planes, out, stride, updates)]
        chain += [Residual(out, out, 1, updates) for _ in range(residuals - 1)]
        blocks.append(Block(Stage(*chain), nn.ReLU(), leak=skip == "leak"))
        planes = out
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(planes, num_classes))
    return BlockNet(*blocks, head=head, input_shape=input_shape)
