"""A batch is determined by the seed, the epoch and its number in the epoch."""

import numpy as np
import pytest
import torch

from dfl_experiments.data.augmentation import Augmentation
from dfl_experiments.data.batches import (
    CHUNK,
    Batches,
    EvaluationBatches,
    Normalise,
    resident,
    split,
)
from dfl_experiments.errors import UserError

CPU = torch.device("cpu")


def made_batches(
    count: int, batch_size: int, augmentation: Augmentation, seed: int = 0, **options
) -> Batches:
    """Return batches of images that all differ. The label of an image is its index."""
    random = torch.Generator().manual_seed(1)
    images = torch.randint(256, (count, 3, 8, 8), generator=random, dtype=torch.uint8)
    return Batches(
        images,
        torch.arange(count),
        Normalise([0.5], [0.25]),
        augmentation,
        batch_size,
        seed,
        CPU,
        **options,
    )


STRONG = Augmentation(flip=0.5, randaugment=True, cutout=3)


@pytest.mark.parametrize(
    ("count", "size"), [(100, 16), (96, 16), (7, 16), (2500, 64), (20, 1), (5000, 3000)]
)
@pytest.mark.parametrize("augmentation", [Augmentation(), STRONG], ids=["plain", "strong"])
def test_epoch_covers_every_image_once(count, size, augmentation):
    batches = made_batches(count, size, augmentation)
    drawn = list(batches.epoch(1))
    assert len(drawn) == len(batches)
    for _, labels in drawn[:-1]:
        assert len(labels) == size
    order = torch.cat([labels for _, labels in drawn])
    assert torch.equal(order.sort().values, torch.arange(count))
    assert count < 20 or not torch.equal(order, torch.arange(count))
    assert all(x.shape == (len(labels), 3, 8, 8) for x, labels in drawn)
    if augmentation.is_identity:
        expected = batches.normalise(batches.images[order])
        assert torch.equal(torch.cat([x for x, _ in drawn]), expected)


@pytest.mark.parametrize("augmentation", [Augmentation(), STRONG], ids=["plain", "strong"])
@pytest.mark.parametrize("start", [1, 32, 33, 40])
def test_epoch_can_start_at_any_batch(augmentation, start):
    batches = made_batches(2500, 64, augmentation)
    list(batches.epoch(1))
    torch.rand(3)  # the global random state has no influence
    whole = list(batches.epoch(2))
    rest = list(made_batches(2500, 64, augmentation).epoch(2, start_batch=start))
    assert len(rest) == len(whole) - min(start, len(whole))
    for (x, labels), (expected, expected_labels) in zip(rest, whole[start:], strict=True):
        assert torch.equal(labels, expected_labels)
        assert torch.equal(x, expected)


def test_random_numbers_differ_between_epochs_seeds_and_chunks():
    def order(seed: int, epoch: int) -> list[int]:
        batches = made_batches(200, 50, Augmentation(), seed)
        return torch.cat([labels for _, labels in batches.epoch(epoch)]).tolist()

    orders = {tuple(order(seed, epoch)) for seed, epoch in ((0, 1), (0, 2), (1, 0), (1, 1))}
    assert len(orders) == 4
    equal_images = Batches(
        torch.full((2 * CHUNK, 1, 8, 8), 9, dtype=torch.uint8),
        torch.zeros(2 * CHUNK, dtype=torch.int64),
        Normalise([0.5], [0.25]),
        Augmentation(cutout=3),
        CHUNK,
        0,
        CPU,
    )
    (first, _), (second, _) = equal_images.epoch(0)
    (other_epoch, _), _ = equal_images.epoch(1)
    assert not torch.equal(first, second)  # they differ only in the cutout
    assert not torch.equal(first, other_epoch)


def test_batches_do_not_change_the_global_random_state():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(made_batches(50, 8, STRONG).epoch(0))
    split(50, 0.1, 0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("mean", "std"), [([0.15], [0.3]), ([0.4, 0.5, 0.6], [0.1, 0.2, 0.3])])
def test_normalise_subtracts_mean_and_divides_by_std(mean, std):
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    expected = (images / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    x = Normalise(mean, std)(images)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, expected, rtol=0, atol=2e-6)


