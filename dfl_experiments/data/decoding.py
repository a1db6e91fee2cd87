"""Decode the image files of a folder or an archive in several threads."""

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
# folders that operating systems create, for example for thumbnails
SYSTEM_FOLDERS = ("@eaDir", "__MACOSX")


@dataclass(frozen=True)
class Tree:
    """The files under one root folder, on disk or in an archive."""

    label: str
    """Path of the root, for messages."""
    names: list[str]
    """Paths relative to the root, with slashes, sorted."""
    read: Callable[[str], bytes]
    """Function that returns the content of one of the named files."""

    def lines(self, name: str) -> list[str]:
        """Return the lines of a text file, stripped, without empty ones.

        Raises `UserError` if the file cannot be read as text.
        """
        try:
            lines = self.read(name).decode().splitlines()
        except Exception as error:  # zipfile raises errors of many types for a damaged archive
            problem = f"cannot be read as text ({reason(error)})"
            raise UserError(f"{self.label}/{name}: {problem}") from error
        return [line.strip() for line in lines if line.strip()]


def is_user_folder(name: str) -> bool:
    """Return whether a folder belongs to the user: it is not hidden, and not one of `SYSTEM_FOLDERS`."""
    return not name.startswith(".") and name not in SYSTEM_FOLDERS


def folder_tree(root: Path, inside: Sequence[str] = ("",)) -> Tree:
    """List the files of a folder, except hidden ones. Links are followed.

    inside: list only these subfolders.
    Raises `UserError` for a folder that cannot be read, a broken link, and a link to a folder that contains the link.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error

    names = []
    for start in inside:
        for folder, subfolders, files in os.walk(root / start, onerror=refuse, followlinks=True):
            is_loop = any(os.path.samefile(folder, parent) for parent in Path(folder).parents)
            if is_loop:
                raise UserError(
                    f"{folder}: is a link to a folder that contains the link; delete the link"
                )
            subfolders[:] = filter(is_user_folder, subfolders)
            visible = [Path(folder, name) for name in files if not name.startswith(".")]
            for path in visible:
                if not path.is_file():
                    raise UserError(
                        f"{path}: is neither a file nor a folder (a broken link?); delete it"
                    )
            names += [path.relative_to(root).as_posix() for path in visible]
    return Tree(str(root), sorted(names), lambda name: (root / name).read_bytes())


def zip_tree(archive: zipfile.ZipFile, inner: str) -> Tree:
    """List the files in the folder `inner` of an archive. Nothing is extracted to the disk."""
    prefix = f"{inner}/"
    names = set()
    for name in archive.namelist():
        if name.startswith(prefix):
            names.add(name.removeprefix(prefix))
    label = f"{archive.filename}:{inner}"
    return Tree(label, sorted(names), lambda name: archive.read(prefix + name))


def pixels(tree: Tree, name: str, channels: int, size: int | None) -> np.ndarray:
    """Decode one image and rotate it as its EXIF orientation says. Transparent pixels become white.

    The result has shape (C, H, W) and type uint8.
    channels: 1 (grey) or 3 (RGB).
    size: scale the image and crop its centre to size x size pixels; None: keep its size.
    Of an animation, the first frame counts.
    Raises `UserError` if the file is not an image, or has more than 8 bits per channel.
    """
    try:
        with Image.open(io.BytesIO(tree.read(name))) as opened:
            mode = opened.mode
            decoded = ImageOps.exif_transpose(opened)
            if decoded.has_transparency_data:
                decoded = decoded.convert("RGBA")
                white = Image.new("RGBA", decoded.size, "white")
                decoded = Image.alpha_composite(white, decoded)
            decoded = decoded.convert("RGB" if channels == 3 else "L")
    except Exception as error:  # Pillow and zipfile raise errors of many types for a damaged file
        problem = f"cannot be read as an image ({reason(error)})"
        raise UserError(f"{tree.label}/{name}: {problem}") from error
    if mode.startswith(("I", "F")):
        raise UserError(
            f"{tree.label}/{name}: has more than 8 bits per channel; convert it to 8 bits"
        )
    if size is not None:
        decoded = ImageOps.fit(decoded, (size, size))
    # a grey image has no axis for its single channel
    image = np.asarray(decoded).reshape(decoded.height, decoded.width, channels)
    return image.transpose(2, 0, 1)


def decode(tree: Tree, names: Sequence[str], channels: int, size: int | None = None) -> np.ndarray:
    """Decode images into one uint8 array of shape (N, C, H, W). Raises `UserError` if the images differ in size."""
    first = pixels(tree, names[0], channels, size)
    images = np.empty((len(names), *first.shape), np.uint8)

    def fill(index: int) -> None:
        image = pixels(tree, names[index], channels, size)
        if image.shape != first.shape:
            advice = "for dataset=folder, set for example dataset.source.size=64"
            raise UserError(f"{tree.label}: {names[0]} and {names[index]} differ in size; {advice}")
        images[index] = image

    thread_map(
        fill, range(len(names)), max_workers=THREADS, desc="decoding", unit=" images", disable=None
    )
    return images
