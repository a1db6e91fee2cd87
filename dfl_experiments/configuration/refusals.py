"""Format a mistake in a configuration as one line: the key, the value, and the choices."""

import difflib
import re
import signal
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from pydantic import ValidationError
from yaml import YAMLError

from dfl_experiments.configuration.history import MOVED, RENAMED
from dfl_experiments.errors import Fault, UserError, clipped, of_the_system, reason, shown

MISTAKES = (HydraException, OmegaConfBaseException, YAMLError, UserError)
# names of options in other programs, and of the choice that switches W&B off
OTHER_WORDS = {"learning_rate": "lr", "wd": "weight_decay", "none": "disabled", "off": "disabled"}
INTERNAL = ("hydra", "name", "_target_")  # keys that error messages do not suggest
LONG_LIST = 12  # a longer list of keys is left out of a message that suggests one of them
# launchers and sweepers that are not installed by default, and the extra that has them
EXTRAS = {
    "joblib": "joblib",
    "submitit_local": "slurm",
    "submitit_slurm": "slurm",
    "ray": "ray",
    "optuna": "optuna",
}


def refuse(error: BaseException, program: str = "dfl-train") -> NoReturn:
    """Print the error in one line and exit. The exit code is 2 for a user's mistake and 1 for a `Fault`."""
    print(f"{program}: error: {one_line(error)}", file=sys.stderr)
    raise SystemExit(getattr(error, "exit_code", 2)) from None


@contextmanager
def refusing(program: str = "dfl-train") -> Iterator[None]:
    """Exit if the block raises an error. Print one line for a user's mistake or an OSError, otherwise the traceback."""
    try:
        yield
    except MISTAKES as error:
        refuse(error, program)
    except BrokenPipeError:  # the program that reads the output, such as `head`, has ended
        raise SystemExit(128 + signal.SIGPIPE) from None
    except OSError as error:
        refuse(Fault(of_the_system(error)), program)
    except Exception as error:
        traceback.print_exc()
        raise SystemExit(1) from error


def uncomposed(error: Exception, overrides: Iterable[str]) -> Exception:
    """Convert an error of Hydra's composition to a `UserError` that names the override.

    An error that is already one of `MISTAKES` is returned unchanged.
    """
    if isinstance(error, MISTAKES):
        return error
    if isinstance(error, UnicodeDecodeError):
        before = error.object[: error.start].decode(errors="replace").rpartition("\n")[2]
        return UserError(f"a YAML file is not UTF-8 text after {shown(before)}; save it as UTF-8")
    return UserError(f"{reason(error)} (in {' '.join(overrides)})")


def one_line(error: BaseException) -> str:
    """Return the message of an error in one line, even if Hydra, OmegaConf or YAML wrote several."""
    if isinstance(error, MISTAKES) and (message := message_with_choices(error)):
        return message
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error.__cause__, OmegaConfBaseException):
        text += f": {' '.join(str(error.__cause__).split())}"
    # OmegaConf writes the key at the end of its message; move the key to the start.
    return clipped(re.sub(r"^(.*?) full_key: (\S+)( .*)?$", r"\2: \1", text))


