"""Pack a data set once from its raw form into arrays on disk, then map these arrays into memory."""

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
from filelock import AcquireReturnProxy, FileLock
from numpy.lib.format import open_memmap

from dfl_experiments.data.checksums import (
    RECORD,
    ChecksumWriter,
    crc32_of,
    damaged,
    read_record,
    verify,
    write_record,
)
from dfl_experiments.data.sources import Arrays, Source, kind_of
from dfl_experiments.errors import UserError, reason

log = logging.getLogger(__name__)
CLASSES = "classes.json"
# one file for each field of `Arrays`, in the same order
FILES = ("train_images.npy", "train_labels.npy", "test_images.npy", "test_labels.npy", CLASSES)
LARGEST = float(np.finfo(np.float32).max)
MOST_CHANNELS = 4  # largest number of channels that is tried for an image (H, W, C)


def is_packed(folder: Path) -> bool:
    """Return whether the folder holds all arrays of a data set, either as a pack or as the user's own arrays.

    Raises `UserError` if the user's own arrays are incomplete, or if the record is damaged.
    """
    # in a folder without permission, os.path.isfile returns False, but Path.is_file raises an error
    missing = [name for name in FILES if not os.path.isfile(folder / name)]
    has_any = any(os.path.lexists(folder / name) for name in FILES)
    # if incomplete arrays have a record, they are left from an interrupted run, and will be packed again
    belongs_to_user = read_record(folder) is None
    if belongs_to_user and missing and has_any:
        names = ", ".join(missing)
        raise UserError(
            f"{folder}: incomplete, without {names}; add the missing files or delete it"
        )
    return not missing


def load_pack(name: str, source: Source, data_dir: Path, download: bool = True) -> Arrays:
    """Map the pack of a data set into memory, and return its arrays. If there is no pack in `data_dir`, make it first.

    download: download the raw form if it is absent.
    Raises `UserError` in three cases: the raw form cannot be found or downloaded; the files are damaged, incomplete or
    inconsistent; the pack cannot be written.
    """
    return load_with_digest(name, source, data_dir, download)[0]


def load_with_digest(
    name: str, source: Source, data_dir: Path, download: bool = True
) -> tuple[Arrays, str]:
    """Return the arrays of a data set (see `load_pack`), and a digest of its images, labels and classes."""
    data_dir = data_dir.expanduser()
    cache = source.cache_name(name)
    if cache is None:
        arrays = read_raw(name, source, None, data_dir, download)
        check_arrays(arrays, [f"dataset {name}: {part}" for part in source.PARTS])
        return arrays, digest_in_memory(arrays)
    folder = data_dir / cache
    if not is_packed(folder):
        with lock_pack(data_dir, name):
            # another process may have packed the data set while this process waited for the lock
            if not is_packed(folder):
                log.info("preparing %s in %s", name, folder)
                pack(read_raw(name, source, folder, data_dir, download), folder)
    return open_packed(folder), digest_of(folder)


def test_images_in_training(name: str, arrays: Arrays) -> int:
    """Count the test images that equal a training image byte for byte. If there are such images, log a warning.

    If the types of training and test images differ, the images are compared in the type with fewer bytes.
    """
    train, test = arrays.train_images, arrays.test_images
    dtype = min(train.dtype, test.dtype, key=lambda dtype: dtype.itemsize)
    training = set(hashes(train, dtype))
    count = sum(value in training for value in hashes(test, dtype))
    if count:
        text = "%s: %d of %d test samples are also training samples"
        log.warning(text, name, count, len(test))
    return count


def hashes(images: np.ndarray, dtype: np.dtype) -> list[int]:
    """Return a hash of the bytes of each image, after conversion to a data type."""
    values = []
    for image in images:
        converted = image.astype(dtype, copy=False)
        values.append(hash(converted.tobytes()))
    return values


def warn_of_empty_classes(name: str, arrays: Arrays) -> None:
    """Log a warning if classes have no training sample."""
    present = set(arrays.train_labels.tolist())
    empty = [text for label, text in enumerate(arrays.classes) if label not in present]
    if empty:
        text = "%s: %d of %d classes have no training sample, such as %s"
        log.warning(text, name, len(empty), arrays.num_classes, empty[0])


def is_channels_last(samples: np.ndarray) -> bool:
    """Return whether the shape of samples looks like (N, H, W, C), with at most 4 channels C."""
    return samples.ndim == 4 and samples.shape[3] <= MOST_CHANNELS < min(samples.shape[1:3])


