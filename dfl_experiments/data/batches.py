"""Make batches on the device from samples in memory. They depend on the seed, the epoch and the batch alone."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dfl_experiments.data.augmentation import Augmentation
from dfl_experiments.errors import UserError

CHUNK = 2048  # images that are augmented together
PLAIN_CHUNK = 512  # images that are normalised together, without augmentation
ROUNDING = 1e-12  # deviation of a constant feature, relative to its mean, at most
SHUFFLE, AUGMENT, SPLIT = range(3)  # purposes of a random stream


def random_stream(seed: int, *key: int) -> torch.Generator:
    """Return a CPU generator, independent of that of any other seed or key.

    key: the purpose, then for example the epoch and the chunk.
    """
    state = np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def split(n: int, fraction: float, seed: int, labels: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
    """Split the shuffled indices 0 … n-1 into those to train on and a `fraction` for validation.

    labels: (n,), of which each class keeps its share to within one sample; None: no heed is paid to classes.
    Raises `UserError` where a fraction above zero leaves one of the two parts empty.
    """
    order = torch.randperm(n, generator=random_stream(seed, SPLIT))
    held_out = round(n * fraction)
    if fraction > 0 and not 0 < held_out < n:
        raise UserError(f"validation_fraction={fraction}: holds out {held_out} of {n} samples; choose another value")
    strata = torch.zeros_like(order) if labels is None else torch.from_numpy(labels.astype(np.int64))
    is_held_out = stratified(strata[order], fraction)
    return order[~is_held_out], order[is_held_out]


def stratified(labels: Tensor, fraction: float) -> Tensor:
    """Return (n,): whether a sample is among the first of its class, of which each has its `fraction`.

    Shares are rounded down, and the rest of n · fraction goes to the classes with the largest remainders.
    """
    shares = labels.bincount().double() * fraction
    quotas = shares.long()
    rest = round(len(labels) * fraction) - int(quotas.sum())
    quotas[(shares - quotas).argsort(descending=True, stable=True)[:rest]] += 1
    is_chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label, quota in enumerate(quotas.tolist()):
        is_chosen[(labels == label).nonzero()[:quota]] = True
    return is_chosen


def resident(images: np.ndarray, labels: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return copies, the labels as int64 (N,), on the device.

    They stay on the CPU where the images need more than half of a GPU's free memory.
    """
    # `np.require` copies a mapped file, and no array that is in memory already
    image_copies = torch.from_numpy(np.require(images, requirements=["C", "W"]))
    label_copies = torch.from_numpy(labels.astype(np.int64))
    if device.type == "cuda" and images.nbytes > torch.cuda.mem_get_info(device)[0] // 2:
        return image_copies, label_copies
    return image_copies.to(device), label_copies.to(device)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on the device, without waiting for a GPU."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Normalise:
    """The map (x / 255 - mean) / std, as one multiplication and one addition.

    mean, std: one value for all channels, or one for each.
    """

    def __init__(self, mean: list[float], std: list[float]) -> None:
        shape = () if len(mean) == 1 else (-1, 1, 1)
        means = torch.tensor(mean, dtype=torch.float64).reshape(shape)
        deviations = torch.tensor(std, dtype=torch.float64).reshape(shape)
        self.scale = (1 / (255 * deviations)).float()
        self.shift = (-means / deviations).float()

    def __call__(self, images: Tensor) -> Tensor:
        """Return normalised images, float32; features and tokens as they are.

        images: (N, C, H, W) uint8. Features and tokens are prepared before training, by `preparation`.
        Raises `UserError` where `mean` and `std` have another number of values than the images have channels.
        """
        if images.dtype != torch.uint8:
            return images
        if self.scale.ndim and len(self.scale) != images.shape[1]:
            channels = images.shape[1]
            values = len(self.scale)
            raise UserError(f"dataset.mean, dataset.std: {values} values, but the images have {channels} channels")
        if self.scale.ndim and self.scale.device != images.device:
            self.scale = moved(self.scale, images.device)
            self.shift = moved(self.shift, images.device)
        return images.float().mul_(self.scale).add_(self.shift)


def preparation(training: np.ndarray, standardise: bool) -> Callable[[np.ndarray], np.ndarray]:
    """Return what makes of samples in memory those to train on: images as they are, tokens int64, features float32.

    training: the samples to train on.
    standardise: features become (x - mean) / std, by their mean and deviation in `training`; a constant one becomes 0.
        A feature is a place of (N, D), a channel of (N, T, C) or (N, C, …).
    """
    if training.dtype.kind != "f":
        return partial(np.asarray, dtype=np.uint8 if training.dtype == np.uint8 else np.int64)
    if not standardise:
        return partial(np.asarray, dtype=np.float32)
    feature_axis = 2 if training.ndim == 3 else 1
    axes = tuple(axis for axis in range(training.ndim) if axis != feature_axis)
    mean = training.mean(axes, np.float64, keepdims=True)
    std = training.std(axes, np.float64, keepdims=True)
    std[std <= ROUNDING * np.abs(mean)] = 1.0
    return lambda samples: ((samples - mean) / std).astype(np.float32)


class Batches:
    """The batches of a training set, shuffled and augmented anew in every epoch.

    images: the samples, on the device or on the CPU; images are (N, C, H, W) uint8.
    labels: (N,) int64, beside the images.
    device: of the batches.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        normalise: Normalise,
        augmentation: Augmentation,
        batch_size: int,
        seed: int,
        device: torch.device,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.images, self.labels = images, labels
        self.normalise, self.augmentation = normalise, augmentation
        self.batch_size, self.seed = batch_size, seed
        self.device, self.memory_format = device, memory_format
        size = PLAIN_CHUNK if augmentation.is_identity else CHUNK
        self.per_chunk = max(1, size // batch_size)

    def __len__(self) -> int:
        """Return the number of batches per epoch; the last one may be smaller."""
        return -(-len(self.labels) // self.batch_size)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield an epoch's batches (images, labels) from `start_batch` on; they do not depend on earlier draws."""
        order = torch.randperm(len(self.labels), generator=random_stream(self.seed, SHUFFLE, epoch))
        chunks = moved(order, self.images.device).split(self.per_chunk * self.batch_size)
        first, skipped = divmod(start_batch, self.per_chunk)
        for chunk in range(first, len(chunks)):
            indices = chunks[chunk]
            images = moved(self.images[indices], self.device)
            labels = moved(self.labels[indices], self.device)
            generator = random_stream(self.seed, AUGMENT, epoch, chunk)
            x = self.augmentation(images, self.normalise, generator)
            x = x.to(memory_format=self.memory_format)
            batches = zip(x.split(self.batch_size), labels.split(self.batch_size), strict=True)
            yield from list(batches)[skipped if chunk == first else 0 :]


class EvaluationBatches:
    """The batches of a set in its own order, normalised, on the device. It can be iterated more than once."""

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        normalise: Normalise,
        device: torch.device,
        batch_size: int = 1000,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.images, self.labels, self.normalise = images, labels, normalise
        self.batch_size, self.device = batch_size, device
        self.memory_format = memory_format

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images, labels) on the device."""
        for start in range(0, len(self.labels), self.batch_size):
            part = slice(start, start + self.batch_size)
            images = self.normalise(moved(self.images[part], self.device))
            yield images.to(memory_format=self.memory_format), moved(self.labels[part], self.device)
