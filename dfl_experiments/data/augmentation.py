"""Augmentations of the paper: random decisions for each image, operations on whole batches."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dfl_experiments.errors import UserError
from dfl_experiments.ranges import Count, Magnitude, Probability, Size


class Augmentation:
    """The sequence RandAugment -> crop -> normalisation -> cutout -> horizontal flip; each part is optional.

    The first two act on uint8.

    flip: probability that an image is mirrored left to right.
    randaugment: apply `num_ops` random operations at `magnitude` of 31 bins (0 to 30).
    cutout: side of one square in pixels, centred on a random pixel and clipped at the border; 0 for none.
    crop: pixels by which an image is padded at each border, by reflection, before a random place of its old size is
        cut out; 0 for none.
    """

    def __init__(
        self,
        flip: Probability = 0.0,
        randaugment: bool = False,
        num_ops: Count = 2,
        magnitude: Magnitude = 9,
        cutout: Size = 0,
        crop: Size = 0,
    ) -> None:
        self.flip = flip
        self.randaugment: Any = None  # or a `RandAugment`
        self.cutout, self.crop = cutout, crop
        if randaugment:  # imported here because torchvision is as slow to import as torch
            from dfl_experiments.data.randaugment import RandAugment

            self.randaugment = RandAugment(num_ops, magnitude)

    @property
    def is_identity(self) -> bool:
        """Return whether no image is changed at random."""
        return self.randaugment is None and not (self.cutout or self.crop or self.flip)

    def check(self, shape: tuple[int, ...], are_images: bool, name: str) -> None:
        """Raise `UserError` for samples that the augmentation of this name cannot change."""
        if not self.is_identity and not (are_images and self.crop < min(shape[1:])):
            size = f" larger than crop={self.crop}" if self.crop else ""
            raise UserError(f"augmentation={name}: needs uint8 images (N, C, H, W){size}, but the samples are {shape}")

    def __call__(self, images: Tensor, normalise: Callable[[Tensor], Tensor], generator: torch.Generator) -> Tensor:
        """Return augmented, normalised images: floats of the same shape.

        images: (N, C, H, W) uint8 on any device; not changed.
        normalise: function that returns a new tensor.
        generator: on the CPU; it makes every decision, so that all devices decide alike.
        """
        if self.is_identity:
            return normalise(images)
        count, _, height, width = images.shape
        if self.randaugment is not None:
            images = self.randaugment.apply(images, self.randaugment.draw(count, generator))
        if self.crop:
            for axis in (2, 3):
                offsets = torch.randint(-self.crop, self.crop + 1, (count,), generator=generator)
                images = shifted(images, offsets, axis)
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


def shifted(images: Tensor, offsets: Tensor, axis: int) -> Tensor:
    """Return images that are shifted along an axis; what is beyond the border is reflected.

    images: (N, C, H, W). offsets: (N,), pixel i of an image is pixel i + offset before; smaller than the images.
    """
    last = images.shape[axis] - 1
    places = last - (last - (torch.arange(last + 1) + offsets[:, None]).abs()).abs()
    places = places[:, None, :, None] if axis == 2 else places[:, None, None, :]
    return images.gather(axis, places.to(images.device, non_blocking=True).expand(images.shape))


def cut_out(x: Tensor, rows: Tensor, columns: Tensor, side: int) -> Tensor:
    """Set one square of each image to zero, which is the mean after normalisation. Changes x in place.

    x: (N, C, H, W).
    rows, columns: (N,), the centres; side // 2 pixels of the square lie before a centre.
    side: of the square in pixels; the border clips it.
    """
    in_rows = _is_inside(rows, side, x.shape[-2])
    in_columns = _is_inside(columns, side, x.shape[-1])
    square = in_rows[:, None, :, None] & in_columns[:, None, None, :]
    return x.mul_((~square).to(x.device, x.dtype, non_blocking=True))


def _is_inside(centres: Tensor, side: int, length: int) -> Tensor:
    """Return (N, length): whether a pixel of the axis lies within `side` pixels around the centre, (N,)."""
    first = centres[:, None] - side // 2
    positions = torch.arange(length)
    return (positions >= first) & (positions < first + side)
