"""Data sets that are trees of image files: TinyImageNet, and a user's own folder."""

import hashlib
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from dfl_experiments.config import Count, UserError
from dfl_experiments.data.decoding import Tree, decode, folder_tree, zip_tree
from dfl_experiments.data.sources import Arrays, Source, quiet_download

SPLITS = ("train", "test", "val")
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class TinyImageNet(Source):
    """200 classes of 64x64 images; the labelled `val` split is the test set. Grey files become RGB.

    Read from the official archive in place, or from its unpacked folder if there is one.
    """

    NAME = "tiny-imagenet-200"
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
            with zipfile.ZipFile(archive) as opened:
                yield zip_tree(opened, self.NAME)
        except zipfile.BadZipFile as error:
            raise UserError(f"{archive}: damaged or incomplete ({error}); delete it and fetch it again") from error

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
            train, test, wnids = self.listing(tree)
            images = decode(tree, [name for name, _ in train + test], channels=3)
            words = tree.read("words.txt").decode() if "words.txt" in tree.names else ""
        number = {wnid: label for label, wnid in enumerate(wnids)}
        labels = np.array([number[wnid] for _, wnid in train + test], np.int64)
        first_word = {wnid: line.split(",")[0] for wnid, _, line in (row.partition("\t") for row in words.splitlines())}
        classes = [f"{wnid} {first_word.get(wnid, '')}".strip() for wnid in wnids]
        n = len(train)
        return Arrays(images[:n], labels[:n], images[n:], labels[n:], classes)

    def listing(self, tree: Tree) -> tuple[list[tuple[str, str]], list[tuple[str, str]], list[str]]:
        """(file, class) of the training and of the test images, and the classes in the order of `wnids.txt`."""
        names = set(tree.names)
        if "val/val_annotations.txt" not in names:
            raise UserError(f"{tree.label}: val/val_annotations.txt is missing")
        train = [(name, name.split("/")[1]) for name in tree.names if re.fullmatch(r"train/\w+/images/.*\.JPEG", name)]
        rows = [line.split("\t") for line in tree.read("val/val_annotations.txt").decode().splitlines() if "\t" in line]
        test = sorted((f"val/images/{row[0]}", row[1]) for row in rows)
        absent = sorted({name for name, _ in test} - names)
        if not train or not test or absent:
            missing = absent[0] if absent else f"{'val' if train else 'train'} images"
            raise UserError(f"{tree.label}: incomplete, {missing} is not there")
        present = {wnid for _, wnid in train}
        wnids = tree.read("wnids.txt").decode().split() if "wnids.txt" in names else sorted(present)
        differing = sorted((present | {wnid for _, wnid in test}) ^ set(wnids))
        if differing:
            raise UserError(f"{tree.label}: the images and wnids.txt do not agree on class {differing[0]}")
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
        self.path = Path(path).expanduser().resolve()
        self.size, self.channels = size, channels

    def locations(self, data_dir: Path) -> list[Path]:
        """The folder itself."""
        return [self.path]

    def cache_name(self, name: str) -> str:
        """The name with a hash of the folder's path, the options and the listing: a changed folder is packed anew."""
        listing = [str(self.path), str(self.size), str(self.channels)]
        for file in self.tree().names:
            status = os.stat(self.path / file)
            listing.append(f"{file} {status.st_size} {status.st_mtime_ns}")
        digest = hashlib.sha256("\n".join(listing).encode()).hexdigest()
        return f"{name}-{digest[:12]}"

    def tree(self) -> Tree:
        """The image files of the splits. Raises `UserError` where the folder does not exist."""
        if not self.path.is_dir():
            raise UserError(f"dataset.source.path={self.path}: no such folder")
        files = folder_tree(self.path, SPLITS)
        return replace(files, names=[name for name in files.names if name.lower().endswith(SUFFIXES)])

    def classes(self, split: str) -> list[str]:
        """The class folders of a split."""
        return sorted(entry.name for entry in (self.path / split).iterdir() if entry.is_dir() and entry.name[0] != ".")

    def read(self, data_dir: Path, download: bool) -> Arrays:
        """Raises `UserError` for a missing split, classes that differ between splits, and classes without images."""
        tree = self.tree()
        here = [split for split in SPLITS if (self.path / split).is_dir()]
        if len(here) < 2 or here[0] != "train":
            raise UserError(f"{self.path}: needs train/ and test/ (or val/) with a folder for each class in them")
        classes = self.classes("train")
        differing = sorted(set(classes) ^ set(self.classes(here[1])))
        if differing or not classes:
            what = (
                f"class {differing[0]} is not in both train/ and {here[1]}/"
                if differing
                else "no class folders in train/"
            )
            raise UserError(f"{self.path}: {what}")
        found = {split: [self.images(tree, split, name) for name in classes] for split in here[:2]}
        files = [file for groups in found.values() for group in groups for file in group]
        labels = [np.repeat(np.arange(len(classes)), [len(group) for group in groups]) for groups in found.values()]
        images, n = decode(tree, files, self.channels, self.size), len(labels[0])
        return Arrays(images[:n], labels[0], images[n:], labels[1], classes)

    def images(self, tree: Tree, split: str, name: str) -> list[str]:
        """A class's files in a split. Raises `UserError` where there is none."""
        inside = f"{split}/{name}/"
        found = [file for file in tree.names if file.startswith(inside)]
        if not found:
            raise UserError(f"{self.path}/{inside}: no images ({' '.join(SUFFIXES)})")
        return found
