"""What a pack's files were when they were written: a format version, and each file's length and CRC-32.

The record tells our own packs from arrays that somebody brought: those have none, and are never written over.
"""

import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from dfl_experiments.errors import UserError, reason

RECORD = "checksums.json"
FORMAT = 1  # of the packed files: another number makes every older pack be packed anew
PIECE = 2**20  # bytes that are read at once: they stay in the processor's cache


def damaged(path: Path, what: str | Exception) -> UserError:
    """The error for one of a folder's files, in a line that says what to do."""
    if isinstance(what, PermissionError):
        return UserError(f"{path}: cannot be read ({what.strerror})")
    text = reason(what) if isinstance(what, Exception) else what
    folder = path.parent
    return UserError(f"{path}: damaged ({text}); delete {folder} to have it packed anew, or put a whole copy there")


def crc32(path: Path) -> int:
    """A file's checksum, without holding the file in memory. Raises OSError."""
    value = 0
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            value = zlib.crc32(piece, value)
    return value


def length(path: Path) -> int:
    """A file's bytes. Raises OSError."""
    return path.stat().st_size


MEASURES = {"bytes": length, "crc32": crc32}  # the quick one first


class Summed:
    """A file to write to, with the length and the checksum of what it was given, whatever the disk kept of it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.bytes, self.crc32 = file, 0, 0

    def write(self, piece: bytes) -> None:
        """Raises OSError."""
        self.file.write(piece)
        self.bytes, self.crc32 = self.bytes + len(piece), zlib.crc32(piece, self.crc32)


@contextmanager
def summed(path: Path, files: dict[str, dict[str, int]]) -> Iterator[Summed]:
    """A new file, which `files` has a line about once it is written. Raises OSError."""
    with path.open("wb") as file:
        summed = Summed(file)
        yield summed
    files[path.name] = {key: getattr(summed, key) for key in MEASURES}


def write_record(folder: Path, files: dict[str, dict[str, int]]) -> None:
    """Record what the folder's files are. Raises OSError."""
    (folder / RECORD).write_text(json.dumps({"format": FORMAT, "files": files}, indent=1))


def read_record(folder: Path) -> dict[str, Any] | None:
    """The folder's record, None where there is none. Raises `UserError` for one that cannot be read."""
    path = folder / RECORD
    try:
        record = json.loads(path.read_text())
        if not isinstance(record["format"], int):
            raise TypeError("its format is no number")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(path, error) from error
    return record


def verify(folder: Path, record: dict[str, Any], names: Iterable[str]) -> None:
    """Compare all lengths, then all checksums. Raises `UserError` naming the first file that is not as recorded."""
    for key, measure in MEASURES.items():
        for name in names:
            path = folder / name
            try:
                found, recorded = measure(path), record["files"][name][key]
            except OSError as error:
                raise damaged(path, error) from error
            except (KeyError, TypeError) as error:
                raise damaged(folder / RECORD, f"no {key} of {name}") from error
            if found != recorded:
                raise damaged(path, f"{key}: {found}, was {recorded} when packed")
