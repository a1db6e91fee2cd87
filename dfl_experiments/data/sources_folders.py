"""Data sets that are trees of image files: TinyImageNet, and a user's own folder."""

import hashlib
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np

from dfl_experiments.config import Count, UserError
from dfl_experiments.data.decoding import Tree, decode, folder_tree, zip_tree
from dfl_experiments.data.sources import Arrays, Source, quiet_download

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
            for name in ("wnids.txt", "val/val_annotations.txt"):
                if name not in tree.names and name != "wnids.txt":
                    raise UserError(f"{tree.label}: {name} is missing")
            train = [(name, name.split("/")[1]) for name in tree.names if re.fullmatch(r"train/\w+/images/.*\.JPEG", name)]
            listed = tree.read("wnids.txt").decode().split() if "wnids.txt" in tree.names else []
            wnids = listed or sorted({wnid for _, wnid in train})
            rows = [line.split("\t")[:2] for line in tree.read("val/val_annotations.txt").decode().splitlines() if line]
            test = sorted((f"val/images/{file}", wnid) for file, wnid in rows)
            absent = sorted({name for name, _ in test} - set(tree.names))
            if absent:
                raise UserError(f"{tree.label}: {absent[0]} is missing, {len(absent)} such files in all")
            unknown = {wnid for _, wnid in train + test} ^ set(wnids)
            if not train or not test or unknown:
                raise UserError(f"{tree.label}: images and wnids.txt do not agree on {', '.join(sorted(unknown)[:3]) or 'any'}")
            images = decode(tree, [name for name, _ in train + test], channels=3)
            words = tree.read("words.txt").decode() if "words.txt" in tree.names else ""
        labels = np.array([wnids.index(wnid) for _, wnid in train + test], np.int64)
        first_word = {wnid: line.split(",")[0] for wnid, _, line in (row.partition("\t") for row in words.splitlines())}
        classes = [f"{wnid} {first_word.get(wnid, '')}".strip() for wnid in wnids]
        n = len(train)
        return Arrays(images[:n], labels[:n], images[n:], labels[n:], classes)


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
        return f"{name}-{hashlib.sha256('\0'.join(listing).encode()).hexdigest()[:12]}"

    def tree(self) -> Tree:
        """The files below the folder. Raises `UserError` where it is none."""
        if not self.path.is_dir():
            raise UserError(f"dataset.source.path={self.path}: no such folder")
        return folder_tree(self.path)

    def classes(self, split: str) -> list[str]:
        """The class folders of a split."""
        return sorted(entry.name for entry in (self.path / split).iterdir() if entry.is_dir() and entry.name[0] != ".")

    def read(self, data_dir: Path, download: bool) -> Arrays:
        """Raises `UserError` for a missing split, classes that differ between splits, and classes without images."""
        tree = self.tree()
        here = [split for split in ("train", "test", "val") if (self.path / split).is_dir()]
        if len(here) < 2 or here[0] != "train":
            raise UserError(f"{self.path}: needs train/ and test/ (or val/) with a folder for each class in them")
        classes = self.classes("train")
        differing = sorted(set(classes) ^ set(self.classes(here[1])))
        if differing:
            raise UserError(f"{self.path}: class {differing[0]} is not in both {here[0]}/ and {here[1]}/")
        files: list[str] = []
        labels: list[int] = []
        ends = []
        for split in here[:2]:
            for label, name in enumerate(classes):
                inside = f"{split}/{name}/"
                found = [file for file in tree.names if file.startswith(inside) and file.lower().endswith(SUFFIXES)]
                if not found:
                    raise UserError(f"{self.path}/{inside}: no images ({' '.join(SUFFIXES)})")
                files += found
                labels += [label] * len(found)
            ends.append(len(files))
        if not classes:
            raise UserError(f"{self.path}/{here[0]}: no class folders")
        images = decode(tree, files, self.channels, self.size)
        targets, n = np.array(labels, np.int64), ends[0]
        return Arrays(images[:n], targets[:n], images[n:], targets[n:], classes)
