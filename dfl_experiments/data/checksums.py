"""Record the format version of a pack, and the length and CRC-32 of each of its files.

Every pack that this program makes has a record. Arrays without a record belong to the user, and are never overwritten.
"""

import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

from dfl_experiments.errors import UserError, reason

RECORD = "checksums.json"
PIECE = 2**20  # bytes per read, small enough for the processor's cache


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
        self.file = file
        self.crc32 = 0

    def write(self, piece: bytes) -> None:
        """Write bytes. Raises OSError."""
        self.file.write(piece)
        self.crc32 = zlib.crc32(piece, self.crc32)


def write_record(folder: Path, checksums: Mapping[str, int]) -> None:
    """Write the record of a pack. checksums: CRC-32 of each file, by name."""
    files = {}
    for name, checksum in checksums.items():
        size = (folder / name).stat().st_size
        files[name] = {"bytes": size, "crc32": checksum}
    record = {"format": 1, "files": files}
    (folder / RECORD).write_text(json.dumps(record, indent=1))


def read_record(folder: Path) -> dict[str, int] | None:
    """Return the recorded CRC-32 of each file, by name; None if the folder has no record.

    Raises `UserError` if the record is unreadable.
    """
    path = folder / RECORD
    try:
        files = json.loads(path.read_bytes())["files"]
        return {name: recorded["crc32"] for name, recorded in files.items()}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
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


def verify(folder: Path, record: Mapping[str, int], names: Iterable[str]) -> None:
    """Compare files with their recorded checksums. Raises `UserError` for the first file whose checksum differs."""
    for name in names:
        path = folder / name
        if record.get(name) != crc32_of(path):
            raise damaged(path, f"its CRC-32 differs from {RECORD}")