def flat_keys(node: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the full names of all keys of nested mappings, such as `a` and `a.b`, except `INTERNAL` keys."""
    keys = []
    for key, value in node.items():
        if key not in INTERNAL:
            keys.append(f"{prefix}{key}")
            if isinstance(value, Mapping):
                keys += flat_keys(value, f"{prefix}{key}.")
    return keys


def did_you_mean(key: str, names: Iterable[str]) -> str:
    """Return "; did you mean …?" with the known name whose last part is closest to that of an unknown key.

    Return "" if none is close. Of several such names, the one with the fewest dots is suggested. For a key in a known
    group, such as optimizer.beta, a name of another group must have the same last part.
    """
    if renamed := (RENAMED | MOVED).get(key):
        return f"; did you mean {renamed}?"
    last = key.lower().rpartition(".")[2]
    last = OTHER_WORDS.get(last, last)
    last_parts = {name: name.rpartition(".")[2] for name in names if name != key}
    group = f"{key.partition('.')[0]}."
    if "." in key and any(name.startswith(group) for name in last_parts):
        last_parts = {
            name: part
            for name, part in last_parts.items()
            if name.startswith(group) or part == last
        }
    close = difflib.get_close_matches(last, last_parts.values(), n=1)
    guesses = [name for name, part in last_parts.items() if part in close]
    guesses.sort(key=lambda name: name.count("."))
    return f"; did you mean {guesses[0]}?" if guesses else ""


def message_with_choices(error: BaseException | None) -> str | None:
    """Return a message that says how to correct an error of Hydra or OmegaConf; None for other errors.

    The message lists the known keys or options, or says how to quote a value.
    """
    if isinstance(error, OverrideParseException):
        return _how_to_quote(str(error.override))
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        if group.startswith("hydra/") and name in EXTRAS:
            command = f"pip install -e '.[{EXTRAS[name]}]'"
            return f"{group}={name}: not installed; in the project's folder run {command}"
        choices = f"there are {', '.join(error.options)}{did_you_mean(name, error.options)}"
        if not group.startswith("hydra/"):
            choices += " (--config-dir=<folder> adds your own options)"
        return f"{group}={name}: {choices}"
    cause = error.__cause__ if isinstance(error, HydraException) else error
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and OmegaConf.is_dict(
        cause.parent_node
    ):
        return _unknown_key(cause)
    return None


def _how_to_quote(override: str) -> str | None:
    """Return a message with the quoted override; None if the value is empty, or contains quotes or brackets."""
    key, _, value = override.partition("=")
    if not value or set(value) & set("'\"[]{}"):
        return None
    rule = "quote a value with other characters than letters, digits and -_./"
    return f"""{rule}: "{key}='{value}'\""""


def _unknown_key(error: Any) -> str:
    """Return a message for an unknown key, with the known keys and a suggestion. error: OmegaConf's error."""
    known = ", ".join(str(key) for key in error.parent_node if key not in INTERNAL)
    choices = f"; there are {known or 'none'}"
    everything: Any = OmegaConf.to_container(error.parent_node._get_root(), resolve=False)
    key = str(error.full_key)
    suggestion, hint = did_you_mean(key, flat_keys(everything)), ""
    if _constructor_takes(key, error.parent_node, everything.get("plugins") or []):
        suggestion, hint = "", f"; +{key}=… passes it to the constructor"
    if suggestion and len(error.parent_node) > LONG_LIST:
        choices = ""
    return f"{key}: no such option{suggestion}{choices}{hint}"


def _constructor_takes(key: str, node: Any, plugins: Sequence[str]) -> bool:
    """Return whether the constructor of a component takes an option that the configuration lacks.

    key: key of the option, such as `method.fixed_blocks`.
    node: the part of the configuration that should hold the option. It may be a component, which has a `_target_`.
    plugins: names of the plugin packages.
    """
    from dfl_experiments.configuration.components import KINDS, locate, options_of

    group, _, name = key.rpartition(".")
    if group not in KINDS or "_target_" not in node:
        return False
    try:
        return name in options_of(locate(node["_target_"], group, plugins), group).model_fields
    except (UserError, OmegaConfBaseException):  # a wrong `_target_`
        return False


def refusal(
    error: ValidationError, where: str, options: Sequence[str], names: Iterable[str] = ()
) -> UserError:
    """Return pydantic's first error as a `UserError` with the full name of the key.

    where: key of the validated group. options: the known options to list; may be empty.
    names: all keys of the configuration, for suggestions.
    """
    first = error.errors()[0]
    key = ".".join(str(part) for part in (where, *first["loc"]) if part != "")
    if first["type"] == "extra_forbidden":
        known = f"; there are {', '.join(options)}" if options else ""
        return UserError(f"{key}: no such option{did_you_mean(key, names)}{known}")
    if first["type"] == "missing":
        return UserError(f"{key}: missing; set {key}=…")
    # raised by a validator of this project, whose message is complete
    if first["type"] == "value_error":
        return UserError(str(first["ctx"]["error"]))
    message = first["msg"]
    return UserError(f"{key}={shown(first['input'])}: {message[0].lower()}{message[1:]}")
