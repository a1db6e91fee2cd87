"""Image files, in a folder or in an archive, decoded by a few threads."""

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
NOT_IMAGES_OF_ONE_S_OWN = ("@eaDir", "__MACOSX")  # folders of thumbnails and the like, which systems make


@dataclass(frozen=True)
class Tree:
    """Files under one root: `names` are relative, with slashes and sorted; `label` says where the root is."""

    label: str
    names: list[str]
    read: Callable[[str], bytes]

    def lines(self, name: str) -> list[str]:
        """A text file's lines. Raises `UserError` for one that is no text or cannot be read."""
        try:
            return self.read(name).decode().splitlines()
        except Exception as error:  # of a damaged archive zipfile raises nearly anything
            raise UserError(f"{self.label}/{name}: cannot be read as text ({reason(error)})") from error


def is_ones_own(name: str) -> bool:
    """Whether a folder's name is none that a system makes for itself."""
    return not name.startswith(".") and name not in NOT_IMAGES_OF_ONE_S_OWN


def folder_tree(root: Path, inside: Sequence[str] = ("",)) -> Tree:
    """The files of a folder, or of some folders inside it, links followed; what begins with a dot is left out.

    Raises `UserError` for what cannot be looked into, a link to nowhere, and one that leads back to where it lies.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error

    names = []
    for start in inside:
        for place, folders, files in os.walk(root / start, onerror=refuse, followlinks=True):
            if any(os.path.samefile(place, parent) for parent in Path(place).parents):
                raise UserError(f"{place}: a link back to a folder that it lies in; delete it")
            folders[:] = [name for name in folders if is_ones_own(name)]
            for path in (Path(place, name) for name in files if not name.startswith(".")):
                if not os.path.isfile(path):
                    raise UserError(f"{path}: neither a file nor a folder (a link to nowhere?); delete it")
                names.append(path.relative_to(root).as_posix())
    return Tree(str(root), sorted(names), lambda name: (root / name).read_bytes())


def zip_tree(archive: zipfile.ZipFile, inner: str) -> Tree:
    """The members of an archive below its folder `inner`, read in place: nothing is ever extracted."""
    prefix = f"{inner}/"
    names = {name.removeprefix(prefix) for name in archive.namelist() if name.startswith(prefix)}
    return Tree(f"{archive.filename}:{inner}", sorted(names), lambda name: archive.read(prefix + name))


def pixels(tree: Tree, name: str, channels: int, size: int | None) -> np.ndarray:
    """One image as (C, H, W) uint8; with a size, scaled to cover a square of it and cropped around the centre.

    It is turned as its camera says, and what is transparent shows white.
    Raises `UserError` for a file that is no image, and for one with several frames or more than 8 bits per channel.
    """
    try:
        with Image.open(io.BytesIO(tree.read(name))) as image:
            mode = image.mode
            # cameras put a preview behind the picture (MPO), which is no frame of it
            animated = getattr(image, "is_animated", False) and image.format != "MPO"
            decoded = ImageOps.exif_transpose(image)
            if decoded.has_transparency_data:
                decoded = decoded.convert("RGBA")
                decoded = Image.alpha_composite(Image.new("RGBA", decoded.size, "white"), decoded)
            decoded = decoded.convert("RGB" if channels == 3 else "L")
    except Exception as error:  # of a damaged file Pillow and zipfile raise nearly anything
        raise UserError(f"{tree.label}/{name}: cannot be read as an image ({reason(error)})") from error
    if mode.startswith(("I", "F")):
        raise UserError(f"{tree.label}/{name}: more than 8 bits per channel; convert it first")
    if animated:
        raise UserError(f"{tree.label}/{name}: more than one frame; keep one of them")
    if size is not None:
        decoded = ImageOps.fit(decoded, (size, size))
    return np.asarray(decoded).reshape(decoded.height, decoded.width, channels).transpose(2, 0, 1)


def decode(tree: Tree, names: Sequence[str], channels: int, size: int | None = None) -> np.ndarray:
    """All the named images, (N, C, H, W) uint8. Raises `UserError` where two of them differ in size."""
    first = pixels(tree, names[0], channels, size)
    images = np.empty((len(names), *first.shape), np.uint8)

    def fill(index: int) -> None:
        image = pixels(tree, names[index], channels, size)
        if image.shape != first.shape:
            raise UserError(
                f"{tree.label}: {names[0]} is {first.shape[2]}x{first.shape[1]}, {names[index]} is "
                f"{image.shape[2]}x{image.shape[1]}; all need one size (dataset=folder: dataset.source.size=64)"
            )
        images[index] = image

    thread_map(fill, range(len(names)), max_workers=THREADS, desc="decoding", unit=" images", disable=None)
    return images
