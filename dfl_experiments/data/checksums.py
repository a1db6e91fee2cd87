"""Record the format version of a pack, and the length and CRC-32 of each of its files.

Only packs that this program wrote have a record. Arrays without one are the user's own, and are never overwritten.
"""

import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Literal

from pydantic import BaseModel, ValidationError

from dfl_experiments.errors import UserError, reason

RECORD = "checksums.json"
PIECE = 2**20  # bytes per read: they stay in the processor's cache


class Record(BaseModel):
    """The content of `checksums.json`."""

    format: Literal[1] = 1
    """Version of the pack's layout."""
    files: dict[str, dict[str, int]]
    """For each file name: its length as `bytes`, and its `crc32`."""


def damaged(path: Path, why: str, own: bool = True) -> UserError:
    """Return the error for a damaged file, which says what to do.

    own: the folder is a pack of this program, which can be made again.
    """
    again = f"delete {path.parent} to have it packed anew, or " if own else ""
    return UserError(f"{path}: unreadable or damaged ({why}); {again}put an undamaged copy there")


class Summed:
    """A writable file with the CRC-32 of the bytes passed to it, which may differ from those that the disk keeps."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.crc32 = file, 0

    def write(self, piece: bytes) -> None:
        """Write bytes. Raises OSError."""
        self.file.write(piece)
        self.crc32 = zlib.crc32(piece, self.crc32)


def read_record(folder: Path) -> Record | None:
    """Return the folder's record, or None where there is none. Raises `UserError` for an unreadable one."""
    path = folder / RECORD
    try:
        return Record.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValidationError) as error:
        raise damaged(path, reason(error)) from error


def crc32_of(path: Path) -> int:
    """Return the CRC-32 of a file. Raises `UserError` where it cannot be read."""
    value = 0
    try:
        with path.open("rb") as file:
            while piece := file.read(PIECE):
                value = zlib.crc32(piece, value)
    except OSError as error:
        raise damaged(path, reason(error)) from error
    return value


def verify(folder: Path, record: Record, names: Iterable[str]) -> None:
    """Compare files with their checksums. Raises `UserError` for the first that differs."""
    for name in names:
        recorded = record.files.get(name, {})
        if recorded.get("crc32") != crc32_of(folder / name):
            raise damaged(folder / name, f"it does not have the CRC-32 in {RECORD}")
