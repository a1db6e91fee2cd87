"""Data sets that are trees of image files: TinyImageNet, and a user's own folder."""

import hashlib
import itertools
import logging
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from dfl_experiments.data.decoding import Tree, decode, folder_tree, zip_tree
from dfl_experiments.data.sources import Arrays, Published, Source, expanded, quiet_download
from dfl_experiments.errors import UserError
from dfl_experiments.ranges import Count

log = logging.getLogger(__name__)
SPLITS = ("train", "test", "val")
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

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


class TinyImageNet(Source):
    """200 classes of 64x64 images; the labelled `val` split is the test set. Grey files become RGB.

    Read from the official archive in place, or from its unpacked folder if there is one.
    """

    published = Published(100_000, (3, 64, 64), 200)
    NAME = "tiny-imagenet-200"
    LABELS = "val/val_annotations.txt"
    URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
    MD5 = "90528d7ca1a48142e341f4ef8d21d0de"

    def locations(self, data_dir: Path) -> list[Path]:
        """The unpacked folder, then the archive."""
        return [data_dir / self.NAME, data_dir / f"{self.NAME}.zip"]

    @contextmanager
    def tree(self, data_dir: Path, download: bool) -> Iterator[Tree]:
        """The files, from wherever they are. Raises OSError or RuntimeError where they are nowhere."""
        folder, archive = self.locations(data_dir)
        if folder.is_dir():
            yield folder_tree(folder)
            return
        if not archive.exists() and download:
            self.fetch(archive)
        try:
            opened = zipfile.ZipFile(archive)
        except OSError:
            raise
        except Exception as error:  # of a damaged archive zipfile raises nearly anything
            raise UserError(f"{archive}: damaged or incomplete ({error}); delete it and fetch it again") from error
        with opened:
            yield zip_tree(opened, self.NAME)

    def fetch(self, archive: Path) -> None:
        """Download beside the archive and check it before it gets its name. Raises OSError or RuntimeError."""
        from torchvision.datasets.utils import download_url

        part = archive.with_name(f"{archive.name}.part")
        with quiet_download():
            download_url(self.URL, archive.parent, part.name, self.MD5)
        part.rename(archive)

    def read(self, data_dir: Path, download: bool) -> Arrays:
        """100,000 and 10,000 images of 3x64x64 where the data set is complete. Raises `UserError` for missing parts."""
        with self.tree(data_dir, download) as tree:
            listing = self.listing(tree)
            arrays = arrays_of(tree, listing, channels=3)
            words = tree.lines("words.txt") if "words.txt" in tree.names else []
        first_word = {wnid: line.split(",")[0] for wnid, _, line in (row.partition("\t") for row in words)}
        return replace(arrays, classes=[f"{wnid} {first_word.get(wnid, '')}".strip() for wnid in arrays.classes])

    def listing(self, tree: Tree) -> Listing:
        """The images that the data set's own lists name. Raises `UserError` where lists and images do not agree."""
        names = set(tree.names)
        if self.LABELS not in names:
            raise UserError(f"{tree.label}: incomplete, {self.LABELS} is not there")
        rows = [line.split("\t") for line in tree.lines(self.LABELS) if line.strip()]
        train = [
            (name, name.split("/")[1]) for name in tree.names if re.fullmatch(r"train/\w+/images/[^/]+\.JPEG", name)
        ]
        test = sorted((f"val/images/{row[0]}", "".join(row[1:2])) for row in rows)
        listed = {name for name, _ in test}
        unlisted = sorted({name for name in names if re.fullmatch(r"val/images/[^/]+\.JPEG", name)} - listed)
        if unlisted or len(listed) < len(test):
            what = f"no line for {unlisted[0]}" if unlisted else "two lines for one image"
            raise UserError(f"{tree.label}/{self.LABELS}: damaged, it has {what}")
        # the published folder has a list of every class's training images
        for file in filter(re.compile(r"train/(\w+)/\1_boxes\.txt").fullmatch, names):
            listed |= {f"{Path(file).parent}/images/{line.split()[0]}" for line in tree.lines(file) if line.strip()}
        absent = sorted(listed - names)
        if not train or not test or absent:
            missing = absent[0] if absent else f"{'val' if train else 'train'} images"
            raise UserError(f"{tree.label}: incomplete, {missing} is not there")
        found = {wnid for _, wnid in train}
        wnids = " ".join(tree.lines("wnids.txt")).split() if "wnids.txt" in names else sorted(found)
        twice = {wnid for wnid in wnids if wnids.count(wnid) > 1}
        differing = sorted((found ^ set(wnids)) | ({wnid for _, wnid in test} ^ set(wnids)) | twice)
        if differing:
            raise UserError(f"{tree.label}: the images and wnids.txt do not agree on class {differing[0]!r}")
        if len(wnids) < 2:
            raise UserError(f"{tree.label}: needs images of two classes at least, has only {wnids[0]}")
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
        lines = [str(self.path), str(self.size), str(self.channels)]
        _, (train, test, _) = self.listing()
        for file, _ in train + test:
            status = os.stat(self.path / file)
            lines.append(f"{file} {status.st_size} {status.st_mtime_ns}")
        digest = hashlib.sha256(os.fsencode("\n".join(lines))).hexdigest()
        return f"{name}-{digest[:12]}"

    def read(self, data_dir: Path, download: bool) -> Arrays:
        """Raises `UserError` as `listing` does, and for an image that cannot be decoded or is of another size."""
        tree, listing = self.listing()
        used = {file for file, _ in listing[0] + listing[1]}
        others = [name for name in tree.names if name not in used]
        if others:
            log.warning("%s: %d files are passed over, such as %s", self.path, len(others), others[0])
        return arrays_of(tree, listing, self.channels, self.size)

    def listing(self) -> tuple[Tree, Listing]:
        """All files of the two splits, and the images among them by class.

        Raises `UserError` for a missing folder or split, classes that differ between the splits, fewer than two of
        them, a class without images and an image without a class.
        """
        if not os.path.isdir(self.path):
            what = "is no folder" if os.path.exists(self.path) else "no such folder"
            raise UserError(f"dataset.source.path={self.path}: {what}")
        splits = [split for split in SPLITS if os.path.isdir(self.path / split)][:2]
        if len(splits) < 2 or splits[0] != "train":
            raise UserError(f"{self.path}: needs train/ and test/ (or val/) with a folder for each class in them")
        tree = folder_tree(self.path, splits)
        groups: dict[str, dict[str, list[str]]] = {split: {} for split in splits}
        for split, group in groups.items():
            group.update({path.name: [] for path in sorted((self.path / split).iterdir()) if path.is_dir()})
        for file in tree.names:
            if file.lower().endswith(SUFFIXES):
                split, name, *inner = file.split("/")
                if not inner:
                    raise UserError(f"{self.path / file}: an image outside the class folders; put it into one")
                groups[split][name].append(file)
        classes, others = ([name for name in group if name[0] != "."] for group in groups.values())
        differing = sorted(set(classes) ^ set(others))
        if differing:
            both = f"both {splits[0]}/ and {splits[1]}/"
            raise UserError(f"{self.path}: class {differing[0]} is not in {both}, which need the same class folders")
        if len(classes) < 2:
            there = f"only {classes[0]}" if classes else "no class folders"
            raise UserError(f"{self.path / 'train'}: needs a folder for each of two classes at least, has {there}")
        for split, name in itertools.product(splits, classes):
            if not groups[split][name]:
                raise UserError(f"{self.path}/{split}/{name}/: no images ({' '.join(SUFFIXES)})")
        train, test = ([(file, name) for name in classes for file in group[name]] for group in groups.values())
        return tree, (train, test, classes)
