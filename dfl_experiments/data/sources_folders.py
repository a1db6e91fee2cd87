"""Sources that consist of image files: TinyImageNet, and a folder of the user's own images."""

import hashlib
import logging
import os
import re
import unicodedata
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from dfl_experiments.data.decoding import Tree, decode, folder_tree, is_user_folder, zip_tree
from dfl_experiments.data.sources import Arrays, Published, Source, fetch
from dfl_experiments.errors import UserError
from dfl_experiments.ranges import Count

log = logging.getLogger(__name__)
# version of the decoding; if it changes, every folder is packed again
DECODING = "turned, on white"
SUFFIXES = (
    ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"
)  # fmt: skip


@dataclass(frozen=True)
class Listing:
    """The images of a data set, by file name."""

    train: list[tuple[str, str]]
    """Pairs (file, class) of the training images."""
    test: list[tuple[str, str]]
    """Pairs (file, class) of the test images."""
    classes: list[str]
    """The classes in the order of the labels."""


def arrays_of(tree: Tree, listing: Listing, channels: int, size: int | None = None) -> Arrays:
    """Decode the listed images.

    channels, size: see `pixels`. Raises `UserError` if an image cannot be decoded, or if the images differ in size.
    """
    label_of = {name: label for label, name in enumerate(listing.classes)}
    listed = listing.train + listing.test
    images = decode(tree, [file for file, _ in listed], channels, size)
    labels = np.array([label_of[name] for _, name in listed], np.int64)
    n = len(listing.train)
    return Arrays(images[:n], labels[:n], images[n:], labels[n:], listing.classes)


def composed(name: str) -> str:
    """Return a name in Unicode's composed form (NFC)."""
    return unicodedata.normalize("NFC", name)


class TinyImageNet(Published):
    """TinyImageNet: 200 classes of 64x64 RGB images. The labelled `val` split is the test set.

    It is read from the unpacked folder if there is one, otherwise directly from the official archive.
    """

    NAME = "tiny-imagenet-200"
    LABELS = "val/val_annotations.txt"
    URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
    MD5 = "90528d7ca1a48142e341f4ef8d21d0de"

    def locations(self, data_dir: Path) -> list[Path]:
        """Return the paths of the unpacked folder and of the archive."""
        return [data_dir / self.NAME, data_dir / f"{self.NAME}.zip"]

    def read(self, data_dir: Path, download: bool) -> Arrays:
        """Return 100,000 training and 10,000 test images, 3x64x64. Raises `UserError` for missing parts."""
        folder, archive = self.locations(data_dir)
        if folder.is_dir():
            return self.arrays(folder_tree(folder))
        if download and not archive.exists():
            fetch(self.URL, archive, self.MD5)
        try:
            opened = zipfile.ZipFile(archive)
        except OSError:
            raise
        except Exception as error:  # zipfile raises errors of many types for a damaged archive
            problem = f"damaged or incomplete ({error}); delete it and download it again"
            raise UserError(f"{archive}: {problem}") from error
        with opened:
            return self.arrays(zip_tree(opened, self.NAME))

    def arrays(self, tree: Tree) -> Arrays:
        """Return the images and labels of a tree. Raises `UserError` for missing parts."""
        arrays = arrays_of(tree, self.listing(tree), channels=3)
        first_word = {}
        for row in tree.lines("words.txt") if "words.txt" in tree.names else []:
            wnid, _, words = row.partition("\t")
            first_word[wnid] = words.split(",")[0]
        classes = [f"{wnid} {first_word.get(wnid, '')}".strip() for wnid in arrays.classes]
        return replace(arrays, classes=classes)

    def listing(self, tree: Tree) -> Listing:
        """Return the listing of the images. Raises `UserError` if it differs from the text files of the data set."""
        names = set(tree.names)
        # each line has the file, the class and a bounding box; the bounding box is not used
        rows = [f"{line}\t".split("\t") for line in tree.lines(self.LABELS) if line.strip()]
        images = [
            name for name in tree.names if re.fullmatch(r"(train/\w+|val)/images/[^/]+\.JPEG", name)
        ]
        train = [(name, name.split("/")[1]) for name in images if name.startswith("train/")]
        test = sorted((f"val/images/{file}", wnid) for file, wnid, *_ in rows)
        listed = {name for name, _ in test}
        # the published data set has a text file with the training images of each class
        for file in filter(re.compile(r"train/(\w+)/\1_boxes\.txt").fullmatch, names):
            folder = f"{Path(file).parent}/images"
            listed |= {f"{folder}/{line.split()[0]}" for line in tree.lines(file) if line.strip()}
        if absent := sorted(listed - names):
            raise UserError(f"{tree.label}: incomplete, {absent[0]} is missing")
        if [name for name, _ in test] != [name for name in images if name.startswith("val/")]:
            raise UserError(
                f"{tree.label}/{self.LABELS}: damaged, it must have one line for each image in val/images"
            )
        trained = sorted({wnid for _, wnid in train})
        tested = sorted({wnid for _, wnid in test})
        wnids = " ".join(tree.lines("wnids.txt")).split() if "wnids.txt" in names else trained
        if not sorted(wnids) == trained == tested:
            raise UserError(f"{tree.label}: train/, val/ and wnids.txt have different classes")
        return Listing(train, test, wnids)


