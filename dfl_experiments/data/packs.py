"""Pack a data set once, from its raw form into arrays on disk, and map the arrays into memory after that."""

import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
from filelock import AcquireReturnProxy, FileLock, Timeout
from numpy.lib.format import open_memmap

from dfl_experiments.data.checksums import RECORD, Record, Summed, crc32_of, damaged, read_record, verify
from dfl_experiments.data.sources import Arrays, Source, expanded, kind_of
from dfl_experiments.errors import UserError, reason

log = logging.getLogger(__name__)
CLASSES = "classes.json"
# one file for each field of `Arrays`, in its order
FILES = ("train_images.npy", "train_labels.npy", "test_images.npy", "test_labels.npy", CLASSES)
LARGEST = float(np.finfo(np.float32).max)


def is_packed(folder: Path) -> bool:
    """Return whether the folder holds all arrays of a data set, packed or the user's own.

    Raises `UserError` where the user's own arrays are incomplete, and where the record is damaged.
    """
    # unlike Path.is_file, isfile returns False where access is not permitted
    missing = [name for name in FILES if not os.path.isfile(folder / name)]
    # an incomplete folder with a record comes from an interrupted run, and is packed again
    has_any = any(os.path.lexists(folder / name) for name in FILES)
    if read_record(folder) is None and missing and has_any:
        raise UserError(f"{folder}: incomplete, without {', '.join(missing)}; add what is missing, or delete {folder}")
    return not missing


def load_pack(name: str, source: Source, data_dir: Path, download: bool = True) -> Arrays:
    """Return the data set, mapped from `data_dir`/<cache name>; pack it there first if need be.

    Only one process packs at a time.
    download: fetch the raw form if it is absent.
    Raises `UserError` where the raw form is absent and cannot be fetched, where files are damaged, incomplete or do not
    fit together, and where the pack cannot be written.
    """
    return load_with_digest(name, source, data_dir, download)[0]


def load_with_digest(name: str, source: Source, data_dir: Path, download: bool = True) -> tuple[Arrays, str]:
    """Return the data set as `load_pack` does, and the digest of its images, labels and classes."""
    data_dir = expanded(data_dir, "data_dir")
    cache = source.cache_name(name)
    if cache is None:
        arrays = source.read(data_dir, download)
        check_arrays(arrays, [f"dataset {name}: {part}" for part in source.PARTS])
        *parts, classes = vars(arrays).values()
        sums = [zlib.crc32(part.tobytes()) for part in parts]
        return arrays, _short([*sums, zlib.crc32(json.dumps(classes).encode())])
    folder = data_dir / cache
    if not is_packed(folder):
        with lock_pack(data_dir, cache):
            # another process may have packed it while this process waited
            if not is_packed(folder):
                log.info("preparing %s in %s", name, folder)
                pack(read_raw(name, source, folder, download), folder)
    return open_packed(folder), digest_of(folder)


def test_images_in_training(name: str, arrays: Arrays) -> int:
    """Count the test images that equal a training image byte for byte, and warn of them."""
    training = {hash(image.tobytes()) for image in arrays.train_images}
    count = sum(hash(image.tobytes()) in training for image in arrays.test_images)
    if count:
        log.warning("%s: %d of %d test samples are also training samples", name, count, len(arrays.test_images))
    return count


def digest(name: str, source: Source, data_dir: Path) -> str | None:
    """Return the digest of a data set, packed first if need be; None where the data set is absent.

    A pack's digest comes from its record, without reading its arrays. Raises `UserError` as `load_pack` does.
    """
    data_dir = expanded(data_dir, "data_dir")
    cache = source.cache_name(name)
    if cache is not None and is_packed(data_dir / cache):
        return digest_of(data_dir / cache)
    if cache is not None and not any(os.path.exists(path) for path in source.locations(data_dir)):
        return None
    return load_with_digest(name, source, data_dir, download=False)[1]


def digest_of(folder: Path) -> str:
    """Return the digest of packed arrays, from the checksums in their record; without a record, from the files."""
    record = read_record(folder)
    if record is None:
        return _short([crc32_of(folder / file) for file in FILES])
    return _short([record.files.get(file, {}).get("crc32", 0) for file in FILES])


def _short(sums: list[int]) -> str:
    return hashlib.sha256(repr(sums).encode()).hexdigest()[:12]


def lock_pack(data_dir: Path, cache: str) -> AcquireReturnProxy:
    """Acquire the lock for packing into `data_dir`/`cache`; the end of the returned context releases it.

    Raises `UserError` where the lock file cannot be written.
    """
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(data_dir / f".{cache}.lock")
        try:
            return lock.acquire(timeout=1)
        except Timeout as busy:
            log.info("waiting: %s", busy)
            return lock.acquire()
    except (OSError, NotImplementedError) as error:  # NotImplementedError: the file system has no locks
        raise UserError(f"data_dir={data_dir}: {cache} cannot be packed there ({reason(error)})") from error