def warn_of_channels_last(name: str, arrays: Arrays) -> None:
    """Log a warning if features look like images (N, H, W, C). For uint8 images, `check_samples` raises an error."""
    if is_channels_last(arrays.train_images):
        log.warning(
            "%s: features of shape %s are read as (C, H, W); if they are images (H, W, C), save "
            "X.transpose(0, 3, 1, 2)",
            name,
            arrays.shape,
        )


def digest(name: str, source: Source, data_dir: Path) -> str | None:
    """Return the digest of a data set, or None if the data set is absent. If there is no pack, make it first.

    Raises `UserError` as `load_pack` does.
    """
    data_dir = data_dir.expanduser()
    cache = source.cache_name(name)
    if cache is not None:
        if is_packed(data_dir / cache):
            return digest_of(data_dir / cache)
        has_raw_form = any(os.path.exists(path) for path in source.locations(data_dir))
        if not has_raw_form:
            return None
    _, value = load_with_digest(name, source, data_dir, download=False)
    return value


def digest_of(folder: Path) -> str:
    """Return the digest of packed arrays.

    The digest is computed from the checksums in the record. If there is no record, the checksums are computed first.
    """
    record = read_record(folder)
    if record is None:
        return _digest_of_checksums([crc32_of(folder / file) for file in FILES])
    return _digest_of_checksums([record.get(file, 0) for file in FILES])


def digest_in_memory(arrays: Arrays) -> str:
    """Return the digest of arrays that are not packed.

    The bytes of other samples than images do not tell the shape of a sample, so the digest depends on this shape too.
    """
    *parts, classes = vars(arrays).values()
    checksums = [zlib.crc32(part.tobytes()) for part in parts]
    text = json.dumps(classes)
    if kind_of(arrays.train_images) == "features" and len(arrays.shape) > 1:
        text += str(arrays.shape)
    checksums.append(zlib.crc32(text.encode()))
    return _digest_of_checksums(checksums)


def _digest_of_checksums(checksums: list[int]) -> str:
    """Return one digest of several checksums."""
    text = repr(checksums)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def lock_pack(data_dir: Path, name: str) -> AcquireReturnProxy:
    """Acquire the lock for packing a data set in `data_dir`. The returned context manager releases the lock.

    The lock file is kept, because two processes could hold the lock if one of them deleted its file. A data set has
    only one lock file, even if it is packed again under another `Source.cache_name`.
    Raises `UserError` if the lock file cannot be written.
    """
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        return FileLock(data_dir / f".{name}.lock").acquire()
    # NotImplementedError: the file system has no locks
    except (OSError, NotImplementedError) as error:
        problem = f"the packed data set {name} cannot be written there ({reason(error)})"
        raise UserError(f"data_dir={data_dir}: {problem}") from error


def read_raw(
    name: str, source: Source, folder: Path | None, data_dir: Path, download: bool
) -> Arrays:
    """Read the raw form of a data set.

    folder: folder for its pack; None if it is not packed.
    Raises `UserError` if the raw form cannot be read, or if the source does not return arrays. In the first case, the
    message lists the paths that were tried, and says how to get the data set.
    """
    try:
        arrays = source.read(data_dir, download)
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError, EOFError, HTTPException) as error:
        if folder is None:
            raise UserError(f"dataset {name}: cannot be read ({reason(error)})") from error
        paths = " or ".join(map(str, source.locations(data_dir)))
        problem = f"neither packed in {folder} nor readable from {paths} ({reason(error)})"
        advice = f"run `dfl-data prepare dataset={name}` with a network, or set data_dir or DFL_DATA_DIR to its folder"
        raise UserError(f"dataset {name}: {problem}; {advice}") from error
    if not isinstance(arrays, Arrays):
        kind = type(arrays).__name__
        raise UserError(f"dataset {name}: `read` must return `Arrays`, but returns a {kind}")
    for field, value in vars(arrays).items():
        if field != "classes" and not isinstance(value, np.ndarray):
            kind = type(value).__name__
            raise UserError(f"dataset {name}: {field} must be a NumPy array, but is a {kind}")
    return arrays


