"""Small data sets on disk in the formats of the real ones, and processes that are killed at a chosen moment."""

import hashlib
import itertools
import os
import pickle
import signal
import stat
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10

from dfl_experiments.data.packs import load_pack
from dfl_experiments.data.sources import Arrays, Published, Source
from dfl_experiments.data.sources_folders import TinyImageNet
from dfl_experiments.errors import UserError


class Made(Published):
    """Given arrays. By default four training and two test images, grey, 2x2, of two classes."""

    def __init__(self, **parts) -> None:
        defaults = {
            "train_images": np.arange(16, dtype=np.uint8).reshape(4, 1, 2, 2),
            "train_labels": np.array([0, 1, 0, 1]),
            "test_images": np.arange(8, dtype=np.uint8).reshape(2, 1, 2, 2),
            "test_labels": np.array([0, 1]),
            "classes": ["a", "b"],
        }
        self.arrays = Arrays(**defaults | parts)

    def read(self, data_dir, download):
        return self.arrays

    def locations(self, data_dir):
        return [data_dir / "raw"]


def equal(first: Arrays, second: Arrays) -> bool:
    """Return whether two data sets have equal arrays."""
    pairs = zip(vars(first).values(), vars(second).values(), strict=True)
    return all(np.array_equal(part, other) for part, other in pairs)


def write_image(
    path: Path, seed: int, size: tuple[int, int] = (8, 8), mode: str = "RGB", **options
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)


def write_folder(root: Path) -> Path:
    """Write two classes with three training images, one of them in a subfolder, and one test image each."""
    for label, name in enumerate(("cats", "dogs")):
        for index in range(3):
            inner = "deeper" if index == 2 else ""
            write_image(root / "train" / name / inner / f"{index}.png", 10 * label + index)
        write_image(root / "test" / name / "a.png", 10 * label + 9)
    (root / "train" / "cats" / "notes.txt").write_text("no image")
    return root


def write_tiny(data_dir: Path) -> Path:
    """Write the layout of TinyImageNet with two classes of 64x64 images, some of them grey."""
    root = data_dir / TinyImageNet.NAME
    rows = []
    for label, wnid in enumerate(("n02", "n01")):
        names = [f"{wnid}_{index}.JPEG" for index in range(4)]
        for index, name in enumerate(names):
            mode = "L" if index == 1 else "RGB"
            write_image(
                root / "train" / wnid / "images" / name,
                10 * label + index,
                (64, 64),
                mode,
                format="JPEG",
            )
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text(
            "".join(f"{name}\t0\t0\t63\t63\n" for name in names)
        )
        for index in range(2):
            name = f"val_{2 * label + index}.JPEG"
            write_image(
                root / "val" / "images" / name, 10 * label + 5 + index, (64, 64), format="JPEG"
            )
            rows.append(f"{name}\t{wnid}\t0\t0\t63\t63")
    (root / "val" / "val_annotations.txt").write_text("\n".join(reversed(rows)) + "\n")
    (root / "wnids.txt").write_text("n02\nn01\n")
    (root / "words.txt").write_text("n01\tcat, feline\nn02\tdog\nn03\tnothing\n")
    return data_dir


def write_mnist(data_dir: Path, train: int = 12) -> dict[str, str]:
    """Write MNIST's idx files with `train` training and 5 test images. Return their checksums by name."""
    random = np.random.default_rng(0)
    raw = data_dir / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, count in (("train", train), ("t10k", 5)):
        images = random.integers(0, 256, (count, 28, 28), np.uint8)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(
            struct.pack(">4i", 0x803, count, 28, 28) + images.tobytes()
        )
        labels = random.integers(0, 10, count).astype(np.uint8)
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2i", 0x801, count) + labels.tobytes()
        )
    names = (
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    )
    return {name: md5(raw / name) for name in names}


def write_cifar(data_dir: Path, published: type[CIFAR10], patch: pytest.MonkeyPatch) -> Path:
    """Write CIFAR's files with 20 images each, register their checksums as the published ones, return their folder."""
    folder = data_dir / published.base_folder
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    labels = "labels" if published is CIFAR10 else "fine_labels"
    for which in ("train_list", "test_list"):
        names = [name for name, _ in getattr(published, which)]
        for name in names:
            batch = {
                "data": random.integers(0, 256, (20, 3072), np.uint8),
                labels: random.integers(0, 10, 20).tolist(),
            }
            (folder / name).write_bytes(pickle.dumps(batch))
        patch.setattr(published, which, [[name, md5(folder / name)] for name in names])
    meta = folder / published.meta["filename"]
    meta.write_bytes(
        pickle.dumps({published.meta["key"]: [f"class {label}" for label in range(100)]})
    )
    patch.setattr(published, "meta", published.meta | {"md5": md5(meta)})
    return folder


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def flip(path: Path, offset: int = -1) -> None:
    """Flip one bit of the byte at this offset of a file."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def contents(*roots: Path) -> dict[str, tuple[int, int]]:
    """Return length and modification time of every file below the folders, except locks."""
    files = {}
    for root in roots:
        for path in root.rglob("*"):
            status = path.lstat()
            if path.suffix != ".lock" and not stat.S_ISDIR(status.st_mode):
                files[str(path)] = status.st_size, status.st_mtime_ns
    return files


def refused(name: str, source: Source, data_dir: Path, message: str, **options) -> str:
    """Assert that loading raises an error of one line that matches, and writes nothing. Return the line."""
    before = contents(data_dir)
    with pytest.raises(UserError, match=message) as caught:
        load_pack(name, source, data_dir, **options)
    assert "\n" not in str(caught.value)
    assert contents(data_dir) == before
    return str(caught.value)


FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")


def forked(action: Callable[[], object], moment: int = 0) -> int:
    """Start a process that runs `action` and kills itself before its n-th file operation. Return its process id.

    moment: n. At 0 the process is not killed.
    """
    child = os.fork()
    if child:
        return child
    try:
        operations = itertools.count(1)

        def kill_at_moment(event: str, arguments: tuple) -> None:
            if event in FILE_EVENTS and next(operations) == moment:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(kill_at_moment)
        action()
        os._exit(0)
    finally:
        os._exit(1)


def killed(action: Callable[[], object], moment: int) -> bool:
    """Run `action` in a process that is killed before its n-th file operation. Return False if it ended before."""
    _, status = os.waitpid(forked(action, moment), 0)
    assert status in (0, signal.SIGKILL)
    return status != 0
