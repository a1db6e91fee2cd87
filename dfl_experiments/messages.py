"""How a mistake is put into one line: values shortened, and what was probably meant."""

import difflib
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

INTERNAL = ("hydra", "name", "_target_")  # keys that nobody is offered


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


def flat_keys(node: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The full name of every key of nested mappings, `a` and `a.b`, without Hydra's own and the program's own."""
    keys = []
    for key, value in node.items():
        if key not in INTERNAL:
            keys.append(f"{prefix}{key}")
            if isinstance(value, Mapping):
                keys += flat_keys(value, f"{prefix}{key}.")
    return keys


def did_you_mean(key: str, names: Iterable[str]) -> str:
    """What to add to a message about a wrong key: the names it looks like, or nothing.

    Last parts are compared: the same one in another place (`lr` for `optimizer.lr`), or else an abbreviation
    (`learning_rate`), or else a similar word.
    """

    def last(name: str) -> str:
        return name.rpartition(".")[2]

    def place(name: str) -> str:
        return name.rpartition(".")[0]

    def initials(name: str) -> str:
        words = [word for word in last(name).split("_") if word]
        return "".join(word[0] for word in words) if len(words) > 1 else ""

    key = key.lower()
    names = [name for name in dict.fromkeys(names) if name != key]
    similar = difflib.get_close_matches(last(key), [last(name) for name in names], n=1, cutoff=0.7)
    found = (
        [name for name in names if last(name) == last(key)]
        or [name for name in names if initials(key) == last(name) or initials(name) == last(key) != ""]
        or [name for name in names if last(name) in similar]
    )
    found = [name for name in found if place(name) == place(key)] or found
    return f"; did you mean {' or '.join(found[:3])}?" if found else ""
