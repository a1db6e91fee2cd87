"""Write and check the seal of a run: the SHA-256 of its files and of `result.json`, stored in `result.json`."""

import hashlib
import json
import os
import stat
import sys
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

from dfl_experiments.errors import UserError, reason

RESULT = "result.json"
SEALED = ("config.yaml", "epochs.csv", "iterations.csv")
CHANGED = "has changed since the run ended; restore the file, or delete the run's folder and start the run again"


def opened(path: Path) -> BufferedReader:
    """Open a file for reading. Raises `UserError` for a link, a folder, or a pipe, which would block the reader."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise UserError(f"{path}: is a symbolic link, a pipe or a folder, but must be a file")
    return path.open("rb")


def complete_lines(content: bytes) -> bytes:
    """Return the content of a CSV file without an incomplete last line, which a run that trains may be writing."""
    return content[: content.rfind(b"\n") + 1]


def read_bytes(path: Path) -> bytes:
    """Return a file's content. Raises as `opened` does."""
    with opened(path) as file:
        return file.read()


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the mapping in a JSON file; None if there is no file. Raises `UserError` for any other content."""
    if not os.path.lexists(path):
        return None
    content = read_bytes(path)
    try:
        values = dict(json.loads(content))
        json.dumps(values, allow_nan=False)
        return values
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})") from None


def sha256_of(path: Path, length: int = sys.maxsize) -> "hashlib._Hash":
    """Return the SHA-256 of a file, or of its first `length` bytes. Raises as `opened` does."""
    digest = hashlib.sha256()
    with opened(path) as file:
        while part := file.read(min(length, 2**20)):
            digest.update(part)
            length -= len(part)
    return digest


def own_digest(result: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a result as JSON with sorted keys. The seal is included, without this digest itself."""
    others = {name: digest for name, digest in result["seal"].items() if name != RESULT}
    return hashlib.sha256(
        json.dumps({**result, "seal": others}, sort_keys=True).encode()
    ).hexdigest()


def sealed(run_dir: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result with its seal: the SHA-256 of each sealed file in the run directory, and of the result itself."""
    content = json.loads(json.dumps(result))
    content["seal"] = {
        name: sha256_of(run_dir / name).hexdigest() for name in SEALED if (run_dir / name).exists()
    }
    content["seal"][RESULT] = own_digest(content)
    return content


def read_sealed(run_dir: Path) -> dict[str, Any] | None:
    """Return the content of `result.json`; None if the file is absent.

    The content is checked against its seal. A sealed file may be absent, because not every file is kept. A result
    without a seal is accepted, because early versions wrote no seal.

    Raises `UserError`, with the file's name, if a file has changed since the run.
    """
    result = read_json(run_dir / RESULT)
    if result is None or "seal" not in result:
        return result
    seal = result["seal"]
    if not isinstance(seal, dict) or seal.get(RESULT) != own_digest(result):
        raise UserError(f"{run_dir / RESULT}: {CHANGED}")
    for path in map(run_dir.joinpath, SEALED):
        if path.exists() and sha256_of(path).hexdigest() != seal.get(path.name):
            raise UserError(f"{path}: {CHANGED}")
    return result