def test_normalise_refuses_another_number_of_channels():
    with pytest.raises(UserError, match="3 values, but the images have 1 channels"):
        Normalise([0.5] * 3, [0.25] * 3)(torch.zeros(1, 1, 2, 2, dtype=torch.uint8))


def test_evaluation_batches_can_be_repeated():
    images, labels = resident(
        np.arange(30, dtype=np.uint8).reshape(10, 3, 1, 1), np.arange(10, dtype=np.int32), CPU
    )
    batches = EvaluationBatches(images, labels, Normalise([0.5], [0.25]), CPU, batch_size=4)
    for _ in range(2):
        drawn = list(batches)
        assert len(batches) == 3
        assert [len(target) for _, target in drawn] == [4, 4, 2]
        assert torch.equal(torch.cat([target for _, target in drawn]), torch.arange(10))
        assert torch.equal(torch.cat([x for x, _ in drawn]), Normalise([0.5], [0.25])(images))
    empty = EvaluationBatches(images[:0], labels[:0], Normalise([0.5], [0.25]), CPU)
    assert list(empty) == []


def test_resident_copies_its_arrays():
    images, labels = np.zeros((4, 1, 2, 2), np.uint8), np.zeros(4, np.int32)
    images.flags.writeable = False  # like a memory-mapped file
    copied, targets = resident(images, labels, CPU)
    assert (copied.dtype, targets.dtype) == (torch.uint8, torch.int64)
    copied += 1
    assert images.sum() == 0


def test_split_is_a_partition_that_depends_on_the_seed_only():
    train, validation = split(1000, 0.1, 3)
    assert (len(train), len(validation)) == (900, 100)
    assert torch.equal(torch.cat([train, validation]).sort().values, torch.arange(1000))
    torch.manual_seed(5)
    assert torch.equal(split(1000, 0.1, 3)[1], validation)
    assert not torch.equal(split(1000, 0.1, 4)[1], validation)
    assert [len(part) for part in split(1000, 0.0, 3)] == [1000, 0]
    with pytest.raises(UserError, match=r"validation_fraction=0\.001"):
        split(100, 0.001, 3)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.37])
@pytest.mark.parametrize("sizes", [(50, 30, 20), (1, 1, 98), (7, 0, 13, 1), (3,) * 40], ids=str)
def test_stratified_split_keeps_class_shares_to_within_one_sample(sizes, fraction):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    train, held_out = split(len(labels), fraction, 3, labels)
    assert len(held_out) == round(len(labels) * fraction)
    assert torch.equal(torch.cat([train, held_out]).sort().values, torch.arange(len(labels)))
    counts = np.bincount(labels[held_out.numpy()], minlength=len(sizes))
    assert np.abs(counts - np.array(sizes) * fraction).max() <= 1
    again, other = (split(len(labels), fraction, seed, labels)[0] for seed in (3, 4))
    assert torch.equal(again, train)
    assert not torch.equal(other, train)
    # the training part keeps the shuffled order, because `limit` takes its first samples
    order = torch.cat(split(len(labels), 0.0, 3)).tolist()
    positions = [order.index(sample) for sample in train]
    assert positions == sorted(positions)


@pytest.mark.parametrize("kind", ["images", "features"])
def test_net_that_changes_its_input_in_place_changes_no_later_batch(kind):
    """The evaluation after each epoch reads the same samples."""
    samples = torch.arange(7 * 4, dtype=torch.uint8).reshape(7, 1, 2, 2)
    if kind == "features":
        samples = samples.float()
    data = samples, torch.zeros(7), Normalise([0.5], [0.25])
    evaluated = EvaluationBatches(*data, CPU, batch_size=3)
    trained = Batches(*data, Augmentation(), 3, 0, CPU)
    for batches in (lambda: evaluated, lambda: trained.epoch(1)):
        first = [x.clone() for x, _ in batches()]
        for x, _ in batches():
            x.mul_(2)
        assert all(torch.equal(x, y) for (x, _), y in zip(batches(), first, strict=True))