def pack(arrays: Arrays, folder: Path) -> None:
    """Write the arrays into a temporary folder, then move them into `folder`.

    Raises `UserError` if the arrays do not fit together (see `check_arrays`), or if they cannot be written.
    """
    check_arrays(arrays, [str(folder / file) for file in FILES])
    temporary = folder.with_name(f".{folder.name}.partial")
    checksums = {}
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # delete what an interrupted run left there
        temporary.mkdir()
        for name, part in zip(FILES, vars(arrays).values(), strict=True):
            with (temporary / name).open("wb") as file:
                # Do not pass the file itself to np.save. It would then call `tofile`, which raises no error if the disk
                # becomes full at the last bytes.
                writer = ChecksumWriter(file)
                if name == CLASSES:
                    writer.write(json.dumps(part).encode())
                else:
                    np.save(writer, part)
            checksums[name] = writer.crc32
        write_record(temporary, checksums)
        # Move the files one by one, because `folder` may exist already. It may hold an unfinished pack. On a system
        # that ignores case in file names, it may also hold the raw form, because MNIST/ and mnist/ are the same folder.
        # The list of classes is moved last, because a folder without this list is not a pack.
        folder.mkdir(exist_ok=True)
        (folder / CLASSES).unlink(missing_ok=True)
        for name in (RECORD, *FILES):
            (temporary / name).replace(folder / name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({reason(error)})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def open_packed(folder: Path) -> Arrays:
    """Map packed arrays into memory, read-only. If there is a record, verify every byte first.

    Raises `UserError` for a damaged file.
    """
    record = read_record(folder)
    if record is not None:
        verify(folder, record, FILES)
    parts: list[Any] = []
    for name in FILES:
        path = folder / name
        try:
            if name == CLASSES:
                parts.append(json.loads(path.read_text("utf-8-sig")))
            else:
                parts.append(open_memmap(path, mode="r"))
        except (OSError, ValueError, EOFError) as error:
            raise damaged(path, reason(error), is_pack=record is not None) from error
    arrays = Arrays(*parts)
    check_arrays(arrays, [str(folder / file) for file in FILES])
    return arrays


def check_arrays(arrays: Arrays, names: Sequence[str]) -> None:
    """Raise `UserError` if the types, lengths, shapes, values or labels of the arrays do not fit together.

    names: for each file in `FILES`, the name that messages use.
    """
    classes = arrays.classes
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError(f'{names[4]}: must be a list of class names, such as ["cats", "dogs"]')
    if len(classes) < 2 or len(set(classes)) < len(classes):
        raise UserError(f"{names[4]}: must name at least two classes, and none of them twice")
    parts = (arrays.train_images, arrays.train_labels, arrays.test_images, arrays.test_labels)
    expected = f"{kind_of(arrays.train_images)} of shape {arrays.shape}"
    for first in (0, 2):  # indices in `parts` of the training images and the test images
        samples, labels = parts[first : first + 2]
        samples_name, labels_name = names[first : first + 2]
        check_samples(samples, samples_name)
        actual = f"{kind_of(samples)} of shape {samples.shape[1:]}"
        if actual != expected:
            first_name = Path(names[0]).name
            raise UserError(f"{samples_name}: has {actual}, but {first_name} has {expected}")
        if labels.shape != (len(samples),) or labels.dtype.kind not in "iu":
            problem = f"must be {len(samples)} integers, is {labels.dtype} {labels.shape}"
            if labels.dtype.kind in "SU":  # texts
                problem += "; before the split, np.unique(y, return_inverse=True) makes integers"
            raise UserError(f"{labels_name}: {problem}")
        lowest, highest = labels.min(), labels.max()
        if lowest < 0 or highest >= len(classes):
            allowed = f"0 to {len(classes) - 1}, one for each class"
            problem = f"labels must be {allowed}; they range from {lowest} to {highest}"
            raise UserError(f"{labels_name}: {problem}")


def check_samples(samples: np.ndarray, name: str) -> None:
    """Raise `UserError` if an array does not hold images, features or tokens, or if it has unusable values."""
    kind = kind_of(samples)
    shape = samples.shape
    problem = ""
    if samples.size == 0:
        problem = f"holds no values, its shape is {shape}"
    elif not kind:
        kinds = "uint8 images (N, C, H, W), float32 features (N, …) or int64 tokens (N, T)"
        problem = f"must be {kinds}, is {samples.dtype} {shape}"
    elif kind == "images" and is_channels_last(samples):
        problem = (
            f"{shape} is (N, H, W, C), but must be (N, C, H, W); save images.transpose(0, 3, 1, 2)"
        )
    elif kind == "tokens" and samples.min() < 0:
        problem = f"tokens must be 0 or more, the smallest is {samples.min()}"
        problem += "; save features as float32"
    # this also finds NaN: min and max are then NaN, and every comparison with NaN is false
    elif kind == "features" and not -LARGEST <= samples.min() <= samples.max() <= LARGEST:
        is_finite = np.abs(samples) <= LARGEST
        index = np.argwhere(~is_finite)[0].tolist()
        problem = f"holds {samples[tuple(index)]} at {index}; values must be finite in float32"
    if problem:
        raise UserError(f"{name}: {problem}")
