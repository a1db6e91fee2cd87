"""Apply RandAugment (Cubuk et al., 2020) to whole batches. Images with the same drawn operation are changed together.

Every operation gives the same bytes as in `torchvision.transforms.RandAugment`. Images are uint8, interpolation is
nearest, and positions outside the image are black.
"""

import math
from functools import lru_cache

import torch
import torchvision.transforms.functional as F
from torch import Tensor

from dfl_experiments.ranges import MAGNITUDE_BINS as BINS

# Operations that move pixels. `_origins` applies them to an image whose values are the positions of its pixels.
GEOMETRY = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
# Operations with the factor 1 ± magnitude.
FACTORS = ("Brightness", "Color", "Contrast", "Sharpness")
SIGNED = (*GEOMETRY, *FACTORS)
OPERATIONS = ("Identity", *SIGNED, "Posterize", "Solarize", "AutoContrast", "Equalize")


def magnitude(operation: str, bin_: int, height: int, width: int) -> float:
    """Return the magnitude of an operation without its sign.

    Its unit depends on the operation: slope, pixels, degrees, number of bits, grey level, or change of a factor.
    bin_: 0 to `BINS` - 1. height, width: size of the image in pixels.
    """
    if operation == "Posterize":
        return float(8 - round(bin_ / ((BINS - 1) / 4)))
    if operation == "Solarize":
        return torch.linspace(255.0, 0.0, BINS)[bin_].item()
    largest = {
        "ShearX": 0.3,
        "ShearY": 0.3,
        "TranslateX": 150.0 / 331.0 * width,
        "TranslateY": 150.0 / 331.0 * height,
        "Rotate": 30.0,
        **dict.fromkeys(FACTORS, 0.9),
    }
    return torch.linspace(0.0, largest.get(operation, 0.0), BINS)[bin_].item()


def _transform(image: Tensor, operation: str, value: float) -> Tensor:
    """Apply an operation of `GEOMETRY`. value: slope, pixels or degrees."""
    angle = math.degrees(math.atan(value))  # of a slope
    match operation:
        case "ShearX":
            return F.affine(image, 0.0, [0, 0], 1.0, [angle, 0.0], center=[0, 0])
        case "ShearY":
            return F.affine(image, 0.0, [0, 0], 1.0, [0.0, angle], center=[0, 0])
        case "TranslateX":
            return F.affine(image, 0.0, [int(value), 0], 1.0, [0.0, 0.0])
        case "TranslateY":
            return F.affine(image, 0.0, [0, int(value)], 1.0, [0.0, 0.0])
    return F.rotate(image, value)


@lru_cache(maxsize=256)
def _origins(operation: str, value: float, height: int, width: int, device: torch.device) -> Tensor:
    """Return the origin of each pixel of the moved image, as int64 of shape (height · width,).

    The origin is 1 + the index of a pixel in the flat image, or 0 for a position outside the image.
    """
    positions = torch.arange(1.0, height * width + 1)
    image = positions.reshape(1, 1, height, width)
    origins = _transform(image, operation, value).flatten()
    return origins.long().to(device, non_blocking=True)


def _planes(images: Tensor) -> Tensor:
    """Return each channel of each image as a row. images: (N, C, H, W). The result has shape (N · C, H · W)."""
    return images.flatten(2).flatten(0, 1)


def _move(images: Tensor, origins: Tensor) -> Tensor:
    """Move the pixels of images. images: (N, C, H, W). origins: result of `_origins`, (H · W,)."""
    # index 0: a black pixel
    planes = torch.nn.functional.pad(_planes(images), (1, 0))
    moved = planes.gather(1, origins.expand(len(planes), -1))
    return moved.view_as(images)


def _look_up(images: Tensor, tables: Tensor) -> Tensor:
    """Replace each grey level by its entry in the table of its channel. tables: (N · C, 256)."""
    planes = _planes(images).long()
    return tables.gather(1, planes).view_as(images)


def equalize(images: Tensor) -> Tensor:
    """Equalise the histogram of each channel of each image. images: (N, C, H, W) uint8."""
    planes = _planes(images).long()
    ones = planes.new_ones(()).expand_as(planes)
    counts = planes.new_zeros(len(planes), 256)
    counts.scatter_add_(1, planes, ones)
    brightest = planes.amax(1, keepdim=True)
    others = planes.shape[1] - counts.gather(1, brightest)
    step = others // 255
    cumulated = counts.cumsum(1)
    below = torch.nn.functional.pad(cumulated[:, :-1], (1, 0))
    rounded = below + step // 2
    tables = rounded // step.clamp(min=1)
    tables = tables.clamp(0, 255)
    tables[:, 0] = 0
    # a channel whose step is 0 keeps its levels
    levels = torch.arange(256, device=images.device)
    tables = torch.where(step == 0, levels, tables)
    return _look_up(images, tables.to(torch.uint8))


