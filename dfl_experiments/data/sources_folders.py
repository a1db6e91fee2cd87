"""Data sets that are trees of image files: TinyImageNet, and a user's own folder."""

import hashlib
import logging
import os
import re
import unicodedata
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from dfl_experiments.data.decoding import Tree, decode, folder_tree, is_ones_own, zip_tree
from dfl_experiments.data.sources import Arrays, Source, expanded, quiet_download
from dfl_experiments.errors import UserError
from dfl_experiments.ranges import Count

log = logging.getLogger(__name__)
DECODING = "turned, on white"  # how images are decoded: packs from before it was so are packed anew
SUFFIXES = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

# (file, class) of the training and of the test images, and the classes in the order of their labels
Listing = tuple[list[tuple[str, str]], list[tuple[str, str]], list[str]]


def arrays_of(tree: Tree, listing: Listing, channels: int, size: int | None = None) -> Arrays:
    """The listed images, decoded. Raises `UserError` for one that cannot be, or that differs from the first in size."""
    train, test, classes = listing
    number = {name: label for label, name in enumerate(classes)}
    images = decode(tree, [file for file, _ in train + test], channels, size)
    labels = np.array([number[name] for _, name in train + test], np.int64)
    n = len(train)
    return Arrays(images[:n], labels[:n], images[n:], labels[n:], classes)


def composed(name: str) -> str:
    """A name in Unicode's composed form."""
    return unicodedata.normalize("NFC", name)


class TinyImageNet(Source):
    """200 classes of 64x64 images; the labelled `val` split is the test set. Grey files become RGB.

    Read from the official archive in place, or from its unpacked folder if there is one.
    """

    NAME = "tiny-imagenet-200"
    LABELS = "val/val_annotations.txt"
    URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
    MD5 = "90528d7ca1a48142e341f4ef8d21d0de"

    def locations(self, data_dir: Path) -> list[Path]:
        """The unpacked folder, then the archive."""
        return [data_dir / self.NAME, data_dir / f"{self.NAME}.zip"]

    def read(self, data_dir: Path, download: bool) -> Arrays:
        """100,000 and 10,000 images of 3x64x64 where the data set is complete. Raises `UserError` for missing parts."""
        from torchvision.datasets.utils import download_url

        folder, archive = self.locations(data_dir)
        if folder.is_dir():
            return self.arrays(folder_tree(folder))
        if download and not archive.exists():
            part = archive.with_name(f"{archive.name}.part")
            with quiet_download():
                download_url(self.URL, data_dir, part.name, self.MD5)
            part.rename(archive)
        try:
            opened = zipfile.ZipFile(archive)
        except OSError:
            raise
        except Exception as error:  # of a damaged archive zipfile raises nearly anything
            raise UserError(f"{archive}: damaged or incomplete ({error}); delete it and fetch it again") from error
        with opened:
            return self.arrays(zip_tree(opened, self.NAME))

    def arrays(self, tree: Tree) -> Arrays:
        """The files' content. Raises `UserError` for missing parts."""
        arrays = arrays_of(tree, self.listing(tree), channels=3)
        words = tree.lines("words.txt") if "words.txt" in tree.names else []
        first_word = {wnid: line.split(",")[0] for wnid, _, line in (row.partition("\t") for row in words)}
        return replace(arrays, classes=[f"{wnid} {first_word.get(wnid, '')}".strip() for wnid in arrays.classes])

    def listing(self, tree: Tree) -> Listing:
        """The images that the data set's own lists name. Raises `UserError` where lists and images do not agree."""
        names = set(tree.names)
        # file, class, and a box that nobody needs
        rows = [f"{line}\t".split("\t") for line in tree.lines(self.LABELS) if line.strip()]
        images = [name for name in tree.names if re.fullmatch(r"(train/\w+|val)/images/[^/]+\.JPEG", name)]
        train = [(name, name.split("/")[1]) for name in images if name.startswith("train/")]
        test = sorted((f"val/images/{file}", wnid) for file, wnid, *_ in rows)
        listed = {name for name, _ in test}
        # the published folder has a list of every class's training images
        for file in filter(re.compile(r"train/(\w+)/\1_boxes\.txt").fullmatch, names):
            listed |= {f"{Path(file).parent}/images/{line.split()[0]}" for line in tree.lines(file) if line.strip()}
        if absent := sorted(listed - names):
            raise UserError(f"{tree.label}: incomplete, {absent[0]} is not there")
        if [name for name, _ in test] != [name for name in images if name.startswith("val/")]:
            raise UserError(f"{tree.label}/{self.LABELS}: damaged, it must have one line for every image of val/images")
        trained, tested = ({wnid for _, wnid in split} for split in (train, test))
        wnids = " ".join(tree.lines("wnids.txt")).split() if "wnids.txt" in names else sorted(trained)
        if not sorted(wnids) == sorted(trained) == sorted(tested):
            raise UserError(f"{tree.label}: train/, {self.LABELS} and wnids.txt do not agree on the classes")
        return train, test, wnids


