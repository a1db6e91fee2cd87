"""Errors that are shown to the user as one line, and functions that format this line."""

import reprlib
from typing import Any


class UserError(ValueError):
    """A mistake in the user's input. It is shown as one line without a traceback, with exit code 2."""

    exit_code = 2


class Fault(UserError):
    """A failure of the machine, such as a full disk or too little memory. It is shown as one line, with exit code 1."""

    exit_code = 1


def shown(value: Any) -> str:
    """Format a value as Python code. A long value is shortened."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 100
    return short.repr(value)


def printable(text: str) -> str:
    """Replace control characters and line breaks by escapes such as `\\x1b` and `\\n`."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def clipped(text: str, length: int = 1500) -> str:
    """Return a text as one line of printable characters. If it is too long, words in its middle are left out."""
    text = printable(" ".join(text.split()))
    if len(text) <= length:
        return text
    start = text[: length * 2 // 3].rsplit(" ", 1)[0]
    end = text[-length // 3 :].split(" ", 1)[-1]
    return f"{start} … {end}"


def reason(error: BaseException) -> str:
    """Return an error's message as one short line."""
    return clipped(str(error).strip() or type(error).__name__, 200)


def of_the_system(error: OSError) -> str:
    """Return the operating system's message, with the file's name if there is one."""
    return (
        f"{error.filename}: {error.strerror}"
        if error.filename and error.strerror
        else reason(error)
    )
