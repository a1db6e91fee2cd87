"""Image files, in a folder or in an archive, decoded by a few threads."""

import io
import os
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from dfl_experiments.config import UserError

THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Tree:
    """Files under one root: `names` are relative, with slashes and sorted; `label` says where the root is."""

    label: str
    names: list[str]
    read: Callable[[str], bytes]


def folder_tree(root: Path, inside: Sequence[str] = ("",)) -> Tree:
    """The files of a folder, or of some folders inside it; what begins with a dot is left out."""
    names = []
    for start in inside:
        for folder, folders, files in os.walk(root / start, followlinks=True):
            folders[:] = [name for name in folders if not name.startswith(".")]
            place = Path(folder).relative_to(root)
            names += [(place / name).as_posix() for name in files if not name.startswith(".")]
    return Tree(str(root), sorted(names), lambda name: (root / name).read_bytes())


def zip_tree(archive: zipfile.ZipFile, inner: str) -> Tree:
    """The members of an archive below its folder `inner`, read in place: nothing is ever extracted."""
    prefix = f"{inner}/"
    names = [name.removeprefix(prefix) for name in archive.namelist() if name.startswith(prefix)]
    return Tree(f"{archive.filename}:{inner}", sorted(names), lambda name: archive.read(prefix + name))


def pixels(tree: Tree, name: str, channels: int, size: int | None) -> np.ndarray:
    """One image as (C, H, W) uint8; with a size, scaled to cover a square of it and cropped around the centre.

    Raises `UserError` for a file that is no image, and for one with more than 8 bits per channel.
    """
    try:
        with Image.open(io.BytesIO(tree.read(name))) as image:
            if image.mode.startswith(("I", "F")):
                raise UserError(f"{tree.label}/{name}: more than 8 bits per channel; convert it first")
            decoded = image.convert("RGB" if channels == 3 else "L")
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, zipfile.BadZipFile) as error:
        raise UserError(f"{tree.label}/{name}: cannot be read as an image") from error
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
                f"{image.shape[2]}x{image.shape[1]}; dataset.source.size=64 would make all of them 64x64"
            )
        images[index] = image

    with ThreadPoolExecutor(THREADS) as pool:
        for _ in tqdm(pool.map(fill, range(len(names))), "decoding", len(names), unit=" images", disable=None):
            pass
    return images
