"""From images in memory to batches on the device: a function of the seed, the epoch and the place in it alone."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dfl_experiments.data.augmentation import Augmentation
from dfl_experiments.errors import UserError

CHUNK = 2048  # images that are augmented at once
PLAIN_CHUNK = 512  # and that are only normalised
SHUFFLE, AUGMENT, SPLIT = range(3)  # what a random stream is for


def random_stream(seed: int, *place: int) -> torch.Generator:
    """A CPU generator for one purpose and place of a run, unrelated to that of any other seed, purpose or place."""
    state = np.random.SeedSequence(seed, spawn_key=place).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def split(n: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Shuffled indices of 0 .. n-1: those to train on, and `fraction` of them held out for validation.

    Raises `UserError` where a fraction above zero leaves one of the two without any.
    """
    order = torch.randperm(n, generator=random_stream(seed, SPLIT))
    held_out = round(n * fraction)
    if fraction > 0 and not 0 < held_out < n:
        raise UserError(f"validation_fraction={fraction}: holds out {held_out} of {n} images; choose another")
    return order[held_out:], order[:held_out]


def resident(images: np.ndarray, labels: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Copies as uint8 (N, C, H, W) and int64 (N,), on the device; on the CPU if half a GPU's free memory is less."""
    # a mapped file is copied, what was picked from one is in memory already
    copies = torch.from_numpy(np.require(images, requirements=["C", "W"])), torch.from_numpy(labels.astype(np.int64))
    if device.type == "cuda" and images.nbytes > torch.cuda.mem_get_info(device)[0] // 2:
        return copies
    return copies[0].to(device), copies[1].to(device)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, without waiting for a GPU."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Normalise:
    """(x / 255 - mean) / std as one multiplication and one addition; one value serves all channels."""

    def __init__(self, mean: list[float], std: list[float]) -> None:
        """mean, std: a value for all channels, or one for each."""
        shape = () if len(mean) == 1 else (-1, 1, 1)
        means, deviations = (torch.tensor(values, dtype=torch.float64).reshape(shape) for values in (mean, std))
        self.scale = (1 / (255 * deviations)).float()
        self.shift = (-means / deviations).float()

    def __call__(self, images: Tensor) -> Tensor:
        """images: (N, C, H, W) uint8 -> float32. Raises `UserError` where the number of channels does not fit."""
        if self.scale.ndim and len(self.scale) != images.shape[1]:
            channels = images.shape[1]
            raise UserError(f"dataset.mean, dataset.std: {len(self.scale)} values, the images {channels} channels")
        if self.scale.ndim and self.scale.device != images.device:
            self.scale, self.shift = moved(self.scale, images.device), moved(self.shift, images.device)
        return images.float().mul_(self.scale).add_(self.shift)


class Batches:
    """A training set's batches, shuffled and augmented anew in every epoch."""

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
        """images: (N, C, H, W) uint8, labels: (N,) int64, on the device or on the CPU."""
        self.images, self.labels = images, labels
        self.normalise, self.augmentation = normalise, augmentation
        self.batch_size, self.seed = batch_size, seed
        self.device, self.memory_format = device, memory_format
        size = PLAIN_CHUNK if augmentation.is_identity else CHUNK
        self.per_chunk = max(1, size // batch_size)

    def __len__(self) -> int:
        """Batches per epoch; the last one may be smaller."""
        return -(-len(self.labels) // self.batch_size)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """An epoch's (images, labels) from a batch on: the same ones whether or not what comes before was drawn."""
        order = torch.randperm(len(self.labels), generator=random_stream(self.seed, SHUFFLE, epoch))
        chunks = moved(order, self.images.device).split(self.per_chunk * self.batch_size)
        first, skipped = divmod(start_batch, self.per_chunk)
        for chunk in range(first, len(chunks)):
            images = moved(self.images[chunks[chunk]], self.device)
            labels = moved(self.labels[chunks[chunk]], self.device)
            generator = random_stream(self.seed, AUGMENT, epoch, chunk)
            x = self.augmentation(images, self.normalise, generator)
            x = x.to(memory_format=self.memory_format)
            batches = zip(x.split(self.batch_size), labels.split(self.batch_size), strict=True)
            yield from list(batches)[skipped if chunk == first else 0 :]


class EvaluationBatches:
    """A set's batches in its own order, normalised, on the device; can be gone through again and again."""

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
        """Batches of one pass."""
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images, labels) on the device."""
        for start in range(0, len(self.labels), self.batch_size):
            part = slice(start, start + self.batch_size)
            images = self.normalise(moved(self.images[part], self.device))
            yield images.to(memory_format=self.memory_format), moved(self.labels[part], self.device)
