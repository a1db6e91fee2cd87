"""Make batches on the device from samples in memory. Random draws depend only on the seed, epoch and batch."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dfl_experiments.data.augmentation import Augmentation
from dfl_experiments.errors import UserError

log = logging.getLogger(__name__)

CHUNK = 2048  # number of images that are augmented together
PLAIN_CHUNK = 512  # number of images that are normalised together, without augmentation
# a feature is constant if its standard deviation is at most this fraction of its mean
ROUNDING = 1e-12
SHUFFLE, AUGMENT, SPLIT = range(3)  # purposes of a random stream


def random_stream(seed: int, *key: int) -> torch.Generator:
    """Return a generator on the CPU. Generators with different seeds or keys are independent.

    key: purpose of the generator, then for example the epoch and the chunk.
    """
    sequence = np.random.SeedSequence(seed, spawn_key=key)
    (state,) = sequence.generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state))


def split(
    n: int, fraction: float, seed: int, labels: np.ndarray | None = None
) -> tuple[Tensor, Tensor]:
    """Shuffle the indices 0 … n-1, and split them into training indices and validation indices.

    fraction: share of validation indices.
    labels: class of each sample, (n,). Every class is split by the same fraction. None: ignore the classes.
    Raises `UserError` if a fraction above zero leaves one of the two parts empty.
    """
    order = torch.randperm(n, generator=random_stream(seed, SPLIT))
    held_out = round(n * fraction)
    if fraction > 0 and not 0 < held_out < n:
        raise UserError(
            f"validation_fraction={fraction}: selects {held_out} of {n} samples; choose another value"
        )
    strata = torch.zeros_like(order)
    if labels is not None:
        strata = torch.from_numpy(labels.astype(np.int64))
    is_held_out = stratified(strata[order], fraction)
    return order[~is_held_out], order[is_held_out]


def stratified(labels: Tensor, fraction: float) -> Tensor:
    """Return a mask that selects the same fraction of each class. labels: (n,). The mask has shape (n,).

    In each class the first samples are selected, and their number is rounded down. Then one more sample is selected in
    the classes with the largest remainders, until n · fraction samples are selected in all.
    """
    shares = labels.bincount().double() * fraction
    quotas = shares.long()
    total = round(len(labels) * fraction)
    rest = total - int(quotas.sum())
    remainders = shares - quotas
    largest_first = remainders.argsort(descending=True, stable=True)
    quotas[largest_first[:rest]] += 1
    is_chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label, quota in enumerate(quotas.tolist()):
        members = (labels == label).nonzero()
        is_chosen[members[:quota]] = True
    return is_chosen


def resident(images: np.ndarray, labels: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return images and labels as tensors on the device. The labels are int64.

    Images and labels stay on the CPU if the images need more than half of the GPU's free memory.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if images.nbytes > free // 2:
            device = torch.device("cpu")
    # `np.require` copies a memory-mapped file, because it is read-only; it does not copy a writable array in memory
    writable = np.require(images, requirements=["C", "W"])
    image_tensor = torch.from_numpy(writable)
    label_tensor = torch.from_numpy(labels.astype(np.int64))
    return image_tensor.to(device), label_tensor.to(device)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on the device. The CPU does not wait for the copy to a GPU."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Normalise:
    """The map (x / 255 - mean) / std, as one multiplication and one addition.

    mean, std: one value for all channels, or one value for each channel.
    """

    def __init__(self, mean: list[float], std: list[float]) -> None:
        means = torch.tensor(mean, dtype=torch.float64)
        deviations = torch.tensor(std, dtype=torch.float64)
        scale = 1 / (255 * deviations)
        shift = -means / deviations
        shape = () if len(mean) == 1 else (-1, 1, 1)
        self.scale = scale.float().reshape(shape)
        self.shift = shift.float().reshape(shape)

    def __call__(self, images: Tensor) -> Tensor:
        """Return normalised images, float32, or a copy of features or tokens: a net may change its input in place.

        images: (N, C, H, W) uint8.
        Raises `UserError` if the number of values in `mean` and `std` is neither 1 nor the number of channels.
        """
        if images.dtype != torch.uint8:
            return images.clone()
        values = self.scale.numel()
        channels = images.shape[1]
        if values not in (1, channels):
            problem = f"{values} values, but the images have {channels} channels"
            raise UserError(f"dataset.mean, dataset.std: {problem}")
        if self.scale.ndim and self.scale.device != images.device:
            self.scale = moved(self.scale, images.device)
            self.shift = moved(self.shift, images.device)
        x = images.float()
        return x.mul_(self.scale).add_(self.shift)


@dataclass(frozen=True)
class Standardise:
    """The map (x - mean) / std of features.

    mean, std: float64 arrays with one value for each feature. All other axes have length 1.
    """

    mean: np.ndarray
    std: np.ndarray

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """Return standardised features in float32."""
        standardised = (samples - self.mean) / self.std
        return standardised.astype(np.float32)


def pooled_axes(samples: np.ndarray) -> tuple[int, ...]:
    """Return all axes except the axis of the features, see `preparation`."""
    feature_axis = 2 if samples.ndim == 3 else 1
    return tuple(axis for axis in range(samples.ndim) if axis != feature_axis)


def count_new_variation(training: np.ndarray, test: np.ndarray) -> int:
    """Return the number of features with one value in all training samples and another value in a test sample."""
    axes = pooled_axes(training)
    is_constant = training.min(axes) == training.max(axes)
    # compared in float32, because the two arrays may have different types
    value = training.min(axes).astype(np.float32)
    lowest = test.min(axes).astype(np.float32)
    highest = test.max(axes).astype(np.float32)
    differs = (lowest != value) | (highest != value)
    is_new = is_constant & differs
    return int(is_new.sum())


def preparation(training: np.ndarray, standardise: bool) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that converts samples before training: tokens to int64, features to float32, images unchanged.

    training: the training samples. The mean and std of each feature are computed from them.
    standardise: whether to convert each feature to (x - mean) / std. A constant feature becomes 0. The features are the
        columns of an array (N, D), or the channels C of an array (N, T, C) or (N, C, …).
    """
    if training.dtype == np.uint8:
        return partial(np.asarray, dtype=np.uint8)
    if training.dtype.kind != "f":
        return partial(np.asarray, dtype=np.int64)
    if not standardise:
        return partial(np.asarray, dtype=np.float32)
    axes = pooled_axes(training)
    if training.ndim == 3:
        log.info(
            "features of shape %s: each of the %d entries of the last axis is standardised",
            training.shape[1:],
            training.shape[2],
        )
    mean = training.mean(axes, np.float64, keepdims=True)
    std = training.std(axes, np.float64, keepdims=True)
    is_constant = std <= ROUNDING * np.abs(mean)
    std[is_constant] = 1.0
    return Standardise(mean, std)