class Folder(Source):
    """A folder of the user's own images. It has the folders `path`/train/<class>/ and `path`/test/<class>/.

    The folder of a class may have subfolders with more images. If there is no test/, val/ is used. Classes are sorted
    by name. A file is ignored if its suffix is not one of `SUFFIXES`.

    size: scale and crop the images to size x size pixels; None: all images must have the same size.
    channels: 1 (grey) or 3 (RGB).
    """

    def __init__(self, path: str, size: Count | None = None, channels: Literal[1, 3] = 3) -> None:
        self.path = Path(os.path.realpath(Path(path).expanduser()))
        self.size, self.channels = size, channels

    def locations(self, data_dir: Path) -> list[Path]:
        """Return the folder itself."""
        return [self.path]

    def cache_name(self, name: str) -> str:
        """Return the name with a hash. After a change, the folder has another hash and is packed again.

        The hash is computed from the path, the options, and the name, size and time of each image file.
        Raises `UserError` as `listing` does, even if the folder was packed before.
        """
        _, listing = self.listing()
        lines = [DECODING, str(self.path), str(self.size), str(self.channels)]
        for file, _ in listing.train + listing.test:
            status = os.stat(self.path / file)
            lines.append(f"{file} {status.st_size} {status.st_mtime_ns}")
        text = "\n".join(lines)
        return f"{name}-{hashlib.sha256(os.fsencode(text)).hexdigest()[:12]}"

    def read(self, data_dir: Path, download: bool) -> Arrays:
        """Return the decoded images. Raises `UserError` as `listing` and `arrays_of` do."""
        tree, listing = self.listing()
        used = {file for file, _ in listing.train + listing.test}
        if ignored := [name for name in tree.names if name not in used]:
            log.warning("%s: %d files are ignored, such as %s", self.path, len(ignored), ignored[0])
        return arrays_of(tree, listing, self.channels, self.size)

    def listing(self) -> tuple[Tree, Listing]:
        """Return all files of the two splits, and the listing of the images among them.

        Raises `UserError` for a missing folder or split, for fewer than two classes, for a class without images in a
        split, and for an image without a class.
        """
        if not os.path.isdir(self.path):
            raise UserError(f"dataset.source.path={self.path}: no such folder")
        found = [split for split in ("train", "test", "val") if os.path.isdir(self.path / split)]
        splits = found[:2]
        if len(splits) < 2 or splits[0] != "train":
            raise UserError(
                f"{self.path}: needs train/ and test/ (or val/), each with a folder for each class"
            )
        if len(found) > len(splits):
            log.warning(
                "%s: val/ is not used; the validation images are a part of train/, see validation_fraction",
                self.path,
            )
        tree = folder_tree(self.path, splits)
        names = set()
        for split in splits:
            for path in (self.path / split).iterdir():
                if path.is_dir() and is_user_folder(path.name):
                    # the same name can have different Unicode forms on different operating systems
                    names.add(composed(path.name))
        classes = sorted(names)
        if len(classes) < 2:
            raise UserError(
                f"{self.path / 'train'}: needs folders of at least two classes, has {classes}"
            )
        groups: dict[tuple[str, str], list[tuple[str, str]]] = {}
        for split in splits:
            groups |= {(split, name): [] for name in classes}
        for file in tree.names:
            if not file.lower().endswith(SUFFIXES):
                continue
            split, name, *inner = file.split("/")
            if not inner:
                raise UserError(
                    f"{self.path / file}: is outside the class folders; move it into one of them"
                )
            groups[split, composed(name)].append((file, composed(name)))
        for (split, name), images in groups.items():
            if not images:
                suffixes = " ".join(SUFFIXES)
                raise UserError(
                    f"{self.path}/{split}/{name}/: no images of this class ({suffixes})"
                )
        train, test = [], []
        for name in classes:
            train += groups[splits[0], name]
            test += groups[splits[1], name]
        return tree, Listing(train, test, classes)
