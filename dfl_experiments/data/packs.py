"""Data sets as arrays on disk, packed once from their raw form and mapped into memory after that."""

import hashlib
import json
import logging
import os
import shutil
import zlib
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
from filelock import AcquireReturnProxy, FileLock, Timeout
from numpy.lib.format import open_memmap

from dfl_experiments.data.checksums import RECORD, Record, Summed, crc32_of, damaged, read_record, verify
from dfl_experiments.data.sources import Arrays, Source, expanded
from dfl_experiments.errors import UserError, reason

log = logging.getLogger(__name__)
CLASSES = "classes.json"
# what `Arrays` has, in its order
FILES = ("train_images.npy", "train_labels.npy", "test_images.npy", "test_labels.npy", CLASSES)


def is_packed(folder: Path) -> bool:
    """Whether the folder holds a whole set of arrays, packed or brought.

    Raises `UserError` where it has a part of somebody's own arrays, and where the record is damaged.
    """
    # isfile, unlike Path.is_file, also says no where looking is not permitted
    missing = [name for name in FILES if not os.path.isfile(folder / name)]
    # what has a record is our own: a part of it is what an interrupted run left
    if read_record(folder) is None and missing and any(os.path.lexists(folder / name) for name in FILES):
        raise UserError(f"{folder}: incomplete, without {', '.join(missing)}; add what is missing, or delete {folder}")
    return not missing


def load(name: str, source: Source, data_dir: Path, download: bool = True) -> Arrays:
    """The data set, mapped from `data_dir`/<cache name>; packed there first where it is not, by one process at a time.

    Raises `UserError` where the raw form is neither there nor can be fetched, where files are damaged, do not fit
    together or are a part of what somebody brought, and where what is to be packed cannot be written.
    """
    return load_known(name, source, data_dir, download)[0]


def load_known(name: str, source: Source, data_dir: Path, download: bool = True) -> tuple[Arrays, str]:
    """As `load`, with the digest that the data set's images, labels and classes are known by."""
    data_dir = expanded(data_dir, "data_dir")
    cache = source.cache_name(name)
    if cache is None:
        arrays = source.read(data_dir, download)
        *parts, classes = vars(arrays).values()
        sums = [zlib.crc32(part.tobytes()) for part in parts]
        return arrays, _short([*sums, zlib.crc32(json.dumps(classes).encode())])
    folder = data_dir / cache
    if not is_packed(folder):
        with locked(data_dir, cache):
            # another process may have packed it while this one waited
            if not is_packed(folder):
                log.info("preparing %s in %s", name, folder)
                pack(read_raw(name, source, folder, download), folder)
    return open_packed(folder), digest_of(folder)


def test_images_in_training(name: str, arrays: Arrays) -> int:
    """Count the test images that are, byte for byte, also training images, and warn of them."""
    known = {hash(image.tobytes()) for image in arrays.train_images}
    count = sum(hash(image.tobytes()) in known for image in arrays.test_images)
    if count:
        log.warning("%s: %d of %d test images are also training images", name, count, len(arrays.test_images))
    return count


def digest(name: str, source: Source, data_dir: Path) -> str | None:
    """The digest of a data set, packed first if need be; None where it is not here.

    The files of a pack of our own are not read for it. Raises `UserError` as `load` does for what cannot be used.
    """
    data_dir = expanded(data_dir, "data_dir")
    cache = source.cache_name(name)
    if cache is not None and is_packed(data_dir / cache):
        return digest_of(data_dir / cache)
    if cache is not None and not any(os.path.exists(path) for path in source.locations(data_dir)):
        return None
    return load_known(name, source, data_dir, download=False)[1]


def digest_of(folder: Path) -> str:
    """The digest of packed arrays, from the sums in their record, or of somebody's own from the files."""
    record = read_record(folder)
    sums = [record.files.get(file, {}).get("crc32", 0) if record else crc32_of(folder / file) for file in FILES]
    return _short(sums)


def _short(sums: list[int]) -> str:
    return hashlib.sha256(repr(sums).encode()).hexdigest()[:12]