def read_raw(name: str, source: Source, folder: Path, download: bool) -> Arrays:
    """Read a source. Raises `UserError` that says what is missing, the paths that were tried, and how to get it."""
    try:
        return source.read(folder.parent, download)
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError, EOFError, HTTPException) as error:
        paths = " or ".join(str(path) for path in source.locations(folder.parent))
        raise UserError(
            f"dataset {name}: neither packed in {folder} nor readable from {paths} ({reason(error)}); run "
            f"`dfl-data prepare dataset={name}` where there is a network, or set data_dir or DFL_DATA_DIR to its folder"
        ) from error


def pack(arrays: Arrays, folder: Path) -> None:
    """Write the arrays beside the folder, then rename them into it.

    Raises `UserError` as `check_arrays` does, and where the disk cannot hold them.
    """
    check_arrays(arrays, [str(folder / file) for file in FILES])
    temporary = folder.with_name(f".{folder.name}.partial")
    record = Record(files={})
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # the remains of an interrupted run
        temporary.mkdir()
        for name, part in zip(FILES, vars(arrays).values(), strict=True):
            with (temporary / name).open("wb") as file:
                # given a path or a file, np.save does not notice a disk that gets full at the very end
                summed = Summed(file)
                if name == CLASSES:
                    summed.write(json.dumps(part).encode())
                else:
                    np.save(summed, part)
            record.files[name] = {"bytes": (temporary / name).stat().st_size, "crc32": summed.crc32}
        (temporary / RECORD).write_text(record.model_dump_json(indent=1))
        # Rename file by file: the folder may hold an unfinished pack, or the raw form where file names ignore case.
        # While the list of classes is absent, the folder does not count as packed; the record marks it as a pack.
        folder.mkdir(exist_ok=True)
        (folder / CLASSES).unlink(missing_ok=True)
        for name in (RECORD, *FILES):
            (temporary / name).replace(folder / name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({reason(error)})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def open_packed(folder: Path) -> Arrays:
    """Return packed arrays, mapped read-only. Where a record exists, every byte is verified.

    Raises `UserError` with the damaged file and what to do.
    """
    record = read_record(folder)
    if record is not None:
        verify(folder, record, FILES)
    parts: list[Any] = []
    for path in (folder / name for name in FILES):
        try:
            if path.name == CLASSES:
                parts.append(json.loads(path.read_text("utf-8-sig")))
            else:
                parts.append(open_memmap(path, mode="r"))
        except (OSError, ValueError, EOFError) as error:
            raise damaged(path, reason(error), own=record is not None) from error
    arrays = Arrays(*parts)
    check_arrays(arrays, [str(folder / file) for file in FILES])
    return arrays


def check_arrays(arrays: Arrays, names: Sequence[str]) -> None:
    """Raise `UserError`, naming the part, unless types, lengths, shapes, values and labels fit together.

    names: of the parts, in the order of `FILES`.
    """

    def demand(fits: bool, name: str, message: str) -> None:
        if not fits:
            raise UserError(f"{name}: {message}")

    classes = arrays.classes
    are_names = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    demand(are_names, names[4], 'must be a list of class names, as ["cats", "dogs"]')
    demand(len(set(classes)) == len(classes) > 1, names[4], "must name two classes at least, and none of them twice")
    expected = f"{kind_of(arrays.train_images)} of {arrays.shape}"
    for place, split in enumerate(("train", "test")):
        samples, labels = getattr(arrays, f"{split}_images"), getattr(arrays, f"{split}_labels")
        samples_name, labels_name = names[2 * place : 2 * place + 2]
        check_samples(samples, samples_name)
        found = f"{kind_of(samples)} of {samples.shape[1:]}"
        demand(found == expected, samples_name, f"{found}, those of {Path(names[0]).name} are {expected}")
        fits = labels.shape == (len(samples),) and labels.dtype.kind in "iu"
        demand(fits, labels_name, f"must be {len(samples)} integers, is {labels.dtype} {labels.shape}")
        lowest, highest = labels.min(), labels.max()
        fits = 0 <= lowest <= highest < len(classes)
        allowed = f"0 to {len(classes) - 1}, one for each class"
        demand(fits, labels_name, f"labels must be {allowed}; they go from {lowest} to {highest}")


def check_samples(samples: np.ndarray, name: str) -> None:
    """Raise `UserError` unless an array holds samples of one of the three kinds, with values that can be used."""
    kind, shape, problem = kind_of(samples), samples.shape, ""
    if not kind or samples.size == 0:
        problem = "must be uint8 images (N, C, H, W), float32 features (N, …) or int64 tokens (N, T)"
        problem += f", is {samples.dtype} {shape}"
    elif kind == "images" and shape[3] in (1, 3, 4) and min(shape[1:3]) > 4:
        problem = f"{shape} is (N, H, W, C); save images.transpose(0, 3, 1, 2), (N, C, H, W)"
    elif kind == "tokens" and samples.min() < 0:
        problem = f"tokens must be 0 or more, the smallest is {samples.min()}"
    # NaN passes through min and max, and fails the comparison
    elif kind == "features" and not -LARGEST <= samples.min() <= samples.max() <= LARGEST:
        place = np.argwhere(~(np.abs(samples) <= LARGEST))[0].tolist()
        problem = f"holds {samples[tuple(place)]} at {place}; values must be finite in float32"
    if problem:
        raise UserError(f"{name}: {problem}")
