"""A mistake of the user's or of the machine's, and the one line that it is told in."""

import reprlib
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


def printable(text: str) -> str:
    """Write every character that a terminal would obey, a line break among them, as its escape: `\\n`, `\\x1b`."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def clipped(text: str, length: int = 1500) -> str:
    """A text in one line of printable characters, its middle left out where it is too long."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= length else f"{text[: length * 2 // 3]} … {text[-length // 3 :]}"


def reason(error: BaseException) -> str:
    """What an error says, as one short line."""
    return clipped(str(error).strip() or type(error).__name__, 200)


def of_the_system(error: OSError) -> str:
    """What the operating system says, with the file that it is about where it names one."""
    return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else reason(error)
