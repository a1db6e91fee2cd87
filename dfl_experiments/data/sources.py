"""Base class of the sources of data sets, and the sources that torchvision downloads."""

import contextlib
import gzip
import hashlib
import io
import os
import socket
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from dfl_experiments.errors import UserError
from dfl_experiments.ranges import SampleKind

SILENCE = 20.0  # a download fails after this number of seconds without an answer
DIGITS = "0123456789"


def kind_of(samples: np.ndarray) -> SampleKind | None:
    """Return the kind of samples. Return None for an array of any other kind."""
    code, axes = samples.dtype.str[1:], samples.ndim
    if code == "u1" and axes == 4:
        return "images"
    if code in ("f4", "f8") and axes > 1:
        return "features"
    return "tokens" if code in ("i4", "i8") and axes == 2 else None


@dataclass(frozen=True)
class Arrays:
    """A data set in memory, or in memory-mapped files."""

    train_images: np.ndarray
    """Images (N, C, H, W) uint8, features (N, …) float32 or float64, or tokens (N, T) int32 or int64."""
    train_labels: np.ndarray
    """Integers (N,). Each is an index of `classes`."""
    test_images: np.ndarray
    """Test samples, as `train_images`."""
    test_labels: np.ndarray
    """Test labels, as `train_labels`."""
    classes: list[str]
    """Names of the K classes, in the order of the labels."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of one sample, (C, H, W) for images."""
        return self.train_images.shape[1:]

    @property
    def num_classes(self) -> int:
        """Return K, the number of classes."""
        return len(self.classes)


class Source(ABC):
    """A data set in its raw form, before it is packed into arrays."""

    PARTS: ClassVar = ("train_images", "train_labels", "test_images", "test_labels", "classes")
    """Names of the fields of `Arrays` in messages about a data set that is not packed."""

    @abstractmethod
    def read(self, data_dir: Path, download: bool) -> Arrays:
        """Return the data set, read from its raw form in `data_dir`.

        download: download the raw form first if it is absent.
        Raises `UserError` for a mistake in the files. Raises OSError, RuntimeError or ValueError if files are absent or
        damaged, or cannot be downloaded.
        """

    def locations(self, data_dir: Path) -> list[Path]:
        """Return the paths where the raw form may be. It is enough if one of the paths exists."""
        return []

    def cache_name(self, name: str) -> str | None:
        """Return the folder in `data_dir` for the packed arrays; None if every run reads the raw form.

        A pack is not made again. So the name must change if an option or the code changes the arrays. A source that is
        packed needs `locations` too.
        """
        return None


class Published(Source):
    """A published data set. It is packed under its own name, because its content never changes."""

    def cache_name(self, name: str) -> str | None:
        """Return the name of the data set."""
        return name


def absolute(path: str) -> Path:
    """Return the absolute path without links. `~` at its start is the user's home."""
    expanded = Path(path).expanduser()
    # unlike `Path.resolve`, realpath raises no error for a loop of links
    return Path(os.path.realpath(expanded))


def read_published(path: Path, md5: str) -> bytes:
    """Return the content of a published file.

    md5: published MD5. Raises `UserError` if the content has another MD5, and OSError if the file is absent.
    """
    content = path.read_bytes()
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise UserError(
            f"{path}: damaged or altered, its MD5 is wrong; delete it, then it is downloaded again"
        )
    return content


