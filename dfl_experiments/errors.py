"""A mistake of the user's or of the machine's, and the one line that it is told in."""

import io
import reprlib
import sys
from typing import Any


class UserError(ValueError):
    """A mistake of the user's: shown as its one line, without a traceback, with a non-zero exit."""

    exit_code = 2


class Fault(UserError):
    """What the machine would not do for a run: a full disk, too little memory. Shown alike."""

    exit_code = 1


def shown(value: Any) -> str:
    """A value as it would be typed in Python, a long one shortened."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 100
    return short.repr(value)


def clipped(text: str, length: int = 1500) -> str:
    """A text in one line of printable characters, its middle left out where it is too long."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))
    return text if len(text) <= length else f"{text[: length * 2 // 3]} … {text[-length // 3 :]}"


def reason(error: BaseException) -> str:
    """What an error says, as one short line."""
    return clipped(str(error).strip() or type(error).__name__, 200)


def any_text() -> None:
    """Let any text be printed, also where the terminal's encoding lacks a letter of it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
