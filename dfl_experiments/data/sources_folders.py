"""Sources that consist of image files: TinyImageNet, and a folder of the user's own images."""

import hashlib
import logging
import os
import re
import unicodedata
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from dfl_experiments.data.decoding import Tree, decode, folder_tree, is_user_folder, zip_tree
from dfl_experiments.data.sources import Arrays, Published, Source, absolute, fetch
from dfl_experiments.errors import UserError
from dfl_experiments.ranges import Count

log = logging.getLogger(__name__)
# version of the decoding; if it changes, every folder is packed again
DECODING = "turned, on white"
SUFFIXES = (
    ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"
)  # fmt: skip


@dataclass(frozen=True)
class ImageFile:
    """An image file and the class of its image."""

    file: str
    """Name of the file in its `Tree`."""
    class_name: str
    """Name of the class."""


@dataclass(frozen=True)
class Listing:
    """The image files of a data set."""

    train: list[ImageFile]
    test: list[ImageFile]
    classes: list[str]
    """The classes in the order of the labels."""

    @property
    def images(self) -> list[ImageFile]:
        """Return the training images, then the test images."""
        return self.train + self.test


def arrays_of(tree: Tree, listing: Listing, channels: int, size: int | None = None) -> Arrays:
    """Decode the listed images.

    channels, size: see `pixels`. Raises `UserError` if an image cannot be decoded, or if the images differ in size.
    """
    files = [image.file for image in listing.images]
    images = decode(tree, files, channels, size)
    label_of = {name: label for label, name in enumerate(listing.classes)}
    labels = [label_of[image.class_name] for image in listing.images]
    label_array = np.array(labels, np.int64)
    first_test = len(listing.train)
    train_images, test_images = np.split(images, [first_test])
    train_labels, test_labels = np.split(label_array, [first_test])
    return Arrays(train_images, train_labels, test_images, test_labels, listing.classes)


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
        first_word = self.first_words(tree)
        classes = []
        for wnid in arrays.classes:
            word = first_word.get(wnid, "")
            classes.append(f"{wnid} {word}".strip())
        return replace(arrays, classes=classes)

    def first_words(self, tree: Tree) -> dict[str, str]:
        """Return the first word that describes each class, from words.txt if there is this file."""
        words: dict[str, str] = {}
        if "words.txt" in tree.names:
            for line in tree.lines("words.txt"):
                wnid, _, synonyms = line.partition("\t")
                words[wnid] = synonyms.split(",")[0]
        return words

    def listing(self, tree: Tree) -> Listing:
        """Return the listing of the images. Raises `UserError` if it differs from the text files of the data set."""
        train: list[ImageFile] = []
        val_files: list[str] = []
        for name in tree.names:
            if re.fullmatch(r"train/\w+/images/[^/]+\.JPEG", name):
                train.append(ImageFile(name, name.split("/")[1]))
            elif re.fullmatch(r"val/images/[^/]+\.JPEG", name):
                val_files.append(name)
        test = self.annotated(tree)
        test_files = [image.file for image in test]
        listed = {*test_files, *self.boxed(tree)}
        absent = sorted(listed.difference(tree.names))
        if absent:
            raise UserError(f"{tree.label}: incomplete, {absent[0]} is missing")
        if test_files != val_files:
            raise UserError(
                f"{tree.label}/{self.LABELS}: damaged, it must have one line for each image in val/images"
            )
        trained = sorted({image.class_name for image in train})
        tested = sorted({image.class_name for image in test})
        wnids = tree.lines("wnids.txt") if "wnids.txt" in tree.names else trained
        if not sorted(wnids) == trained == tested:
            raise UserError(f"{tree.label}: train/, val/ and wnids.txt have different classes")
        return Listing(train, test, wnids)

    def annotated(self, tree: Tree) -> list[ImageFile]:
        """Return the test images that the annotations list, sorted by file."""
        images = []
        for line in tree.lines(self.LABELS):
            file, _, rest = line.partition("\t")
            wnid, _, _bounding_box = rest.partition("\t")
            images.append(ImageFile(f"val/images/{file}", wnid))
        return sorted(images, key=lambda image: image.file)

    def boxed(self, tree: Tree) -> list[str]:
        """Return the training images for which the data set lists bounding boxes: in the original, all of them."""
        images = []
        for name in tree.names:
            if re.fullmatch(r"train/(\w+)/\1_boxes\.txt", name):
                folder = f"{Path(name).parent}/images"
                for line in tree.lines(name):
                    file, _, _bounding_box = line.partition("\t")
                    images.append(f"{folder}/{file}")
        return images