@dataclass(eq=False)
class Batches:
    """Batches of a training set. In every epoch, the samples are shuffled and augmented again."""

    images: Tensor
    """The samples, on the GPU or on the CPU. If they are images, the shape is (N, C, H, W) and the type uint8."""
    labels: Tensor
    """Labels (N,) int64, on the same device as `images`."""
    normalise: Normalise
    augmentation: Augmentation
    batch_size: int
    seed: int
    device: torch.device
    """Device of the batches."""
    memory_format: torch.memory_format = torch.contiguous_format

    @property
    def per_chunk(self) -> int:
        """Number of batches that are augmented together."""
        size = PLAIN_CHUNK if self.augmentation.is_identity else CHUNK
        return max(1, size // self.batch_size)

    def __len__(self) -> int:
        """Return the number of batches per epoch. The last batch may be smaller."""
        return -(-len(self.labels) // self.batch_size)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches (images, labels) of an epoch, beginning with batch number `start_batch`."""
        size = self.batch_size
        stream = random_stream(self.seed, SHUFFLE, epoch)
        order = torch.randperm(len(self.labels), generator=stream)
        order = moved(order, self.images.device)
        chunks = order.split(self.per_chunk * size)
        first, skipped = divmod(start_batch, self.per_chunk)
        for chunk, indices in enumerate(chunks[first:], start=first):
            stream = random_stream(self.seed, AUGMENT, epoch, chunk)
            x, labels = self._augmented(indices, stream)
            batches = list(zip(x.split(size), labels.split(size), strict=True))
            yield from batches[skipped:]
            skipped = 0

    def _augmented(self, indices: Tensor, stream: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return some samples, augmented and on the device, and their labels. stream: for the random decisions."""
        images = moved(self.images[indices], self.device)
        labels = moved(self.labels[indices], self.device)
        x = self.augmentation(images, self.normalise, stream)
        x = x.to(memory_format=self.memory_format)
        return x, labels


@dataclass(eq=False)
class EvaluationBatches:
    """Normalised batches of a data set on the device, without shuffling. Every iteration gives the same batches."""

    images: Tensor
    labels: Tensor
    normalise: Normalise
    device: torch.device
    batch_size: int = 1000
    memory_format: torch.memory_format = torch.contiguous_format

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images, labels) on the device."""
        for start in range(0, len(self.labels), self.batch_size):
            part = slice(start, start + self.batch_size)
            images = moved(self.images[part], self.device)
            labels = moved(self.labels[part], self.device)
            x = self.normalise(images)
            x = x.to(memory_format=self.memory_format)
            yield x, labels
