"""The paper's augmentations, drawn for each image and applied to whole batches."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dfl_experiments.ranges import Count, Magnitude, Probability, Size


class Augmentation:
    """RandAugment on whole numbers -> normalise -> one cutout -> horizontal flip; each may be switched off.

    flip         probability that an image is mirrored left to right
    randaugment  apply `num_ops` random operations at `magnitude` of 31 bins
    cutout       side of the square in pixels, centred on any pixel and clipped at the border; 0 for none
    """

    def __init__(
        self,
        flip: Probability = 0.0,
        randaugment: bool = False,
        num_ops: Count = 2,
        magnitude: Magnitude = 9,
        cutout: Size = 0,
    ) -> None:
        self.flip = flip
        self.randaugment: Any = None  # or a `RandAugment`
        self.cutout = cutout
        if randaugment:  # it brings torchvision along, which is as slow to import as torch
            from dfl_experiments.data.randaugment import RandAugment

            self.randaugment = RandAugment(num_ops, magnitude)

    @property
    def is_identity(self) -> bool:
        """Whether nothing random is done to an image."""
        return self.randaugment is None and not self.cutout and not self.flip

    def __call__(self, images: Tensor, normalise: Callable[[Tensor], Tensor], generator: torch.Generator) -> Tensor:
        """images: (N, C, H, W) uint8 on any device, left as they are -> the same shape, floats.

        `normalise` returns a new tensor. `generator` is a CPU generator: every decision is made there, so that all
        devices decide alike.
        """
        count, _, height, width = images.shape
        if self.randaugment is not None:
            images = self.randaugment.apply(images, self.randaugment.draw(count, generator))
        x = normalise(images)
        if self.cutout:
            rows = torch.randint(height, (count,), generator=generator)
            columns = torch.randint(width, (count,), generator=generator)
            x = cut_out(x, rows, columns, self.cutout)
        if self.flip:
            chosen = (torch.rand(count, generator=generator) < self.flip).nonzero().squeeze(1)
            chosen = chosen.to(x.device, non_blocking=True)
            x[chosen] = x[chosen].flip(-1)
        return x


def cut_out(x: Tensor, rows: Tensor, columns: Tensor, side: int) -> Tensor:
    """Put zero, the mean after normalisation, into one square per image, clipped at the border. Changes x in place.

    x: (N, C, H, W). rows, columns: (N,) the centres, with side // 2 pixels before them and the rest from them on.
    """

    def inside(centres: Tensor, length: int) -> Tensor:
        first = centres[:, None] - side // 2
        places = torch.arange(length)
        return (places >= first) & (places < first + side)

    square = inside(rows, x.shape[-2])[:, None, :, None] & inside(columns, x.shape[-1])[:, None, None, :]
    return x.mul_((~square).to(x.device, x.dtype, non_blocking=True))
