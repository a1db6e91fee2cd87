"""Augmentation of whole batches: the result of each operation, how often it is drawn, and the order of operations."""

import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.autoaugment import RandAugment as Reference
from torchvision.transforms.autoaugment import _apply_op

from dfl_experiments.configuration.components import component
from dfl_experiments.configuration.composition import compose, group_options
from dfl_experiments.configuration.schema import check
from dfl_experiments.data.augmentation import Augmentation, cut_out
from dfl_experiments.data.batches import Batches, Normalise
from dfl_experiments.data.randaugment import BINS, OPERATIONS, SIGNED, RandAugment, apply, magnitude
from dfl_experiments.errors import UserError

SHAPES = [(3, 32, 32), (1, 28, 28), (3, 64, 64), (1, 8, 8), (3, 21, 34)]


def pictures(shape: tuple[int, int, int], count: int = 24) -> torch.Tensor:
    """Return noise, smooth images, a constant one, a dark one and one of two levels: (count, C, H, W) uint8."""
    random = torch.Generator().manual_seed(5)
    images = torch.randint(256, (count, *shape), generator=random, dtype=torch.uint8)
    coarse = torch.rand(count // 2, shape[0], 4, 4, generator=random) * 300 - 20
    smooth = torch.nn.functional.interpolate(coarse, shape[1:], mode="bicubic").clamp(0, 255)
    images[: count // 2] = smooth.to(torch.uint8)
    images[0], images[1], images[2] = 7, images[1] // 16, (images[2] > 100) * 200
    return images


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def floats(images: torch.Tensor) -> torch.Tensor:
    """Return x / 255 + 1. No pixel is zero after this normalisation, so zeros show the cutout."""
    return images.float() / 255 + 1


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_operation_equals_torchvision(operation, shape):
    images = pictures(shape)
    for bin_ in (0, 9, 30):
        value = magnitude(operation, bin_, *shape[1:])
        for level in (value, -value) if operation in SIGNED else (value,):
            expected = _apply_op(images, operation, level, InterpolationMode.NEAREST, None)
            assert torch.equal(apply(operation, images, level), expected), (bin_, level)


def test_operations_and_magnitudes_are_those_of_torchvision():
    space = Reference()._augmentation_space(BINS, (28, 30))
    assert tuple(space) == OPERATIONS
    for operation, (magnitudes, signed) in space.items():
        assert signed == (operation in SIGNED)
        for bin_ in range(BINS):
            assert magnitude(operation, bin_, 28, 30) == (
                magnitudes[bin_].item() if magnitudes.ndim else 0.0
            )


def test_draws_are_uniform():
    count, codes = 56_000, 2 * len(OPERATIONS)
    for draws in RandAugment(2, 9).draw(count, generator(1)):
        observed = draws.bincount(minlength=codes).double()
        expected = count / codes
        # the 99.9 % point for 27 degrees of freedom
        assert ((observed - expected) ** 2 / expected).sum() < 55.5


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28)], ids=str)
def test_each_image_gets_its_own_operations(shape):
    images = pictures(shape, count=200)
    randaugment = RandAugment(2, 9)
    draws = randaugment.draw(len(images), generator(2))
    result = randaugment.apply(images, draws)
    for index in range(len(images)):
        expected = images[index]
        for code in draws[:, index].tolist():
            operation = OPERATIONS[code // 2]
            value = magnitude(operation, 9, *shape[1:])
            if code % 2 and operation in SIGNED:
                value = -value
            expected = _apply_op(expected, operation, value, InterpolationMode.NEAREST, None)
        assert torch.equal(result[index], expected)


def test_input_images_are_not_changed():
    images = pictures((3, 32, 32))
    before = images.clone()
    Augmentation(flip=0.5, randaugment=True, cutout=14)(images, floats, generator())
    assert torch.equal(images, before)


def test_same_generator_gives_the_same_result():
    images, augmentation = (
        pictures((3, 32, 32)),
        Augmentation(flip=0.5, randaugment=True, cutout=14),
    )
    first, again, other = (augmentation(images, floats, generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("row", "column", "rows", "columns"),
    [
        (16, 16, (9, 23), (9, 23)),
        (0, 0, (0, 7), (0, 7)),
        (31, 0, (24, 32), (0, 7)),
        (3, 31, (0, 10), (24, 32)),
    ],
)
def test_cutout_is_clipped_at_the_border(row, column, rows, columns):
    x = cut_out(torch.ones(2, 3, 32, 32), torch.tensor([row, 16]), torch.tensor([column, 16]), 14)
    expected = torch.ones(3, 32, 32)
    expected[:, slice(*rows), slice(*columns)] = 0
    assert torch.equal(x[0], expected)
    assert (x[1] == 0).sum() == 3 * 14 * 14


def test_cutout_centres_are_uniform():
    images = torch.zeros(20_000, 1, 8, 8, dtype=torch.uint8)
    x = Augmentation(cutout=1)(images, floats, generator(6))
    assert torch.equal((x == 0).sum((1, 2, 3)), torch.ones(20_000, dtype=torch.int64))
    observed = (x == 0).sum(0).double()
    expected = 20_000 / 64
    # the 99.9 % point for 63 degrees of freedom
    assert ((observed - expected) ** 2 / expected).sum() < 103.4


def test_own_augmentation_needs_only_a_call():
    class Brighter(Augmentation):
        def __init__(self, step: float) -> None:
            self.step = step

        def __call__(self, images, normalise, generator):
            return normalise(images) + self.step

    features = torch.arange(12.0).view(4, 3)
    own = Brighter(2.0)
    own.check((3,), False, "brighter")
    labels = torch.arange(4)
    batches = Batches(
        features, labels, Normalise([0.5], [0.25]), own, 3, seed=0, device=torch.device("cpu")
    )
    for x, label in batches.epoch(1):
        assert torch.equal(x, features[label] + 2)


def test_flip_mirrors_the_configured_share_of_images():
    images = pictures((3, 32, 32), count=2000)[1000:]
    x = Augmentation(flip=0.3)(images, floats, generator(7))
    mirrored = (x == floats(images).flip(-1)).flatten(1).all(1)
    kept = (x == floats(images)).flatten(1).all(1)
    assert (mirrored ^ kept).all()
    assert 250 < mirrored.sum() < 350
    assert torch.equal(Augmentation(flip=1.0)(images, floats, generator()), floats(images).flip(-1))


def test_steps_are_randaugment_normalise_cutout_flip_in_this_order():
    images = pictures((3, 32, 32))
    normalised = []

    def normalise(batch):
        normalised.append(batch)
        return floats(batch)

    random = generator(8)
    x = Augmentation(flip=1.0, randaugment=True, cutout=14)(images, normalise, random)
    random = generator(8)
    randaugment = RandAugment(2, 9)
    changed = randaugment.apply(images, randaugment.draw(len(images), random))
    rows, columns = (torch.randint(32, (len(images),), generator=random) for _ in range(2))
    (batch,) = normalised
    assert batch.dtype == torch.uint8
    assert torch.equal(batch, changed)
    assert torch.equal(x, cut_out(floats(changed), rows, columns, 14).flip(-1))


@pytest.mark.parametrize("name", group_options("augmentation"))
def test_every_configured_augmentation_returns_float32(name):
    augmentation = check(compose([f"augmentation={name}"])).components["augmentation"].build()
    assert augmentation.is_identity == (name == "none")
    assert augmentation(pictures((1, 28, 28)), floats, generator()).dtype == torch.float32


@pytest.mark.parametrize(
    ("option", "value"),
    [("magnitude", 31), ("magnitude", -1), ("flip", 1.5), ("num_ops", 0), ("cutout", "14")],
)
def test_options_out_of_range_are_refused(option, value):
    node = {"_target_": "dfl_experiments.data.augmentation.Augmentation", option: value}
    with pytest.raises(UserError, match=f"^augmentation.{option}="):
        component(node, "augmentation")


def crop_flipped(
    images: torch.Tensor, generator: torch.Generator, crop: int, flip: float
) -> torch.Tensor:
    """Pad by reflection, crop and flip one image at a time, with the random numbers of a whole batch."""
    count = len(images)
    rows, columns = (
        torch.randint(-crop, crop + 1, (count,), generator=generator) + crop for _ in range(2)
    )
    flips = torch.rand(count, generator=generator) < flip
    height, width = images.shape[2:]
    results = []
    for image, row, column, is_flipped in zip(images, rows, columns, flips, strict=True):
        padded = torch.nn.functional.pad(image.float(), [crop] * 4, mode="reflect")
        cropped = padded[:, row : row + height, column : column + width]
        results.append(cropped.flip(-1) if is_flipped else cropped)
    return torch.stack(results)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8), (2, 9, 5)], ids=str)
def test_crop_flip_of_a_batch_equals_one_image_at_a_time(shape):
    images = torch.randint(256, (200, *shape), generator=generator(1), dtype=torch.uint8)
    before = images.clone()
    augmentation = Augmentation(crop=4, flip=0.5)
    for seed in range(3):
        augmented = augmentation(images, lambda batch: batch.float(), generator(seed))
        assert torch.equal(augmented, crop_flipped(images, generator(seed), 4, 0.5))
    assert torch.equal(images, before)


def test_images_must_be_larger_than_the_crop():
    with pytest.raises(
        UserError, match=r"^augmentation=crop_flip: needs uint8 images larger than crop=4"
    ):
        Augmentation(crop=4).check((1, 4, 9), True, "crop_flip")
    Augmentation(crop=4).check((1, 5, 9), True, "crop_flip")
