"""The raw form of each data set: what all sources promise, and those that libraries already read."""

import contextlib
import hashlib
import io
import pickle
import socket
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from dfl_experiments.errors import UserError

SILENCE = 20.0  # seconds without an answer after which a download is given up


@dataclass(frozen=True)
class Arrays:
    """A data set in memory, or mapped into it.

    images: (N, C, H, W) uint8. labels: (N,) integers that index `classes`.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: list[str]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.classes)


class Source(ABC):
    """Where a data set comes from, before it is packed into arrays."""

    @abstractmethod
    def read(self, data_dir: Path, download: bool) -> Arrays:
        """The data set from its raw form in `data_dir`, fetched first if it is not there and `download` is set.

        Raises `UserError` for a mistake in the files that it can name, and OSError, RuntimeError or ValueError where
        they are absent, cannot be fetched or are damaged.
        """

    @abstractmethod
    def locations(self, data_dir: Path) -> list[Path]:
        """Where the raw form is looked for; any one of them is enough."""

    def cache_name(self, name: str) -> str | None:
        """The folder of `data_dir` that holds the packed arrays, or None where packing is not worth it."""
        return name


def expanded(path: str | Path, key: str) -> Path:
    """A path with `~` replaced by the home. Raises `UserError` where there is no such home."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{key}={path}: there is no such home") from error


def official(path: Path, md5: str) -> bytes:
    """A published file's content. Raises `UserError` where it is not what was published, OSError where it is absent."""
    content = path.read_bytes()
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise UserError(f"{path}: damaged or altered, it is not the published file; delete it to have it fetched again")
    return content


@contextlib.contextmanager
def quiet_download() -> Iterator[None]:
    """Give up on a silent network, and keep progress bars to terminals."""
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


class Digits(Source):
    """8x8 handwritten digits, bundled: 1,437 to train on and 360 to test, stratified by class.

    The test part of *Optical Recognition of Handwritten Digits* (Alpaydin and Kaynak, UCI, 1998, CC BY 4.0), as
    scikit-learn has it; the 17 grey levels are spread over 0..255.
    """

    FILE = Path(__file__).with_name("digits.npz")

    def read(self, data_dir: Path, download: bool) -> Arrays:
        """A split that is always the same."""
        with np.load(self.FILE) as parts:
            return Arrays(**parts, classes=[str(digit) for digit in range(10)])

    def locations(self, data_dir: Path) -> list[Path]:
        """Nowhere in `data_dir`: it is part of this package."""
        return []

    def cache_name(self, name: str) -> str | None:
        """Never packed."""
        return None


class Mnist(Source):
    """MNIST in the four files of its authors, as torchvision unpacks them."""

    # torchvision knows the checksums of the packed files only
    FILES: ClassVar = {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    }

    def read(self, data_dir: Path, download: bool) -> Arrays:
        """60,000 and 10,000 images of 1x28x28. Raises `UserError` for a file that is not the published one."""
        from torchvision.datasets import MNIST

        (raw,) = self.locations(data_dir)
        if download and not all((raw / name).exists() for name in self.FILES):
            with quiet_download():
                MNIST(data_dir, download=True)
        contents = [np.frombuffer(official(raw / name, md5), np.uint8) for name, md5 in self.FILES.items()]
        # after a header of 16 bytes, or of 8
        images = [content[16:].reshape(-1, 1, 28, 28) for content in contents[::2]]
        labels = [content[8:].astype(np.int64) for content in contents[1::2]]
        return Arrays(images[0], labels[0], images[1], labels[1], [str(digit) for digit in range(10)])

    def locations(self, data_dir: Path) -> list[Path]:
        """torchvision's folder."""
        return [data_dir / "MNIST" / "raw"]


class Cifar(Source):
    """CIFAR-10 or CIFAR-100 (fine labels) in the pickled batches of their authors, as torchvision keeps them."""

    def __init__(self, classes: Literal[10, 100]) -> None:
        self.classes = classes

    def read(self, data_dir: Path, download: bool) -> Arrays:
        """50,000 and 10,000 images of 3x32x32. Raises `UserError` for a file that is not the published one."""
        from torchvision.datasets import CIFAR10, CIFAR100
        from torchvision.datasets.utils import check_integrity, download_and_extract_archive

        published = {10: CIFAR10, 100: CIFAR100}[self.classes]
        splits, meta = (published.train_list, published.test_list), published.meta
        folder = data_dir / published.base_folder
        files = {name: md5 for split in splits for name, md5 in split} | {meta["filename"]: meta["md5"]}
        damaged = [name for name, md5 in files.items() if not check_integrity(folder / name, md5)]
        if download and damaged:
            try:
                with quiet_download():
                    download_and_extract_archive(published.url, data_dir, None, published.filename, published.tgz_md5)
            except (OSError, RuntimeError):
                for name in damaged:
                    if (folder / name).exists():
                        official(folder / name, files[name])
                raise
        batches = {name: pickle.loads(official(folder / name, md5), encoding="latin1") for name, md5 in files.items()}
        key = {10: "labels", 100: "fine_labels"}[self.classes]
        train, test = ([batches[name] for name, _ in split] for split in splits)
        images = [np.concatenate([batch["data"] for batch in split]).reshape(-1, 3, 32, 32) for split in (train, test)]
        labels = [np.concatenate([batch[key] for batch in split]).astype(np.int64) for split in (train, test)]
        return Arrays(images[0], labels[0], images[1], labels[1], batches[meta["filename"]][meta["key"]])

    def locations(self, data_dir: Path) -> list[Path]:
        """torchvision's folder, or the archive that it unpacks."""
        names = {
            10: ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
            100: ("cifar-100-python", "cifar-100-python.tar.gz"),
        }
        return [data_dir / name for name in names[self.classes]]
