"""Augment whole batches as in the paper, with random decisions for each image."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dfl_experiments.errors import UserError
from dfl_experiments.ranges import Count, Magnitude, Probability, Size


class Augmentation:
    """Apply RandAugment, crop, normalisation, cutout and horizontal flip, in this order.

    Normalisation is always applied. All other steps are optional.
    flip: probability that an image is mirrored left to right.
    randaugment: whether to apply `num_ops` random operations of strength `magnitude` (0 to 30) to each uint8 image.
    cutout: side of a square in pixels. The square lies around a random pixel and is set to zero. 0: no square.
    crop: each border of the uint8 image is extended by this number of reflected pixels. Then an image of the original
        size is cut out at a random position. 0: no crop.
    A subclass overrides `__call__`. It need not call this constructor. It overrides `check` to refuse samples.
    """

    flip: float = 0.0
    cutout: int = 0
    crop: int = 0
    randaugment: Any = None  # None, or a `RandAugment`

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
        self.cutout = cutout
        self.crop = crop
        if randaugment:  # imported only if needed, because importing torchvision is slow
            from dfl_experiments.data.randaugment import RandAugment

            self.randaugment = RandAugment(num_ops, magnitude)

    @property
    def is_identity(self) -> bool:
        """Return whether the augmentation changes no image."""
        return self.randaugment is None and not (self.cutout or self.crop or self.flip)

    def check(self, shape: tuple[int, ...], are_images: bool, name: str) -> None:
        """Raise `UserError` if the samples are not images, or if the images do not suit the operations.

        shape: shape of one sample. name: name of the augmentation, for the message.
        """
        if self.is_identity:
            return
        if not are_images or self.crop >= min(shape[1:]):
            size = f" larger than crop={self.crop}" if self.crop else ""
            raise UserError(
                f"augmentation={name}: needs uint8 images{size}, but a sample has shape {shape}"
            )
        if self.randaugment is not None and shape[0] not in (1, 3):
            raise UserError(f"augmentation={name}: needs images of 1 or 3 channels, not {shape[0]}")

    def __call__(
        self, images: Tensor, normalise: Callable[[Tensor], Tensor], generator: torch.Generator
    ) -> Tensor:
        """Return augmented and normalised images, as floats of the same shape.

        images: (N, C, H, W) uint8 on any device; not changed.
        normalise: function that returns normalised images as a new tensor.
        generator: on the CPU, so that the random decisions do not depend on the device.
        """
        if self.is_identity:
            return normalise(images)
        count, _, height, width = images.shape
        if self.randaugment is not None:
            draws = self.randaugment.draw(count, generator)
            images = self.randaugment.apply(images, draws)
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
            is_chosen = torch.rand(count, generator=generator) < self.flip
            chosen = is_chosen.nonzero().squeeze(1)
            chosen = chosen.to(x.device, non_blocking=True)
            x[chosen] = x[chosen].flip(-1)
        return x


def shifted(images: Tensor, offsets: Tensor, axis: int) -> Tensor:
    """Shift each image along an axis. Positions beyond the border are filled with reflected pixels.

    images: (N, C, H, W). offsets: (N,); pixel i of the result is pixel i + offset of the image.
    """
    length = images.shape[axis]
    last = length - 1
    sources = torch.arange(length) + offsets[:, None]
    sources = sources.abs()  # reflect indices before the first pixel
    sources = last - (last - sources).abs()  # reflect indices after the last pixel
    sources = sources.to(images.device, non_blocking=True)
    shape = [len(images), 1, 1, 1]
    shape[axis] = length
    sources = sources.view(shape).expand(images.shape)
    return images.gather(axis, sources)


def cut_out(x: Tensor, rows: Tensor, columns: Tensor, side: int) -> Tensor:
    """Set one square of each image to zero, in place. Zero is the mean of normalised images.

    x: (N, C, H, W).
    rows, columns: position of the centre of each square, (N,). A square begins side // 2 pixels before its centre.
    side: side of the square in pixels. A square may extend beyond the image.
    """
    height, width = x.shape[-2:]
    in_rows = _is_inside(rows, side, height)
    in_columns = _is_inside(columns, side, width)
    is_cut = in_rows.view(-1, 1, height, 1) & in_columns.view(-1, 1, 1, width)
    kept = (~is_cut).to(x.device, x.dtype, non_blocking=True)
    return x.mul_(kept)


def _is_inside(centres: Tensor, side: int, length: int) -> Tensor:
    """Return a mask of shape (N, length). It is true for the `side` pixels around each centre. centres: (N,)."""
    positions = torch.arange(length)
    first = centres[:, None] - side // 2
    end = first + side
    return (positions >= first) & (positions < end)
