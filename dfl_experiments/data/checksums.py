"""Record the format version of a pack, and the length and CRC-32 of each of its files.

Every pack that this program makes has a record. Arrays without a record belong to the user, and are never overwritten.
"""

import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Literal

from pydantic import BaseModel, ValidationError

from dfl_experiments.errors import UserError, reason

RECORD = "checksums.json"
PIECE = 2**20  # bytes per read, small enough for the processor's cache


class Record(BaseModel):
    """The content of `checksums.json`."""

    format: Literal[1] = 1
    """Version of the pack's layout."""
    files: dict[str, dict[str, int]]
    """For each file name, the length as `bytes` and the checksum as `crc32`."""


def damaged(path: Path, why: str, is_pack: bool = True) -> UserError:
    """Return an error that names a damaged file and says what to do.

    is_pack: whether this program packed the folder. Only such a folder can be packed again.
    """
    again = f"delete {path.parent} so that it is packed again, or " if is_pack else ""
    return UserError(f"{path}: unreadable or damaged ({why}); {again}put an undamaged copy there")


class ChecksumWriter:
    """A writable file that computes the CRC-32 of the bytes passed to `write`.

    The CRC-32 is computed from memory, not from the file, so it is right even if the disk stores wrong bytes.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.crc32 = file, 0

    def write(self, piece: bytes) -> None:
        """Write bytes. Raises OSError."""
        self.file.write(piece)
        self.crc32 = zlib.crc32(piece, self.crc32)


def read_record(folder: Path) -> Record | None:
    """Return the folder's record; None if the folder has no record. Raises `UserError` if the record is unreadable."""
    path = folder / RECORD
    try:
        return Record.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValidationError) as error:
        raise damaged(path, reason(error)) from error


def crc32_of(path: Path) -> int:
    """Return the CRC-32 of a file. Raises `UserError` if the file cannot be read."""
    value = 0
    try:
        with path.open("rb") as file:
            while piece := file.read(PIECE):
                value = zlib.crc32(piece, value)
    except OSError as error:
        raise damaged(path, reason(error)) from error
    return value


def verify(folder: Path, record: Record, names: Iterable[str]) -> None:
    """Compare files with their recorded checksums. Raises `UserError` for the first file whose checksum differs."""
    for name in names:
        recorded = record.files.get(name, {})
        if recorded.get("crc32") != crc32_of(folder / name):
            raise damaged(folder / name, f"its CRC-32 differs from {RECORD}")
