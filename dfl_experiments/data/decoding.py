"""Decode image files of a folder or an archive, with a few threads."""

import io
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm.contrib.concurrent import thread_map

from dfl_experiments.errors import UserError, reason

THREADS = min(8, os.cpu_count() or 1)
SYSTEM_FOLDERS = ("@eaDir", "__MACOSX")  # of thumbnails and the like, made by operating systems


@dataclass(frozen=True)
class Tree:
    """The files under one root folder, on disk or in an archive."""

    label: str
    """Path of the root, for messages."""
    names: list[str]
    """Paths relative to the root, with slashes, sorted."""
    read: Callable[[str], bytes]
    """Function that returns the content of a file by its name."""

    def lines(self, name: str) -> list[str]:
        """Return the lines of a text file. Raises `UserError` for one that is no text or cannot be read."""
        try:
            return self.read(name).decode().splitlines()
        except Exception as error:  # zipfile raises errors of many types for a damaged archive
            raise UserError(f"{self.label}/{name}: cannot be read as text ({reason(error)})") from error


def is_user_folder(name: str) -> bool:
    """Return whether a folder is neither hidden nor made by an operating system."""
    return not name.startswith(".") and name not in SYSTEM_FOLDERS


def folder_tree(root: Path, inside: Sequence[str] = ("",)) -> Tree:
    """Return the files of a folder, links followed, without hidden ones.

    inside: subfolders to read in place of the whole folder.
    Raises `UserError` for a folder that cannot be read, a broken link, and a link to a folder that contains it.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error

    names = []
    for start in inside:
        for folder, subfolders, files in os.walk(root / start, onerror=refuse, followlinks=True):
            if any(os.path.samefile(folder, parent) for parent in Path(folder).parents):
                raise UserError(f"{folder}: a link back to a folder that it lies in; delete it")
            subfolders[:] = filter(is_user_folder, subfolders)
            for name in files:
                path = Path(folder, name)
                if name.startswith("."):
                    continue
                if not os.path.isfile(path):
                    raise UserError(f"{path}: neither a file nor a folder (a broken link?); delete it")
                names.append(path.relative_to(root).as_posix())
    return Tree(str(root), sorted(names), lambda name: (root / name).read_bytes())


def zip_tree(archive: zipfile.ZipFile, inner: str) -> Tree:
    """Return the files below the folder `inner` of an archive. They are read in place, not extracted."""
    prefix = f"{inner}/"
    names = {name.removeprefix(prefix) for name in archive.namelist() if name.startswith(prefix)}
    return Tree(f"{archive.filename}:{inner}", sorted(names), lambda name: archive.read(prefix + name))


def pixels(tree: Tree, name: str, channels: int, size: int | None) -> np.ndarray:
    """Return one image as (C, H, W) uint8, turned as its EXIF data say, on a white background.

    channels: 1 (grey) or 3 (RGB).
    size: side of a square that the scaled image covers, cropped around its centre; None keeps the image's size.
    Raises `UserError` for a file that is no image, has several frames or more than 8 bits per channel.
    """
    try:
        with Image.open(io.BytesIO(tree.read(name))) as image:
            mode = image.mode
            # cameras add a preview to the picture (MPO), which does not count as a frame
            animated = getattr(image, "is_animated", False) and image.format != "MPO"
            decoded = ImageOps.exif_transpose(image)
            if decoded.has_transparency_data:
                decoded = decoded.convert("RGBA")
                decoded = Image.alpha_composite(Image.new("RGBA", decoded.size, "white"), decoded)
            decoded = decoded.convert("RGB" if channels == 3 else "L")
    except Exception as error:  # Pillow and zipfile raise errors of many types for a damaged file
        raise UserError(f"{tree.label}/{name}: cannot be read as an image ({reason(error)})") from error
    if mode.startswith(("I", "F")):
        raise UserError(f"{tree.label}/{name}: more than 8 bits per channel; convert it first")
    if animated:
        raise UserError(f"{tree.label}/{name}: more than one frame; keep one of them")
    if size is not None:
        decoded = ImageOps.fit(decoded, (size, size))
    return np.asarray(decoded).reshape(decoded.height, decoded.width, channels).transpose(2, 0, 1)


def decode(tree: Tree, names: Sequence[str], channels: int, size: int | None = None) -> np.ndarray:
    """Return the named images, (N, C, H, W) uint8. Raises `UserError` where two of them differ in size."""
    first = pixels(tree, names[0], channels, size)
    images = np.empty((len(names), *first.shape), np.uint8)

    def fill(index: int) -> None:
        image = pixels(tree, names[index], channels, size)
        if image.shape != first.shape:
            sizes = [f"{width}x{height}" for _, height, width in (first.shape, image.shape)]
            raise UserError(
                f"{tree.label}: {names[0]} is {sizes[0]}, {names[index]} is {sizes[1]}; all need one size "
                "(dataset=folder: dataset.source.size=64)"
            )
        images[index] = image

    thread_map(fill, range(len(names)), max_workers=THREADS, desc="decoding", unit=" images", disable=None)
    return images