def locked(data_dir: Path, cache: str) -> AcquireReturnProxy:
    """The lock to pack under, held until its context ends. Raises `UserError` where it cannot be written."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(data_dir / f".{cache}.lock")
        try:
            return lock.acquire(timeout=1)
        except Timeout as busy:
            log.info("waiting: %s", busy)
            return lock.acquire()
    except (OSError, NotImplementedError) as error:  # the latter where the file system has no locks
        raise UserError(f"data_dir={data_dir}: {cache} cannot be packed there ({reason(error)})") from error


def read_raw(name: str, source: Source, folder: Path, download: bool) -> Arrays:
    """The raw form, or a `UserError` that says what is missing, where it was looked for and how to get it."""
    try:
        return source.read(folder.parent, download)
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError, EOFError, HTTPException) as error:
        places = " or ".join(str(path) for path in source.locations(folder.parent))
        raise UserError(
            f"dataset {name}: neither packed in {folder} nor readable from {places} ({reason(error)}); run "
            f"`dfl-data prepare dataset={name}` where there is a network, or set data_dir or DFL_DATA_DIR to its place"
        ) from error


def pack(arrays: Arrays, folder: Path) -> None:
    """Write the arrays beside the folder and rename them into it. Raises `UserError`, as `check` or for the disk."""
    check(arrays, folder)
    temporary = folder.with_name(f".{folder.name}.partial")
    record = Record(files={})
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # what an interrupted run left
        temporary.mkdir()
        for name, part in zip(FILES, vars(arrays).values(), strict=True):
            with (temporary / name).open("wb") as file:
                # np.save, given a path or a file, does not notice a disk that is full at the very end
                summed = Summed(file)
                if name == CLASSES:
                    summed.write(json.dumps(part).encode())
                else:
                    np.save(summed, part)
            record.files[name] = {"bytes": (temporary / name).stat().st_size, "crc32": summed.crc32}
        (temporary / RECORD).write_text(record.model_dump_json(indent=1))
        # File by file: the folder may hold an unfinished pack, or be the raw one where case makes no difference.
        # While the list of classes is absent nothing is packed, and the record says that the arrays are ours.
        folder.mkdir(exist_ok=True)
        (folder / CLASSES).unlink(missing_ok=True)
        for name in (RECORD, *FILES):
            (temporary / name).replace(folder / name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({reason(error)})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def open_packed(folder: Path) -> Arrays:
    """Packed arrays, mapped read-only, every byte of them verified where there is a record to verify them with.

    Raises `UserError` naming the file that is damaged, and what to do.
    """
    record = read_record(folder)
    if record is not None:
        verify(folder, record, FILES)
    parts: list[Any] = []
    for path in (folder / name for name in FILES):
        try:
            text = path.name == CLASSES
            parts.append(json.loads(path.read_text("utf-8-sig")) if text else open_memmap(path, mode="r"))
        except (OSError, ValueError, EOFError) as error:
            raise damaged(path, reason(error), own=record is not None) from error
    arrays = Arrays(*parts)
    check(arrays, folder)
    return arrays


def check(arrays: Arrays, folder: Path) -> None:
    """Raise `UserError`, naming the file, unless types, lengths, shapes and labels fit together."""

    def demand(fits: bool, file: str, what: str) -> None:
        if not fits:
            raise UserError(f"{folder / file}: {what}")

    classes, shape = arrays.classes, arrays.train_images.shape[1:]
    named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    demand(named, CLASSES, 'must be a list of class names, as ["cats", "dogs"]')
    demand(len(set(classes)) == len(classes) > 1, CLASSES, "must name two classes at least, and none of them twice")
    for split in ("train", "test"):
        images, file = getattr(arrays, f"{split}_images"), f"{split}_images.npy"
        fits = images.dtype == np.uint8 and images.ndim == 4 and images.size > 0
        demand(fits, file, f"must be uint8 (N, C, H, W), is {images.dtype} {images.shape}")
        channels, height, width = images.shape[1:]
        turned = width in (1, 3, 4) and channels > 4 and height > 4
        demand(not turned, file, f"{images.shape} is (N, H, W, C); save images.transpose(0, 3, 1, 2), (N, C, H, W)")
        demand(images.shape[1:] == shape, file, f"images of {images.shape[1:]}, those of train_images.npy are {shape}")
        labels, file = getattr(arrays, f"{split}_labels"), f"{split}_labels.npy"
        fits = labels.shape == (len(images),) and labels.dtype.kind in "iu"
        demand(fits, file, f"must be {len(images)} integers, is {labels.dtype} {labels.shape}")
        fits = 0 <= labels.min() <= labels.max() < len(classes)
        names = f"0 to {len(classes) - 1}, one for each name of {CLASSES}"
        demand(fits, file, f"labels must be {names}; they go from {labels.min()} to {labels.max()}")
