"""What a pack's files were when they were written: a format version, and each file's length and CRC-32.

The record tells our own packs from arrays that somebody brought: those have none, and are never written over.
"""

import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Literal

from pydantic import BaseModel, ValidationError

from dfl_experiments.errors import UserError, reason

RECORD = "checksums.json"
PIECE = 2**20  # bytes that are read at once: they stay in the processor's cache


class Record(BaseModel):
    """format: of the packed files; files: the `bytes` and the `crc32` of each, by name."""

    format: Literal[1] = 1
    files: dict[str, dict[str, int]]


def damaged(path: Path, why: str, own: bool = True) -> UserError:
    """The error for one of a folder's files, in a line that says what to do. own: whether it is a pack of our own."""
    again = f"delete {path.parent} to have it packed anew, or " if own else ""
    return UserError(f"{path}: unreadable or damaged ({why}); {again}put a whole copy there")


class Summed:
    """A file to write to, with the CRC-32 of what it was given, whatever the disk kept of it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.crc32 = file, 0

    def write(self, piece: bytes) -> None:
        """Raises OSError."""
        self.file.write(piece)
        self.crc32 = zlib.crc32(piece, self.crc32)


def read_record(folder: Path) -> Record | None:
    """The folder's record, None where there is none. Raises `UserError` for one that cannot be read."""
    path = folder / RECORD
    try:
        return Record.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValidationError) as error:
        raise damaged(path, reason(error)) from error


def crc32_of(path: Path) -> int:
    """The CRC-32 of a file. Raises `UserError` where it cannot be read."""
    value = 0
    try:
        with path.open("rb") as file:
            while piece := file.read(PIECE):
                value = zlib.crc32(piece, value)
    except OSError as error:
        raise damaged(path, reason(error)) from error
    return value


def verify(folder: Path, record: Record, names: Iterable[str]) -> None:
    """Compare the files with their checksums. Raises `UserError` naming the first that is not as recorded."""
    for name in names:
        if record.files.get(name, {}).get("crc32") != crc32_of(folder / name):
            raise damaged(folder / name, f"it does not have the CRC-32 in {RECORD}")