class Folder(Source):
    """A folder of the user's own images. It has the folders `path`/train/<class>/ and `path`/test/<class>/.

    The folder of a class may have subfolders with more images. If there is no test/, val/ is used. Classes are sorted
    by name. A file is ignored if its suffix is not one of `SUFFIXES`.

    size: scale and crop the images to size x size pixels; None: all images must have the same size.
    channels: 1 (grey) or 3 (RGB).
    """

    def __init__(self, path: str, size: Count | None = None, channels: Literal[1, 3] = 3) -> None:
        self.path = absolute(path)
        self.size = size
        self.channels = channels

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
        for image in listing.images:
            status = os.stat(self.path / image.file)
            lines.append(f"{image.file} {status.st_size} {status.st_mtime_ns}")
        text = os.fsencode("\n".join(lines))
        digest = hashlib.sha256(text).hexdigest()
        return f"{name}-{digest[:12]}"

    def read(self, data_dir: Path, download: bool) -> Arrays:
        """Return the decoded images. Raises `UserError` as `listing` and `arrays_of` do."""
        tree, listing = self.listing()
        used = {image.file for image in listing.images}
        ignored = [name for name in tree.names if name not in used]
        if ignored:
            log.warning("%s: ignored files: %d, such as %s", self.path, len(ignored), ignored[0])
        return arrays_of(tree, listing, self.channels, self.size)

    def listing(self) -> tuple[Tree, Listing]:
        """Return all files of the two splits, and the listing of the images among them.

        Raises `UserError` for a missing folder or split, for fewer than two classes, for a class without images in a
        split, and for an image without a class.
        """
        splits = self.splits()
        tree = folder_tree(self.path, splits)
        classes = self.classes(splits)
        images: dict[str, list[ImageFile]] = {split: [] for split in splits}
        for file in tree.names:
            if not file.lower().endswith(SUFFIXES):
                continue
            split, name, *inner = file.split("/")
            if not inner:
                raise UserError(
                    f"{self.path / file}: is outside the class folders; move it into one of them"
                )
            images[split].append(ImageFile(file, composed(name)))
        for split in splits:
            present = {image.class_name for image in images[split]}
            empty = [name for name in classes if name not in present]
            if empty:
                suffixes = " ".join(SUFFIXES)
                raise UserError(
                    f"{self.path}/{split}/{empty[0]}/: no images of this class ({suffixes})"
                )
            images[split].sort(key=lambda image: image.class_name)
        train, test = images.values()
        return tree, Listing(train, test, classes)

    def splits(self) -> list[str]:
        """Return the names of the two split folders. Raises `UserError` if one is missing."""
        if not os.path.isdir(self.path):
            raise UserError(f"dataset.source.path={self.path}: no such folder")
        present = [split for split in ("train", "test", "val") if os.path.isdir(self.path / split)]
        if len(present) < 2 or present[0] != "train":
            raise UserError(
                f"{self.path}: needs train/ and test/ (or val/), each with a folder for each class"
            )
        if len(present) > 2:
            log.warning(
                "%s: val/ is not used; the validation images are a part of train/, see validation_fraction",
                self.path,
            )
        return present[:2]

    def classes(self, splits: Sequence[str]) -> list[str]:
        """Return the names of the class folders, sorted. Raises `UserError` if there are fewer than two."""
        names = set()
        for split in splits:
            for path in (self.path / split).iterdir():
                if path.is_dir() and is_user_folder(path.name):
                    # the same name can have different Unicode forms on different operating systems
                    names.add(composed(path.name))
        if len(names) < 2:
            raise UserError(
                f"{self.path / 'train'}: needs folders of at least two classes, has {sorted(names)}"
            )
        return sorted(names)
