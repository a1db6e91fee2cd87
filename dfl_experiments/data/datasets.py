"""Data sets as arrays on disk, packed once from their raw form and mapped into memory after that."""

import json
import logging
import shutil
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
from filelock import AcquireReturnProxy, FileLock

from dfl_experiments.config import UserError
from dfl_experiments.data.sources import Arrays, Source

log = logging.getLogger(__name__)
PARTS = ("train_images", "train_labels", "test_images", "test_labels")
CLASSES = "classes.json"  # put in its place last: while it is absent, nothing is packed


def is_packed(folder: Path) -> bool:
    """Whether the folder holds a complete set of packed arrays."""
    return all((folder / name).is_file() for name in (CLASSES, *(f"{part}.npy" for part in PARTS)))


def load(name: str, source: Source, data_dir: Path, download: bool = True) -> Arrays:
    """The data set, mapped from `data_dir`/<cache name>; packed there first where it is not, by one process at a time.

    Raises `UserError` where the raw form is neither there nor can be fetched, where arrays or files are damaged, and
    where `data_dir` cannot be written to although something is to be packed.
    """
    data_dir = data_dir.expanduser()
    cache = source.cache_name(name)
    if cache is None:
        return source.read(data_dir, download)
    folder = data_dir / cache
    if not is_packed(folder):
        with locked(data_dir, cache):
            # another process may have packed it while this one waited
            if not is_packed(folder):
                log.info("preparing %s in %s", name, folder)
                pack(read_raw(name, source, data_dir, download), folder)
    return open_packed(folder)


def locked(data_dir: Path, cache: str) -> AcquireReturnProxy:
    """The lock to pack under, held until its context ends. Raises `UserError` where it cannot be written."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        return FileLock(data_dir / f".{cache}.lock").acquire()
    except OSError as error:
        raise UserError(f"data_dir={data_dir}: {cache} cannot be packed there ({reason(error)})") from error


def reason(error: Exception) -> str:
    """An error in one short line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:160]}…"


def read_raw(name: str, source: Source, data_dir: Path, download: bool) -> Arrays:
    """The raw form, or a `UserError` that says what is missing, where it was looked for and how to get it."""
    try:
        return source.read(data_dir, download)
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError, AssertionError, EOFError, UnpicklingError) as error:
        places = " or ".join(str(path) for path in source.locations(data_dir))
        raise UserError(
            f"dataset {name}: neither packed in {data_dir / (source.cache_name(name) or name)} nor readable from "
            f"{places} ({reason(error)}); run `dfl-data prepare dataset={name}` on a machine with a network, or set "
            "data_dir or DFL_DATA_DIR to the folder that has it"
        ) from error


def pack(arrays: Arrays, folder: Path) -> None:
    """Write the arrays beside the folder and rename them into it. Raises `UserError`, as `check` or for the disk."""
    check(arrays, folder)
    temporary = folder.with_name(f".{folder.name}.partial")
    try:
        try:
            shutil.rmtree(temporary, ignore_errors=True)  # what an interrupted run left
            temporary.mkdir()
            for part in PARTS:
                np.save(temporary / f"{part}.npy", getattr(arrays, part))
            (temporary / CLASSES).write_text(json.dumps(arrays.classes))
            # File by file: the folder may hold an unfinished pack, or be the raw one where case makes no difference.
            folder.mkdir(exist_ok=True)
            (folder / CLASSES).unlink(missing_ok=True)
            for file in (*(f"{part}.npy" for part in PARTS), CLASSES):
                (temporary / file).replace(folder / file)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({reason(error)})") from error


def open_packed(folder: Path) -> Arrays:
    """Packed arrays, mapped read-only. Raises `UserError` naming the file that is damaged."""
    parts = {}
    for part in PARTS:
        try:
            parts[part] = np.load(folder / f"{part}.npy", mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{folder / part}.npy: damaged ({reason(error)}); delete {folder}") from error
    try:
        classes = json.loads((folder / CLASSES).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / CLASSES}: damaged ({reason(error)}); delete {folder}") from error
    arrays = Arrays(**parts, classes=classes)
    check(arrays, folder)
    return arrays


def check(arrays: Arrays, folder: Path) -> None:
    """Raise `UserError`, naming the file, unless types, lengths, shapes and labels fit together."""
    if not isinstance(arrays.classes, list) or not arrays.classes:
        raise UserError(f"{folder / CLASSES}: must be a list of class names")
    for split in ("train", "test"):
        images, labels = getattr(arrays, f"{split}_images"), getattr(arrays, f"{split}_labels")
        if images.dtype != np.uint8 or images.ndim != 4 or len(images) == 0:
            raise UserError(
                f"{folder / split}_images.npy: must be uint8 (N, C, H, W), is {images.dtype} {images.shape}"
            )
        if images.shape[1:] != arrays.train_images.shape[1:]:
            raise UserError(f"{folder / split}_images.npy: of another shape than train_images.npy")
        if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
            raise UserError(
                f"{folder / split}_labels.npy: must be {len(images)} integers, is {labels.dtype} {labels.shape}"
            )
        if labels.min() < 0 or labels.max() >= len(arrays.classes):
            raise UserError(f"{folder / split}_labels.npy: labels must be 0 to {len(arrays.classes) - 1}")
