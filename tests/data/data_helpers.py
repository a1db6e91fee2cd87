"""Small data sets on disk in the forms of the real ones, and processes that end at a moment of one's choosing."""

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
    """Arrays as given: two classes, four and two grey images of 2x2, unless something else is."""

    def __init__(self, **parts) -> None:
        good = {
            "train_images": np.arange(16, dtype=np.uint8).reshape(4, 1, 2, 2),
            "train_labels": np.array([0, 1, 0, 1]),
            "test_images": np.arange(8, dtype=np.uint8).reshape(2, 1, 2, 2),
            "test_labels": np.array([0, 1]),
            "classes": ["a", "b"],
        }
        self.arrays = Arrays(**good | parts)

    def read(self, data_dir, download):
        return self.arrays

    def locations(self, data_dir):
        return [data_dir / "raw"]


def equal(first: Arrays, second: Arrays) -> bool:
    """Return whether two data sets have equal arrays."""
    return all(
        np.array_equal(*parts)
        for parts in zip(*(vars(data).values() for data in (first, second)), strict=True)
    )


def write_image(
    path: Path, seed: int, size: tuple[int, int] = (8, 8), mode: str = "RGB", **options
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)


def write_folder(root: Path) -> Path:
    """Two classes, three training images and one test image each, one of them deeper down."""
    for label, name in enumerate(("cats", "dogs")):
        for index in range(3):
            inner = "deeper" if index == 2 else ""
            write_image(root / "train" / name / inner / f"{index}.png", 10 * label + index)
        write_image(root / "test" / name / "a.png", 10 * label + 9)
    (root / "train" / "cats" / "notes.txt").write_text("no image")
    return root


def write_tiny(data_dir: Path) -> Path:
    """TinyImageNet's layout: two classes of 64x64, some files grey."""
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
    """Idx files of MNIST's form, of so many and 5 images; their names and checksums."""
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
    order = [
        f"{name}-{kind}"
        for name in ("train", "t10k")
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
    ]
    return {name: md5(raw / name) for name in order}


def write_cifar(data_dir: Path, published: type[CIFAR10], patch: pytest.MonkeyPatch) -> Path:
    """Batches of CIFAR's form, of 20 images each, which count as the published ones; their folder."""
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


def flip(path: Path, place: int = -1) -> None:
    """Alter one byte of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def contents(*roots: Path) -> dict[str, tuple[int, int]]:
    """Every file below the folders, but for locks, with its length and the time it was last written to."""
    files = (
        (str(path), path.lstat())
        for root in roots
        for path in root.rglob("*")
        if path.suffix != ".lock"
    )
    return {
        path: (file.st_size, file.st_mtime_ns)
        for path, file in files
        if not stat.S_ISDIR(file.st_mode)
    }


def refused(name: str, source: Source, data_dir: Path, message: str, **options) -> str:
    """Check that loading raises one line that matches, and writes nothing; the line."""
    before = contents(data_dir)
    with pytest.raises(UserError, match=message) as caught:
        load_pack(name, source, data_dir, **options)
    assert "\n" not in str(caught.value)
    assert contents(data_dir) == before
    return str(caught.value)


FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")


def forked(act: Callable[[], object], moment: int = 0, send: int = signal.SIGKILL) -> int:
    """Start a process that does `act` and signals itself before its moment-th operation on files; its number."""
    child = os.fork()
    if child:
        return child
    try:
        left = itertools.count(1)

        def look(event: str, arguments: tuple) -> None:
            if event in FILE_EVENTS and next(left) == moment:
                os.kill(os.getpid(), send)

        sys.addaudithook(look)
        act()
        os._exit(0)
    finally:
        os._exit(1)


def killed(act: Callable[[], object], moment: int) -> bool:
    """Do `act` in a process that is killed at a moment; whether it was, or ended well before."""
    _, status = os.waitpid(forked(act, moment), 0)
    assert status in (0, signal.SIGKILL)
    return status != 0