def _sum_of_three(x: Tensor, axis: int) -> Tensor:
    """Return the sum of each pixel and its two neighbours along an axis, for all pixels that have two neighbours."""
    length = x.shape[axis] - 2
    before = x.narrow(axis, 0, length)
    centre = x.narrow(axis, 1, length)
    after = x.narrow(axis, 2, length)
    return before + centre + after


def sharpen(images: Tensor, factor: float) -> Tensor:
    """Return factor · image + (1 - factor) · blurred.

    blurred is the image filtered with the kernel [1 1 1; 1 5 1; 1 1 1] / 13; its border pixels are not filtered.
    images: (N, C, H, W) uint8.
    """
    if min(images.shape[-2:]) <= 2:
        return images
    # The result equals torchvision's exactly. The sums are sums of integers, so their order does not matter. A sum
    # divided by 13 is never halfway between two integers, so rounding is unambiguous.
    x = images.to(torch.int16)
    in_columns = _sum_of_three(x, 2)
    total = _sum_of_three(in_columns, 3)
    inside = (..., slice(1, -1), slice(1, -1))
    total += 4 * x[inside]
    blurred = images.float()
    blurred[inside] = total.float().div_(13).round_()
    blurred.mul_(1.0 - factor)
    sharp = images.float()
    sharp.mul_(factor).add_(blurred)
    return sharp.clamp_(0, 255).to(torch.uint8)


def apply(operation: str, images: Tensor, value: float) -> Tensor:
    """Apply one operation to all images. images: (N, C, H, W) uint8. value: magnitude with its sign."""
    height, width = images.shape[-2:]
    if operation in GEOMETRY:
        origins = _origins(operation, value, height, width, images.device)
        return _move(images, origins)
    match operation:
        case "Identity":
            return images
        case "Brightness":
            return F.adjust_brightness(images, 1.0 + value)
        case "Color":
            return F.adjust_saturation(images, 1.0 + value)
        case "Contrast":
            return F.adjust_contrast(images, 1.0 + value)
        case "Sharpness":
            return sharpen(images, 1.0 + value)
        case "Posterize":
            return F.posterize(images, int(value))
        case "Solarize":
            return F.solarize(images, value)
        case "AutoContrast":
            return F.autocontrast(images)
        case "Equalize":
            return equalize(images)
    raise AssertionError(operation)


class RandAugment:
    """Apply `rounds` random operations to each image. Operations and signs are drawn uniformly.

    bin_: magnitude of all operations, 0 to `BINS` - 1.
    """

    def __init__(self, rounds: int, bin_: int) -> None:
        self.rounds = rounds
        self.bin = bin_

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw a random code for each round and each image. The result has shape (rounds, count).

        A code is 2 · operation, plus 1 if the magnitude is negative.
        """
        return torch.randint(2 * len(OPERATIONS), (self.rounds, count), generator=generator)

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        """Apply the drawn operations to each image, one round after the other.

        images: (N, C, H, W) uint8, on any device; not changed. draws: result of `draw`.
        """
        for draw in draws:
            # Group the images by code. `draw` is on the CPU, so the sizes are known without waiting for the device.
            sizes = draw.bincount(minlength=2 * len(OPERATIONS)).tolist()
            order = draw.argsort(stable=True)
            back = order.argsort().to(images.device, non_blocking=True)
            order = order.to(images.device, non_blocking=True)
            groups = images.index_select(0, order).split(sizes)
            changed = []
            for code, group in enumerate(groups):
                if len(group):
                    changed.append(self.change(code, group))
            images = torch.cat(changed).index_select(0, back)
        return images

    def change(self, code: int, images: Tensor) -> Tensor:
        """Apply the operation and the sign of a code to all images. See `draw` for the codes."""
        operation = OPERATIONS[code // 2]
        height, width = images.shape[-2:]
        value = magnitude(operation, self.bin, height, width)
        is_negative = code % 2 == 1
        if is_negative and operation in SIGNED:
            value = -value
        return apply(operation, images, value)
