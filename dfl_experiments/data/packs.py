"""Data sets as arrays on disk, packed once from their raw form and mapped into memory after that."""

import json
import logging
import os
import shutil
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
from filelock import AcquireReturnProxy, FileLock
from numpy.lib.format import open_memmap

from dfl_experiments.data.checksums import FORMAT, RECORD, damaged, read_record, summed, verify, write_record
from dfl_experiments.data.sources import Arrays, Source, expanded
from dfl_experiments.errors import UserError, reason

log = logging.getLogger(__name__)
PARTS = ("train_images", "train_labels", "test_images", "test_labels")
CLASSES = "classes.json"
FILES = (*(f"{part}.npy" for part in PARTS), CLASSES)


def is_packed(folder: Path) -> bool:
    """Whether the folder holds a whole set of arrays: packed by this version, or brought, which have no record.

    Raises `UserError` where the record is damaged.
    """
    record = read_record(folder)
    # isfile, unlike Path.is_file, also says no where looking is not permitted
    return all(os.path.isfile(folder / name) for name in FILES) and (record is None or record["format"] == FORMAT)


def load(name: str, source: Source, data_dir: Path, download: bool = True) -> Arrays:
    """The data set, mapped from `data_dir`/<cache name>; packed there first where it is not, by one process at a time.

    Raises `UserError` where the raw form is neither there nor can be fetched, where arrays or files are damaged, where
    packing would write over arrays that somebody brought, and where `data_dir` cannot be written to although something
    is to be packed.
    """
    data_dir = expanded(data_dir, "data_dir")
    cache = source.cache_name(name)
    if cache is None:
        return source.read(data_dir, download)
    folder = data_dir / cache
    if not is_packed(folder):
        with locked(data_dir, cache):
            # another process may have packed it while this one waited
            if not is_packed(folder):
                older = replaceable(folder, source.locations(data_dir))
                log.info("preparing %s in %s", name, folder)
                pack(read_raw(name, source, data_dir, download and not older), folder)
    return open_packed(folder)


def replaceable(folder: Path, raw: list[Path]) -> bool:
    """Whether the folder holds a whole pack of another version, to be made anew from the raw form that is there.

    Raises `UserError` where that is not there, and where the folder holds a part of somebody's own arrays.
    """
    there = [name for name in FILES if os.path.lexists(folder / name)]
    missing = [name for name in FILES if name not in there]
    record = read_record(folder)
    if record is None:
        if there:
            raise UserError(
                f"{folder}: {there[0]} is there without {', '.join(missing)}; add what is missing, or delete {folder}"
            )
        return False
    if missing or record["format"] == FORMAT:  # what an interrupted run left
        return False
    if not any(os.path.exists(path) for path in raw):
        raise UserError(
            f"{folder}: packed in format {record['format']}, this version has format {FORMAT}, and no raw form to pack "
            f"anew is in {' or '.join(str(path) for path in raw)}; put it there, or delete {folder} to fetch it"
        )
    return True


def locked(data_dir: Path, cache: str) -> AcquireReturnProxy:
    """The lock to pack under, held until its context ends. Raises `UserError` where it cannot be written."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        return FileLock(data_dir / f".{cache}.lock").acquire()
    except (OSError, NotImplementedError) as error:  # the latter where the file system has no locks
        raise UserError(f"data_dir={data_dir}: {cache} cannot be packed there ({reason(error)})") from error


def read_raw(name: str, source: Source, data_dir: Path, download: bool) -> Arrays:
    """The raw form, or a `UserError` that says what is missing, where it was looked for and how to get it."""
    try:
        return source.read(data_dir, download)
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError, AssertionError, EOFError, UnpicklingError, HTTPException) as error:
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
            files: dict[str, dict[str, int]] = {}
            for part in PARTS:
                # not given a path: np.save then does not notice a disk that is full at the very end
                with summed(temporary / f"{part}.npy", files) as file:
                    np.save(file, getattr(arrays, part))
            with summed(temporary / CLASSES, files) as file:
                file.write(json.dumps(arrays.classes).encode())
            write_record(temporary, files)
            # File by file: the folder may hold an unfinished pack, or be the raw one where case makes no difference.
            # While the list of classes is absent nothing is packed, and the record says that the arrays are ours.
            folder.mkdir(exist_ok=True)
            (folder / CLASSES).unlink(missing_ok=True)
            for name in (RECORD, *FILES):
                (temporary / name).replace(folder / name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({reason(error)})") from error


def open_packed(folder: Path) -> Arrays:
    """Packed arrays, mapped read-only, every byte of them verified where there is a record to verify them with.

    Raises `UserError` naming the file that is damaged, and what to do.
    """
    record = read_record(folder)
    if record is not None:
        verify(folder, record, FILES)
    parts = {}
    file = folder
    try:
        for part in PARTS:
            file = folder / f"{part}.npy"
            parts[part] = open_memmap(file, mode="r")
        file = folder / CLASSES
        classes = json.loads(file.read_text())
    except (OSError, ValueError, EOFError) as error:
        raise damaged(file, error) from error
    arrays = Arrays(**parts, classes=classes)
    check(arrays, folder)
    return arrays


def check(arrays: Arrays, folder: Path) -> None:
    """Raise `UserError`, naming the file, unless types, lengths, shapes and labels fit together."""
    classes = arrays.classes
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError(f'{folder / CLASSES}: must be a list of class names, as ["cats", "dogs"]')
    if len(classes) < 2:
        raise UserError(f"{folder / CLASSES}: must name two classes at least, there are {len(classes)}")
    if len(set(classes)) < len(classes):
        twice = next(name for name in classes if classes.count(name) > 1)
        raise UserError(f"{folder / CLASSES}: names must differ, {twice!r} is there twice")
    for split in ("train", "test"):
        images, labels = getattr(arrays, f"{split}_images"), getattr(arrays, f"{split}_labels")
        if images.dtype != np.uint8 or images.ndim != 4 or images.size == 0:
            raise UserError(
                f"{folder / split}_images.npy: must be uint8 (N, C, H, W), is {images.dtype} {images.shape}"
            )
        channels, height, width = images.shape[1:]
        if width in (1, 3) and channels == height > 3:
            raise UserError(f"{folder / split}_images.npy: {images.shape} is (N, H, W, C); make it (N, C, H, W)")
        if images.shape[1:] != arrays.train_images.shape[1:]:
            raise UserError(
                f"{folder / split}_images.npy: of another shape than train_images.npy, "
                f"{images.shape[1:]} and not {arrays.train_images.shape[1:]}"
            )
        if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
            raise UserError(
                f"{folder / split}_labels.npy: must be {len(images)} integers, is {labels.dtype} {labels.shape}"
            )
        wrong = labels[(labels < 0) | (labels >= len(classes))]
        if len(wrong):
            raise UserError(
                f"{folder / split}_labels.npy: labels must be 0 to {len(classes) - 1}, as {CLASSES} has "
                f"{len(classes)} names; {wrong[0]} is there"
            )
