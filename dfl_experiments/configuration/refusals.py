"""Messages for a mistake in a configuration: the key, the value, and the choices, in one line."""

import difflib
import re
import signal
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import yaml
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from pydantic import ValidationError
from yaml import MarkedYAMLError, YAMLError

from dfl_experiments.configuration.composition import group_options
from dfl_experiments.configuration.history import MOVED, RENAMED
from dfl_experiments.errors import Fault, UserError, clipped, of_the_system, reason, shown

MISTAKES = (HydraException, OmegaConfBaseException, YAMLError, UserError)
INTERNAL = ("hydra", "name", "_target_")  # keys that no message offers
MOST_GUESSES = 3


def refuse(error: BaseException, program: str = "dfl-train") -> NoReturn:
    """Print the error in one line and exit: with code 2 for a mistake, with 1 for a fault of the machine."""
    print(f"{program}: error: {one_line(error)}", file=sys.stderr)
    raise SystemExit(getattr(error, "exit_code", 2)) from None


@contextmanager
def refusing(program: str = "dfl-train") -> Iterator[None]:
    """Turn errors inside into an exit: a mistake with one line, any other error with its traceback."""
    try:
        yield
    except MISTAKES as error:
        refuse(error, program)
    except BrokenPipeError:  # the reader of the output has left
        raise SystemExit(128 + signal.SIGPIPE) from None
    except OSError as error:
        refuse(Fault(of_the_system(error)), program)
    except Exception as error:
        traceback.print_exc()
        raise SystemExit(1) from error


def uncomposed(error: Exception, overrides: Iterable[str]) -> Exception:
    """Return the error of a failed composition as a mistake in the overrides."""
    if isinstance(error, MISTAKES):
        return error
    for override in overrides:
        group, _, value = override.partition("=")
        options = group_options(group)
        if options and not isinstance(yaml.safe_load(value), str):
            return UserError(f"{override}: is no option of the group; there are {', '.join(options)}")
    return UserError(f"{reason(error)} (in {' '.join(overrides)})")


def one_line(error: BaseException) -> str:
    """Return the message of an error in one line; Hydra, OmegaConf and YAML use several."""
    if isinstance(error, MISTAKES) and (message := in_our_words(error)):
        return message
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error.__cause__, OmegaConfBaseException):
        text += f": {' '.join(str(error.__cause__).split())}"
    # OmegaConf writes the key last, among its types; here it comes first.
    return clipped(re.sub(r"^(.*?) full_key: (\S+)( .*)?$", r"\2: \1", text))


def flat_keys(node: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the full names of all keys of nested mappings, such as `a` and `a.b`, without `INTERNAL` ones."""
    keys = []
    for key, value in node.items():
        if key not in INTERNAL:
            keys.append(f"{prefix}{key}")
            if isinstance(value, Mapping):
                keys += flat_keys(value, f"{prefix}{key}.")
    return keys


def did_you_mean(key: str, names: Iterable[str]) -> str:
    """Return the end of a message about an unknown key: "; did you mean …?", or nothing.

    The last parts of names are compared: the same word in another group (`lr` for `optimizer.lr`), else the same
    initials (`learning_rate` for `lr`), else a similar word. Names of the key's group come first, then short ones.
    """
    group, _, last = key.lower().rpartition(".")
    if renamed := (RENAMED | MOVED).get(key):
        return f"; did you mean {renamed}?"
    words = {name: name.rpartition(".")[2] for name in names if name != key}
    short = _initials(last) if "_" in last else last
    similar = difflib.get_close_matches(last, words.values(), n=1, cutoff=0.65)
    guesses = [name for name, word in words.items() if word == last]
    if not guesses and len(short) > 1:
        guesses = [name for name, word in words.items() if short in (word, _initials(word))]
    if not guesses:
        guesses = [name for name, word in words.items() if word in similar]
    of_the_group = [name for name in guesses if name.rpartition(".")[0] == group]
    highest = min((name.count(".") for name in guesses), default=0)
    guesses = (of_the_group or [name for name in guesses if name.count(".") == highest])[:MOST_GUESSES]
    return f"; did you mean {' or '.join(guesses)}?" if guesses else ""


def _initials(word: str) -> str:
    return "".join(part[:1] for part in word.split("_"))


def in_our_words(error: BaseException | None) -> str | None:
    """Return a message that adds to Hydra's what there is to choose from; None for other errors.

    For an unknown key or option it lists the known ones, for an unreadable value it says how to quote it.
    """
    if isinstance(error, MarkedYAMLError):
        return yaml_line(error)
    if isinstance(error, OverrideParseException):
        return _how_to_quote(str(error.override))
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        there = f"there are {', '.join(error.options)}{did_you_mean(name, error.options)}"
        return f"{group}={name}: {there} (--config-dir names a folder with options of your own)"
    cause = error.__cause__ if isinstance(error, HydraException) else error
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and OmegaConf.is_dict(cause.parent_node):
        return _unknown_key(cause)
    return None


def _how_to_quote(override: str) -> str | None:
    key, _, value = override.partition("=")
    if not value or set(value) & set("'\"[]{}"):
        return None
    return f"""quote a value that has more than letters, digits and -_./ in it: "{key}='{value}'\""""


def _unknown_key(error: Any) -> str:
    known = ", ".join(str(key) for key in error.parent_node if key not in INTERNAL)
    everything: Any = OmegaConf.to_container(error.parent_node._get_root(), resolve=False)
    key = str(error.full_key)
    hint = f"; +{key}=… passes its constructor one more" if "_target_" in error.parent_node else ""
    return f"{key}: no such option{did_you_mean(key, flat_keys(everything))}; there are {known}{hint}"


def yaml_line(error: MarkedYAMLError) -> str | None:
    """Return a message with the file, the line and the reason of a YAML error; None where no file is named."""
    mark = error.problem_mark or error.context_mark
    if mark is None or not Path(mark.name).is_file():
        return None
    lines = Path(mark.name).read_text(encoding="utf-8", errors="replace").splitlines()[: mark.line + 1]
    while lines and not lines[-1].strip():  # an unclosed bracket is reported at the end of the file
        lines.pop()
    return f"{mark.name}, line {len(lines)}: {clipped(lines[-1] if lines else '', 100)} ({error.problem})"


def refusal(error: ValidationError, where: str, options: Sequence[str], names: Iterable[str] = ()) -> UserError:
    """Return pydantic's first error as a `UserError` with the full name of the key.

    where: the group that was validated. options: the known options there, for a message about an unknown one.
    names: all keys of the configuration, for a guess.
    """
    first = error.errors()[0]
    key = ".".join(str(part) for part in (where, *first["loc"]) if part != "")
    if first["type"] == "extra_forbidden":
        return UserError(f"{key}: no such option{did_you_mean(key, names)}; there are {', '.join(options) or 'none'}")
    if first["type"] == "missing":
        return UserError(f"{key}: missing; set {key}=…")
    if first["type"] == "value_error":  # raised by our own validators: the message is complete
        return UserError(str(first["ctx"]["error"]))
    return UserError(f"{key}={shown(first['input'])}: {first['msg'][0].lower()}{first['msg'][1:]}")