class Folder(Source):
    """A user's own images: `path`/train/<class>/… and `path`/test/<class>/… (or val), at any depth below a class.

    With both test and val, test is used. Classes are in alphabetical order. Files that do not have the suffix of an
    image are passed over.
    """

    def __init__(self, path: str, size: Count | None = None, channels: Literal[1, 3] = 3) -> None:
        """size: None where all images have one size; otherwise they are scaled and cropped to size x size."""
        if path in ("", "???"):
            raise UserError("dataset.source.path: missing; it names the folder that has train/ and test/ in it")
        self.path = Path(os.path.realpath(expanded(path, "dataset.source.path")))
        self.size, self.channels = size, channels

    def locations(self, data_dir: Path) -> list[Path]:
        """The folder itself."""
        return [self.path]

    def cache_name(self, name: str) -> str:
        """The name with a hash of the folder's path, the options and the listing: a changed folder is packed anew.

        Raises `UserError` as `listing` does: no start goes by a pack whose folder has become a bad one.
        """
        _, (train, test, _) = self.listing()
        files = ((file, os.stat(self.path / file)) for file, _ in train + test)
        lines = (f"{file} {status.st_size} {status.st_mtime_ns}" for file, status in files)
        text = "\n".join([DECODING, str(self.path), str(self.size), str(self.channels), *lines])
        return f"{name}-{hashlib.sha256(os.fsencode(text)).hexdigest()[:12]}"

    def read(self, data_dir: Path, download: bool) -> Arrays:
        """Raises `UserError` as `listing` does, and for an image that cannot be decoded or is of another size."""
        tree, listing = self.listing()
        used = {file for file, _ in listing[0] + listing[1]}
        if others := [name for name in tree.names if name not in used]:
            log.warning("%s: %d files are passed over, such as %s", self.path, len(others), others[0])
        return arrays_of(tree, listing, self.channels, self.size)

    def listing(self) -> tuple[Tree, Listing]:
        """All files of the two splits, and the images among them by class.

        Raises `UserError` for a missing folder or split, fewer than two classes, one without images in a split, and an
        image without a class.
        """
        if not os.path.isdir(self.path):
            raise UserError(f"dataset.source.path={self.path}: no such folder")
        splits = [split for split in ("train", "test", "val") if os.path.isdir(self.path / split)][:2]
        if len(splits) < 2 or splits[0] != "train":
            raise UserError(f"{self.path}: needs train/ and test/ (or val/) with a folder for each class in them")
        tree = folder_tree(self.path, splits)
        folders = (path for split in splits for path in (self.path / split).iterdir() if path.is_dir())
        # one name in two normal forms, as systems write them, is one class
        classes = sorted({composed(folder.name) for folder in folders if is_ones_own(folder.name)})
        if len(classes) < 2:
            raise UserError(f"{self.path / 'train'}: needs a folder for each of two classes at least, has {classes}")
        groups: dict[tuple[str, str], list[tuple[str, str]]] = {(split, x): [] for split in splits for x in classes}
        for file in tree.names:
            if file.lower().endswith(SUFFIXES):
                split, name, *inner = file.split("/")
                if not inner:
                    raise UserError(f"{self.path / file}: an image outside the class folders; put it into one")
                groups[split, composed(name)].append((file, composed(name)))
        for (split, name), images in groups.items():
            if not images:
                raise UserError(f"{self.path}/{split}/{name}/: no images of this class ({' '.join(SUFFIXES)})")
        train, test = ([row for name in classes for row in groups[split, name]] for split in splits)
        return tree, (train, test, classes)