@contextlib.contextmanager
def quiet_download() -> Iterator[None]:
    """Make downloads in this block fail after `SILENCE` seconds without an answer. Show progress only in a terminal."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            if not sys.stderr.isatty():
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            yield
    finally:
        socket.setdefaulttimeout(before)


def fetch(url: str, path: Path, md5: str) -> None:
    """Download a published file to a temporary name, then rename it. Raises OSError or RuntimeError."""
    from torchvision.datasets.utils import download_url

    part = path.with_name(f"{path.name}.part")
    with quiet_download():
        download_url(url, path.parent, part.name, md5)
    part.rename(path)


class Digits(Source):
    """Handwritten digits that are part of this package: 1,437 training and 360 test images, stratified by class.

    An image has shape (1, 8, 8).
    Source: the test part of *Optical Recognition of Handwritten Digits* (Alpaydin and Kaynak, UCI, 1998, CC BY 4.0), as
    in scikit-learn. Its 17 grey levels are scaled to 0 … 255.
    """

    FILE = Path(__file__).with_name("digits.npz")

    def read(self, data_dir: Path, download: bool) -> Arrays:
        """Return the digits. The split into training and test images is fixed."""
        with np.load(self.FILE) as parts:
            return Arrays(**parts, classes=list(DIGITS))


class Mnist(Published):
    """MNIST in the four files of its authors, as unpacked by torchvision."""

    # MD5 of the unpacked files. torchvision only has the MD5 of the compressed files.
    FILES: ClassVar = {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    }

    def read(self, data_dir: Path, download: bool) -> Arrays:
        """Return 60,000 training and 10,000 test images, 1x28x28.

        Raises `UserError` for a file that differs from the published one.
        """
        from torchvision.datasets import MNIST

        (raw,) = self.locations(data_dir)
        is_complete = all((raw / name).exists() for name in self.FILES)
        if download and not is_complete:
            with quiet_download():
                MNIST(data_dir, download=True)
        files = [read_published(raw / name, md5) for name, md5 in self.FILES.items()]
        return read_idx_files(files, list(DIGITS))

    def locations(self, data_dir: Path) -> list[Path]:
        """Return torchvision's folder."""
        return [data_dir / "MNIST" / "raw"]


class FashionMnist(Published):
    """Fashion-MNIST in the four compressed files of its authors. The files' checksums come from torchvision."""

    def read(self, data_dir: Path, download: bool) -> Arrays:
        """Return 60,000 training and 10,000 test images, as `Mnist` does."""
        from torchvision.datasets import FashionMNIST

        (raw,) = self.locations(data_dir)
        files = []
        for name, md5 in FashionMNIST.resources:
            if download and not (raw / name).exists():
                fetch(f"{FashionMNIST.mirrors[0]}{name}", raw / name, md5)
            files.append(gzip.decompress(read_published(raw / name, md5)))
        return read_idx_files(files, FashionMNIST.classes)

    def locations(self, data_dir: Path) -> list[Path]:
        """Return torchvision's folder."""
        return [data_dir / "FashionMNIST" / "raw"]


def read_idx_files(files: list[bytes], classes: list[str]) -> Arrays:
    """Return the images and labels in MNIST's files. An image has shape (1, 28, 28).

    files: contents of the training images, training labels, test images and test labels.
    """
    arrays: dict[str, Any] = {}
    for part, (images, labels) in (("train", files[:2]), ("test", files[2:])):
        # the header has 16 bytes in a file of images, and 8 bytes in a file of labels
        pixels = np.frombuffer(images, np.uint8, offset=16)
        arrays[f"{part}_images"] = pixels.reshape(-1, 1, 28, 28)
        arrays[f"{part}_labels"] = np.frombuffer(labels, np.uint8, offset=8).astype(np.int64)
    return Arrays(**arrays, classes=classes)


class Cifar(Published):
    """CIFAR-10 or CIFAR-100 (fine labels) as stored by torchvision."""

    def __init__(self, classes: Literal[10, 100]) -> None:
        self.classes = classes

    def read(self, data_dir: Path, download: bool) -> Arrays:
        """Return 50,000 training and 10,000 test images, 3x32x32.

        torchvision checks the MD5 of every file. Raises RuntimeError if a file is absent or damaged.
        """
        from torchvision.datasets import CIFAR10, CIFAR100

        published = {10: CIFAR10, 100: CIFAR100}[self.classes]
        arrays: dict[str, Any] = {}
        for part in ("train", "test"):
            with quiet_download():
                split = published(data_dir, train=part == "train", download=download)
            arrays[f"{part}_images"] = split.data.transpose(0, 3, 1, 2)
            arrays[f"{part}_labels"] = np.array(split.targets, np.int64)
        return Arrays(**arrays, classes=split.classes)

    def locations(self, data_dir: Path) -> list[Path]:
        """Return the folder that torchvision unpacks, and the archive that torchvision downloads."""
        unpacked = {10: "cifar-10-batches-py", 100: "cifar-100-python"}[self.classes]
        archive = f"cifar-{self.classes}-python.tar.gz"
        return [data_dir / unpacked, data_dir / archive]
